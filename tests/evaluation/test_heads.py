"""Laws of the heads: they find a known optimum, are independent of each other, and read the features they name.

Shapes: N images, D feature width.
"""

import builtins

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ijepa_transformers.evaluation.heads import (
    AttentiveHead,
    HeadSettings,
    LinearHead,
    choose_heads,
    head_accuracies,
    head_grid,
    head_scores,
    learning_rate_factor,
    rebatch,
    require_optimizers,
    split_holdout,
    train_heads,
)


NUM_CLASSES, WIDTH, BATCH_SIZE = 5, 12, 50


def gaussians(num_images, seed, spread=2.5, width=WIDTH):
    """Overlapping classes, each a Gaussian around its centre: logistic regression finds the best boundary."""
    centres = torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    return centres[labels] + spread * torch.randn(num_images, width, generator=generator), labels


@pytest.fixture(scope="module")
def train():
    return gaussians(500, seed=0)


@pytest.fixture(scope="module")
def test():
    return gaussians(1000, seed=1)


def settings_of(optimizer="adamw", learning_rate=0.01, weight_decay=0.0, features="last", batch_norm=False):
    return HeadSettings(features, batch_norm, optimizer, learning_rate, weight_decay)


def fit(settings, features, labels, *, epochs=20, **changes):
    """Heads trained on batches whose order depends on the epoch alone."""
    size = min(BATCH_SIZE, len(labels))

    def batches(epoch):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(size):
            yield {name: values[part] for name, values in features.items()}, labels[part]

    widths = {name: values.shape[-1] for name, values in features.items()}
    return train_heads(
        settings, batches, widths, NUM_CLASSES, epochs=epochs, steps_per_epoch=len(labels) // size, **changes
    )


def accuracies(settings, heads, features, labels):
    return head_accuracies(settings, heads, [(features, labels)])


def oracle(train, test):
    return LogisticRegression(C=1e6, max_iter=2000).fit(*train).score(*test)


# A known optimum


@pytest.mark.parametrize("optimizer, learning_rate", [("adamw", 0.01), ("sgd", 0.1), ("lars", 10.0)])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_every_optimizer_finds_the_optimum_among_absurd_learning_rates(
    train, test, optimizer, learning_rate, schedule
):
    if optimizer == "lars":
        pytest.importorskip("timm")
    rates = [1e-9, learning_rate, 1e9]
    settings = [settings_of(optimizer, rate) for rate in rates]
    heads = fit(settings, {"last": train[0]}, train[1], epochs=31, schedule=schedule, warmup_epochs=1)
    found = accuracies(settings, heads, {"last": test[0]}, test[1])
    assert choose_heads(settings, found) == {"linear": 1}
    assert found[1] > oracle(train, test) - 0.015
    assert found[1] > max(found[0], found[2]) + 0.03


def test_weights_equal_those_of_logistic_regression(train):
    """Full batches until convergence: the optimum of the same convex loss, up to a shift common to all classes."""
    settings = [settings_of("sgd", 0.5)]
    (head,) = train_heads(
        settings, lambda epoch: [({"last": train[0]}, train[1])], {"last": WIDTH}, 5, epochs=1500, steps_per_epoch=1
    )
    expected = torch.tensor(LogisticRegression(C=1e9, max_iter=5000, tol=1e-8).fit(*train).coef_).float()
    weights = head.classifier.weight.detach()
    torch.testing.assert_close(weights - weights.mean(0), expected - expected.mean(0), atol=0.01, rtol=0)


def test_weight_decay_shrinks_weights_and_spares_biases(train):
    features, labels = train[0] + 3, torch.zeros_like(train[1])  # one class: its bias should grow
    for optimizer in ("adamw", "sgd"):
        settings = [settings_of(optimizer, 0.01, decay) for decay in (0.0, 10.0)]
        free, decayed = fit(settings, {"last": features}, labels)
        assert decayed.classifier.weight.norm() < 0.5 * free.classifier.weight.norm()
        assert decayed.classifier.bias[0] > free.classifier.bias[0] > 0


def test_lars_adapts_a_head_without_weight_decay_too(train):
    """By default timm adapts only parameters with weight decay. A head without it would be trained by plain SGD."""
    pytest.importorskip("timm")
    settings = [settings_of("lars", 10.0, decay) for decay in (0.0, 1e-12)]
    plain, decayed = fit(settings, {"last": train[0]}, train[1], epochs=2)
    torch.testing.assert_close(plain.classifier.weight, decayed.classifier.weight, atol=1e-5, rtol=1e-4)


# Heads are independent


