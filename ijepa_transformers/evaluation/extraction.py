# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes the features of images to Parquet or safetensors files:

    python run_feature_extraction.py --model DIR --data my/photos --output_dir features
    accelerate launch run_feature_extraction.py --model DIR --data my/photos --output_dir features --dtype bf16

Each image has a row, in the order of the data set. An image that cannot be read has a row too: its features are NaN,
the column `error` has the reason, and `bad_images.jsonl` lists the image. A shard is a pure function of the arguments
and its number, and is complete if its file and its images are those of its record (shard_records.py). So the same
command continues a killed run, with any number of processes, and the files at the end are the same. `manifest.json` is
written last: if it exists, all features do.
"""

import dataclasses
import glob
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..api import Result, process_as_before
from ..arguments import require
from ..data.bit_depth import look_at_dataset, settle
from ..data.contents import status_digest
from ..data.datasets import ProcessedImages
from ..data.labels import class_names, has_several, several_labels_of
from ..data.notices import counted, tell
from ..data.sources import open_split
from ..data.workers import prepare_worker
from ..display import SECONDS_BETWEEN_LINES, Progress, in_python, show, show_end, show_facts
from ..distributed import check_launch, end_process_group, on_main_process
from ..encoders import load_encoder, load_processor, weights_digest
from ..execution import computation_of, configure, prepare_for_inference
from ..failures import FAILED, REFUSED, failures_told
from ..files import check_output_directory, refuse_among_images, refuse_other_files, write_rows, write_text
from ..locks import OutputLock
from .embedding import LoadedBatch, collate, embed
from .extraction_arguments import PROGRAM, FeatureExtractionArguments, extraction_arguments, parse_extraction_arguments
from .shard_files import Columns, differences, read_bad_images, shard_files, write_shard
from .shard_records import (
    MANIFEST,
    ShardRecord,
    problem_of,
    read_records,
    refuse_folders,
    remove_records,
    reopen,
    write_record,
)


_SETTINGS, _BAD_IMAGES = "settings.json", "bad_images.jsonl"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def image_names(dataset: datasets.Dataset, rows: range, folder: str) -> list[str]:
    """File names of these rows, relative to `folder` if they are in it. A row without a file name has a number.

    Only the column of paths is read, and no image.
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


def _all_shards(num_images: int, shard_size: int) -> list[Shard]:
    """Shards of `shard_size` images; the last one may be shorter. The number of processes does not matter."""
    starts = range(0, num_images, shard_size)
    return [Shard(number, range(start, min(start + shard_size, num_images))) for number, start in enumerate(starts)]


# The run
@dataclass
class Run:
    """All that the loop needs. `build_run` builds and checks it before anything is written.

    `shapes` are those of an image's features by output; `settings` is all that the features depend on.
    """

    arguments: FeatureExtractionArguments
    accelerator: Accelerator
    model: PreTrainedModel
    images: ProcessedImages
    shapes: dict[str, list[int]]
    shards: list[Shard]
    settings: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    def path(self, shard: Shard) -> Path:
        return self.output_dir / shard.file_name(self.arguments.format)


def open_model(
    arguments: FeatureExtractionArguments, dataset: datasets.Dataset
) -> tuple[PreTrainedModel, ProcessedImages]:
    """The encoder, and the images of a data set as it takes them.

    Raises:
        ValueError: if the encoder or its image processor cannot be opened, or if 16-bit images need a setting.
    """
    processor = load_processor(arguments.model)
    model = load_encoder(arguments.model, arguments.encoder, _DTYPES[arguments.dtype])
    images = ProcessedImages(dataset, processor, getattr(model.config, "num_channels", 3))
    settle(processor, look_at_dataset(dataset, images.num_channels, arguments.data), arguments.sixteen_bit_max)
    return model, images


