# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint costs beside its own writing: the model in the output directory, and the hashes.

    python benchmarks/speed/checkpoint.py [--size base] [--turns 5] [--directory DIR] [--output FILE]

`write` saves the weights of a model a second time, as FSDP2 and DeepSpeed do. `link` gives the files of a checkpoint a
second name, as one process and DDP do; of two checkpoints in turns, because a run replaces the older model by a newer
one. Both end on the disk. `hash` reads the files and takes their SHA-256, once for each checkpoint. They take turns.
Figures are medians over the turns, by wall and by processor time. The last line of the output is one JSON object,
which is added to a file too.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.timing import add_common_arguments, prepare, report, rounded, take_turns
from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa_transformers.checkpoints import describe_files
from ijepa_transformers.files import files_below, link_or_copy, replace_files, sync_to_disk
from ijepa_transformers.modeling_ijepa import weight_files


def write(model: IJepaForPretraining, aside: Path, destination: Path) -> None:
    model.save_pretrained(aside)
    replace_files(aside, destination)


def link(checkpoints: Iterator[Path], aside: Path, destination: Path) -> None:
    aside.mkdir()
    for file in weight_files(next(checkpoints)):
        link_or_copy(file, aside / file.name)
    replace_files(aside, destination)


def measure(size: str, num_turns: int, directory: Path) -> dict:
    logging.disable_progress_bar()
    model = IJepaForPretraining(IJepaConfig(**IJEPA_SIZES[size], patch_size=16))
    checkpoints = [directory / f"step-{step:08d}" for step in (1, 2)]
    written, linked = directory / "written", directory / "linked"
    for place in (written, linked):
        place.mkdir()
    for checkpoint in checkpoints:
        model.save_pretrained(checkpoint)
        for file in files_below(checkpoint):
            sync_to_disk(file)
    files = weight_files(checkpoints[0])
    work = {
        "write": partial(write, model, directory / ".tmp-write", written),
        "link": partial(link, cycle(checkpoints), directory / ".tmp-link", linked),
        "hash": partial(describe_files, checkpoints[0], [file.name for file in files]),
    }
    for function in work.values():
        function()
    times = take_turns(work, seconds=0, least_turns=num_turns)
    figures = {
        name: {
            "seconds": rounded((each.wall for each in values), 4),
            "cpu_seconds": rounded((each.cpu for each in values), 4),
        }
        for name, values in times.items()
    }
    return {"size": size, "turns": num_turns, "bytes": sum(file.stat().st_size for file in files), **figures}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=list(IJEPA_SIZES), default="base")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--directory", help="where the temporary directory is made: on the disk to measure")
    add_common_arguments(parser)
    arguments = parser.parse_args(words)
    prepare(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        result = measure(arguments.size, arguments.turns, Path(directory))
    for name in ("write", "link", "hash"):
        print(f"{name}: {result[name]}")
    report("checkpoint", arguments, result)


if __name__ == "__main__":
    main()
