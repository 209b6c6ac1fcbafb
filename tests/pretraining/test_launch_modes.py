"""The same run under every launch mode: the real script, the real launch configurations, two processes on the CPU.

Each run is launched once and looked at by several tests. What is compared with a single process differs by the order
in which float32 gradients are summed; AdamW magnifies that where gradients are tiny, hence its large epsilon.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.pretraining.checkpointing import damage
from tests.tiny_run import TINY


REPOSITORY = Path(__file__).parents[2]
CONFIGURATIONS = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero1": "deepspeed_zero1",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs pip install deepspeed, and a C++ compiler for the operator it builds",
)
MODES = [pytest.param(mode, marks=needs_deepspeed if mode.startswith("zero") else ()) for mode in CONFIGURATIONS]
TOLERANCE = 1e-7  # of weights, against one process, after six steps: measured 4e-9
BF16_TOLERANCE = 2e-6  # the same in bfloat16: measured 7e-7 under ZeRO-3, 1e-9 elsewhere; float32 is 6e-6 away

RUN = {
    **{name: value for name, value in TINY.items() if name != "mixed_precision"},  # the launcher's
    "per_device_batch_size": 2,  # two accumulation steps of two processes, four of one
    "predictor_num_hidden_layers": 2,  # one that computes all tokens, and the last
    "momentum": 0.9,
    "logging_steps": 1,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.5,
    "drop_path_rate": 0.2,
    "validation_split": "test",
    "max_probe_images": 60,
}

pytestmark = pytest.mark.slow


def launch(mode, output_dir, num_processes=2, precision="no", check=True, **changes):
    """Runs tests/launched.py as `accelerate launch --config_file .../recipes/accelerate/...` does; a mode of None is
    Python alone."""
    watched = [str(output_dir / "watched"), changes.pop("watch_nan", "never")]
    values = {**RUN, "output_dir": output_dir / "run", **changes}
    words = [f"--{key}={value}" for key, value in values.items() if value != ""]
    program = [str(REPOSITORY / "tests/launched.py"), *watched, *words]
    launcher = [sys.executable]
    if mode is not None:
        launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--mixed_precision", precision]
        launcher += [
            "--config_file",
            f"ijepa_transformers/recipes/accelerate/{CONFIGURATIONS[mode]}.yaml",
            "--num_processes",
            str(num_processes),
        ]
    else:
        program += [f"--mixed_precision={precision}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
    if mode is None or not mode.startswith("zero"):
        environment["ACCELERATE_USE_CPU"] = "true"
    # Not the user's directory: a build that was killed leaves a lock there, for which every later one waits.
    environment["TORCH_EXTENSIONS_DIR"] = f"{tempfile.gettempdir()}/ijepa_extensions_{os.getpid()}"
    done = subprocess.run(
        [*launcher, *program], cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=400
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def ranks(output_dir):
    return [json.loads(file.read_text()) for file in sorted((output_dir / "watched").glob("rank_*.json"))]


def weights(output_dir):
    return load_file(output_dir / "run/model.safetensors")


def rows(output_dir):
    rows = [json.loads(line) for line in (output_dir / "run/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def seen(output_dir):
    """(step, image) of all processes, sorted."""
    return sorted(tuple(pair) for rank in ranks(output_dir) for pair in rank["seen"])


def assert_close_weights(ours, others, tolerance):
    assert set(ours) == set(others)
    for name in ours:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], others[name], atol=tolerance, rtol=0, msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Launches a run to its end, once: `finished(mode)` and `finished(mode, "bf16")` give its directory."""

    @cache
    def run(mode, precision="no", num_processes=2):
        directory = tmp_path_factory.mktemp(f"{mode}_{precision}_{num_processes}")
        launch(mode, directory, num_processes, precision)
        return directory

    return run