def build_run(
    arguments: FeatureExtractionArguments,
    lock: OutputLock | None = None,
    opened: tuple[PreTrainedModel, ProcessedImages] | None = None,
) -> Run:
    """Opens everything, tests the model with a blank image and locks the output directory.

    Args:
        arguments: of the command.
        lock: of the output directory.
        opened: what `open_model` returned, perhaps with fewer images.

    Raises:
        ValueError: if the arguments or the model cannot work, or if the output directory has other features.
    """
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    check_output_directory(Path(arguments.output_dir))
    refuse_among_images(Path(arguments.output_dir), arguments.data)
    lock = lock or OutputLock(Path(arguments.output_dir))
    on_main_process(accelerator, lock.take_if_there)
    model, images = opened or open_model(arguments, open_split(arguments, arguments.split))
    dataset, processor = images.dataset, images.processor
    shards = _all_shards(len(dataset), arguments.shard_size)
    settings = _describe(arguments, model, processor, dataset, shards)
    output_dir = Path(arguments.output_dir)
    refuse_folders(output_dir, (_SETTINGS, _BAD_IMAGES, *(shard.file_name(arguments.format) for shard in shards)))
    _check_settings(output_dir, settings, lambda: _all_names(dataset, shards, arguments.data))
    model = model.to(accelerator.device)
    configure(model, accelerator.device.type, arguments.dtype)
    blank = images.prepare(np.zeros((256, 256, images.num_channels), dtype=np.uint8))
    features = embed(model, blank[None], arguments.outputs)
    require(
        all(value.isfinite().all() for value in features.values()),
        f"The model {arguments.model!r} gives NaN or infinity even for a blank image: it has diverged or is damaged.",
    )
    if arguments.torch_compile:
        batch = _blank_batch(arguments, len(dataset), blank).to(model.device, model.dtype)
        accelerator.print(f"compiling the encoder for batches of {counted(len(batch), 'image')} ...")
        prepare_for_inference(model, batch, arguments.dtype)
    shapes = {name: list(value.shape[1:]) for name, value in features.items()}
    on_main_process(accelerator, lock.claim)
    return Run(arguments, accelerator, model, images, shapes, shards, settings)


def _describe(
    arguments: FeatureExtractionArguments,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    shards: list[Shard],
) -> dict[str, Any]:
    """All that the features depend on, in values that JSON keeps. Directories and workers are left out."""
    free = ("model", "data", "output_dir", "num_workers")
    names = hashlib.sha256()
    for part in _all_names(dataset, shards, arguments.data):
        names.update(json.dumps(part).encode())
    settings = {key: value for key, value in dataclasses.asdict(arguments).items() if key not in free}
    return {
        **settings,
        "num_images": len(dataset),
        "names_sha256": names.hexdigest(),
        "weights_sha256": weights_digest(model),
        "processor": json.loads(processor.to_json_string()),
    }


def _all_names(dataset: datasets.Dataset, shards: Sequence[Shard], folder: str) -> Iterator[list[str]]:
    """The names of all images, shard by shard."""
    return (image_names(dataset, shard.rows, folder) for shard in shards)


def _check_settings(output_dir: Path, settings: dict[str, Any], names: Callable[[], Iterator[list[str]]]) -> None:
    """Raises ValueError if the directory has features of another run, or other files. `names` gives those of all
    images."""
    path = output_dir / _SETTINGS
    if not path.exists():
        refuse_other_files(output_dir, [])
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}); choose another --output_dir or remove this one."
        ) from None
    # Earlier versions had no torch_compile.
    before = {"torch_compile": False, **(before if isinstance(before, dict) else {})}
    changed = {key: value for key, value in settings.items() if before.get(key) != value}
    if changed:
        told = "; ".join(differences(output_dir, before, changed, names))
        raise ValueError(f"{str(output_dir)!r} holds features of another run ({told}); choose another output_dir.")


def start(run: Run, with_head: bool = True) -> list[Shard]:
    """Makes the directory and returns the shards that this process has to compute. Prints the head if asked."""
    if run.accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(run.output_dir / _SETTINGS, json.dumps(run.settings, indent=2))
        _tell_of_surplus(run)
    run.accelerator.wait_for_everyone()
    problems = _problems(run)  # no process writes before all have looked, so all find the same shards
    missing = [shard for shard in run.shards if shard.number in problems]
    if missing and run.accelerator.is_main_process:
        records, lost = read_records(run.output_dir), {run.path(shard).name for shard in missing}
        reopen(run.output_dir, {name: record for name, record in records.items() if name not in lost})
    run.accelerator.wait_for_everyone()
    for shard in missing:
        if problems[shard.number]:
            run.accelerator.print(f"{run.path(shard).name} is computed again: {problems[shard.number]}.")
    if with_head and run.accelerator.is_main_process:
        _show_head(run, len(run.shards) - len(missing))
    return missing[run.accelerator.process_index :: run.accelerator.num_processes]


def _show_head(run: Run, num_done: int) -> None:
    arguments, processes = run.arguments, run.accelerator.num_processes
    images = counted(run.settings["num_images"], "image")
    done = f", {num_done:,} of them done" if num_done else ""
    show_facts(
        {
            "model": f"{arguments.model}, {arguments.encoder} encoder, features: {', '.join(arguments.features)}",
            "data": f"{arguments.data}, split {arguments.split!r}",
            "length": f"{images} in {counted(len(run.shards), 'file')}{done}",
            "computation": computation_of(run.accelerator.device.type, processes, arguments.dtype)
            + (", compiled" if arguments.torch_compile else ""),
            "output": run.output_dir,
        }
    )


