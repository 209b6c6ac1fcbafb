"""Whatever ends or troubles a run, nothing is lost: signals, kills, full disks, damaged files, dying workers, NaN.

The long version of the kill loop: python tests/kill_loop.py --kills 200
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ijepa_transformers import modeling_ijepa
from ijepa_transformers.data.datasets import PretrainingImages
from ijepa_transformers.modeling_ijepa import remove_weights
from ijepa_transformers.pretraining import build as pretraining_build
from ijepa_transformers.pretraining import checkpointing as pretraining_checkpointing
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import evaluate as pretraining_evaluate
from ijepa_transformers.pretraining import loop
from ijepa_transformers.pretraining.checkpointing import DirectoryLock, damage, newest_checkpoint
from tests import forked
from tests.runs import (
    assert_close_weights,
    environment_of,
    launch,
    launched_weights,
    pretrain,
    pretraining_argv,
    real_launch_command,
    saved_weights,
    send_in_step,
    start_launch,
    status,
)


REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate", "signals_that_are_heard")


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


# Kills and signals


@pytest.mark.parametrize(
    "options",
    [
        ["--kills", "2"],
        pytest.param(["--kills", "8"], marks=pytest.mark.slow),
        pytest.param(["--kills", "4", "--num_workers", "2"], marks=pytest.mark.slow),
        pytest.param(["--kills", "4", "--signal", "TERM", "--num_workers", "1"], marks=pytest.mark.slow),
    ],
    ids=["kill twice", "kill", "kill with workers", "sigterm"],
)
def test_a_run_that_is_killed_at_any_moment_ends_like_an_uninterrupted_one(options):
    done = forked.run(["tests/kill_loop.py", *options])
    assert done.returncode == 0 and "\n0 losses" in done.stdout, done.stdout + done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGTERM, 4), (signal.SIGINT, 4), (signal.SIGUSR1, 4), (signal.SIGHUP, 4), (signal.SIGTERM, 5)],
)
def test_a_signal_saves_and_exits_with_its_code_and_the_run_goes_on_bit_for_bit(tmp_path, monkeypatch, number, step):
    """Also in the last step, after which only the model is left to write."""
    heard = signal.getsignal(number)
    whole = pretrain(tmp_path / "whole", drop_path_rate=0.3)
    send_in_step(monkeypatch, step, number)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "cut", drop_path_rate=0.3)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert stop.value.code == 75 and status(tmp_path / "cut") == "preempted"
    assert newest_checkpoint(tmp_path / "cut/checkpoints", pytest.fail).name == f"step-0000000{step + 1}"
    again = pretrain(tmp_path / "cut", drop_path_rate=0.3, resume="true")
    assert_close_weights(again, whole, 0)
    assert status(tmp_path / "cut") == "finished"
    assert signal.getsignal(number) == heard


def test_an_evaluation_that_a_signal_interrupts_is_done_after_the_resume(tmp_path, monkeypatch):
    changes = {"validation_split": "test", "max_probe_images": 60, "eval_steps": 4}
    pretrain(tmp_path / "whole", **changes)
    original, calls = pretraining_evaluate.Probe.features_of, []

    def features_of(self, encoder):
        calls.append(encoder)
        if len(calls) == 2:  # the first is the random encoder's
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, encoder)

    monkeypatch.setattr(pretraining_evaluate.Probe, "features_of", features_of)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "cut", **changes)
    assert stop.value.code == 75
    pretrain(tmp_path / "cut", resume="true", **changes)
    ours, others = rows_by_step(tmp_path / "cut"), rows_by_step(tmp_path / "whole")
    assert {step: row.get("knn_accuracy") for step, row in ours.items() if step in others} == {
        step: row.get("knn_accuracy") for step, row in others.items()
    }


def rows_by_step(directory):
    return {row["step"]: row for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())}


TWO_PROCESSES = {"max_steps": 60, "save_steps": 20, "validation_split": "", "num_workers": 1, "warmup_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a run of two processes that was left in peace."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    launch("ddp", directory, **TWO_PROCESSES)
    return launched_weights(directory)


def wait_for_step(run, checkpoint=20, rows=24):
    """Waits until a run has written a checkpoint and trained on."""
    wait_until(lambda: (run / f"checkpoints/step-{checkpoint:08d}").exists())
    wait_until(lambda: (run / "metrics.jsonl").read_text().count("\n") >= rows)


def assert_goes_on(directory, whole):
    done = launch("ddp", directory, resume="true", **TWO_PROCESSES)
    assert "resuming" in done.stdout
    assert_close_weights(launched_weights(directory), whole, 0)


@pytest.mark.parametrize("event", ["both told", "one told", "one killed"])
def test_two_processes_stop_together(tmp_path, uninterrupted, event):
    """Who is told to stop saves; after a killed process an older checkpoint serves."""
    run = tmp_path / "run"
    processes = start_launch("ddp", tmp_path, **TWO_PROCESSES)
    wait_for_step(run)
    if event == "both told":
        processes.send_signal(signal.SIGTERM)
    else:
        os.kill(processes.pids[1], signal.SIGKILL if event == "one killed" else signal.SIGUSR1)
    code = processes.wait(120)
    if event == "one killed":
        assert code not in (0, 75)
    else:
        assert code == 75 and processes.codes == [75, 75] and status(run) == "preempted"
        assert newest_checkpoint(run / "checkpoints", pytest.fail).name > "step-00000020"
    assert_goes_on(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["launcher told", "one worker told", "launcher killed", "worker killed"])
def test_two_processes_of_the_real_launcher_stop_together(tmp_path, uninterrupted, event):
    """Whether the launcher is told, killed, or sees a worker end."""
    run = tmp_path / "run"
    command = real_launch_command("ddp", tmp_path, **TWO_PROCESSES)
    launcher = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **environment_of("ddp")})
    wait_for_step(run)
    workers = ranks_of(run)
    assert len(workers) == 2
    number = signal.SIGKILL if event.endswith("killed") else signal.SIGUSR1 if "worker" in event else signal.SIGTERM
    os.kill(launcher.pid if event.startswith("launcher") else workers[1], number)
    launcher.wait(120)
    wait_until(lambda: not training_processes(run))
    if event != "worker killed":
        assert status(run) == "preempted"  # in time, or the launcher would have killed it after 30 seconds
        assert newest_checkpoint(run / "checkpoints", pytest.fail).name > "step-00000020"
    assert_goes_on(tmp_path, uninterrupted)


def training_processes(run):
    """Process id -> command of the parent, of all processes that write to `run`, but launchers."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_text()
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if f"--output_dir={run}" in command and "accelerate_cli" not in command:
                found[int(entry.name)] = (entry.parent / parent / "cmdline").read_text()
        except OSError:
            continue
    return found


