"""Laws of the probes and of the collapse measures. Shapes: N images, D feature width."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ijepa import probing
from ijepa.probing import CollapseMonitor, effective_rank, few_shot_accuracy, knn_accuracy


NUM_CLASSES = 4


def clusters(num_images: int = 200, width: int = 16, spread: float = 2.0, seed: int = 0):
    """Features around one centre per class, and labels that are not 0..n-1 on purpose."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(99))
    classes = torch.arange(num_images) % NUM_CLASSES
    return centres[classes] + spread * torch.randn(num_images, width, generator=generator), classes * 10 - 5


@pytest.fixture
def data():
    return *clusters(seed=0), *clusters(num_images=101, seed=1)


# ----------------------------------------------------------------------------------------------------------- features


def test_features_keep_the_order_and_carry_no_gradient():
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    batches = [{"pixel_values": images[i : i + 4], "labels": torch.arange(i, min(i + 4, 10))} for i in (0, 4, 8)]
    weight = torch.ones(3, requires_grad=True)
    features, labels = probing.extract_features(lambda x: (x.flatten(1) * weight).bfloat16(), batches, "cpu")
    assert torch.equal(features, images.flatten(1).expand(10, 3)) and features.dtype == torch.float32
    assert torch.equal(labels, torch.arange(10)) and not features.requires_grad


def test_features_without_labels_and_mistakes():
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert probing.extract_features(lambda x: x.mean((2, 3)), [batch], "cpu")[1] is None
    with pytest.raises(ValueError, match="no batch"):
        probing.extract_features(lambda x: x, [], "cpu")
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        probing.extract_features(lambda x: x, [batch], "cpu")
    with pytest.raises(ValueError, match="1 of 2 batches"):
        probing.extract_features(lambda x: x.mean((2, 3)), [batch, {**batch, "labels": torch.zeros(2)}], "cpu")


def test_standardize_equals_sklearn_and_silences_constant_features(data):
    train, _, test, _ = data
    scaler = StandardScaler().fit(train.numpy())
    for ours, raw in zip(probing.standardize(train, test), (train, test), strict=True):
        torch.testing.assert_close(ours, torch.tensor(scaler.transform(raw.numpy())), atol=1e-5, rtol=1e-5)
    train[:, 3], test[:, 3], train[:, 5] = 0.1, 7.0, 0.0
    for ours in probing.standardize(train, test):
        assert (ours[:, [3, 5]] == 0).all() and ours.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- k-NN


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
    assert knn_accuracy(*data) != knn_accuracy(*data, temperature=None)  # so the weights matter on these data


@pytest.mark.parametrize("temperature", [None, 0.07, 0.001])
def test_knn_depends_neither_on_scale_nor_on_chunks(data, temperature):
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
    labels = torch.tensor([9, 7, 7, 5, 5, 5])  # five training images are alike: of these, k = 3 takes 7, 7, 5
    assert knn_accuracy(train, labels, test, torch.tensor([7]), k=3) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([5]), k=4) == 1.0  # 7, 7, 5, 5: equal votes


def test_knn_mistakes(data):
    train, train_labels, test, test_labels = data
    with pytest.raises(ValueError, match="k=201 neighbours, but there are 200"):
        knn_accuracy(*data, k=201)
    with pytest.raises(ValueError, match="train features and labels"):
        knn_accuracy(train, train_labels[1:], test, test_labels)
    with pytest.raises(ValueError, match="test features hold NaN"):
        knn_accuracy(train, train_labels, test * math.nan, test_labels)


# ---------------------------------------------------------------------------------------------------- linear probes


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


def test_few_shot_mistakes(data):
    with pytest.raises(ValueError, match="class -5 has 50 training images, fewer than shots=51"):
        few_shot_accuracy(*data, shots=51)
    with pytest.raises(ValueError, match="at least 1"):
        few_shot_accuracy(*data, num_draws=0)


def test_logistic_regression_equals_sklearn_and_all_shots(data):
    train, train_labels, test, test_labels = data
    scaler = StandardScaler().fit(train)
    oracle = LogisticRegression(max_iter=1000).fit(scaler.transform(train), train_labels)
    expected = oracle.score(scaler.transform(test), test_labels)
    assert probing.logistic_regression_accuracy(*data) == pytest.approx(expected)
    assert few_shot_accuracy(*data, shots=50, num_draws=1).mean == pytest.approx(expected)  # every image is drawn


