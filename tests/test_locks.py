"""Of two commands that write to one place, the second is refused in one sentence and changes nothing."""

import errno
import subprocess
import sys

import pytest

from ijepa_transformers import locks
from ijepa_transformers.conversion import command_line
from ijepa_transformers.evaluation import command as evaluation_command
from ijepa_transformers.evaluation import extraction
from ijepa_transformers.finetuning import command as finetuning_command
from ijepa_transformers.locks import OutputLock, alone_with
from ijepa_transformers.pretraining import checkpointing
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining.checkpointing import DirectoryLock
from ijepa_transformers.visualization import command as visualization_command


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)


def test_a_directory_has_one_writer_at_a_time_and_no_file_is_left(tmp_path):
    with OutputLock(tmp_path) as first:
        first.claim()
        with OutputLock(tmp_path) as second, pytest.raises(ValueError, match=f"is writing to {tmp_path}"):
            second.take_if_there()
        first.claim()
    with OutputLock(tmp_path) as third:
        third.take_if_there()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [OutputLock, DirectoryLock])
def test_a_command_that_waits_for_another_says_so_once(tmp_path, monkeypatch, capsys, kind):
    for module, names in ((locks, ("SILENT", "PATIENCE")), (checkpointing, ("SILENT", "LOCK_PATIENCE"))):
        for name, seconds in zip(names, (0.2, 0.9), strict=True):
            monkeypatch.setattr(module, name, seconds)
    with kind(tmp_path) as first:
        first.claim() if kind is OutputLock else first.take()
        with kind(tmp_path) as second, pytest.raises(ValueError, match="is writing to"):
            second.take_if_there()
    told = f"note: another command is writing to {tmp_path}; this one waits up to 1 s for its end.\n"
    assert capsys.readouterr().err == told


def test_a_directory_that_another_command_made_meanwhile_is_refused(tmp_path):
    with OutputLock(tmp_path / "out") as lock:
        lock.take_if_there()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "result").write_text("theirs")
        with pytest.raises(ValueError, match="has just written"):
            lock.claim()
    assert (tmp_path / "out" / "result").read_text() == "theirs"


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path; from ijepa_transformers.locks import OutputLock\n"
    code += "lock = OutputLock(Path(sys.argv[1])); lock.claim(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is writing to"):
            OutputLock(tmp_path).claim()
        holder.kill()
    with OutputLock(tmp_path) as lock:
        lock.claim()


def test_file_systems_without_locks_do_not_stop_a_command(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with OutputLock(tmp_path / "out") as lock, alone_with(tmp_path / "page.html"):
        lock.claim()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Another command is writing to" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "command, flags",
    [
        (extraction, ("--model", "nowhere")),
        (evaluation_command, ("--models", "nowhere")),
        (finetuning_command, ("--model", "nowhere", "--use_cpu", "--report_to", "none")),
        (
            pretraining_command,
            ("--max_steps", 1, "--batch_size", 8, "--per_device_batch_size", 8, "--mixed_precision", "no"),
        ),
    ],
)
def test_a_second_start_in_one_directory_is_refused(tmp_path, capsys, command, flags):
    (tmp_path / "result").write_text("of the first")
    with OutputLock(tmp_path) as first:
        first.take_if_there()
        refused(capsys, command.main, "--data", "digits", *flags, "--output_dir", tmp_path)
    assert files(tmp_path) == {"result": b"of the first"}


def test_a_command_is_refused_in_the_directory_of_a_pretraining(tmp_path, capsys):
    with DirectoryLock(tmp_path) as first:
        first.take()
        refused(capsys, extraction.main, "--data", "digits", "--model", "nowhere", "--output_dir", tmp_path)
    with OutputLock(tmp_path) as lock:
        lock.take_if_there()  # the pretraining has given it back


def test_a_second_visualization_is_refused(tmp_path, capsys):
    with alone_with(tmp_path / "page.html"):
        before = files(tmp_path)
        argv = ("--data", "digits", "--model", tmp_path, "--output", tmp_path / "page.html")
        refused(capsys, visualization_command.main, *argv)
        assert files(tmp_path) == before
    assert files(tmp_path) == {}


def test_a_second_conversion_leaves_what_the_first_has_written(tmp_path):
    with command_line.written_aside(tmp_path / "out") as first:
        first.mkdir()
        (first / "weights").write_text("of the first")
        with (
            pytest.raises(ValueError, match="Another command is writing to"),
            command_line.written_aside(tmp_path / "out"),
        ):
            pass
        assert (first / "weights").read_text() == "of the first"
    assert (tmp_path / "out" / "weights").read_text() == "of the first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
