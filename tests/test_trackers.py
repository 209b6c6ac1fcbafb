"""A tracker that cannot start is refused in one sentence. One that fails later costs its own rows only."""

import errno
from pathlib import Path

import pytest

from ijepa_transformers.finetuning import command as finetuning_command
from ijepa_transformers.pretraining import command as pretraining_command
from tests.runs import fine_tune, fine_tuning_argv, pretrain, pretraining_argv, rows, status


pytest.importorskip("tensorboard")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def full_disk(monkeypatch):
    """TensorBoard can write three records. It writes in a thread of its own."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, written = RecordWriter.write, []

    def write_some(self, data):
        written.append(data)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_some)


def assert_told_once(told):
    assert "Traceback" not in told.out + told.err and "Exception in thread" not in told.err
    (line,) = [line for line in (told.out + told.err).splitlines() if "No space left" in line]
    assert line.startswith("WARNING: the tracker tensorboard failed (No space left on device), so it gets no more")


def test_a_full_disk_under_tensorboard_costs_a_pretraining_its_events_only(tmp_path, capsys, full_disk):
    pretrain(tmp_path / "run", trackers="tensorboard")
    assert_told_once(capsys.readouterr())
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 3, 4, 6] and status(tmp_path / "run") == "finished"


def test_a_full_disk_under_tensorboard_costs_a_fine_tuning_its_events_only(
    gray_pretrained, tmp_path, capsys, full_disk
):
    fine_tune(gray_pretrained, tmp_path / "run", report_to="tensorboard", logging_steps=1)
    assert_told_once(capsys.readouterr())


def test_a_tracker_that_cannot_start_is_refused_and_leaves_the_directory_free(tmp_path, capsys, monkeypatch):
    def fail(directory, **settings):
        Path(directory).mkdir()
        raise PermissionError(errno.EACCES, "Permission denied", "events.out")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr("torch.utils.tensorboard.SummaryWriter", fail)
        pretraining_command.main(pretraining_argv(tmp_path / "run", trackers="tensorboard"))
    told = capsys.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in told.err
    assert "trackers: tensorboard cannot start here (events.out: Permission denied)." in told.err.splitlines()[-1]
    pretrain(tmp_path / "run", trackers="tensorboard")


def test_a_place_of_tensorboard_that_is_a_file_ends_a_fine_tuning_before_its_first_step(
    gray_pretrained, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    argv = fine_tuning_argv(gray_pretrained, tmp_path / "run", report_to="tensorboard")
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(argv)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and f"report_to: tensorboard cannot start here ({tmp_path}/file" in sentence
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("name", "message"), [("excel", "must be among azure_ml,"), ("wandb", "is not installed")])
def test_a_tracker_of_fine_tuning_that_is_not_there_is_one_sentence(tmp_path, capsys, monkeypatch, name, message):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(fine_tuning_argv("model", tmp_path / "run", report_to=name))
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "report_to" in sentence and message in sentence and repr(name) in sentence
