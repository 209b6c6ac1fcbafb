"""A file or a checkpoint is whole, or it is not there, or it is the older one. (Kills: test_survival.py.)"""

import errno
import os
import threading

import pytest

from ijepa_transformers.files import write_text, written_aside
from ijepa_transformers.pretraining import checkpointing, loop
from tests.runs import pretrain


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