def _tell_of_surplus(run: Run) -> None:
    """Tells of files that are called like shards and are none of this run: who reads all files would read them."""
    expected = {run.path(shard).name for shard in run.shards}
    surplus = [path.name for path in shard_files(run.output_dir) if path.name not in expected]
    if surplus:
        more = f" (and {len(surplus) - 1:,} more)" if len(surplus) > 1 else ""
        tell(
            f"{surplus[0]}{more} in {run.output_dir} is not of this run, which writes"
            f" {counted(len(expected), 'file')}; remove it, or read only the files that {MANIFEST} lists."
        )


def _problems(run: Run) -> dict[int, str]:
    """By the number of each shard that must be computed, what is wrong with it. Every process looks at a share."""
    records, dataset, found = read_records(run.output_dir), run.images.dataset, []
    for shard in run.shards[run.accelerator.process_index :: run.accelerator.num_processes]:
        path = run.path(shard)
        found.append((shard.number, problem_of(path, records.get(path.name), dataset, shard.rows)))
    return {number: problem for number, problem in gather_object(found) if problem is not None}


def _batches(run: Run, shards: list[Shard]) -> Iterator[LoadedBatch]:
    """The batches of all these shards, one after the other, from one set of loading processes."""
    loader = DataLoader(
        run.images,
        batch_sampler=[list(rows) for shard in shards for rows in shard.batches(run.arguments.batch_size)],
        num_workers=run.arguments.num_workers,
        worker_init_fn=prepare_worker,
        collate_fn=collate,
        pin_memory=run.accelerator.device.type == "cuda",
    )
    yield from loader


def extract(run: Run, shards: list[Shard]) -> None:
    """Computes and writes these shards. A progress bar counts the images of the main process."""
    progress = Progress(
        sum(len(shard.rows) for shard in shards),
        "image",
        shown=run.accelerator.is_main_process,
        seconds_between_lines=SECONDS_BETWEEN_LINES,
    )
    dataset = run.images.dataset
    before = [status_digest(dataset, shard.rows) for shard in shards]  # loading processes read ahead
    stream = _batches(run, shards)
    for done, shard in enumerate(shards, start=1):
        path = run.path(shard)
        write_shard(path, *_compute_shard(run, shard, stream, progress))
        record = ShardRecord.of(path, dataset, shard.rows)
        if record.files_status == before[done - 1]:  # otherwise `finish` finds no record
            write_record(run.output_dir, path.name, record)
        progress.report({"file": f"{done:,} of {len(shards):,}"}, at_once=False)
    progress.close()


def _compute_shard(
    run: Run, shard: Shard, stream: Iterator[LoadedBatch], progress: Progress
) -> tuple[Columns, dict[str, torch.Tensor]]:
    """The columns and the features of a shard, from the next batches of the stream."""
    errors: list[str | None] = []
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in run.shapes}
    for _ in shard.batches(run.arguments.batch_size):
        pixel_values, batch_errors = next(stream)
        for name, values in _embed_readable(run, pixel_values, batch_errors).items():
            parts[name].append(values)
        errors += batch_errors
        progress.update(len(batch_errors))
    return _columns_of(run, shard, errors), {name: torch.cat(values) for name, values in parts.items()}


def _embed_readable(run: Run, pixel_values: torch.Tensor | None, errors: list[str | None]) -> dict[str, torch.Tensor]:
    """The features of a batch, with NaN for images that could not be read. Adds to `errors` those that the features
    have themselves."""
    if pixel_values is None:
        shapes = {name: (len(errors), *shape) for name, shape in run.shapes.items()}
        return {name: torch.full(shape, torch.nan, dtype=run.model.dtype) for name, shape in shapes.items()}
    features = _embed_in_batches_of_one_size(run, pixel_values)
    is_finite = torch.stack([values.flatten(1).isfinite().all(dim=1) for values in features.values()]).all(dim=0)
    for row in (~is_finite).nonzero().flatten().tolist():
        errors[row] = errors[row] or "its features hold NaN or infinity"
    is_bad = torch.tensor([error is not None for error in errors])
    for values in features.values():
        values[is_bad] = torch.nan
    return features


