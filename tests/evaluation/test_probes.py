"""Laws of the probes, metrics and tables. Shapes: N images, D feature width."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ijepa_transformers.evaluation import probes as evaluation_probes
from ijepa_transformers.evaluation.probes import few_shot_accuracy, knn_accuracy


NUM_CLASSES = 4


def clusters(num_images: int = 200, width: int = 16, spread: float = 2.0, seed: int = 0):
    """Features around one centre per class, and labels that are not 0..n-1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(99))
    classes = torch.arange(num_images) % NUM_CLASSES
    return centres[classes] + spread * torch.randn(num_images, width, generator=generator), classes * 10 - 5


@pytest.fixture
def data():
    return *clusters(seed=0), *clusters(num_images=101, seed=1)


# Features


def test_features_keep_the_order_and_carry_no_gradient():
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    batches = [{"pixel_values": images[i : i + 4], "labels": torch.arange(i, min(i + 4, 10))} for i in (0, 4, 8)]
    weight = torch.ones(3, requires_grad=True)
    features, labels = evaluation_probes.extract_features(lambda x: (x.flatten(1) * weight).bfloat16(), batches, "cpu")
    assert torch.equal(features, images.flatten(1).expand(10, 3)) and features.dtype == torch.float32
    assert torch.equal(labels, torch.arange(10)) and not features.requires_grad


def test_features_without_labels_and_wrong_input():
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert evaluation_probes.extract_features(lambda x: x.mean((2, 3)), [batch], "cpu")[1] is None
    with pytest.raises(ValueError, match="no batch"):
        evaluation_probes.extract_features(lambda x: x, [], "cpu")
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        evaluation_probes.extract_features(lambda x: x, [batch], "cpu")
    with pytest.raises(ValueError, match="1 of 2 batches"):
        evaluation_probes.extract_features(
            lambda x: x.mean((2, 3)), [batch, {**batch, "labels": torch.zeros(2)}], "cpu"
        )


def test_standardize_equals_sklearn_and_sets_constant_features_to_zero(data):
    train, _, test, _ = data
    scaler = StandardScaler().fit(train.numpy())
    for ours, raw in zip(evaluation_probes.standardize(train, test), (train, test), strict=True):
        torch.testing.assert_close(ours, torch.tensor(scaler.transform(raw.numpy())), atol=1e-5, rtol=1e-5)
    train[:, 3], test[:, 3], train[:, 5] = 0.1, 7.0, 0.0
    for ours in evaluation_probes.standardize(train, test):
        assert (ours[:, [3, 5]] == 0).all() and ours.isfinite().all()


# k-NN


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_majority_equals_sklearn(data, k):
    train, train_labels, test, test_labels = data
    oracle = KNeighborsClassifier(k, metric="cosine", weights="uniform").fit(train, train_labels)
    assert knn_accuracy(*data, k=k, temperature=None) == pytest.approx(oracle.score(test, test_labels))


def test_knn_weighted_equals_sklearn_with_the_same_weights(data):
    train, train_labels, test, test_labels = data
    weights = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
    oracle = KNeighborsClassifier(20, metric="cosine", weights=weights).fit(train, train_labels)
    assert knn_accuracy(*data) == pytest.approx(oracle.score(test, test_labels))
    assert knn_accuracy(*data) != knn_accuracy(*data, temperature=None)  # the weights matter on these data


@pytest.mark.parametrize("temperature", [None, 0.07, 0.001])
def test_knn_does_not_depend_on_scale_or_chunks(data, temperature):
    train, train_labels, test, test_labels = data
    expected = knn_accuracy(*data, temperature=temperature)
    for scale in (1e-3, 1e3):
        assert knn_accuracy(train * scale, train_labels, test * 7, test_labels, temperature=temperature) == expected
    for chunk_size in (1, 7, 101, 1000):
        assert knn_accuracy(*data, temperature=temperature, chunk_size=chunk_size) == expected


def test_knn_near_neighbours_outvote_more_distant_ones_only_when_weighted():
    train = torch.tensor([[1.0, 0.1], [1.0, 0.9], [0.9, 1.0]])
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=3) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=3, temperature=None) == 1.0


def test_knn_is_perfect_on_separate_classes_and_at_chance_on_random_labels():
    train, train_labels = clusters(spread=0.01)
    test, test_labels = clusters(spread=0.01, seed=1)
    assert knn_accuracy(train, train_labels, test, test_labels) == 1.0
    noise = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(NUM_CLASSES, (1000,), generator=torch.Generator().manual_seed(1))
    chance = knn_accuracy(noise[:500], labels[:500], noise[500:], labels[500:])
    assert abs(chance - 1 / NUM_CLASSES) < 0.07  # more than 3 standard deviations


def test_knn_ties_go_to_the_lower_index_then_to_the_lower_label():
    train, test = torch.eye(4)[[1, 0, 0, 0, 0, 0]], torch.eye(4)[:1]
    labels = torch.tensor([9, 7, 7, 5, 5, 5])  # five equal training images: k = 3 takes 7, 7, 5
    assert knn_accuracy(train, labels, test, torch.tensor([7]), k=3) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([5]), k=4) == 1.0  # 7, 7, 5, 5: equal votes


