# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretraining batches streamed from Parquet and tar (WebDataset) shards, local or remote, for data of any size.

Shape legend:
    B images of a batch, C channels (1 or 3), H rows, W columns; `pixel_values` is uint8 (C, H, W).

Micro-batch q = step * slot_blocks + slot_block (see `PretrainingBatchSampler`) takes the next B readable images of
lane q % L. A lane is an endless sequence of images, a pure function of (seed, shuffle_buffer, L, lane): in each epoch
it reads its part of the shards (`lane_shards`), cut into blocks of `shuffle_buffer` images, each in the order of
`block_order`. So the L lanes together see every image once per epoch, and nothing depends on which process or worker
reads a lane. L is fixed for a run; processes x workers must divide it, so that no two of them read the same lane.

What resuming needs is one `Position` per lane: every batch carries the one after it, `LanePositions` collects them.
Images stay encoded until they are cropped, and nothing is read at the start but a list of the shards and one header.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import fsspec.asyn
import pyarrow.parquet as pq
import torch

from .datasets import MAX_SUBSTITUTES, PretrainingImages
from .decoding import BadImageError
from .order import block_order, epoch_order
from .sources import SHARD_BUILDERS, choose_split, find_image_column, resolve


MAX_EMPTY_EPOCHS = 20  # epochs in a row in which a lane may find no image in its shards
_READ_ROWS = 64  # images handed over at once by a shard's reader
_FOOTER_THREADS = 16
_TAR_END = 1024  # bytes


