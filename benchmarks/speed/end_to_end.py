# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A whole pretraining run on JPEG files, and how much of its time is not spent in the optimizer step.

    python benchmarks/speed/end_to_end.py [--size tiny] [--image_size 128] [--images 768] [--batch_size 16]
        [--epochs 1] [--workers 1] [--mixed_precision no] [--labelled] [--allocator keep] [--output FILE]
        [more arguments of run_pretraining.py]

Writes a folder of generated photographs of 500 x 375 pixels, runs `run_pretraining.main` on it in this process (as
`python run_pretraining.py` would) and times its functions from outside: waiting for the next batch, the step (forward
and backward pass, optimizer, moving average), bookkeeping, metrics, logging, checkpoints, the exported model, and what
is left. Time inside a function that is timed itself counts there only. On a GPU the step's clock waits for the device
before and after it, so that nothing else is hidden behind the device's work: the share outside is an upper limit.

`outside_step` are shares of the training loop, the start of the workers and the first step left out.
`outside_step_at_defaults` is computed from them for a longer run, with a row of metrics and a checkpoint as often as
recipes have them unless told otherwise. All times are wall times. `cpu_seconds` is processor time of this process: it
holds what threads do meanwhile, such as completing a checkpoint, and nothing of the workers. The last line of the
output is one JSON object, which is added to a file too.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation


from benchmarks.speed.input_pipeline import CASES, jpeg, photograph
from benchmarks.speed.timing import Seconds, add_common_arguments, prepare, report
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import loop as pretraining_loop
from ijepa_transformers.pretraining import saving as pretraining_saving
from ijepa_transformers.pretraining.arguments import OutputArguments


DIFFERENT_PHOTOS = 64
STEP, WAITING, STARTING, REST = "step", "waiting for images", "starting workers", "rest of the loop"
PER_ROW, PER_CHECKPOINT = ("metrics", "logging"), ("checkpoint", "export")

# The modules that call the functions below, and under which name the time of each function counts.
CALLERS = (pretraining_command, pretraining_loop, pretraining_saving)
PHASES = {"build_run": "building", "start": "starting", "train": REST, "finish": "finishing"}
PARTS = {
    "optimizer_step": STEP,
    "update_target_encoder": STEP,
    "any_process": "asking for stop signals",
    "evaluate": "evaluation",
    "record": "logging",
    "save": "checkpoint",
    "export": "export",
}


class Stopwatch:
    """The time of each call of timed functions, without that of timed functions inside it.

    `calls` holds (phase, name, Seconds); the phase is that of the outermost function in PHASES.
    """

    def __init__(self):
        self.calls, self.phase, self.inside = [], None, []

    def timed(self, name: str, function: Callable, phase: str | None = None) -> Callable:
        def wrapper(*arguments, **options):
            self.phase = phase or self.phase
            self.inside.append(Seconds(0.0, 0.0))
            start = now(name)
            try:
                return function(*arguments, **options)
            finally:
                elapsed = now(name).since(start)
                self.calls.append((self.phase, name, elapsed.since(self.inside.pop())))
                if self.inside:
                    self.inside[-1] = Seconds(*map(sum, zip(self.inside[-1], elapsed, strict=True)))

        return wrapper

    def seconds(self, phase: str, name: str) -> list[float]:
        return [seconds.wall for *place, seconds in self.calls if place == [phase, name]]

    def cpu_seconds(self, phase: str, name: str) -> float:
        """Of all calls together."""
        return sum(seconds.cpu for *place, seconds in self.calls if place == [phase, name])

    def calls_of(self, name: str) -> list[float]:
        """In any phase: the model is exported when the loop has ended, too."""
        return [seconds.wall for _, found, seconds in self.calls if found == name]

    def names(self, phase: str) -> list[str]:
        return sorted({name for found, name, _ in self.calls if found == phase})


def now(name: str) -> Seconds:
    if name == STEP and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Seconds.now()


class TimedBatches(Iterator):
    def __init__(self, batches: Iterator, stopwatch: Stopwatch):
        self.next = stopwatch.timed(WAITING, batches.__next__)

    def __next__(self) -> dict:
        return self.next()


def watch(stopwatch: Stopwatch) -> None:
    """Puts the stopwatch round the functions of a pretraining run."""
    step, window = pretraining_loop.optimizer_step, pretraining_loop.Window

    def optimizer_step(run, batches, number):
        return step(run, TimedBatches(batches, stopwatch), number)

    pretraining_loop.optimizer_step = optimizer_step
    for attribute, name in PHASES.items():
        phase = stopwatch.timed(name, getattr(pretraining_command, attribute), phase=attribute)
        setattr(pretraining_command, attribute, phase)
    for attribute, name in PARTS.items():
        modules = [module for module in CALLERS if hasattr(module, attribute)]
        if not modules:
            raise AttributeError(f"no module of CALLERS has {attribute!r}")
        for module in modules:
            setattr(module, attribute, stopwatch.timed(name, getattr(module, attribute)))
    DataLoader.__iter__ = stopwatch.timed(STARTING, DataLoader.__iter__)
    window.add = stopwatch.timed("bookkeeping", window.add)
    window.row = stopwatch.timed("metrics", window.row)