@pytest.mark.parametrize("temperature", [None, 0.07])
@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "many equally near"])
def test_neighbours_of_several_k_are_searched_once_and_vote_as_those_of_each_k(
    data, monkeypatch, temperature, rounded
):
    train, train_labels, test, _ = data
    train, test = (train.sign(), test.sign()) if rounded else (train, test)
    ks = [20, 1, len(train), 3, 7]
    expected = {k: evaluation_probes.knn_scores_by_k(train, train_labels, test, [k], temperature)[k] for k in ks}
    calls, original = [], evaluation_probes.nearest
    monkeypatch.setattr(evaluation_probes, "nearest", lambda values, k: calls.append(k) or original(values, k))
    votes = evaluation_probes.knn_scores_by_k(train, train_labels, test, ks, temperature, chunk_size=len(test))
    assert list(votes) == ks and calls == [len(train)]
    for k in ks:
        assert torch.equal(votes[k], expected[k])


def test_knn_with_wrong_input(data):
    train, train_labels, test, test_labels = data
    with pytest.raises(ValueError, match="k=201 neighbours, but there are 200"):
        knn_accuracy(*data, k=201)
    with pytest.raises(ValueError, match="train features and labels"):
        knn_accuracy(train, train_labels[1:], test, test_labels)
    with pytest.raises(ValueError, match="test features hold NaN"):
        knn_accuracy(train, train_labels, test * math.nan, test_labels)


# Linear probes


def test_few_shot_is_deterministic_and_more_draws_keep_the_first(data):
    first, more = few_shot_accuracy(*data, num_draws=2), few_shot_accuracy(*data, num_draws=4)
    assert first == few_shot_accuracy(*data, num_draws=2)
    assert more.accuracies[:2] == first.accuracies
    assert few_shot_accuracy(*data, num_draws=2, seed=1).accuracies != first.accuracies
    assert len(set(more.accuracies)) > 1  # the draws differ


def test_few_shot_equals_sklearn_by_hand(data):
    train, train_labels, test, test_labels = (tensor.numpy() for tensor in data)
    scaler = StandardScaler().fit(train)  # on all training images, not on the shots
    expected = []
    for draw in range(2):
        generator = np.random.default_rng([3, draw])
        of_class = [np.flatnonzero(train_labels == label) for label in np.unique(train_labels)]
        shots = np.concatenate([generator.choice(indices, 2, replace=False) for indices in of_class])
        model = LogisticRegression(max_iter=1000).fit(scaler.transform(train[shots]), train_labels[shots])
        expected.append(model.score(scaler.transform(test), test_labels))
    result = few_shot_accuracy(*data, shots=2, num_draws=2, seed=3)
    assert result.accuracies == pytest.approx(expected)
    assert (result.mean, result.std) == pytest.approx((np.mean(expected), np.std(expected)))


def test_few_shot_takes_a_share_of_every_class_and_at_least_one_image(data):
    train, train_labels, test, test_labels = data
    rare = torch.cat([torch.arange(0, 200, 2), torch.tensor([1, 3])])  # 50 images of two classes, 1 of the others
    data = train[rare], train_labels[rare], test, test_labels
    generator = np.random.default_rng([0, 0])
    chosen = evaluation_probes._draw_shots(data[1].numpy(), 0.1, generator)
    assert np.unique(data[1][chosen], return_counts=True)[1].tolist() == [5, 1, 5, 1] and len(set(chosen)) == 12
    assert few_shot_accuracy(*data, shots=1.0, num_draws=1).mean == pytest.approx(
        evaluation_probes.logistic_regression_accuracy(*data)
    )
    assert few_shot_accuracy(*data, shots=1, num_draws=1) != few_shot_accuracy(*data, shots=1.0, num_draws=1)


def test_few_shot_with_wrong_input(data):
    with pytest.raises(ValueError, match="class -5 has 50 training images, fewer than shots=51"):
        few_shot_accuracy(*data, shots=51)
    for wrong in ({"num_draws": 0}, {"shots": 0}, {"shots": 0.0}, {"shots": 1.5}):
        with pytest.raises(ValueError, match="at least 1"):
            few_shot_accuracy(*data, **wrong)


def test_logistic_regression_equals_sklearn_and_all_shots(data):
    train, train_labels, test, test_labels = data
    scaler = StandardScaler().fit(train)
    oracle = LogisticRegression(max_iter=1000).fit(scaler.transform(train), train_labels)
    expected = oracle.score(scaler.transform(test), test_labels)
    assert evaluation_probes.logistic_regression_accuracy(*data) == pytest.approx(expected)
    assert few_shot_accuracy(*data, shots=50, num_draws=1).mean == pytest.approx(expected)  # every image is drawn