# Opening
@dataclass
class ImageStream:
    """The shards of one split, opened but not read.

    Args:
        source: what the user called it, for messages.
        names: path or URL of every shard, in a fixed order.
        dataset: streaming data set of `datasets` with one shard for each name.
        column: in which the images are, undecoded.
        kind: "parquet", "webdataset" (tar) or "arrow".
        known_images: number of images where the Hub's description of the data set says it.
    """

    source: str
    names: list[str]
    dataset: datasets.IterableDataset
    column: str
    kind: str
    known_images: int | None = None

    @property
    def num_shards(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """Of the shards' file names and their order; a folder that was moved keeps it, and a URL signed anew."""
        names = "\n".join(name.partition("?")[0].replace("\\", "/").rsplit("/", 1)[-1] for name in self.names)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def rows(self, shard: int, first_row: int = 0) -> Iterator[tuple[int, dict | None]]:
        """(row number, `{"bytes", "path"}` as stored) of a shard from `first_row` on, encoded.

        Of Parquet only the row groups from `first_row` on are read; a tar file is read from its beginning.

        Raises:
            OSError: if the shard has vanished or cannot be read; the message names it and the row.
        """
        row = first_row
        try:
            for part, start in self._parts(shard, first_row):
                # Not iter(part), which inside a DataLoader's worker gives one worker all shards and the others none.
                batches = part.iter(batch_size=_READ_ROWS)
                values = (value for batch in batches for value in batch[self.column])
                for value in itertools.islice(values, row - start, None):
                    yield row, value
                    row += 1
            if self.kind == "webdataset":
                _check_tar_end(self.names[shard])
        except Exception as error:  # of pyarrow, tarfile, json, any file system: many classes, some not even OSError
            reason = f"{type(error).__name__}: {error}"
            raise OSError(f"the shard {self.names[shard]!r} cannot be read from row {row} on: {reason}") from error

    def _parts(self, shard: int, first_row: int) -> Iterator[tuple[datasets.IterableDataset, int]]:
        """Streaming data sets that together hold the rows from `first_row` on, each with its first row's number."""
        whole = self.dataset.shard(num_shards=self.num_shards, index=shard)
        if first_row == 0 or self.kind != "parquet":
            yield whole, 0
            return
        groups = whole.reshard()  # a shard for each row group
        start = 0
        for index, num_rows in enumerate(_row_group_sizes(self.names[shard])):
            if start + num_rows > first_row:
                yield groups.shard(num_shards=groups.num_shards, index=index), start
            start += num_rows


def open_stream(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str | None = None,
) -> ImageStream:
    """Opens shards for streaming: lists the files and reads the header of one; no image is decoded.

    Args:
        source: one of
            - a folder, file or glob of .parquet, .tar (WebDataset) or .arrow files, with splits as in
              `load_image_dataset`;
            - any URL or glob of URLs that fsspec opens, such as `hf://datasets/USER/NAME/**/*.parquet`,
              `s3://bucket/train-*.tar` or `https://host/train-{00000..00099}.tar`; the range in braces is for servers
              that cannot list files. Files named by a URL are one split, "train".
            - otherwise the name of a data set on the Hub, which must consist of such files.
        split, config_name, image_column: as in `load_image_dataset`.

    Raises:
        ValueError: if the source, the split or the column is absent or ambiguous, or if it cannot be streamed.
    """
    source = os.fspath(source)
    arguments = _builder_arguments(source, config_name)
    with _explained(f"{source!r} cannot be opened for streaming"):
        builder = datasets.load_dataset_builder(**arguments)
    if builder.name not in SHARD_BUILDERS.values():
        raise ValueError(f"{source!r} cannot be streamed: it is no set of .parquet, .tar or .arrow files; {_ADVICE}")
    with _explained(f"the {builder.name} files of {source!r} cannot be read"):
        splits = builder.as_streaming_dataset()
    chosen = choose_split(source, splits, split)
    column = find_image_column(splits[chosen], image_column)
    if builder.name == "parquet":
        # The column is known only after opening. Set here, because opening again would list all files again.
        builder.config.columns = [column]
        splits = builder.as_streaming_dataset()
    dataset = splits[chosen].select_columns([column]).cast_column(column, datasets.Image(decode=False))
    names = [str(name) for name in builder.config.data_files[chosen]]
    known = (builder.info.splits or {}).get(chosen)
    return ImageStream(source, names, dataset, column, builder.name, (known.num_examples or None) if known else None)


def count_images(stream: ImageStream) -> int | None:
    """Number of images, from what the Hub says or from the footers of all Parquet files; None for tar and Arrow.

    Raises:
        OSError: if a footer cannot be read.
    """
    if stream.known_images is not None or stream.kind != "parquet":
        return stream.known_images
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:  # footers are small, so remote ones cost waiting only
        return sum(map(sum, pool.map(_row_group_sizes, stream.names)))


_ADVICE = (
    'leave streaming off, or pack the images into Parquet: datasets.load_dataset("imagefolder", data_dir=...), then '
    "to_parquet of `.shard(num_shards, index)` for every index"
)


def _builder_arguments(source: str, config_name: str | None) -> dict[str, Any]:
    """What `datasets.load_dataset_builder` takes for this source."""
    resolved = resolve(source, config_name)
    if resolved.kind == "hub":
        return {"path": source, "name": config_name}
    if resolved.kind == "url":
        kind, urls = _files_of_url(source)
        return {"path": SHARD_BUILDERS[kind], "data_files": urls}
    if resolved.kind == "saved":
        raise ValueError(f"{source!r} is a save_to_disk folder, which opens at once without streaming: leave it off")
    if resolved.kind not in SHARD_BUILDERS:
        raise ValueError(f"{source!r} cannot be streamed: it holds single images; {_ADVICE}")
    return {"path": SHARD_BUILDERS[resolved.kind], "data_files": resolved.data_files}


def _files_of_url(source: str) -> tuple[str, dict[str, list[str]]]:
    path = source.partition("?")[0] if source.startswith("http") else source  # elsewhere a ? belongs to a glob
    kinds = [extension for extension in SHARD_BUILDERS if path.lower().endswith(extension)]
    if not kinds:
        example = source.rstrip("/") + "/**/*.parquet"
        raise ValueError(f"{source!r} does not end in .parquet, .tar or .arrow; name the files, such as {example!r}")
    return kinds[0], {"train": _expand_ranges(source)}


def _expand_ranges(url: str) -> list[str]:
    """`a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if found is None:
        return [url]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _expand_ranges(url[: found.start()] + number + url[found.end() :])]


@contextmanager
def _explained(problem: str):
    try:
        yield
    except Exception as error:  # `datasets` wraps what went wrong in errors of many classes
        reason = error.__cause__ or error
        raise ValueError(f"{problem}: {type(reason).__name__}: {reason}") from error


def _row_group_sizes(name: str) -> list[int]:
    try:
        with fsspec.open(name, "rb") as file:
            metadata = pq.read_metadata(file)
    except Exception as error:
        raise OSError(f"the footer of {name!r} cannot be read: {type(error).__name__}: {error}") from error
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _check_tar_end(name: str) -> None:
    """Raises ValueError if a tar file was cut off: tarfile takes the end of such a file for the end of the archive."""
    try:
        with fsspec.open(name, "rb") as file:
            file.seek(-_TAR_END, os.SEEK_END)
            end = file.read()
    except Exception:  # a web server that gives whole files only; the images were read all the same
        return
    if any(end):
        raise ValueError(f"the file is cut off, because a tar file ends in {_TAR_END:,} zero bytes")


# Lanes
def choose_lanes(num_shards: int, world_size: int, num_workers: int, lanes: int | None = None) -> tuple[int, int]:
    """How many lanes a run reads, and how many workers each process may start.

    Args:
        num_shards: of the stream.
        world_size: processes.
        num_workers: wanted in each process; 0 means that the training process reads.
        lanes: of the run to resume, or None for a fresh run, in which every worker gets one lane.

    Returns:
        (lanes, workers): workers is the largest usable number, at most `num_workers`.

    Raises:
        ValueError: if there are fewer shards than processes, or the processes cannot share the lanes evenly.
    """
    if lanes is None:
        if num_shards < world_size:
            raise ValueError(
                f"{num_shards} shards cannot be streamed to {world_size} processes, which need one each: start at "
                f"most {num_shards} processes, or write the images to more files"
            )
        workers = min(num_workers, num_shards // world_size)
        return world_size * max(workers, 1), workers
    if lanes % world_size:
        divisors = ", ".join(str(number) for number in range(1, lanes + 1) if lanes % number == 0)
        raise ValueError(
            f"the run to resume reads its shards in {lanes} lanes, which {world_size} processes cannot share evenly: "
            f"resume with a number of processes among {divisors}"
        )
    share = lanes // world_size
    return lanes, max((number for number in range(1, num_workers + 1) if share % number == 0), default=0)


def lane_shards(num_shards: int, lane: int, lanes: int, seed: int, epoch: int) -> list[int]:
    """The shards that a lane reads in an epoch, in order: each shard of the epoch's permutation is in one lane."""
    # Lanes take turns with the longer parts; always the same ones would fall behind the others, epoch after epoch.
    return epoch_order(num_shards, seed, epoch)[(lane + epoch) % lanes :: lanes].tolist()


class Position(NamedTuple):
    """Where a lane goes on: in a block of its epoch, which starts at a row of one of its shards.

    Args:
        epoch: of the lane, from 0.
        block: number of the block in this epoch of the lane.
        place: in which of the lane's shards the block starts, in the order of the epoch.
        row: at which row of that shard the block starts.
        taken: images of the block that were used before, bad ones included.
    """

    epoch: int = 0
    block: int = 0
    place: int = 0
    row: int = 0
    taken: int = 0


class StreamedImage(NamedTuple):
    """An encoded image and the position after it. (shard, row) is its identity; `place` is as in `Position`."""

    value: dict | None
    epoch: int
    place: int
    shard: int
    row: int
    after: Position | None = None


def read_lane(
    stream: ImageStream, lane: int, lanes: int, seed: int, shuffle_buffer: int, start: Position
) -> Iterator[StreamedImage]:
    """The endless sequence of a lane's images from a position on. Holds one block of encoded images.

    Raises:
        OSError: a shard cannot be read.
        ValueError: no image in any of the lane's shards for MAX_EMPTY_EPOCHS epochs, or fewer than at `start`.
    """
    num_empty = 0
    for epoch in itertools.count(start.epoch):
        position = start if epoch == start.epoch else Position(epoch)
        num_empty += position.block == 0  # unless an image comes
        for image in _read_epoch(stream, lane, lanes, seed, shuffle_buffer, position):
            num_empty = 0
            yield image
        if num_empty >= MAX_EMPTY_EPOCHS:
            raise ValueError(f"{stream.source!r} holds no images in any shard of lane {lane} for {num_empty} epochs")


def _read_epoch(stream, lane, lanes, seed, shuffle_buffer, position) -> Iterator[StreamedImage]:
    shards = lane_shards(stream.num_shards, lane, lanes, seed, position.epoch)
    images = _in_file_order(stream, shards, position)
    while block := list(itertools.islice(images, shuffle_buffer)):
        if position.taken >= len(block):
            raise ValueError(f"the shards of {stream.source!r} hold fewer images than when the checkpoint was written")
        end = Position(position.epoch, position.block + 1, block[-1].place, block[-1].row + 1)
        order = block_order(len(block), seed, lane, position.epoch, position.block).tolist()
        for taken in range(position.taken, len(block)):
            image, block[order[taken]] = block[order[taken]], None  # what was used need not stay in memory
            is_last = taken + 1 == len(block)
            yield image._replace(after=end if is_last else position._replace(taken=taken + 1))
        position = end


def _in_file_order(stream, shards, position) -> Iterator[StreamedImage]:
    for place in range(position.place, len(shards)):
        first_row = position.row if place == position.place else 0
        for row, value in stream.rows(shards[place], first_row):
            yield StreamedImage(value, position.epoch, place, shards[place], row)


class LanePositions:
    """Where each lane of a run goes on, and the settings with which alone it can: what a checkpoint must keep.

    Args:
        settings: `StreamingBatches.settings`.
        positions: lane -> `Position`; lanes that are absent start from the beginning.
    """

    def __init__(self, settings: Mapping[str, int | str], positions: Mapping[int, Iterable[int]] | None = None):
        self.settings = dict(settings)
        self.positions = {int(lane): Position(*position) for lane, position in (positions or {}).items()}

    def update(self, batch: dict) -> None:
        """Notes a batch that was used. Batches that a worker only prepared must not be noted."""
        self.positions[batch["lane"]] = Position(*batch["position"])

    def state_dict(self) -> dict:
        """For JSON. Those of all processes, each of which knows its own lanes, are merged by `merge_positions`."""
        positions = {str(lane): list(position) for lane, position in sorted(self.positions.items())}
        return {"settings": self.settings, "positions": positions}

    @classmethod
    def from_state_dict(cls, state: dict) -> "LanePositions":
        return cls(state["settings"], state["positions"])


def merge_positions(states: Iterable[dict]) -> dict:
    """One `state_dict` from those of all processes.

    Right for runs that were resumed with another number of processes as well, because every process starts from all
    positions: of each lane the farthest position counts.

    Raises:
        ValueError: if they come from runs of different settings.
    """
    states = list(states)
    if any(state["settings"] != states[0]["settings"] for state in states):
        raise ValueError(f"the processes stream with different settings: {[state['settings'] for state in states]}")
    merged = {}
    for state in states:
        for lane, position in state["positions"].items():
            merged[lane] = max(merged.get(lane, position), position)
    return {"settings": states[0]["settings"], "positions": merged}


# Batches
_SETTING_NAMES = {
    "lanes": "lanes",
    "shards": "shards",
    "fingerprint": "names of the shards",
    "seed": "seed",
    "shuffle_buffer": "shuffle_buffer",
    "batch_size": "images per process and pass",
    "slot_blocks": "passes per optimizer step over all processes",
}


class StreamingBatches(torch.utils.data.IterableDataset):
    """The collated micro-batches of one process, for `DataLoader(batches, batch_size=None, num_workers=...)`.

    An image that cannot be read is left out and reported; the next readable one of the lane takes its place. What a
    batch holds depends on (seed, shuffle_buffer, lanes, batch_size, shards) and on its number alone.

    Args:
        stream: of `open_stream`.
        image_size: of the samples.
        collate_fn: gets B samples, dicts of `pixel_values` uint8 (C, H, W) and the ints `step`, `slot_block`, `shard`
            and `row`, and returns a dict, as `MaskingCollator` does.
        batch_size: B, images per process and micro-batch.
        total_steps: the optimizer step after the last one.
        lanes: of `choose_lanes`.
        shuffle_buffer: images of a lane that are shuffled with one another, and held in memory, encoded.
        seed: of the order and of the crops, which are a pure function of (seed, epoch of the lane, shard, row).
        start_step: the optimizer step to go on with after an interruption.
        start: where the lanes go on; it must hold all lanes of all processes.
        accumulation_steps, rank, world_size: as in `PretrainingBatchSampler`.
        crop_settings: `num_channels`, `crop_scale`, `crop_ratio`, `horizontal_flip`, `interpolation`,
            `fast_large_photos` as in `PretrainingImages`.

    Yields:
        What `collate_fn` returns, plus `lane` (int), `position` (the five ints of the lane's `Position` after this
        batch) and `bad_images` (a list of `{"name", "reason"}` of the images that were left out).

    Raises:
        ValueError: a value is out of range, `start` belongs to a run of other settings, or the number of workers does
            not fit the lanes.
        BadImageError: more than MAX_SUBSTITUTES unreadable images in a row.
        OSError: a shard vanished or cannot be read.
    """

    def __init__(
        self,
        stream: ImageStream,
        image_size: int | tuple[int, int],
        *,
        collate_fn: Callable[[list[dict]], dict],
        batch_size: int,
        total_steps: int,
        lanes: int,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        start_step: int = 0,
        start: LanePositions | None = None,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        **crop_settings,
    ):
        if min(batch_size, accumulation_steps, world_size, shuffle_buffer) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size, accumulation_steps, world_size and shuffle_buffer must be positive and rank below "
                f"world_size, got {batch_size}, {accumulation_steps}, {world_size}, {shuffle_buffer} and rank {rank}"
            )
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be in 0..total_steps, got {start_step} of {total_steps}")
        if not 1 <= lanes <= stream.num_shards:
            raise ValueError(f"lanes must be in 1..{stream.num_shards}, the number of shards, got {lanes}")
        self.stream = stream
        self.images = PretrainingImages(None, image_size, seed=seed, **crop_settings)  # for its crops alone
        self.collate_fn = collate_fn
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.lanes = lanes
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.start_step = start_step
        self.accumulation_steps = accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.start = self._checked(start)

    @property
    def slot_blocks(self) -> int:
        """Micro-batches of an optimizer step, over all processes."""
        return self.accumulation_steps * self.world_size

    @property
    def settings(self) -> dict[str, int | str]:
        """What must not change between an interruption and its resumption."""
        return {
            "lanes": self.lanes,
            "shards": self.stream.num_shards,
            "fingerprint": self.stream.fingerprint,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "batch_size": self.batch_size,
            "slot_blocks": self.slot_blocks,
        }

    def _checked(self, start: LanePositions | None) -> dict[int, Position]:
        for name, now in self.settings.items() if start else ():
            before = start.settings[name]
            if before != now:
                raise ValueError(
                    f"The stream cannot go on where it was: {_SETTING_NAMES[name]} changed from {before} to {now}."
                )
        positions = start.positions if start else {}
        begun = range(min(self.lanes, self.start_step * self.slot_blocks))
        missing = [lane for lane in begun if lane not in positions]
        if missing:
            raise ValueError(
                f"To go on at step {self.start_step}, the positions of the lanes {missing} are missing: merge those "
                "of all processes with merge_positions."
            )
        return dict(positions)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.lanes % (self.world_size * num_workers):
            raise ValueError(
                f"{self.world_size} processes x {num_workers} workers cannot share {self.lanes} lanes evenly: take "
                "the number of workers from choose_lanes"
            )
        if worker:
            fsspec.asyn.reset_lock()  # a copy of the main process's event loop would never answer
        readers = {}
        for number in range(first, len(self), num_workers):
            yield self._batch(*divmod(number, self.accumulation_steps), readers)

    def _batch(self, steps_done: int, micro_step: int, readers: dict[int, Iterator[StreamedImage]]) -> dict:
        place = {"step": self.start_step + steps_done, "slot_block": micro_step * self.world_size + self.rank}
        lane = (place["step"] * self.slot_blocks + place["slot_block"]) % self.lanes
        if lane not in readers:
            begin = self.start.get(lane, Position())
            readers[lane] = read_lane(self.stream, lane, self.lanes, self.seed, self.shuffle_buffer, begin)
        samples, bad_images = [], []
        for _ in range(self.batch_size):
            image, pixel_values = self._next_readable(readers[lane], bad_images)
            samples.append({"pixel_values": pixel_values, **place, "shard": image.shard, "row": image.row})
        batch = self.collate_fn(samples)
        return {**batch, "lane": lane, "position": list(image.after), "bad_images": bad_images}

    def _next_readable(self, reader, bad_images: list[dict]) -> tuple[StreamedImage, torch.Tensor]:
        for image in itertools.islice(reader, MAX_SUBSTITUTES):
            name = self._name(image)
            try:
                return image, self.images.read_crop(image.value, name, image.epoch, image.shard, image.row)
            except BadImageError as error:
                bad_images.append({"name": name, "reason": error.reason})
        raise BadImageError(
            f"{MAX_SUBSTITUTES} images in a row cannot be read; the last one is {name}: {bad_images[-1]['reason']}"
        )

    def _name(self, image: StreamedImage) -> str:
        stored = image.value.get("path") if image.value else None
        return stored or f"{self.stream.names[image.shard]} row {image.row}"
