"""Kills a pretraining run again and again, at random moments, and looks at what is left:

    python tests/kill_loop.py --kills 200
    python tests/kill_loop.py --kills 50 --signal TERM --num_workers 2

Every second kill waits for the writing of a checkpoint to begin. After every kill there must be nothing under a
checkpoint's name but whole checkpoints. At the end the run must equal, bit for bit, one that was never killed:
weights, optimizer and metrics. Prints how many kills fell into the writing of a checkpoint or of the model; exits with
1 if anything was lost.

Each attempt is a fork of this process, which has everything imported: an attempt takes a second, not ten.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining.checkpointing import damage
from tests.runs import TINY, saved_weights


RUN = {**TINY, "per_device_batch_size": 4, "logging_steps": 1, "save_steps": 2, "drop_path_rate": 0.1}


@dataclass
class Report:
    """What the kills hit, and what they cost."""

    kills: int = 0
    in_checkpoint: int = 0
    in_export: int = 0
    before_training: int = 0
    exit_codes: dict[int, int] = field(default_factory=dict)
    slowest_exit: float = 0.0
    losses: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.exit_codes.items()))
        return (
            f"{self.kills} kills: {self.in_checkpoint} while a checkpoint was written, {self.in_export} while the"
            f" model was exported, {self.before_training} before the first step\nexit codes: {codes}; slowest exit"
            f" {self.slowest_exit:.1f} s\n{len(self.losses)} losses {self.losses or ''}"
        )


def start(words: list[str], log: Path) -> int:
    """Forks a process group that runs run_pretraining.py; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setpgrp()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 0
    try:
        pretraining_command.main(words)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def wait(child: int, seconds: float | None = None) -> int | None:
    """The exit code, negative for a signal; None if the process still runs after that long."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def wait_for_checkpoint(child: int, checkpoints: Path, seconds: float) -> int | None:
    """Waits until a checkpoint is being written, and a moment more."""
    code = None
    while code is None and not any(checkpoints.glob(".tmp-*")):
        code = wait(child, 0)
    return wait(child, seconds) if code is None else code


def words(directory: Path, steps: int, num_workers: int) -> list[str]:
    settings = {**RUN, "output_dir": directory, "max_steps": steps, "num_workers": num_workers, "resume": "true"}
    return [f"--{key}={value}" for key, value in settings.items()]


def strike(child: int, number: signal.Signals, report: Report) -> None:
    """SIGKILL takes the whole group at once; another signal is given 30 seconds to be obeyed."""
    began = time.monotonic()
    os.killpg(child, number)
    code = wait(child, 30)
    if code is None:
        report.losses.append("did not stop within 30 s")
        os.killpg(child, signal.SIGKILL)
        code = wait(child)
    if number != signal.SIGKILL and code not in (pretraining_command.PREEMPTED, 0):
        report.losses.append(f"kill {report.kills + 1}: exit code {code}")
    report.slowest_exit = max(report.slowest_exit, time.monotonic() - began)
    report.exit_codes[code] = report.exit_codes.get(code, 0) + 1


def inspect(directory: Path, report: Report) -> None:
    """What the kill has left."""
    checkpoints = directory / "checkpoints"
    report.in_checkpoint += any(checkpoints.glob(".tmp-*"))
    report.in_export += (directory / ".tmp-export").exists()
    report.before_training += not checkpoints.exists()
    for checkpoint in checkpoints.glob("step-*"):
        if problem := damage(checkpoint):
            report.losses.append(f"kill {report.kills}: {checkpoint.name}: {problem}")
    saved_weights(directory)


def differences(ours: Path, others: Path, steps: int) -> list[str]:
    """What a killed run has otherwise than one left in peace."""
    found = []
    weights = [saved_weights(directory) for directory in (ours, others)]
    if any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[1]):
        found.append("other weights")
    last = f"checkpoints/step-{steps:08d}/optimizer.bin"
    states = [torch.load(directory / last, weights_only=True)["state"] for directory in (ours, others)]
    if any(
        not torch.equal(states[0][key][name], states[1][key][name]) for key in states[1] for name in states[1][key]
    ):
        found.append("another optimizer state")
    if rows(ours) != rows(others):
        found.append("other metrics")
    return found


def rows(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "images_per_second"} for line in lines]


def kill_loop(
    directory: Path, kills: int, *, number: signal.Signals = signal.SIGKILL, num_workers: int = 0, seed: int = 0
) -> Report:
    """Kills a run `kills` times in `directory`, lets it end, and compares it with an untouched one."""
    steps, report, moments = 6 * kills, Report(), random.Random(seed)
    untouched, killed = (words(directory / name, steps, num_workers) for name in ("untouched", "killed"))
    began = time.monotonic()
    assert wait(start(untouched, directory / "untouched.log")) == 0, (directory / "untouched.log").read_text()
    longest = 2 * (time.monotonic() - began) / kills  # of six steps and three checkpoints, twice
    while report.kills < kills:
        child = start(killed, directory / "killed.log")
        code = wait(child, moments.uniform(0, longest))
        if code is None and report.kills % 2:
            code = wait_for_checkpoint(child, directory / "killed/checkpoints", moments.uniform(0, 0.05))
        if code is not None:
            report.losses += [] if code == 0 else [f"exit code {code} before kill {report.kills + 1}"]
            break
        strike(child, number, report)
        report.kills += 1
        inspect(directory / "killed", report)
    code = wait(start(killed, directory / "killed.log"))
    report.losses += [f"the last attempt ended with {code}"] if code else []
    if number == signal.SIGKILL:
        report.losses += differences(directory / "killed", directory / "untouched", steps)
    else:  # a run that stops writes a row where it stops, so only the weights can be equal
        report.losses += [
            each for each in differences(directory / "killed", directory / "untouched", steps) if "metrics" not in each
        ]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT", "USR1"])
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where the runs stay; a temporary one by default")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(exist_ok=True, parents=True)
        report = kill_loop(
            directory, arguments.kills, number=number, num_workers=arguments.num_workers, seed=arguments.seed
        )
    print(report)
    sys.exit(bool(report.losses))


if __name__ == "__main__":
    main()
