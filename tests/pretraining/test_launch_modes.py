"""The same run under every launch mode: the real script, the real launch configurations, two processes on the CPU.

Each run is launched once and looked at by several tests. What is compared with a single process differs by the order
in which float32 gradients are summed; AdamW magnifies that where gradients are tiny, hence its large epsilon.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.pretraining.checkpointing import damage
from tests import runs
from tests.runs import (
    assert_close_weights,
    cut_back,
    launch,
    launched_ranks,
    launched_weights,
    needs_deepspeed,
    without_speed,
)


REPOSITORY = Path(__file__).parents[2]
ZERO = [needs_deepspeed, pytest.mark.slow]
MODES = ["ddp", "fsdp2", *(pytest.param(mode, marks=ZERO) for mode in ("zero1", "zero2", "zero3"))]
QUICK_MODES = [*MODES[:-1], pytest.param("zero3", marks=needs_deepspeed)]  # ZeRO-3 stands for ZeRO in the main laws
TOLERANCE = 1e-7  # of weights, against one process, after six steps: measured 4e-9
# The same in bfloat16: measured 1e-9, under ZeRO-3 7e-7; float32 is 6e-6 away. FSDP2 rounds norms and the mask token
# to bfloat16 too, which autocast leaves alone: measured 2.6e-6.
BF16_TOLERANCE, FSDP2_BF16_TOLERANCE = 2e-6, 4e-6


def rows(output_dir):
    return without_speed(runs.rows(output_dir / "run"))


def seen(output_dir):
    """(step, image) of all processes, sorted."""
    return sorted(tuple(pair) for rank in launched_ranks(output_dir) for pair in rank["seen"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Launches a run to its end, once: `finished(mode)` and `finished(mode, "bf16")` give its directory."""

    @cache
    def run(mode, precision="no", num_processes=2):
        directory = tmp_path_factory.mktemp(f"{mode}_{precision}_{num_processes}")
        launch(mode, directory, num_processes, precision)
        return directory

    return run


@pytest.mark.parametrize("mode", QUICK_MODES)
def test_two_processes_agree_with_each_other(finished, mode):
    records = launched_ranks(finished(mode))
    assert [record["num_processes"] for record in records] == [2, 2]
    assert [record["mode"] for record in records] == [mode, mode]
    assert [record["accumulation"] for record in records] == [2, 2]
    assert records[0]["weights"] == records[1]["weights"]
    assert not set(map(tuple, records[0]["seen"])) & set(map(tuple, records[1]["seen"]))


@pytest.mark.parametrize(
    "mode", ["ddp", *(pytest.param(mode, marks=pytest.mark.slow) for mode in (None, "fsdp2")), *MODES[2:]]
)
def test_the_real_launcher_does_what_the_forked_processes_do(finished, mode, tmp_path):
    """So whatever the other tests find holds under `accelerate launch` too."""
    runs.launch_for_real(mode, tmp_path)
    assert_close_weights(launched_weights(tmp_path), launched_weights(finished(mode)), 0)
    assert rows(tmp_path) == rows(finished(mode))
    for name in ("environment", "mode", "seen"):
        ours, others = ([rank[name] for rank in launched_ranks(path)] for path in (finished(mode), tmp_path))
        assert ours == others


