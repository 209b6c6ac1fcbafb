# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes the features of images to Parquet or safetensors files:

    python run_feature_extraction.py --model DIR --data my/photos --output_dir features
    accelerate launch run_feature_extraction.py --model DIR --data my/photos --output_dir features --dtype bf16

Every image has one row, in the order of the data set, also an image that cannot be read: its features are NaN, its
column `error` says why, and `bad_images.jsonl` lists it. A shard is a pure function of the arguments and its number,
and it is either whole or not there. So the same command continues a killed run, on as many processes as there happen
to be, and ends with the same files. `manifest.json` is written last: where it is, the features are complete.

Shape legend: B images of a batch, N tokens, D features.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..data.datasets import ProcessedImages
from ..data.sources import open_split
from ..distributed import check_launch, end_process_group
from ..encoders import load_encoder, load_processor, weights_digest
from ..execution import configure
from ..files import write_text, written_aside
from .extraction_arguments import PROGRAM, FeatureExtractionArguments, parse_extraction_arguments


SETTINGS, MANIFEST, BAD_IMAGES = "settings.json", "manifest.json", "bad_images.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# The model
@torch.no_grad()
def embed(model: PreTrainedModel, pixel_values: torch.Tensor, outputs: list[str]) -> dict[str, torch.Tensor]:
    """Images (B, channels, height, width) to `pooler_output` (B, D) and `last_hidden_state` (B, N, D), on the CPU.

    Raises:
        ValueError: if the model has no such output.
    """
    result = model(pixel_values.to(model.device, model.dtype))
    features = {name: getattr(result, name, None) for name in outputs}
    for name, value in features.items():
        if value is None:
            raise ValueError(f"{type(model).__name__} has no output {name!r}.")
    if "pooler_output" in features:
        features["pooler_output"] = features["pooler_output"].flatten(1)  # convolutional networks pool to (B, D, 1, 1)
    return {name: value.cpu() for name, value in features.items()}


# The images
def collate(samples: list[torch.Tensor | str]) -> tuple[torch.Tensor | None, list[str | None]]:
    """Pixels (B, channels, height, width), zeros where an image is bad, or None if all are; and the reasons (B).

    A bad image keeps its place in the batch, so its neighbours are computed as they would be without it.
    """
    errors = [sample if isinstance(sample, str) else None for sample in samples]
    images = [sample for sample in samples if not isinstance(sample, str)]
    if len({image.shape for image in images}) > 1:
        raise ValueError("The image processor gives images of different sizes; --batch_size 1 takes one at a time.")
    if not images:
        return None, errors
    blank = torch.zeros_like(images[0])
    return torch.stack([blank if isinstance(sample, str) else sample for sample in samples]), errors


def image_names(dataset: datasets.Dataset, rows: range, folder: str) -> list[str]:
    """File names of these rows, relative to `folder` where they lie in it; a number where the source has no names.

    Reads the column of paths only, not the images beside it.
    """
    table = dataset.with_format("arrow")[rows.start : rows.stop]
    paths = pa.compute.struct_field(table["image"], "path").to_pylist()
    prefix = os.path.join(Path(folder).expanduser().absolute(), "")
    return [
        f"image {row}" if path is None else path.removeprefix(prefix) for row, path in zip(rows, paths, strict=True)
    ]


# Shards
@dataclass
class Shard:
    """The rows of one file."""

    number: int
    rows: range

    def batches(self, batch_size: int) -> list[range]:
        return [self.rows[start : start + batch_size] for start in range(0, len(self.rows), batch_size)]

    def file_name(self, file_format: str) -> str:
        return f"features-{self.number:06}.{file_format}"


def all_shards(num_images: int, shard_size: int) -> list[Shard]:
    """Shards of `shard_size` images, the last one shorter; independent of the number of processes."""
    starts = range(0, num_images, shard_size)
    return [Shard(number, range(start, min(start + shard_size, num_images))) for number, start in enumerate(starts)]


def write_shard(path: Path, columns: dict, features: dict[str, torch.Tensor]) -> None:
    """Writes a shard under another name, and renames it when it is whole and on the disk.

    Args:
        columns: `index`, `name`, `error` (None for good images) and perhaps `label`, one entry per image.
        features: (images, D) or (images, N, D) for each output.
    """
    with written_aside(path) as unfinished:
        (write_parquet if path.suffix == ".parquet" else write_safetensors)(unfinished, columns, features)


