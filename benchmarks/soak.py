#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""One long pretraining run, watched from outside: does its memory grow, do processes or open files pile up?

    python benchmarks/soak.py --minutes 32 --output_dir soak -- --recipe recipes/quickstart.yaml --save_steps 250 ...

Everything after -- goes to run_pretraining.py. Every ten seconds the processes of the run are counted, with their
memory (proportional set size, in which shared pages count once) and open files; when the time is up, the run is sent
SIGTERM, which must end it with exit code 75. Prints the medians of each fifth of the time, so that growth shows.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path


INTERVAL = 10  # seconds
EXIT_PREEMPTED = 75


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def proportional_set_size(pid: int) -> int:
    """Bytes of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def sample(pid: int, directory: Path) -> dict:
    members = family(pid)
    return {
        "main process, MB": proportional_set_size(pid) / 1e6,
        "all processes, MB": sum(map(proportional_set_size, members)) / 1e6,
        "processes": len(members),
        "open files": sum(len(os.listdir(f"/proc/{member}/fd")) for member in members),
        "files written": sum(1 for path in directory.rglob("*") if path.is_file()),
    }


def watch(process: subprocess.Popen, seconds: float, directory: Path) -> list[dict]:
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(INTERVAL)
        try:
            samples.append(sample(process.pid, directory))
        except (OSError, StopIteration):  # a data loading process that ended while it was looked at
            continue
    return samples


def table(samples: list[dict]) -> str:
    fifths = [samples[len(samples) * part // 5 : len(samples) * (part + 1) // 5] for part in range(5)]
    lines = ["| median of | " + " | ".join(samples[0]) + " |", "|---|" + "---:|" * len(samples[0])]
    for number, part in enumerate(fifths, 1):
        medians = (statistics.median(entry[name] for entry in part) for name in samples[0])
        lines.append(f"| fifth {number} of the time | " + " | ".join(f"{value:,.0f}" for value in medians) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=32)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="of run_pretraining.py, after --")
    options = parser.parse_args()
    command = [sys.executable, "run_pretraining.py", "--output_dir", str(options.output_dir), *options.arguments]
    began = time.monotonic()
    process = subprocess.Popen(command)
    samples = watch(process, 60 * options.minutes, options.output_dir)
    members = family(process.pid)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    code = process.wait(60)
    ended = time.monotonic()
    time.sleep(6)  # workers look for their parent every five seconds
    left = [member for member in members if Path(f"/proc/{member}").exists()]
    rows = [json.loads(line) for line in (options.output_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = sum("knn_accuracy" in row for row in rows)
    print(f"\n{(ended - began) / 60:.1f} minutes, {rows[-1]['step']:,} steps, {evaluations} k-NN, exit code {code}")
    print(f"{ended - told:.1f} s from SIGTERM to the end, {len(left)} processes left\n\n{table(samples)}")
    sys.exit(code != EXIT_PREEMPTED or bool(left))


if __name__ == "__main__":
    main()