def test_scores_are_those_of_sklearn_and_give_the_accuracies(data):
    train, train_labels, test, test_labels = data
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(train), train_labels)
    scores = evaluation_probes.logistic_regression_scores(train, train_labels, test)
    np.testing.assert_allclose(scores, model.decision_function(scaler.transform(test)), atol=2e-2)
    votes = evaluation_probes.knn_scores_by_k(train, train_labels, test, [20], temperature=None)[20]
    oracle = KNeighborsClassifier(20, metric="cosine").fit(train, train_labels)
    np.testing.assert_allclose(votes / 20, oracle.predict_proba(test), atol=1e-6)
    expected = evaluation_probes.class_indices(train_labels, test_labels)
    assert (votes.argmax(1) == expected).double().mean() == knn_accuracy(*data, temperature=None)


def test_two_classes_have_two_scores(data):
    train, train_labels, test, test_labels = data
    labels = (train_labels > 0).long(), (test_labels > 0).long()
    scores = evaluation_probes.logistic_regression_scores(train, labels[0], test)
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(train), labels[0])
    assert scores.shape == (101, 2) and np.array_equal(scores.argmax(1), model.predict(scaler.transform(test)))
    assert evaluation_probes.logistic_regression_accuracy(train, labels[0], test, labels[1]) > 0.7


def test_classes_without_training_images_are_never_right():
    train_labels, labels = torch.tensor([7, 3, 3, 9]), torch.tensor([3, 9, 5, 7, 11, -2])
    assert evaluation_probes.class_indices(train_labels, labels).tolist() == [0, 2, -1, 1, -1, -1]
    features = torch.eye(4)
    assert knn_accuracy(features, train_labels, features[:2], torch.tensor([7, 5]), k=1) == 0.5


# Metrics and tables


@pytest.fixture
def scores():
    generator = np.random.default_rng(0)
    return generator.standard_normal((300, 7)).astype("float32"), generator.choice(7, 300, p=[0.4] + [0.1] * 6)


def test_accuracies_equal_sklearn(scores):
    values, labels = scores
    for k in (1, 3, 6):
        assert evaluation_probes._top_k_accuracy(values, labels, k) == pytest.approx(
            top_k_accuracy_score(labels, values, k=k)
        )
    with pytest.raises(ValueError, match="k=8, but there are 7"):
        evaluation_probes._top_k_accuracy(values, labels, 8)


def test_of_constant_scores_the_first_classes_are_predicted(scores):
    _, labels = scores
    assert evaluation_probes._top_k_accuracy(np.zeros((300, 7)), labels, 2) == np.isin(labels, [0, 1]).mean()


def test_scores_that_are_not_finite_count_as_wrong():
    """argmax takes NaN for the highest score, and class 0 if all scores are NaN."""
    values = np.eye(3)[[0, 1, 2, 0]].astype(np.float32)
    values[0] = np.nan
    values[1, 1] = np.inf
    labels = np.array([0, 1, 2, -1])
    assert (
        evaluation_probes._top_k_accuracy(values, labels) == 0.25
        and evaluation_probes._top_k_accuracy(values, labels, k=3) == 0.25
    )
    result = evaluation_probes.accuracy_metric(top_k=2).compute(predictions=values, references=labels)
    assert result == {"accuracy": 0.25, "macro_accuracy": 0.25, "top_2_accuracy": 0.25}
    values[3] = np.nan  # the prediction for NaN must not equal -1, the label of a class without training images
    assert evaluation_probes.accuracy_metric().compute(predictions=values, references=labels)["macro_accuracy"] == 0.25


def test_metric_works_offline_at_once_and_in_batches(scores, monkeypatch):
    import socket

    metric = evaluation_probes.accuracy_metric(top_k=3)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("the metric went online"))
    values, labels = scores
    result = metric.compute(predictions=values, references=labels)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, values.argmax(1)))
    assert result["top_3_accuracy"] == pytest.approx(top_k_accuracy_score(labels, values, k=3))
    assert result["macro_accuracy"] == pytest.approx(balanced_accuracy_score(labels, values.argmax(1)))
    for part in (slice(0, 100), slice(100, 300)):
        metric.add_batch(predictions=values[part], references=labels[part])
    assert metric.compute() == result
    few_classes = metric.compute(predictions=values[:, :3], references=labels % 3)
    assert set(few_classes) == {"accuracy", "macro_accuracy"}


def test_table_is_aligned_and_keeps_the_order_of_columns():
    shots = evaluation_probes.Accuracies(0.791, 0.0123, (0.791,))
    rows = [
        {"encoder": "pixels | raw", "k-NN": 0.9621},
        {"encoder": "target", "k-NN": 0.876, "5-shot": shots, "n": 12},
    ]
    assert evaluation_probes.format_table(rows).split("\n") == [
        "| encoder       |  k-NN |        5-shot |   n |",
        "| ------------- | ----: | ------------: | --: |",
        "| pixels \\| raw | 0.962 |             - |   - |",
        "| target        | 0.876 | 0.791 ± 0.012 |  12 |",
    ]
    with pytest.raises(ValueError, match="at least one row"):
        evaluation_probes.format_table([])