def write_parquet(path: Path, columns: dict, features: dict[str, torch.Tensor]) -> None:
    table = pa.table({**columns, "name": pa.array(columns["name"], pa.string())})
    table = table.set_column(table.column_names.index("error"), "error", pa.array(columns["error"], pa.string()))
    for name, values in features.items():
        array = pa.array(values.float().numpy().reshape(-1))
        for size in reversed(values.shape[1:]):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        table = table.append_column(name, array)
    pa.parquet.write_table(table, path)


def write_safetensors(path: Path, columns: dict, features: dict[str, torch.Tensor]) -> None:
    """Numbers become tensors; names and errors go to the metadata, as JSON under the one key `columns`.

    One key, because the library writes several in a random order, and equal shards would not be equal files.
    """
    words = {name: columns[name] for name in ("name", "error")}
    numbers = {name: torch.tensor(values) for name, values in columns.items() if name not in words}
    save_file({**numbers, **features}, path, metadata={"columns": json.dumps(words)})


def read_bad_images(path: Path) -> list[dict]:
    """The `{"index", "name", "reason"}` of the images of a shard that could not be read."""
    if path.suffix == ".parquet":
        columns = pa.parquet.read_table(path, columns=["index", "name", "error"]).to_pydict()
    else:
        with safe_open(path, framework="pt") as file:
            columns = {**json.loads(file.metadata()["columns"]), "index": file.get_tensor("index").tolist()}
    rows = zip(columns["index"], columns["name"], columns["error"], strict=True)
    return [{"index": index, "name": name, "reason": error} for index, name, error in rows if error is not None]


# The run
@dataclass
class Run:
    """Everything the loop needs, built and checked by `build_run` before anything is written."""

    arguments: FeatureExtractionArguments
    accelerator: Accelerator
    model: PreTrainedModel
    images: ProcessedImages
    shapes: dict[str, list[int]]
    shards: list[Shard]
    settings: dict
    execution: str

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    def path(self, shard: Shard) -> Path:
        return self.output_dir / shard.file_name(self.arguments.format)


def build_run(arguments: FeatureExtractionArguments) -> Run:
    """Opens everything and tries the model on a blank image.

    Raises:
        ValueError: if the arguments cannot work, or the output directory holds other features.
    """
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    dataset = open_split(arguments, arguments.split)
    processor = load_processor(arguments.model)
    model = load_encoder(arguments.model, arguments.encoder, DTYPES[arguments.dtype])
    images = ProcessedImages(dataset, processor, getattr(model.config, "num_channels", 3))
    shards = all_shards(len(dataset), arguments.shard_size)
    settings = describe(arguments, model, processor, dataset, shards)
    check_settings(Path(arguments.output_dir), settings)
    model = model.to(accelerator.device)
    execution = configure(model, accelerator.device.type, arguments.dtype)
    blank = images.prepare(np.zeros((256, 256, images.num_channels), dtype=np.uint8))
    shapes = {name: list(value.shape[1:]) for name, value in embed(model, blank[None], arguments.outputs).items()}
    return Run(arguments, accelerator, model, images, shapes, shards, settings, execution)


def describe(arguments: FeatureExtractionArguments, model, processor, dataset, shards: list[Shard]) -> dict:
    """All that the features depend on, in values that JSON keeps. Places and speed are left out."""
    free = ("model", "data", "output_dir", "num_workers")
    names = hashlib.sha256()
    for shard in shards:
        names.update(json.dumps(image_names(dataset, shard.rows, arguments.data)).encode())
    settings = {key: value for key, value in dataclasses.asdict(arguments).items() if key not in free}
    return {
        **settings,
        "num_images": len(dataset),
        "names_sha256": names.hexdigest(),
        "weights_sha256": weights_digest(model),
        "processor": json.loads(processor.to_json_string()),
    }


def check_settings(output_dir: Path, settings: dict) -> None:
    """Raises ValueError if the directory holds features of another run."""
    path = output_dir / SETTINGS
    if not path.exists():
        if output_dir.exists() and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
            raise ValueError(f"{str(output_dir)!r} holds other files; choose an empty or a new --output_dir.")
        return
    before = json.loads(path.read_text())
    changed = {key: value for key, value in settings.items() if before.get(key) != value}
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r}, is {value!r}" for key, value in changed.items())
        raise ValueError(f"{str(output_dir)!r} holds features of another run ({differences}).")