def write_photos(folder: Path, num_images: int, labelled: bool) -> None:
    """In one folder; or labelled: in two classes, and an eighth as many again for validation."""
    texture = CASES["500x375"]["texture"]
    photos = [jpeg(photograph(500, 375, texture, seed)) for seed in range(min(num_images, DIFFERENT_PHOTOS))]
    places = ("train/a", "train/b", "validation/a", "validation/b") if labelled else (".",)
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)
    for number in range(num_images + num_images // 8 if labelled else num_images):
        first = 2 * (number >= num_images)
        place = places[first + number % 2 if labelled else 0]
        (folder / place / f"{number:06}.jpg").write_bytes(photos[number % len(photos)])


def loop_figures(stopwatch: Stopwatch, num_steps: int, batch_size: int, output: argparse.Namespace) -> dict:
    """Seconds of each part of the training loop, and shares of what is not the step."""
    loop = {name: stopwatch.seconds("train", name) for name in stopwatch.names("train")}
    # Two calls make a step, the second one moves the target encoder.
    first_batch, first_step = loop[WAITING][0], sum(loop[STEP][:2])
    totals = {name: sum(values) for name, values in loop.items()}
    steady = {**totals, WAITING: totals[WAITING] - first_batch, STEP: totals[STEP] - first_step}
    del steady[STARTING]
    steady_seconds, steady_steps = sum(steady.values()), num_steps - 1
    per_step = {name: total / steady_steps for name, total in steady.items()}
    for names, steps in ((PER_ROW, output.logging_steps), (PER_CHECKPOINT, output.save_steps)):
        per_step.update({name: statistics.mean(stopwatch.calls_of(name)) / steps for name in names})
    return {
        "first_batch_seconds": round(totals[STARTING] + first_batch, 2),
        "first_step_seconds": round(first_step, 2),
        "step_milliseconds": round(1000 * steady[STEP] / steady_steps, 1),
        "images_per_second": round(batch_size * steady_steps / steady_seconds, 1),
        "seconds": {name: round(total, 3) for name, total in totals.items()},
        "cpu_seconds": {name: round(stopwatch.cpu_seconds("train", name), 3) for name in totals},
        "calls": {name: len(values) for name, values in loop.items()},
        "outside_step": shares(steady),
        "outside_step_at_defaults": {
            "logging_steps": output.logging_steps,
            "save_steps": output.save_steps,
            **shares(per_step),
        },
    }


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Per cent of the whole of all that is not the step."""
    whole = sum(seconds.values())
    outside = {name: round(100 * value / whole, 2) for name, value in seconds.items() if name != STEP}
    return {"total_percent": round(100 * (1 - seconds[STEP] / whole), 2), **outside}


def run_arguments(arguments: argparse.Namespace, data: Path, output_dir: Path) -> list[str]:
    settings = {
        "data": data,
        "output_dir": output_dir,
        "size": arguments.size,
        "image_size": arguments.image_size,
        "patch_size": arguments.patch_size,
        "batch_size": arguments.batch_size,
        "per_device_batch_size": arguments.batch_size,
        "epochs": arguments.epochs,
        "warmup_epochs": 0,
        "num_workers": arguments.workers,
        "mixed_precision": arguments.mixed_precision,
        "logging_steps": arguments.logging_steps,
        **({"validation_split": "validation"} if arguments.labelled else {}),
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", default="tiny", help="of the model, as in recipes")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--images", type=int, default=768, help="photographs, of which 64 are different")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mixed_precision", default="bf16" if torch.cuda.is_available() else "no")
    parser.add_argument("--logging_steps", type=int, default=10, help="in the run itself")
    parser.add_argument("--labelled", action="store_true", help="two classes and a validation split, so with k-NN")
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    add_common_arguments(parser)
    return parser.parse_known_args()


def main():
    arguments, more = parse_arguments()
    prepare(arguments)
    num_steps = int(arguments.epochs * (arguments.images // arguments.batch_size))
    if num_steps < 3:
        raise SystemExit(f"{num_steps} steps are too few: more images or epochs, or a smaller batch")
    stopwatch = Stopwatch()
    watch(stopwatch)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(f"writing {arguments.images} photographs to {directory}", flush=True)
        write_photos(Path(directory) / "photos", arguments.images, arguments.labelled)
        words = run_arguments(arguments, Path(directory) / "photos", Path(directory) / "run")
        print("run_pretraining.py", *words, *more, flush=True)
        start = Seconds.now()
        pretraining_command.main([*words, *more])
        seconds = Seconds.now().since(start)
    on_gpu = torch.cuda.is_initialized()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("directory", "output")}
    result = {
        **{**settings, "more_arguments": more},
        "steps": num_steps,
        "seconds": round(seconds.wall, 2),
        "cpu_seconds": round(seconds.cpu, 2),
        "images_per_second": round(num_steps * arguments.batch_size / seconds.wall, 1),
        "images_per_cpu_second": round(num_steps * arguments.batch_size / seconds.cpu, 1),
        "phases": {
            phase: round(sum(sum(stopwatch.seconds(phase, name)) for name in stopwatch.names(phase)), 2)
            for phase in PHASES
        },
        "loop": loop_figures(stopwatch, num_steps, arguments.batch_size, OutputArguments()),
    }
    report("end_to_end", arguments, result, "cuda" if on_gpu else "cpu")


if __name__ == "__main__":
    main()