def ranks_of(run):
    """Process ids of the two ranks: their parent is the launcher."""
    return sorted(pid for pid, parent in training_processes(run).items() if "accelerate_cli" in parent)


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


def holds(condition):
    try:
        return condition()
    except FileNotFoundError:
        return False


# Storage


def test_a_full_disk_is_one_sentence_and_older_checkpoints_stay(tmp_path):
    pretrain(tmp_path / "run", max_steps=6, save_steps=3, keep_checkpoints=5)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    before = {path: data for path, data in files(tmp_path / "run").items() if "checkpoints" in path.parts}
    model = (tmp_path / "run/model.safetensors").read_bytes()
    argv = ["run_pretraining.py", *pretraining_argv(tmp_path / "run", resume="true")]
    done = forked.run(argv, file_size_limit=20_000)  # a disk on which no larger file fits
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the checkpoint of step 6 cannot be written" in done.stderr and "step-00000003" in done.stderr
    assert status(tmp_path / "run") == "failed"
    assert {path: data for path, data in files(tmp_path / "run").items() if "checkpoints" in path.parts} == before
    assert (tmp_path / "run/model.safetensors").read_bytes() == model
    pretrain(tmp_path / "run", resume="true", keep_checkpoints=5)  # when there is room again


def test_a_full_disk_under_the_picture_of_the_curves_names_the_directory(tmp_path):
    """matplotlib's error names no file."""
    argv = ["run_pretraining.py", *pretraining_argv(tmp_path / "run")]
    done = forked.run(argv, file_size_limit=100_000)  # the weights are shorter, the picture is longer
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'run'}: File too large. What was saved before is complete" in done.stderr


