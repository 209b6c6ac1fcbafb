# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the pretraining step compares like with like and reports what it promises."""

import json

import pytest
import torch

from benchmarks.speed import pretraining_step
from benchmarks.speed.peers import Batch, Ours, Reference
from benchmarks.speed.pretraining_step import (
    Entry,
    LeftOut,
    Steps,
    build_config,
    compare,
    take_turn,
    with_smaller_batches,
)


CPU = torch.device("cpu")
CONFIG = build_config("smoke")


@pytest.fixture
def steps() -> Steps:
    return Steps(CONFIG, batch_size=3, device=CPU)


@pytest.fixture
def quick_peaks(monkeypatch):
    monkeypatch.setattr(pretraining_step, "MATMUL_SHAPES", {"cpu": [(64, 64, 64)]})
    monkeypatch.setattr(pretraining_step, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(pretraining_step, "REPEATED_SECONDS", 0.01)


def pair(precision="fp32") -> tuple[Ours, Reference]:
    ours = Ours(CONFIG, CPU, precision)
    return ours, Reference(CONFIG, CPU, precision, ours, "highest")


def test_reference_computes_the_loss_and_gradients_of_ours(steps):
    ours, reference = pair()
    differences = compare(ours, reference, steps.batch(0))
    assert max(differences.values()) < 1e-5
    assert set(ours.gradients()) == set() == set(reference.gradients()), "comparing must leave nothing behind"


def test_a_difference_in_the_mathematics_is_found(steps):
    ours, reference = pair()
    reference.networks.predictor.layernorm.eps = 1e-2
    assert max(compare(ours, reference, steps.batch(0)).values()) > 1e-5


def test_contenders_train_the_same_parameters_with_the_same_moments(steps):
    ours = Ours(CONFIG, CPU, "fp32")
    ours.step(steps.batch(0))
    reference = Reference(CONFIG, CPU, "fp32", ours, "highest")
    other = Ours(CONFIG, CPU, "fp32", name="other", weights_of=ours)
    for contender in (reference, other):
        theirs = dict(contender.networks.named_parameters())
        assert all(theirs[name] is parameter for name, parameter in ours.networks.named_parameters())
    for parameter, state in ours.optimizer.state.items():
        assert reference.optimizer.state[parameter]["exp_avg"] is state["exp_avg"]


def test_a_step_of_the_reference_is_a_step_of_ours(steps):
    """Gradient, AdamW, schedules and moving average: weights apart, both land at the same place."""
    torch.manual_seed(0)
    ours, twin = Ours(CONFIG, CPU, "fp32"), Ours(CONFIG, CPU, "fp32")
    twin.networks.load_state_dict(ours.networks.state_dict())
    reference = Reference(CONFIG, CPU, "fp32", twin, "highest")
    before = {name: value.clone() for name, value in ours.networks.state_dict().items()}
    for number in range(3):
        ours.step(steps.batch(number))
        reference.step(steps.batch(number))
    moved = {name: value - before[name] for name, value in ours.networks.state_dict().items()}
    assert any(change.abs().max() > 0 for name, change in moved.items() if name.startswith("ijepa."))
    for name, value in twin.networks.named_parameters():
        if not name.endswith("k_proj.bias"):  # softmax ignores it: its gradient is rounding, and AdamW scales it up
            assert (value - before[name] - moved[name]).norm() <= 0.05 * moved[name].norm(), name


def test_settings_are_restored_after_a_turn(steps):
    ours = Ours(CONFIG, CPU, "fp32", matmul_precision="medium")
    before = torch.get_float32_matmul_precision()
    entry = Entry("ours", ours, batch_size=2)
    take_turn(entry, steps, range(2))
    assert torch.get_float32_matmul_precision() == before
    assert len(entry.seconds_per_image) == 1


def test_a_contender_that_does_not_fit_gets_half_the_batch(steps):
    entry, seen = Entry("ours", Ours(CONFIG, CPU, "fp32"), batch_size=8), []

    def action():
        seen.append(entry.batch_size)
        if entry.batch_size > 2:
            raise torch.OutOfMemoryError("pretended")

    with_smaller_batches(entry, action)
    assert seen == [8, 4, 2]
    assert entry.notes == ["out of memory, so with a batch of 4", "out of memory, so with a batch of 2"]

    def never():
        raise torch.OutOfMemoryError("pretended")

    with pytest.raises(LeftOut, match="not even one image"):
        with_smaller_batches(entry, never)


def test_half_a_batch_is_the_first_half(steps):
    batch = steps.batch(0)
    half = batch.first(2)
    assert isinstance(half, Batch)
    assert all(torch.equal(part, whole[:2]) for part, whole in zip(half, batch, strict=True))


def test_the_last_line_is_one_json_object_with_every_figure(capsys, quick_peaks):
    words = "--sizes smoke --batch 2 --turns 2 --steps-per-turn 1 --threads 1 --minutes 1 --precision fp32 bf16"
    words += " --output -"
    contenders = "--contenders ours reference reference-automatic ours-highest"
    pretraining_step.main([*words.split(), *contenders.split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "pretraining_step"
    assert {"torch", "transformers", "lightly"} <= result["versions"].keys()
    assert {"copy_gb_per_s", "triad_gb_per_s", "matmul"} <= set(result["hardware"])
    assert "stable-pretraining" in result["left_out"]
    assert [case["precision"] for case in result["cases"]] == ["fp32", "bf16"]
    for case in result["cases"]:
        assert {"ours", "reference"} <= set(case["contenders"])
        assert case["roofline"]["measured_over_floor"] > 0
        assert {"backward", "optimizer", "moving average"} <= set(case["milliseconds_by_part"]["ours"])
        for row in case["contenders"].values():
            assert row["images_per_second"]["q1"] <= row["images_per_second"]["median"]
            assert row["mfu"]["median"] > 0
            assert row["images_per_cpu_second"]["median"] > 0 and row["ours_is_times_faster_by_cpu"]["median"] > 0
            assert row["saved_activations_mib_per_image"] > 0
    assert "ours-highest" in result["cases"][1]["left_out"], "in bf16 it would be ours again"


def test_cases_without_time_are_dropped_and_named(capsys, quick_peaks):
    words = "--sizes smoke --batch 2 --turns 2 --steps-per-turn 1 --threads 1 --minutes 0.001 --output -"
    pretraining_step.main([*words.split(), "--contenders", "reference"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["cases"]) == 1
    assert result["left_out"]["smoke, batch 2, bf16"] == "no time left within --minutes"