# --------------------------------------------------------------------------------------------------- rank and spread


def gaussians(num_images: int, width: int, rank: int, seed: int = 0) -> torch.Tensor:
    """(N, D) of equal variance over `rank` directions of a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return torch.randn(num_images, rank, generator=generator) @ rotation[:rank]


@pytest.mark.parametrize("rank", [1, 3, 10, 32])
def test_rank_of_isotropic_gaussians_is_their_number_of_directions(rank):
    assert effective_rank(gaussians(2000, 32, rank)) == pytest.approx(rank, rel=0.01)


def test_rank_is_the_formula_of_the_paper_on_centred_features():
    features = gaussians(50, 20, 12).double()
    p = np.linalg.svd((features - features.mean(0)).numpy(), compute_uv=False)
    p = p[p > 1e-9] / p.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)


def test_rank_is_invariant_to_scale_rotation_offset_and_order():
    features = gaussians(100, 16, 16) * torch.linspace(0.1, 1, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    expected = effective_rank(features)
    for same in (features * 1e-6, features * 1e6, features @ rotation, features + 30, features.flip(0)):
        assert effective_rank(same) == pytest.approx(expected, rel=1e-3)


def test_rank_of_nothing_to_tell_apart_is_one():
    offset = torch.randn(64, generator=torch.Generator().manual_seed(0))
    rounding = 1e-8 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for features in (offset.expand(200, 64), offset + rounding, torch.zeros(200, 64), offset[None]):
        assert effective_rank(features) == 1.0


def test_rank_of_what_is_not_finite_is_nan():
    features = gaussians(20, 8, 8)
    for bad in (math.nan, math.inf):
        features[3, 3] = bad
        assert math.isnan(effective_rank(features))
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        effective_rank(features[:0])


def test_feature_std_is_zero_exactly_for_functions_of_position():
    generator = torch.Generator().manual_seed(0)
    positions, content = torch.randn(1, 9, 8, generator=generator), torch.randn(100, 1, 8, generator=generator)
    assert probing.feature_std(positions.expand(100, 9, 8)) == pytest.approx(0, abs=1e-6)
    assert probing.feature_std(positions + content) == pytest.approx(content.std(0, correction=0).mean().item())
    assert probing.feature_std(content[:, 0]) == pytest.approx(content.std(0, correction=0).mean().item())
    assert probing.feature_std(content[:1]) == 0.0
    with pytest.raises(ValueError, match=r"\(8,\)"):
        probing.feature_std(content[0, 0])


# ------------------------------------------------------------------------------------------------------------ monitor


WIDTH, OFFSET = 64, 5.0  # an encoder's features share an offset: here 5 times as large as their healthy variation


def fed(batches, **settings) -> CollapseMonitor:
    monitor = CollapseMonitor(**{"warmup_updates": 0, **settings})
    for batch in batches:
        monitor.update(batch)
    return monitor


def batches_of(rank: int = 16, variation: float = 1.0, count: int = 8) -> list[torch.Tensor]:
    features = gaussians(32 * count, WIDTH, rank)
    features = features / features.square().mean().sqrt()
    return list((OFFSET + variation * features).split(32))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_monitor_fires_on_collapse_and_not_on_health_at_any_scale(scale):
    for healthy in (batches_of(), batches_of(rank=6), batches_of(variation=0.6)):
        report = fed(scale * batch for batch in healthy).report()
        assert not report["collapsing"] and report["reason"] == ""
    for collapsed in (batches_of(variation=0.05), batches_of(variation=0.0), batches_of(rank=1)):
        report = fed(scale * batch for batch in collapsed).report()
        assert report["collapsing"] and "collapsing" in report["reason"]


def test_monitor_names_what_is_wrong():
    assert "depend on the image" in fed(batches_of(variation=0.05)).report()["reason"]
    assert "1.0 of 64 directions" in fed(batches_of(rank=1)).report()["reason"]
    assert "NaN" in fed([batches_of()[0] * math.nan]).report()["reason"]


def test_monitor_reports_share_of_variation_and_rank_of_what_it_holds():
    batches = batches_of()
    report = fed(batches).report()
    assert report["target_std"] == pytest.approx(1 / math.sqrt(1 + OFFSET**2), rel=0.05)
    assert report["effective_rank"] == pytest.approx(effective_rank(torch.cat(batches)))


def test_monitor_is_silent_while_warming_up():
    collapsed = batches_of(variation=0.01)
    assert not fed(collapsed, warmup_updates=9).report()["collapsing"]
    assert fed(collapsed, warmup_updates=8).report()["collapsing"]
    assert not fed([collapsed[0][:1]]).report()["collapsing"]  # a single image cannot differ from itself
    with pytest.raises(ValueError, match="no features"):
        CollapseMonitor().report()


def test_monitor_remembers_only_the_newest_images_however_they_are_batched():
    old, new = batches_of(variation=0.01), batches_of()
    recent = torch.cat(new)[-100:]
    monitor = fed([*old, *new], size=100)
    assert torch.equal(monitor.features, recent)
    assert monitor.features.untyped_storage().nbytes() == recent.numel() * 4  # and holds no larger storage
    assert torch.equal(fed([torch.cat([*old, *new])], size=100).features, recent)


def test_monitor_resumed_reports_what_an_uninterrupted_one_reports(tmp_path):
    first, second = batches_of()[:3], batches_of(variation=0.01)
    interrupted = fed(first, size=80, warmup_updates=5)
    torch.save(interrupted.state_dict(), tmp_path / "monitor.pt")
    interrupted.update(torch.zeros(80, WIDTH))  # what happens after the save does not leak into it
    resumed = CollapseMonitor(size=80, warmup_updates=5)
    resumed.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    uninterrupted = fed(first, size=80, warmup_updates=5)
    for batch in second:
        resumed.update(batch)
        uninterrupted.update(batch)
        assert resumed.report() == uninterrupted.report()
    assert resumed.report()["collapsing"]


def test_monitor_before_any_update_survives_a_round_trip():
    monitor = CollapseMonitor()
    monitor.load_state_dict(CollapseMonitor().state_dict())
    assert monitor.features is None and monitor.num_updates == 0


# ------------------------------------------------------------------------------------------------- metrics and tables


@pytest.fixture
def scores():
    generator = np.random.default_rng(0)
    return generator.standard_normal((300, 7)).astype("float32"), generator.choice(7, 300, p=[0.4] + [0.1] * 6)


def test_accuracies_equal_sklearn(scores):
    values, labels = scores
    for k in (1, 3, 6):
        assert probing.top_k_accuracy(values, labels, k) == pytest.approx(top_k_accuracy_score(labels, values, k=k))
    expected = balanced_accuracy_score(labels, values.argmax(1))
    assert probing.macro_accuracy(values.argmax(1), labels) == pytest.approx(expected)
    with pytest.raises(ValueError, match="k=8, but there are 7"):
        probing.top_k_accuracy(values, labels, 8)


def test_constant_scores_earn_no_more_than_the_first_classes(scores):
    _, labels = scores
    assert probing.top_k_accuracy(np.zeros((300, 7)), labels, 2) == np.isin(labels, [0, 1]).mean()


def test_metric_works_offline_in_one_go_and_in_batches(scores, monkeypatch):
    import socket

    metric = probing.accuracy_metric(top_k=3)
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


def test_table_lines_up_and_keeps_the_order_of_columns():
    shots = probing.FewShotResult(0.791, 0.0123, (0.791,))
    rows = [
        {"encoder": "pixels | raw", "k-NN": 0.9621},
        {"encoder": "target", "k-NN": 0.876, "5-shot": shots, "n": 12},
    ]
    assert probing.format_table(rows).split("\n") == [
        "| encoder       |  k-NN |        5-shot |   n |",
        "| ------------- | ----: | ------------: | --: |",
        "| pixels \\| raw | 0.962 |             - |   - |",
        "| target        | 0.876 | 0.791 ± 0.012 |  12 |",
    ]
    with pytest.raises(ValueError, match="at least one row"):
        probing.format_table([])