def start(run: Run) -> list[Shard]:
    """Makes the directory; returns the missing shards of this process."""
    if run.accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(run.output_dir / SETTINGS, json.dumps(run.settings, indent=2))
    run.accelerator.wait_for_everyone()
    missing = [shard for shard in run.shards if not run.path(shard).exists()]
    run.accelerator.wait_for_everyone()  # nobody writes before everybody has looked, so all see the same list
    done = len(run.shards) - len(missing)
    run.accelerator.print(
        f"{run.settings['num_images']:,} images in {len(run.shards):,} shards, {done:,} of them done; processes:"
        f" {run.accelerator.num_processes}; {run.accelerator.device.type}, {run.arguments.dtype}, {run.execution}"
    )
    return missing[run.accelerator.process_index :: run.accelerator.num_processes]


def batches(run: Run, shards: list[Shard]) -> Iterator[tuple[torch.Tensor | None, list[str | None]]]:
    """The batches of all these shards, one after the other, from one set of loading processes."""
    loader = DataLoader(
        run.images,
        batch_sampler=[batch for shard in shards for batch in shard.batches(run.arguments.batch_size)],
        num_workers=run.arguments.num_workers,
        collate_fn=collate,
        pin_memory=run.accelerator.device.type == "cuda",
    )
    yield from loader


def extract(run: Run, shards: list[Shard]) -> None:
    """Computes and writes these shards. The progress bar counts the images of the main process."""
    progress = tqdm(
        total=sum(len(shard.rows) for shard in shards),
        unit="img",
        disable=None if run.accelerator.is_main_process else True,
    )
    stream = batches(run, shards)
    for done, shard in enumerate(shards, start=1):
        write_shard(run.path(shard), *compute_shard(run, shard, stream, progress))
        if progress.disable:  # a log file: a line for each shard instead of a bar
            run.accelerator.print(f"{done:,} of {len(shards):,} shards", flush=True)
    progress.close()


def compute_shard(run: Run, shard: Shard, stream: Iterator, progress: tqdm) -> tuple[dict, dict[str, torch.Tensor]]:
    """The columns and the features of a shard, from the next batches of the stream."""
    errors, parts = [], {name: [] for name in run.shapes}
    for _ in shard.batches(run.arguments.batch_size):
        pixel_values, batch_errors = next(stream)
        for name, values in embed_readable(run, pixel_values, batch_errors).items():
            parts[name].append(values)
        errors += batch_errors
        progress.update(len(batch_errors))
    return columns_of(run, shard, errors), {name: torch.cat(values) for name, values in parts.items()}


def embed_readable(run: Run, pixel_values: torch.Tensor | None, errors: list[str | None]) -> dict[str, torch.Tensor]:
    """`embed`, with NaN in the rows of images that could not be read."""
    if pixel_values is None:
        shapes = {name: (len(errors), *shape) for name, shape in run.shapes.items()}
        return {name: torch.full(shape, torch.nan, dtype=run.model.dtype) for name, shape in shapes.items()}
    features = embed(run.model, pixel_values, run.arguments.outputs)
    is_bad = torch.tensor([error is not None for error in errors])
    for values in features.values():
        values[is_bad] = torch.nan
    return features


def columns_of(run: Run, shard: Shard, errors: list[str | None]) -> dict:
    """What stands beside the features of a shard."""
    dataset = run.images.dataset
    labels = {"label": dataset.select(shard.rows)["label"][:]} if "label" in dataset.column_names else {}
    names = image_names(dataset, shard.rows, run.arguments.data)
    return {"index": list(shard.rows), "name": names, **labels, "error": errors}


def finish(run: Run) -> None:
    """When all processes are done: the list of bad images, then the manifest."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        bad_images = [entry for shard in run.shards for entry in read_bad_images(run.path(shard))]
        write_text(run.output_dir / BAD_IMAGES, "".join(json.dumps(entry) + "\n" for entry in bad_images))
        files = [{"file": run.path(shard).name, "rows": len(shard.rows)} for shard in run.shards]
        sources = {"model": run.arguments.model, "data": run.arguments.data}
        manifest = {**sources, "shapes": run.shapes, "num_bad_images": len(bad_images), "files": files, **run.settings}
        write_text(run.output_dir / MANIFEST, json.dumps(manifest, indent=2))
        print(f"{len(bad_images):,} images could not be read; the features are complete in {run.output_dir}")
    end_process_group(run.accelerator)


def main(argv: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading
    arguments = parse_extraction_arguments(argv)
    try:
        run = build_run(arguments)
    except ValueError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(2)  # the status argparse gives to wrong arguments
    extract(run, start(run))
    finish(run)