def test_heads_trained_together_equal_heads_trained_alone(train):
    tokens = torch.randn(len(train[0]), 3, WIDTH, generator=torch.Generator().manual_seed(2))
    features = {"last": train[0], "last4": train[0].repeat(1, 2), "tokens": tokens}
    settings = head_grid(["last", "last4"], [False, True], ["adamw", "sgd"], [0.01, 1e12], [0.0, 0.1])
    settings += head_grid(["tokens"], [False], ["adamw"], [0.01], [0.0])
    together = fit(settings, features, train[1], epochs=2)
    for entry, head in zip(settings, together, strict=True):
        (alone,) = fit([entry], features, train[1], epochs=2)
        for name, value in head.state_dict().items():
            torch.testing.assert_close(alone.state_dict()[name], value, atol=0, rtol=0, equal_nan=True)


def test_training_does_not_change_the_callers_random_numbers(train):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    fit([settings_of()], {"last": train[0]}, train[1], epochs=1)
    assert torch.rand(1) == expected


def test_the_seed_decides_the_initial_weights(train):
    first, same, other = (
        fit([settings_of()], {"last": train[0]}, train[1], epochs=1, seed=seed)[0].classifier.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_grid_has_each_combination_once_and_no_batch_norm_on_tokens():
    grid = head_grid(["last", "tokens"], [False, True], ["adamw"], [0.1, 0.2], [0.0])
    assert len(grid) == len(set(grid)) == 4 + 2
    assert {entry.probe for entry in grid} == {"linear", "attentive"}
    assert not any(entry.batch_norm for entry in grid if entry.probe == "attentive")
    assert str(grid[2]) == "BatchNorm + linear on last, adamw, learning rate 0.1, weight decay 0"


# What heads read


def test_a_head_reads_the_features_it_names(train, test):
    """Only one part of last4 depends on the class."""
    noise = {name: torch.randn(len(part[0]), 3 * WIDTH) for name, part in (("train", train), ("test", test))}
    features = {
        name: {"last": noise[name][:, :WIDTH], "last4": torch.cat([part[0], noise[name]], dim=1)}
        for name, part in (("train", train), ("test", test))
    }
    settings = [settings_of(features="last"), settings_of(features="last4")]
    last, last4 = accuracies(settings, fit(settings, features["train"], train[1]), features["test"], test[1])
    assert last < 1 / NUM_CLASSES + 0.05 and last4 > oracle(train, test) - 0.05


def test_batch_norm_makes_a_head_independent_of_scale_and_offset(train, test):
    settings = [settings_of(batch_norm=True), settings_of()]
    plain, scaled = (
        accuracies(
            settings,
            fit(settings, {"last": scale * train[0] + offset}, train[1]),
            {"last": scale * test[0] + offset},
            test[1],
        )
        for scale, offset in ((1.0, 0.0), (100.0, 3000.0))
    )
    assert scaled[0] == pytest.approx(plain[0], abs=0.003) and plain[0] > oracle(train, test) - 0.015
    assert scaled[1] < plain[1] - 0.05


def test_batch_norm_ends_with_the_statistics_of_the_training_images(train):
    (head,) = fit([settings_of(batch_norm=True)], {"last": train[0]}, train[1], epochs=2)
    torch.testing.assert_close(head.norm.running_mean, train[0].mean(0), atol=1e-4, rtol=0)
    assert not head.training and not list(head.norm.parameters())


def test_attention_finds_the_one_patch_with_the_class_and_averaging_does_not():
    """One of 60 patches depends on the class. It is marked and at a random position; the others are noise."""

    def images(num_images, seed):
        generator = torch.Generator().manual_seed(seed)
        features, labels = gaussians(num_images, seed, spread=0.3)
        tokens = 1.5 * torch.randn(num_images, 60, WIDTH + 1, generator=generator)
        place = torch.randint(60, (num_images,), generator=generator)
        marked = torch.cat([features, torch.full((num_images, 1), 8.0)], dim=1)
        tokens[torch.arange(num_images), place] = marked
        return {"tokens": tokens, "last": tokens.mean(1)}, labels

    settings = [settings_of("adamw", 0.01, features="tokens"), settings_of("adamw", 0.01)]
    heads = fit(settings, *images(600, seed=0), epochs=20)  # after 12 some versions of torch are still at .5
    attentive, linear = accuracies(settings, heads, *images(600, seed=1))
    assert attentive > 0.9 and linear < 0.6
    assert choose_heads(settings, [attentive, linear]) == {"attentive": 0, "linear": 1}


def test_the_order_of_the_tokens_does_not_matter():
    head = AttentiveHead(128, NUM_CLASSES)
    tokens = torch.randn(2, 7, 128)
    torch.testing.assert_close(head(tokens), head(tokens.flip(1)))


def test_attention_is_that_of_torch_with_one_query():
    """The short form, compared with torch's own module with two attention heads and the same projections."""
    head, reference = AttentiveHead(128, NUM_CLASSES), torch.nn.MultiheadAttention(128, 2, batch_first=True)
    tokens = torch.randn(3, 7, 128)
    query = torch.randn(1, 1, 128)
    projection, key, value = reference.in_proj_weight.detach().split(128)
    split_query = (projection @ query[0, 0]).unflatten(0, (2, 64))  # (H, D / H)
    head.query.data = torch.einsum("hw,hwd->hd", split_query, key.unflatten(0, (2, 64))) / 64**0.5
    head.value.weight.data = value.clone()
    head.value.bias.data.zero_()
    head.classifier = torch.nn.Linear(128, 128)
    head.classifier.load_state_dict(reference.out_proj.state_dict())
    normed = head.norm(tokens)
    expected = reference(query.expand(3, 1, 128), normed, normed)[0][:, 0]
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-4)