def test_an_output_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file/run", "/proc/run"):
        done = forked.run(["run_pretraining.py", *pretraining_argv(place)])
        assert done.returncode != 0 and str(place) in done.stderr and "Traceback" not in done.stderr


HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from ijepa_transformers.pretraining.checkpointing import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_the_same_directory_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretraining_checkpointing, "LOCK_PATIENCE", 0.0)
    pretrain(tmp_path / "run", max_steps=3)
    remove_weights(tmp_path / "run")  # a finished run is not opened
    holder = forked.start(["-c", HOLD_THE_LOCK, tmp_path / "run"])
    wait_until(lambda: holder.stdout == "held\n")
    before = files(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", max_steps=3, resume="true")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"Another run (process {holder.pid} on" in error
    assert files(tmp_path / "run") == before
    holder.kill()
    holder.wait()
    DirectoryLock(tmp_path / "run").take()  # the lock ended with its process


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with DirectoryLock(tmp_path) as lock:
        lock.take()
        assert lock.is_taken


def test_a_lock_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    (tmp_path / ".lock").mkdir()
    with DirectoryLock(tmp_path) as lock, pytest.raises(OSError, match=r"\.lock"):
        lock.take()
    assert not lock.is_taken


# Damaged checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Whole checkpoints of steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(directory / "run", save_steps=2, keep_checkpoints=5)
    return directory / "run/checkpoints"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


KINDS = {
    "model.safetensors",
    "pretraining.safetensors",
    "pretraining.safetensors.index.json",
    "optimizer.bin",
    "random_states_0.pkl",
    "monitor_0.safetensors",
    "run_state.json",
    "images.safetensors",
    "config.json",
    "preprocessor_config.json",
    "manifest.json",
}


@pytest.mark.parametrize("harm", [cut, empty, Path.unlink, flip], ids=["cut", "empty", "missing", "flipped"])
def test_a_damaged_file_of_any_kind_is_found_and_the_newest_whole_checkpoint_used(checkpoints, tmp_path, harm):
    assert {path.name for path in (checkpoints / "step-00000006").iterdir()} == KINDS
    for kind in KINDS:
        copy = Path(shutil.copytree(checkpoints, tmp_path / kind))
        harm(copy / "step-00000006" / kind)
        said = []
        assert newest_checkpoint(copy, said.append) == copy / "step-00000004"
        assert len(said) == 1 and "step-00000006 is damaged" in said[0], kind


def test_any_changed_byte_of_a_manifest_is_damage(checkpoints, tmp_path):
    copy = Path(shutil.copytree(checkpoints / "step-00000006", tmp_path / "step-00000006"))
    manifest = (copy / "manifest.json").read_bytes()
    assert damage(copy) is None
    for place in range(0, len(manifest), 7):
        harmed = bytearray(manifest)
        harmed[place] ^= 1
        (copy / "manifest.json").write_bytes(harmed)
        before = json.loads(manifest)
        try:
            same = json.loads(harmed) == before  # a blank became another blank
        except ValueError:
            same = False
        assert same or damage(copy) is not None, (place, bytes(harmed[place - 9 : place + 9]))


def test_no_whole_checkpoint_is_removed_because_of_damaged_ones(checkpoints, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoints.parent, run)
    for step in (4, 6):
        flip(run / f"checkpoints/step-{step:08d}/optimizer.bin")
    remove_weights(run)  # a finished run needs no checkpoint
    pretrain(run, save_steps=3, keep_checkpoints=2, resume="true", max_steps=6)
    assert [damage(path) for path in sorted((run / "checkpoints").iterdir())] == [None, None]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert_close_weights(saved_weights(run), saved_weights(checkpoints.parent), 0)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    def fails(checkpoint):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(pretraining_checkpointing, "remove_checkpoint", fails)
    pretrain(tmp_path / "run", save_steps=1, keep_checkpoints=1)
    assert status(tmp_path / "run") == "finished"


def test_a_resumed_run_works_without_lost_metrics(tmp_path):
    changes = {"validation_split": "test", "max_probe_images": 60, "eval_steps": 3, "keep_checkpoints": 5}
    whole = pretrain(tmp_path / "run", **changes)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    (tmp_path / "run/metrics.jsonl").unlink()
    assert_close_weights(pretrain(tmp_path / "run", resume="true", **changes), whole, 0)
    assert list(rows_by_step(tmp_path / "run")) == [4, 6]


def test_if_all_checkpoints_are_damaged_the_run_does_not_start(checkpoints, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(checkpoints.parent, run)
    for step in (2, 4, 6):
        empty(run / f"checkpoints/step-{step:08d}/model.safetensors")
    remove_weights(run)  # a finished run needs no checkpoint
    before = files(run)
    with pytest.raises(SystemExit) as stop:
        pretrain(run, save_steps=2, keep_checkpoints=5, resume="true")
    assert stop.value.code == 2 and "All 3 checkpoints" in capsys.readouterr().err
    assert files(run) == before


# Numbers


def spoil(monkeypatch, *steps):
    """Makes the loss of some steps (from 0) NaN."""
    original, step = modeling_ijepa.IJepaForPretraining.prediction_loss, loop.optimizer_step
    now = []

    def optimizer_step(run, batches, number):
        now[:] = [number]
        return step(run, batches, number)

    def prediction_loss(self, predictions, targets):
        return original(self, predictions * (float("nan") if now[0] in steps else 1.0), targets)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    monkeypatch.setattr(modeling_ijepa.IJepaForPretraining, "prediction_loss", prediction_loss)


def test_a_step_without_a_finite_gradient_changes_nothing_but_the_count(tmp_path, monkeypatch, capsys):
    """Also when accumulating; weights, optimizer and moving average stay, and the report names the images."""
    changes = {"per_device_batch_size": 4, "save_steps": 1, "keep_checkpoints": 9, "logging_steps": 1}
    spoil(monkeypatch, 2)
    pretrain(tmp_path / "run", **changes)
    before, after = (tmp_path / f"run/checkpoints/step-0000000{step}" for step in (2, 3))
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    states = [torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in (before, after)]
    assert all(torch.equal(states[0][key][name], states[1][key][name]) for key in states[0] for name in states[0][key])
    metrics = rows_by_step(tmp_path / "run")
    assert [row["skipped_steps"] for row in metrics.values()] == [0, 0, 1, 1, 1, 1]
    (report,) = map(json.loads, (tmp_path / "run/skipped_steps.jsonl").read_text().splitlines())
    assert report["step"] == 3 and report["losses"] == ["nan", "nan"] and len(set(report["images"])) == 8
    assert all(name.startswith("digits/") for name in report["images"])
    assert "WARNING at step 3" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path / "run").values())


def test_a_skipped_step_that_is_repeated_after_a_resume_is_reported_once(tmp_path, monkeypatch):
    spoil(monkeypatch, 3)
    pretrain(tmp_path / "run", keep_checkpoints=5)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    with open(tmp_path / "run/skipped_steps.jsonl", "a") as file:
        file.write('{"step": 5, "half')  # as after a kill
    pretrain(tmp_path / "run", keep_checkpoints=5, resume="true")
    lines = (tmp_path / "run/skipped_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]


def test_too_many_skipped_steps_end_the_run_with_a_saved_state_and_a_report(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 1, 2, 3)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", max_skipped_steps=2)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "3 steps had no finite gradient" in error and "skipped_steps.jsonl" in error
    assert newest_checkpoint(tmp_path / "run/checkpoints", pytest.fail).name == "step-00000004"
    assert status(tmp_path / "run") == "failed"
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    pretrain(tmp_path / "run", max_skipped_steps=9, resume="true")
    assert rows_by_step(tmp_path / "run")[6]["skipped_steps"] == 3


# Processes and memory


def test_a_data_loading_process_that_dies_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PretrainingImages, "__getitem__", lambda self, key: os._exit(9))
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", num_workers=1)
    assert stop.value.code == 1 and "lower num_workers" in capsys.readouterr().err


def test_a_data_loading_process_that_waits_for_a_slow_disk_does_not_delay_the_end(tmp_path, monkeypatch):
    original = PretrainingImages.__getitem__

    def slow(self, key):
        if key[0] == 4:
            time.sleep(100)
        return original(self, key)

    monkeypatch.setattr(PretrainingImages, "__getitem__", slow)
    send_in_step(monkeypatch, 2, signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", num_workers=1)
    assert stop.value.code == 75 and time.monotonic() - began < 60


@pytest.mark.parametrize("where", ["_build_model", "optimizer_step"])
def test_too_little_memory_is_one_sentence_with_advice(tmp_path, monkeypatch, capsys, where):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(loop if where == "optimizer_step" else pretraining_build, where, fails)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "Lower per_device_batch_size" in error and "--print_memory_estimate" in error


def test_the_memory_estimate_is_printed_and_nothing_started(tmp_path, capsys):
    pretraining_command.main(pretraining_argv(tmp_path / "run", print_memory_estimate="true"))
    assert "peak of one process" in capsys.readouterr().out and not (tmp_path / "run").exists()


# Slurm, make-believe


SHIMS = {
    "srun": 'echo $$ > "$SHIMS/launcher"; SLURM_NODEID=0 exec "$@"',
    "scancel": '[ "$1" = --signal=TERM ] && [ "$2" = 7.0 ] && kill -TERM $(cat "$SHIMS/launcher")',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SHIMS/requeued"; fi',
    "accelerate": 'exec "$PYTHON" -m accelerate.commands.accelerate_cli "$@"',
}


@pytest.mark.slow
def test_the_slurm_script_saves_before_the_time_is_up_and_requeues_until_the_run_is_finished(tmp_path):
    """With stand-ins for Slurm's commands: one node, two processes."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, body in SHIMS.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (shims / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{shims}:{os.environ['PATH']}", "SHIMS": str(shims)}
    environment |= {"PYTHON": sys.executable}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "here"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = tmp_path / "a run"
    settings = {"per_device_batch_size": 4, "max_steps": 60, "logging_steps": 1, "save_steps": 50}
    command = ["bash", "ijepa_transformers/recipes/accelerate/slurm.sh", *pretraining_argv(run, **settings)]
    job = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    wait_until(lambda: (run / "metrics.jsonl").read_text().count("\n") > 5)
    job.send_signal(signal.SIGUSR1)
    job.wait(60)
    assert status(run) == "preempted" and (shims / "requeued").read_text() == "requeue 7\n"
    saved = newest_checkpoint(run / "checkpoints", pytest.fail)
    assert saved is not None and saved.name < "step-00000060"
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)
    assert status(run) == "finished" and (shims / "requeued").read_text() == "requeue 7\n"
    assert newest_checkpoint(run / "checkpoints", pytest.fail).name == "step-00000060"
