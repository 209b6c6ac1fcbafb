# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""How the time of a training step and of features grows with the image, the batch and the depth:

    python benchmarks/speed/scaling.py [--device cuda] [--axes image_size batch depth] [--batch_values 1 2 4]
        [--size tiny] [--image_size 224] [--batch 8] [--precision no] [--seconds 30] [--allocator keep] [--output FILE]

One of the three changes, the others stay: 224 pixels, a batch of 8, and the depth of the size. Patches have 16 pixels.
All values of an axis take turns. Figures are medians over the turns, by wall and by processor time. `exponent`
compares the processor time (on CUDA the wall time) with that of the value before: 1 is linear.
`exponent_of_operations` says the same of the operations. The last line of the output is one JSON object, which is
added to a file too.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.flops import embedding_flops, encoder_flops
from benchmarks.speed.peers import Ours
from benchmarks.speed.pretraining_step import Steps
from benchmarks.speed.timing import Seconds, add_common_arguments, prepare, report, rounded, take_turns
from ijepa_transformers import IJEPA_SIZES, IJepaConfig


VALUES = {
    "image_size": (64, 96, 128, 176, 224, 320, 448),
    "batch": (1, 2, 4, 8, 16, 32),
    "depth": (3, 6, 12, 24),
}
WORK = ("step", "features")


class Place:
    """A value of an axis: the model and the images that belong to it."""

    def __init__(self, own: argparse.Namespace, axis: str, value: int):
        settings = {"image_size": own.image_size, "batch": own.batch, "depth": None, axis: value}
        fields = {"num_hidden_layers": settings["depth"]} if settings["depth"] else {}
        config = IJepaConfig(**{**IJEPA_SIZES[own.size], **fields}, image_size=settings["image_size"], patch_size=16)
        device = torch.device(own.device)
        self.config, self.batch_size = config, settings["batch"]
        self.steps = Steps(config, self.batch_size, device)
        self.ours = Ours(config, device, own.precision)

    def step(self) -> None:
        with self.ours.settings():
            self.ours.step(self.steps.batch(self.ours.number))

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        with self.ours.settings(), self.ours.autocast():
            return self.ours.networks.ijepa(self.steps.pixel_values).last_hidden_state

    def operations(self, work: str) -> int:
        """Of a call; of the next step, because masks differ."""
        if work == "step":
            return self.batch_size * self.steps.flops(self.ours.number)
        return self.batch_size * (encoder_flops(self.config, self.config.num_patches) + embedding_flops(self.config))


def measure(own: argparse.Namespace, axis: str, work: str, values: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of an axis."""
    places = {str(value): Place(own, axis, value) for value in values}
    operations: dict[str, list[int]] = {name: [] for name in places}

    def call(name: str) -> None:
        operations[name].append(places[name].operations(work))
        getattr(places[name], work)()

    for name in places:
        call(name)
        operations[name].clear()
    times = take_turns({name: partial(call, name) for name in places}, own.seconds, device_type=own.device)
    rows: list[dict[str, Any]] = []
    for value, (name, place) in zip(values, places.items(), strict=True):
        new = row(place, times[name], operations[name], own.device)
        rows.append({"value": value, **new, **(exponents(rows[-1], new, axis, value) if rows else {})})
    return rows


def row(place: Place, times: list[Seconds], operations: list[int], device_type: str) -> dict[str, Any]:
    counted = [each.wall if device_type == "cuda" else each.cpu for each in times]
    return {
        "patches": place.config.num_patches,
        "turns": len(times),
        "seconds": rounded((each.wall for each in times), 4),
        "cpu_seconds": rounded((each.cpu for each in times), 4),
        "images_per_second": rounded((place.batch_size / each for each in counted), 2),
        "gflops_per_second": rounded((done / taken / 1e9 for done, taken in zip(operations, counted, strict=True)), 1),
        "operations_of_image": round(sum(operations) / len(operations) / place.batch_size),
    }


def exponents(before: dict[str, Any], after: dict[str, Any], axis: str, value: int) -> dict[str, float]:
    """Of the time and the operations of a call, in the number of patches, images or layers."""
    sizes = (before["patches"], after["patches"]) if axis == "image_size" else (before["value"], value)
    images = sizes[1] / sizes[0] if axis == "batch" else 1.0
    growth = {
        "exponent": images * before["images_per_second"]["median"] / after["images_per_second"]["median"],
        "exponent_of_operations": images * after["operations_of_image"] / before["operations_of_image"],
    }
    return {name: round(math.log(times) / math.log(sizes[1] / sizes[0]), 2) for name, times in growth.items()}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--axes", nargs="+", choices=[*VALUES], default=[*VALUES])
    for axis, values in VALUES.items():
        parser.add_argument(f"--{axis}_values", type=int, nargs="+", default=values, metavar="NUMBER")
    parser.add_argument("--size", choices=[*IJEPA_SIZES], default="tiny", help="width of the encoder")
    parser.add_argument("--image_size", type=int, default=224, help="pixels, where they do not change")
    parser.add_argument("--batch", type=int, default=8, help="images, where their number does not change")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seconds", type=float, default=30, help="least time of the turns of each axis and work")
    add_common_arguments(parser)
    own = parser.parse_args(words)
    prepare(own)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for axis in own.axes:
        for work in WORK:
            torch.manual_seed(0)
            rows = measure(own, axis, work, getattr(own, f"{axis}_values"))
            results.setdefault(axis, {})[work] = rows
            for each in rows:
                print(f"{axis} {work}: {each}", flush=True)
    report("scaling", own, {"results": results}, own.device)


if __name__ == "__main__":
    main()