# Schedules


def test_schedules():
    factors = [learning_rate_factor("step", epoch, 50) for epoch in (0, 14.99, 15, 29.9, 30, 45)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])
    factors = [learning_rate_factor("cosine", epoch, 10) for epoch in (0, 2.5, 5, 10)]
    assert factors == pytest.approx([1, 0.853553, 0.5, 0])
    factors = [learning_rate_factor("cosine", epoch, 10, warmup_epochs=2) for epoch in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_factor("step", 1, 50, warmup_epochs=4) == 0.25


def test_the_schedule_scales_each_heads_own_learning_rate(monkeypatch, train):
    """Steps of plain SGD on a linear loss show the learning rates that were used."""
    seen = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), original(self))
    )
    fit([settings_of("sgd", 0.4), settings_of("sgd", 0.1)], {"last": train[0]}, train[1], epochs=2)
    factors = [learning_rate_factor("cosine", step / 10, 2) for step in range(20)]
    assert seen == [pytest.approx([0.4 * f, 0.4 * f, 0.1 * f, 0.1 * f]) for f in factors]


# Evaluation


def test_accuracy_and_scores_do_not_depend_on_batches(train):
    settings = [settings_of(), settings_of(batch_norm=True)]
    heads = fit(settings, {"last": train[0]}, train[1], epochs=1)
    whole = accuracies(settings, heads, {"last": train[0]}, train[1])
    parts = [({"last": train[0][part]}, train[1][part]) for part in torch.arange(500).split(7)]
    assert head_accuracies(settings, heads, parts) == pytest.approx(whole)
    scores = head_scores(settings[1], heads[1], parts)
    assert (scores.argmax(1) == train[1]).double().mean().item() == pytest.approx(whole[1])
    with pytest.raises(ValueError, match="no image"):
        head_accuracies(settings, heads, [])


def test_scores_that_are_not_finite_count_as_wrong():
    head = LinearHead(2, 2, batch_norm=False)
    head.classifier.weight.data.fill_(float("nan"))
    assert head_accuracies([settings_of()], [head], [({"last": torch.ones(3, 2)}, torch.zeros(3).long())]) == [0.0]


def test_hits_are_converted_to_double_precision_on_the_cpu(monkeypatch, train):
    """MPS has no double precision, so hits must be moved to the CPU first."""
    moved, double = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor) or tensor)

    def checked(tensor):
        assert any(tensor is other for other in moved)
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", checked)
    entry = HeadSettings("last", False, "sgd", 1.0, 0.0)
    batches = [({"last": torch.eye(2)}, torch.tensor([0, 0]))]
    assert head_accuracies([entry], [torch.nn.Identity()], batches) == [0.5]


def test_the_first_of_equal_heads_is_chosen():
    settings = [settings_of(learning_rate=rate) for rate in (1, 2, 3)]
    assert choose_heads(settings, [0.5, 0.7, 0.7]) == {"linear": 1}


@pytest.mark.parametrize("size", [1, 3, 4, 10, 25])
def test_rebatch_keeps_every_row_in_order(size):
    rows = torch.arange(10)
    parts = [{"a": part, "b": -part} for part in rows.split(4)]
    batches = list(rebatch(parts, size))
    assert torch.equal(torch.cat([batch["a"] for batch in batches]), rows)
    assert all(torch.equal(batch["a"], -batch["b"]) for batch in batches)
    assert [len(batch["a"]) for batch in batches] == [len(part) for part in rows.split(size)]


def test_holdout_and_training_images_are_a_partition():
    fit_places, held = split_holdout(100, 0.1, seed=0)
    assert len(held) == 10 and sorted([*fit_places.tolist(), *held.tolist()]) == list(range(100))
    assert not torch.equal(held, split_holdout(100, 0.1, seed=1)[1]) and held.tolist() != list(range(10))
    assert len(split_holdout(100, 0.0, seed=0)[1]) == 0
    assert len(split_holdout(3, 0.01, seed=0)[1]) == 1 and len(split_holdout(3, 0.99, seed=0)[0]) == 1


# Wrong input


def test_lars_without_timm_is_one_sentence(monkeypatch):
    original = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name.startswith("timm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ValueError, match=r'lars needs timm, .*: pip install "ijepa-transformers\[vision\]"'):
        require_optimizers(["adamw", "lars"])
    require_optimizers(["adamw", "sgd"])