def _embed_in_batches_of_one_size(run: Run, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """`embed`, with blank images after those of a shorter batch if the model would be compiled again for it."""
    if not run.arguments.torch_compile:
        return embed(run.model, pixel_values, run.arguments.outputs)
    batch = _blank_batch(run.arguments, run.settings["num_images"], pixel_values[0])
    batch[: len(pixel_values)] = pixel_values
    features = embed(run.model, batch, run.arguments.outputs)
    return {name: values[: len(pixel_values)] for name, values in features.items()}


def _blank_batch(arguments: FeatureExtractionArguments, num_images: int, image: torch.Tensor) -> torch.Tensor:
    """As many blank images as the largest batch has, in the shape of this one."""
    count = min(arguments.batch_size, arguments.shard_size, num_images)
    return image.new_zeros(count, *image.shape)


def _columns_of(run: Run, shard: Shard, errors: list[str | None]) -> Columns:
    """The columns of a shard other than features."""
    dataset = run.images.dataset
    labels: Columns = {}
    if "label" in dataset.column_names:
        part = dataset.select(shard.rows)
        # A tensor has no rows of unequal length: several labels are 0 or 1 for each class there.
        as_rows = has_several(part) and run.arguments.format == "safetensors"
        labels["label"] = several_labels_of(part).tolist() if as_rows else part["label"][:]
    names = image_names(dataset, shard.rows, run.arguments.data)
    return {"index": list(shard.rows), "name": names, **labels, "error": errors}


def finish(run: Run, with_end: bool = True) -> None:
    """Waits for all processes, then writes the list of bad images and the manifest.

    Args:
        run: whose shards are all written.
        with_end: whether to print where the files are, and the next command.

    Raises:
        ValueError: if images changed while their features were computed. Then there is no manifest.
    """
    run.accelerator.wait_for_everyone()
    on_main_process(run.accelerator, lambda: _write_manifest(run, with_end))
    end_process_group(run.accelerator)


def _write_manifest(run: Run, with_end: bool) -> None:
    records = read_records(run.output_dir)
    unsure = [run.path(shard).name for shard in run.shards if run.path(shard).name not in records]
    if unsure:
        raise ValueError(f"Images of {unsure[0]} changed while they were read. Run the same command again.")
    bad_images = [entry for shard in run.shards for entry in read_bad_images(run.path(shard))]
    write_rows(run.output_dir / _BAD_IMAGES, bad_images)
    files: list[dict[str, Any]] = []
    for shard in run.shards:
        name = run.path(shard).name
        files.append({"file": name, "rows": len(shard.rows), **dataclasses.asdict(records[name])})
    sources: dict[str, Any] = {"model": run.arguments.model, "data": run.arguments.data}
    if "label" in run.images.dataset.column_names:  # the column `label` counts through these names
        sources["class_names"] = class_names(run.images.dataset)
    manifest = {**sources, "shapes": run.shapes, "num_bad_images": len(bad_images), "files": files, **run.settings}
    write_text(run.output_dir / MANIFEST, json.dumps(manifest, indent=2))
    remove_records(run.output_dir)
    if len(bad_images) == run.settings["num_images"]:
        first = bad_images[0]
        raise ValueError(
            f"None of the {counted(len(bad_images), 'image')} could be read, so there are no features. The first is"
            f" {first['name']!r} ({first['reason']}); {run.output_dir / _BAD_IMAGES} has all."
        )
    if with_end:
        _show_end(run, len(bad_images))


def _show_end(run: Run, num_bad: int) -> None:
    bad = f"; {counted(num_bad, 'image')} could not be read" if num_bad else ""
    show(f"\nThe features of {counted(run.settings['num_images'] - num_bad, 'image')} are complete{bad}.")
    places = {"features": run.output_dir / f"features-*.{run.arguments.format}", "manifest": run.output_dir / MANIFEST}
    if num_bad:
        places["bad images"] = run.output_dir / _BAD_IMAGES
    pattern = Path(glob.escape(str(run.output_dir))) / places["features"].name  # brackets are a pattern too
    files = in_python(pattern)
    code = f'import datasets; print(datasets.load_dataset("parquet", data_files={files})["train"])'
    show_end(places, [shlex.join(["python", "-c", code])] if run.arguments.format == "parquet" else [])


def execute(arguments: FeatureExtractionArguments, argv: Sequence[str] = ()) -> None:
    """Runs the command with its parsed arguments. Exits as a command does."""
    disable_progress_bar()  # Transformers shows one while it loads weights
    with OutputLock(Path(arguments.output_dir)) as lock:
        with failures_told(PROGRAM, REFUSED):
            run = build_run(arguments, lock)
        with failures_told(PROGRAM, FAILED):
            extract(run, start(run))
            finish(run)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parse_extraction_arguments(argv))


def extract_features(**keywords: Any) -> Result:
    """Writes the features of images to files: `ijepa extract` as a function.

    With `torch_compile` PyTorch forgets at the end what it has compiled in this process. Otherwise it would compile no
    more than eight encoders of a class, and keep more memory for each.

    Args:
        keywords: the flags of `ijepa extract --help` by name, `recipe` among them.

    Returns:
        output_dir and the content of its manifest.json; `files` lists the files.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: with one sentence, where the command would end with an error.
    """
    arguments = extraction_arguments(**keywords)
    with process_as_before(), OutputLock(Path(arguments.output_dir)) as lock:
        disable_progress_bar()
        try:
            run = build_run(arguments, lock)
            extract(run, start(run))
            finish(run)
        finally:
            if arguments.torch_compile:
                torch.compiler.reset()
    return Result(run.output_dir, json.loads((run.output_dir / MANIFEST).read_text()))
