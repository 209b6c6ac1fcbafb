"""A file or a checkpoint is whole, or it is not there, or it is the older one. (Kills: test_survival.py.)"""

import errno
import os
import threading

import pytest
from accelerate import Accelerator
from transformers.models.ijepa.modeling_ijepa import IJepaModel as StockModel

from ijepa_transformers import IJepaForPretraining
from ijepa_transformers.checkpoints import CheckpointError
from ijepa_transformers.files import write_text, written_aside
from ijepa_transformers.modeling_ijepa import weight_files
from ijepa_transformers.pretraining import checkpointing, exporting, loop
from tests.runs import assert_equal_weights, pretrain, saved_weights


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_text_file_is_the_new_one_or_the_old_one_and_always_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    write_text(path, "älter")
    assert path.read_text(encoding="utf-8") == "älter"

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError):
        write_text(path, "newer")
    assert path.read_text(encoding="utf-8") == "älter"


def test_a_write_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), written_aside(tmp_path / "shard") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert not (tmp_path / "shard").exists()


def test_the_next_steps_are_computed_while_a_checkpoint_is_completed(tmp_path, monkeypatch):
    """A checkpoint counts when it is complete; the next one waits for it, and so does the end of the run."""
    original_finish, original_step = checkpointing._finish, loop.optimizer_step
    next_step_is_done, there = threading.Event(), {}

    def finish(unfinished, finished, files):
        if finished.name == "step-00000002":
            assert next_step_is_done.wait(60)
        original_finish(unfinished, finished, files)

    def optimizer_step(run, batches, number):
        step = original_step(run, batches, number)
        there[number + 1] = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*"))
        if number == 2:
            next_step_is_done.set()
        return step

    monkeypatch.setattr(checkpointing, "_finish", finish)
    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    pretrain(tmp_path / "run", save_steps=2, keep_checkpoints=9)
    assert there[3] == [".tmp-2"] and "step-00000002" in there[5]
    done = sorted((tmp_path / "run/checkpoints").glob("*"))
    assert [path.name for path in done] == ["step-00000002", "step-00000004", "step-00000006"]
    assert all(checkpointing.damage(path) is None for path in done)


@pytest.mark.parametrize("save_steps", [2, 5])
def test_a_checkpoint_that_cannot_be_completed_ends_the_run_with_its_name(tmp_path, monkeypatch, capsys, save_steps):
    original = checkpointing._describe

    def full(directory, names):
        if directory.name == f".tmp-{save_steps}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(directory, names)

    monkeypatch.setattr(checkpointing, "_describe", full)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", save_steps=save_steps)
    place = tmp_path / "run/checkpoints"
    assert stop.value.code == 1
    assert f"the checkpoint of step {save_steps} cannot be written to {place}" in capsys.readouterr().err
    assert not list(place.glob("*"))


def test_without_the_thread_a_checkpoint_is_complete_before_the_next_step(tmp_path, monkeypatch):
    there, original_step = {}, loop.optimizer_step

    def optimizer_step(run, batches, number):
        there[number] = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*"))
        return original_step(run, batches, number)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    pretrain(tmp_path / "run", save_steps=2, keep_checkpoints=9, async_checkpoints="false")
    assert there[2] == ["step-00000002"] and there[4] == ["step-00000002", "step-00000004"]


# The model in the output directory


def test_weights_are_written_once_and_the_output_directory_has_links_to_them(tmp_path):
    """What people edit there does not damage the checkpoint."""
    ended = pretrain(tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-00000006"
    files = weight_files(tmp_path / "run")
    assert len(files) == 2 and all(file.samefile(checkpoint / file.name) for file in files)
    assert_equal_weights(IJepaForPretraining.from_pretrained(checkpoint).state_dict(), ended)
    for file in (tmp_path / "run").glob("*.json"):
        file.write_text("edited")
    assert checkpointing.damage(checkpoint) is None


def test_without_hard_links_the_weights_are_copied(tmp_path, monkeypatch):
    linked = pretrain(tmp_path / "linked")

    def refuses(*paths):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", refuses)
    assert_equal_weights(pretrain(tmp_path / "copied"), linked)
    for file in weight_files(tmp_path / "copied"):
        assert file.stat().st_nlink == 1


@pytest.mark.parametrize("in_thread", ["true", "false"])
@pytest.mark.parametrize(("every", "exported"), [(1, [1, 2, 3, 4, 5]), (2, [2, 2, 4, 4]), (0, [])])
def test_the_output_directory_becomes_the_model_of_every_nth_checkpoint(
    tmp_path, monkeypatch, every, exported, in_thread
):
    seen, original = [], loop.optimizer_step

    def optimizer_step(run, batches, number):
        run.checkpoints.wait()
        if weight_files(tmp_path / "run"):
            model = saved_weights(tmp_path / "run")
            seen.append(next(step for step in range(number, 0, -1) if equal(model, saved_weights(place(step)))))
        return original(run, batches, number)

    def place(step):
        return tmp_path / f"run/checkpoints/step-{step:08d}"

    def equal(ours, others):
        return all(tensor.equal(others[name]) for name, tensor in ours.items())

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    settings = {"save_steps": 1, "keep_checkpoints": 9, "export_every": every, "async_checkpoints": in_thread}
    ended = pretrain(tmp_path / "run", **settings)
    assert seen == exported and equal(ended, saved_weights(place(6)))


def test_a_model_that_cannot_be_exported_ends_the_run_and_its_checkpoint_stays(tmp_path, monkeypatch, capsys):
    original = os.replace

    def full(source, destination):
        if os.fspath(destination) == str(tmp_path / "run/model.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(destination))
        original(source, destination)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", save_steps=2)
    assert stop.value.code == 1 and str(tmp_path / "run/model.safetensors") in capsys.readouterr().err
    assert checkpointing.damage(tmp_path / "run/checkpoints/step-00000002") is None


def test_what_follows_a_checkpoint_is_left_out_if_it_cannot_be_written(tmp_path, monkeypatch):
    """An older, damaged checkpoint of the same step may be in its place, and would become the model."""

    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpointing, "_describe", full)
    writer, called = checkpointing.CheckpointWriter(Accelerator(cpu=True), tmp_path, 1, in_background=True), []
    writer.save(1, lambda directory: None, waits=False)
    writer.afterwards(lambda: called.append("export"))
    with pytest.raises(CheckpointError, match="step 1 cannot be written"):
        writer.wait()
    assert not called


def test_a_checkpoint_whose_encoder_is_in_several_files_becomes_a_model_too(tmp_path, tiny_config):
    model = IJepaForPretraining(tiny_config)
    for name in ("checkpoint", "unfinished", "run"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert len(weight_files(tmp_path / "checkpoint", stem="model")) > 1
    exporting._publish_checkpoint(*(tmp_path / name for name in ("checkpoint", "unfinished", "run")))
    encoder = StockModel.from_pretrained(tmp_path / "run", add_pooling_layer=False)
    assert_equal_weights(encoder.state_dict(), model.ijepa.state_dict())