@pytest.mark.parametrize("mode", QUICK_MODES)
def test_two_processes_equal_one_at_the_same_global_batch(finished, mode):
    """Context encoder, predictor, moving average, losses, metrics and the k-NN; stochastic depth and clipping on."""
    alone, together = finished(None), finished(mode)
    assert launched_ranks(alone)[0]["num_processes"] == 1 and launched_ranks(alone)[0]["accumulation"] == 4
    assert_close_weights(launched_weights(together), launched_weights(alone), TOLERANCE)
    assert seen(together) == seen(alone)
    for ours, others in zip(rows(together), rows(alone), strict=True):
        assert (ours["step"], ours["momentum"], ours["bad_images"]) == (
            others["step"],
            others["momentum"],
            others["bad_images"],
        )
        assert ours["loss"] == pytest.approx(others["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(others["grad_norm"], rel=1e-4)
    ours, others = rows(together)[-1], rows(alone)[-1]
    assert ours["random_knn_accuracy"] == others["random_knn_accuracy"]  # the same encoder, the same batches
    assert ours["knn_accuracy"] == pytest.approx(others["knn_accuracy"], abs=0.02)


def test_targets_normalised_over_the_images_of_a_pass_do_not_depend_on_the_number_of_processes(finished, tmp_path):
    """Which images share a pass is the same for two processes as for the four accumulated passes of one."""
    for mode, name in ((None, "alone"), ("ddp", "together")):
        launch(mode, tmp_path / name, target_normalization="batch")
    assert_close_weights(launched_weights(tmp_path / "together"), launched_weights(tmp_path / "alone"), TOLERANCE)
    released = launched_weights(finished("ddp"))
    together = launched_weights(tmp_path / "together")
    assert any(not torch.equal(together[name], released[name]) for name in together)


@pytest.mark.parametrize("mode", MODES)
def test_the_moving_average_moves_and_is_no_copy(finished, mode):
    tensors = launched_weights(finished(mode))
    names = [name for name in tensors if name.startswith("ijepa.layers") and tensors[name].ndim == 2]
    assert names
    for name in names:
        assert not torch.equal(tensors[name], tensors[name.replace("ijepa.", "context_encoder.", 1)]), name


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_computes_on_float32_weights(finished, mode):
    """In bfloat16 weights the moving average of momentum .9 would stand still more often than not."""
    ours, others = launched_weights(finished(mode, "bf16")), launched_weights(finished(None, "bf16"))
    assert launched_ranks(finished(mode, "bf16"))[0]["num_processes"] == 2
    assert_close_weights(ours, others, FSDP2_BF16_TOLERANCE if mode == "fsdp2" else BF16_TOLERANCE)
    full = launched_weights(finished(mode))
    assert any(not torch.equal(ours[name], full[name]) for name in ours)  # it did compute in bfloat16
    averages = [name for name in ours if name.startswith("ijepa.layers")]
    assert any(not torch.equal(ours[name], ours[name].bfloat16().float()) for name in averages)


@pytest.mark.parametrize("mode", QUICK_MODES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, mode, tmp_path):
    whole, again = finished(mode), cut_back(finished(mode), tmp_path)
    done = launch(mode, again, resume="true")
    assert "at step 3" in done.stdout
    assert_close_weights(launched_weights(again), launched_weights(whole), 0)
    assert rows(again) == rows(whole)
    assert seen(again) == [pair for pair in seen(whole) if pair[0] >= 3]


@pytest.mark.parametrize(("mode", "before", "after"), [("ddp", 2, 1), ("ddp", 1, 2), ("fsdp2", 2, 1), ("fsdp2", 1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(finished, mode, before, after, tmp_path):
    """No image is seen twice or skipped, and the weights are those of the uninterrupted run within rounding."""
    first = (None if mode == "ddp" and before == 1 else mode, "no", before)
    whole = finished(*first)
    again = cut_back(whole, tmp_path)
    launch(None if mode == "ddp" and after == 1 else mode, again, num_processes=after, resume="true")
    assert [record["num_processes"] for record in launched_ranks(again)] == [after] * after
    assert_close_weights(launched_weights(again), launched_weights(whole), TOLERANCE)
    assert seen(again) == [pair for pair in seen(whole) if pair[0] >= 3]


@pytest.mark.parametrize("after", [2, 1])
def test_a_streamed_run_goes_on_with_any_number_of_processes_that_shares_its_lanes(tmp_path, after):
    """The shards are read in two lanes, by two processes or by one."""
    shards = tmp_path / "shards"
    shards.mkdir()
    digits = load_image_dataset("digits")
    for number in range(4):  # 80 images: the epoch ends in step 10
        digits.select(range(20 * number, 20 * number + 20)).to_parquet(shards / f"train-{number}.parquet")
    settings = {"data": shards, "streaming": "true", "shuffle_buffer": 7, "validation_split": "", "max_steps": 12}
    settings |= {"save_steps": 5, "keep_checkpoints": 9}
    launch("ddp", tmp_path / "whole", **settings)
    again = cut_back(tmp_path / "whole", tmp_path / "again", step=5)
    launch(None if after == 1 else "ddp", again, resume="true", **settings)
    assert [record["num_processes"] for record in launched_ranks(again)] == [after] * after
    assert_close_weights(launched_weights(again), launched_weights(tmp_path / "whole"), 0 if after == 2 else TOLERANCE)
    assert seen(again) == [pair for pair in seen(tmp_path / "whole") if pair[0] >= 5]
    first_epoch = [name for step, name in seen(tmp_path / "whole") if step < 10]
    assert len(set(first_epoch)) == len(first_epoch) == 80


@pytest.mark.parametrize(
    ("written", "launched", "num_processes", "message"),
    [
        pytest.param("zero2", "zero2", 1, "DeepSpeed cannot go on with 1: launch 2 again", marks=ZERO),
        pytest.param("zero1", "ddp", 2, "was written under zero1, but this is ddp", marks=ZERO),
        ("ddp", "fsdp2", 2, "was written under ddp, but this is fsdp2"),
    ],
)
def test_what_cannot_be_resumed_is_refused_with_a_way_out(
    finished, written, launched, num_processes, message, tmp_path
):
    again = cut_back(finished(written), tmp_path)
    before = {path: path.read_bytes() for path in (again / "run").rglob("*") if path.is_file() and path.suffix}
    done = launch(launched, again, num_processes, check=False, resume="true")
    assert done.returncode != 0 and message in done.stderr and "--init_from" in done.stderr
    assert "Traceback" not in done.stderr.split(message)[0]
    assert before == {path: path.read_bytes() for path in (again / "run").rglob("*") if path.is_file() and path.suffix}


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(mode, tmp_path):
    launch(mode, tmp_path, watch_nan="1:3", validation_split="", max_steps=5)
    skipped = json.loads((tmp_path / "run/skipped_steps.jsonl").read_text())
    assert skipped["step"] == 4 and len(skipped["images"]) == 8 and skipped["losses"].count("nan") == 2
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 0, 0, 1, 1]
    records = launched_ranks(tmp_path)
    assert records[0]["weights"] == records[1]["weights"]
    assert all(tensor.isfinite().all() for tensor in launched_weights(tmp_path).values())


@pytest.mark.parametrize("mode", [pytest.param("zero2", marks=ZERO), "ddp"])
def test_a_process_that_cannot_save_does_not_leave_the_other_waiting(mode, tmp_path):
    """The second process has only its part of ZeRO's state to save; under DDP the first one saves."""
    rank = 1 if mode == "zero2" else 0
    done = launch(mode, tmp_path, check=False, watch_nan=f"{rank}:save", validation_split="")
    assert done.returncode != 0 and "the checkpoint of step 3 cannot be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize("mode", MODES)
def test_the_exported_directory_opens_in_stock_transformers(finished, mode):
    directory = finished(mode) / "run"
    encoder, report = transformers.IJepaModel.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and encoder.__module__.startswith("transformers.")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, launched_weights(finished(mode))[f"ijepa.{name}"]), name
    assert all(damage(checkpoint) is None for checkpoint in (directory / "checkpoints").iterdir())