def cut_back(source, directory, step=3):
    """A copy of a run as it was when a process was killed after `step` steps."""
    shutil.copytree(source / "run", directory / "run")
    for checkpoint in (directory / "run/checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (directory / "run/model.safetensors").unlink()
    return directory


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_agree_with_each_other(finished, mode):
    records = ranks(finished(mode))
    assert [record["num_processes"] for record in records] == [2, 2]
    assert [record["mode"] for record in records] == [mode, mode]
    assert [record["accumulation"] for record in records] == [2, 2]
    assert records[0]["weights"] == records[1]["weights"]
    assert not set(map(tuple, records[0]["seen"])) & set(map(tuple, records[1]["seen"]))


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_at_the_same_global_batch(finished, mode):
    """Context encoder, predictor, moving average, losses, metrics and the k-NN; stochastic depth and clipping on."""
    alone, together = finished(None), finished(mode)
    assert ranks(alone)[0]["num_processes"] == 1 and ranks(alone)[0]["accumulation"] == 4
    assert_close_weights(weights(together), weights(alone), TOLERANCE)
    assert seen(together) == seen(alone)
    for ours, others in zip(rows(together), rows(alone), strict=True):
        assert (ours["step"], ours["momentum"], ours["bad_images"]) == (
            others["step"],
            others["momentum"],
            others["bad_images"],
        )
        assert ours["loss"] == pytest.approx(others["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(others["grad_norm"], rel=1e-4)
    for name in ("knn_accuracy", "random_knn_accuracy"):
        assert rows(together)[-1][name] == pytest.approx(rows(alone)[-1][name], abs=0.02)


def test_targets_normalised_over_the_images_of_a_pass_do_not_depend_on_the_number_of_processes(finished, tmp_path):
    """Which images share a pass is the same for two processes as for the four accumulated passes of one."""
    for mode, name in ((None, "alone"), ("ddp", "together")):
        launch(mode, tmp_path / name, target_normalization="batch")
    assert_close_weights(weights(tmp_path / "together"), weights(tmp_path / "alone"), TOLERANCE)
    released = weights(finished("ddp"))
    assert any(not torch.equal(weight, released[name]) for name, weight in weights(tmp_path / "together").items())


@pytest.mark.parametrize("mode", MODES)
def test_the_moving_average_moves_and_is_no_copy(finished, mode):
    tensors = weights(finished(mode))
    names = [name for name in tensors if name.startswith("ijepa.layers") and tensors[name].ndim == 2]
    assert names
    for name in names:
        assert not torch.equal(tensors[name], tensors[name.replace("ijepa.", "context_encoder.", 1)]), name


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_computes_on_float32_weights(finished, mode):
    """In bfloat16 weights the moving average of momentum .9 would stand still more often than not."""
    ours, others = weights(finished(mode, "bf16")), weights(finished(None, "bf16"))
    assert ranks(finished(mode, "bf16"))[0]["num_processes"] == 2
    assert_close_weights(ours, others, BF16_TOLERANCE)
    full = weights(finished(mode))
    assert any(not torch.equal(ours[name], full[name]) for name in ours)  # it did compute in bfloat16
    averages = [name for name in ours if name.startswith("ijepa.layers")]
    assert any(not torch.equal(ours[name], ours[name].bfloat16().float()) for name in averages)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, mode, tmp_path):
    whole, again = finished(mode), cut_back(finished(mode), tmp_path)
    done = launch(mode, again, resume="true")
    assert "at step 3" in done.stdout
    assert_close_weights(weights(again), weights(whole), 0)
    assert rows(again) == rows(whole)
    assert seen(again) == [pair for pair in seen(whole) if pair[0] >= 3]


@pytest.mark.parametrize(("mode", "before", "after"), [("ddp", 2, 1), ("ddp", 1, 2), ("fsdp2", 2, 1), ("fsdp2", 1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(finished, mode, before, after, tmp_path):
    """No image is seen twice or skipped, and the weights are those of the uninterrupted run within rounding."""
    first = (None if mode == "ddp" and before == 1 else mode, "no", before)
    whole = finished(*first)
    again = cut_back(whole, tmp_path)
    launch(None if mode == "ddp" and after == 1 else mode, again, num_processes=after, resume="true")
    assert [record["num_processes"] for record in ranks(again)] == [after] * after
    assert_close_weights(weights(again), weights(whole), TOLERANCE)
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
    assert [record["num_processes"] for record in ranks(again)] == [after] * after
    assert_close_weights(weights(again), weights(tmp_path / "whole"), 0 if after == 2 else TOLERANCE)
    assert seen(again) == [pair for pair in seen(tmp_path / "whole") if pair[0] >= 5]
    first_epoch = [name for step, name in seen(tmp_path / "whole") if step < 10]
    assert len(set(first_epoch)) == len(first_epoch) == 80


@pytest.mark.parametrize(
    ("written", "launched", "num_processes", "message"),
    [
        pytest.param("zero2", "zero2", 1, "DeepSpeed cannot go on with 1: launch 2 again", marks=needs_deepspeed),
        pytest.param("zero1", "ddp", 2, "was written under zero1, but this is ddp", marks=needs_deepspeed),
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
    records = ranks(tmp_path)
    assert records[0]["weights"] == records[1]["weights"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("mode", [pytest.param("zero2", marks=needs_deepspeed), "ddp"])
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
        assert torch.equal(tensor, weights(finished(mode))[f"ijepa.{name}"]), name
    assert all(damage(checkpoint) is None for checkpoint in (directory / "checkpoints").iterdir())
