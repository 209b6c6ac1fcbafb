"""What stands last if a launched command fails: our sentence, once, and the code of the process."""

import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ijepa_transformers import cli, launch, launcher
from ijepa_transformers.failures import end


@pytest.fixture
def error_file(tmp_path, monkeypatch):
    monkeypatch.setenv(launcher.ERROR_FILE, str(tmp_path / "error.json"))
    return tmp_path / "error.json"


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited."""
    found = []
    monkeypatch.setattr("ijepa_transformers.launcher.time.sleep", found.append)
    return found


def failure(path, code=2):
    return ProcessFailure(local_rank=0, pid=7, exitcode=code, error_file=str(path))


def test_the_launcher_finds_the_sentence_of_a_failed_run(error_file, waits, capsys):
    with pytest.raises(SystemExit):
        end("ijepa pretrain", OSError("x"), "the disk is full.", 1)
    assert failure(error_file).message == "ijepa pretrain: error: the disk is full."
    assert waits == [] and capsys.readouterr().err.count("the disk is full") == 1


def test_the_launcher_finds_the_sentence_of_a_wrong_argument(error_file, waits, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.main(["extract", "--modell", "x"])
    sentence = capsys.readouterr().err.strip()
    assert "unrecognized arguments: --modell" in sentence and failure(error_file).message == sentence
    assert sum(waits) == launcher.FIRST_SPEAKS  # for the first process


def test_a_process_is_silent_if_the_first_one_has_said_the_same(tmp_path, waits, monkeypatch, capsys):
    def said_by(number, sentence):
        (tmp_path / number).mkdir(exist_ok=True)
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv(launcher.ERROR_FILE, str(tmp_path / number / "error.json"))  # as torchrun places it
        with pytest.raises(SystemExit):
            end("ijepa pretrain", OSError("x"), sentence, 1)
        return capsys.readouterr().err

    assert "the disk is full." in said_by("0", "the disk is full.")
    assert said_by("1", "the disk is full.") == "" and waits == []
    assert "the network is down." in said_by("1", "the network is down.") and sum(waits) == launcher.FIRST_SPEAKS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ChildFailedError("x", {0: failure("no file", 75)}), 75),
        (ChildFailedError("x", {0: failure("no file", -9)}), 1),
        (ChildFailedError("x", {0: failure("no file", -15), 1: failure("no file", 2)}), 2),
        (subprocess.CalledProcessError(2, ["x"]), 2),
    ],
)
def test_a_launch_ends_with_the_code_of_its_process_and_no_traceback(monkeypatch, capsys, error, code):
    given = []

    def launch_command(arguments):
        given.append(arguments)
        raise error

    monkeypatch.setenv(launch.USE_CPU, "true")
    monkeypatch.setattr(launch, "launch_command", launch_command)
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["launch", "--num_processes", "2", "pretrain", "--recipe", "quickstart"])
    assert stopped.value.code == code and "Traceback" not in capsys.readouterr().err
    assert given[0].num_processes == 2 and given[0].module and given[0].training_script == "ijepa_transformers.cli"
    assert given[0].training_script_args == ["pretrain", "--recipe", "quickstart"]


def test_a_launch_without_a_command_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["launch", "--num_processes", "2"])
    assert stopped.value.code == 2 and "Name a command after the flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_proceses", "2"], "accelerate launch has no flag --num_proceses. Did you mean --num_processes?"),
        (["--num_processes", "two"], "--num_processes: invalid int value: 'two'."),
        (["--num_processes", "0"], "num_processes must be at least 1, got 0."),
    ],
)
def test_a_wrong_flag_of_a_launch_is_one_sentence(capsys, flags, sentence):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["launch", *flags, "pretrain", "--recipe", "quickstart"])
    assert stopped.value.code == 2 and capsys.readouterr().err == f"ijepa: error: {sentence}\n"


@pytest.mark.parametrize("flags", [[], ["--cpu"]])
def test_processes_without_gpus_work_together_on_the_cpu(monkeypatch, capsys, flags):
    """Accelerate alone would start one process, and say nothing."""
    given = []
    monkeypatch.setenv(launch.USE_CPU, "")
    monkeypatch.setattr(launch, "launch_command", given.append)
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: False)
    cli.main(["launch", *flags, "--num_processes", "2", "pretrain"])
    assert given[0].multi_gpu and not given[0].cpu and os.environ[launch.USE_CPU] == "true"
    assert "2 processes compute on the CPU" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.delenv(launch.USE_CPU, raising=False)
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["launch", "--num_processes", "2", "pretrain"])
    assert stopped.value.code == 2 and "only 1 GPU can be seen" in capsys.readouterr().err


@pytest.mark.slow
def test_two_real_processes_that_fail_end_with_one_sentence(tmp_path):
    """`accelerate launch` shows its own summary; `ijepa launch` shows the sentence alone."""
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["pretrain", "--recipe", "quickstart", "--batch_size", "15", "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    argv = [sys.executable, "-m", "ijepa_transformers.cli", "launch", *flags, *command]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=400)
    sentence = "ijepa pretrain: error: batch_size 15 is not a multiple of per_device_batch_size 16 x 2 processes."
    assert done.returncode == 2 and done.stderr.strip() == sentence
