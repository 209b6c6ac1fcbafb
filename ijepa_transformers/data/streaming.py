# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretraining batches streamed from shards, for data of any size.

Shape legend:
    B images of a batch, C channels (1 or 3), H rows, W columns; `pixel_values` is uint8 (C, H, W).

Micro-batch q = step * slot_blocks + slot_block (see `PretrainingBatchSampler`) takes the next B readable images of
lane q % L. A lane is an endless sequence of images, a pure function of (seed, shuffle_buffer, L, lane). In each epoch
it reads its part of the shards (`_lane_shards`) in blocks of `shuffle_buffer` images, each in the order of
`block_order`. So the L lanes together see every image once per epoch, and it does not matter which process or worker
reads a lane. L is fixed for a run. It must be a multiple of processes x workers, so that no two read the same lane.

To resume, a run needs one `Position` per lane. Every batch carries the position after it, and `LanePositions` collects
them. Images stay encoded until they are cropped. At the start only a list of the shards and one header are read.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec.asyn
import torch
from typing_extensions import Unpack

from ..url_secrets import without_secrets
from .datasets import MAX_SUBSTITUTES, CropSettings, RandomCrops
from .decoding import BadImageError, StoredImage
from .notices import counted, tell
from .order import block_order, epoch_order
from .remote import have_changed, may_have_changed
from .shards import ImageStream


_MAX_EMPTY_EPOCHS = 20  # epochs in a row in which a lane may find no image in its shards


def choose_lanes(num_shards: int, world_size: int, num_workers: int, lanes: int | None = None) -> tuple[int, int]:
    """How many lanes a run reads, and how many workers each process may start.

    Args:
        num_shards: of the stream.
        world_size: processes.
        num_workers: wanted workers of each process; 0 means that the training process reads.
        lanes: of the run to resume, or None for a new run, in which every worker gets one lane.

    Returns:
        (lanes, workers): `workers` is the largest number that divides the lanes evenly, at most `num_workers`.

    Raises:
        ValueError: if there are fewer shards than processes, or the processes cannot share the lanes evenly.
    """
    if lanes is None:
        if num_shards < world_size:
            raise ValueError(
                f"{counted(num_shards, 'shard')} cannot be streamed to {world_size} processes, which need one each: "
                f"start at most {counted(num_shards, 'process')}, or write the images to more files"
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


def _lane_shards(num_shards: int, lane: int, lanes: int, seed: int, epoch: int) -> list[int]:
    """The shards that a lane reads in an epoch, in order. Each shard of the epoch's permutation is in one lane."""
    # Some lanes get one shard more. They take turns, or the same lanes would fall behind in every epoch.
    return epoch_order(num_shards, seed, epoch)[(lane + epoch) % lanes :: lanes].tolist()


class Position(NamedTuple):
    """Where a lane goes on: a block of images, and how many of its images are used already.

    Args:
        epoch: of the lane, from 0.
        block: number of the block in this epoch of the lane.
        place: number of the shard in which the block starts, in the lane's order of this epoch.
        row: the row of that shard at which the block starts.
        taken: images of the block that were used before, bad ones included.
    """

    epoch: int = 0
    block: int = 0
    place: int = 0
    row: int = 0
    taken: int = 0


class StreamedImage(NamedTuple):
    """An encoded image and the position after it. (shard, row) is its identity; `place` is as in `Position`."""

    value: StoredImage | None
    epoch: int
    place: int
    shard: int
    row: int
    after: Position = Position()


def read_lane(
    stream: ImageStream, lane: int, lanes: int, seed: int, shuffle_buffer: int, start: Position
) -> Iterator[StreamedImage]:
    """The endless sequence of a lane's images from a position on. Holds one block of encoded images in memory.

    Raises:
        OSError: if a shard cannot be read.
        ValueError: if the lane's shards hold no image for 20 epochs, or fewer images than when `start` was written.
    """
    num_empty = 0
    for epoch in itertools.count(start.epoch):
        position = start if epoch == start.epoch else Position(epoch)
        num_empty += position.block == 0  # set back when an image is found
        for image in _read_epoch(stream, lane, lanes, seed, shuffle_buffer, position):
            num_empty = 0
            yield image
        if num_empty >= _MAX_EMPTY_EPOCHS:
            raise ValueError(f"{stream.source!r} holds no images in any shard of lane {lane} for {num_empty} epochs")


def _read_epoch(
    stream: ImageStream, lane: int, lanes: int, seed: int, shuffle_buffer: int, position: Position
) -> Iterator[StreamedImage]:
    shards = _lane_shards(stream.num_shards, lane, lanes, seed, position.epoch)
    images = _in_file_order(stream, shards, position)
    while block := list(itertools.islice(images, shuffle_buffer)):
        if position.taken >= len(block):
            raise ValueError(f"the shards of {stream.source!r} hold fewer images than when the checkpoint was written")
        end = Position(position.epoch, position.block + 1, block[-1].place, block[-1].row + 1)
        order = block_order(len(block), seed, lane, position.epoch, position.block).tolist()
        waiting = [block[place] for place in reversed(order[position.taken :])]
        block.clear()  # from here on an image that is used leaves the memory
        while waiting:
            image = waiting.pop()
            is_last = not waiting
            yield image._replace(after=end if is_last else position._replace(taken=len(order) - len(waiting)))
        position = end


def _in_file_order(stream: ImageStream, shards: list[int], position: Position) -> Iterator[StreamedImage]:
    """The images of these shards from the start of the position's block on."""
    for place in range(position.place, len(shards)):
        first_row = position.row if place == position.place else 0
        for row, value in stream.rows(shards[place], first_row):
            yield StreamedImage(value, position.epoch, place, shards[place], row)


class LanePositions:
    """Where each lane of a run goes on, and the settings that must stay the same. A checkpoint keeps both.

    Args:
        settings: `StreamingBatches.settings`.
        positions: lane -> `Position`; lanes that are absent start from the beginning.
    """

    def __init__(self, settings: Mapping[str, int | str], positions: Mapping[int, Iterable[int]] | None = None):
        self.settings = dict(settings)
        self.positions = {int(lane): Position(*position) for lane, position in (positions or {}).items()}

    def update(self, batch: dict[str, Any]) -> None:
        """Records the position after a batch that was used in training. Not for batches that are only prepared."""
        self.positions[batch["lane"]] = Position(*batch["position"])

    def state_dict(self) -> dict[str, dict]:
        """For JSON. A process knows its own lanes only; `merge_positions` merges the states of all processes."""
        positions = {str(lane): list(position) for lane, position in sorted(self.positions.items())}
        return {"settings": self.settings, "positions": positions}

    @classmethod
    def from_state_dict(cls, state: dict[str, dict]) -> "LanePositions":
        """The positions that `state_dict` gave."""
        return cls(state["settings"], state["positions"])


def merge_positions(states: Iterable[dict[str, dict]]) -> dict[str, dict]:
    """One `state_dict` from those of all processes, with the farthest position of each lane.

    This is also right if a run was resumed with another number of processes: every process starts from the positions
    of all lanes, and only the process that reads a lane moves its position.

    Raises:
        ValueError: if they come from runs of different settings.
    """
    states = list(states)
    if any(state["settings"] != states[0]["settings"] for state in states):
        raise ValueError(f"the processes stream with different settings: {[state['settings'] for state in states]}")
    merged: dict[str, list[int]] = {}
    for state in states:
        for lane, position in state["positions"].items():
            merged[lane] = max(merged.get(lane, position), position)
    return {"settings": states[0]["settings"], "positions": merged}


_SETTING_NAMES = {
    "lanes": "lanes",
    "shards": "shards",
    "fingerprint": "names of the shards",
    "seed": "seed",
    "shuffle_buffer": "shuffle_buffer",
    "batch_size": "images per process and pass",
    "slot_blocks": "passes per optimizer step over all processes",
}


def _check_contents(before: str, now: str) -> None:
    """Raises ValueError if the shards are others than before. Tells if they may be."""
    if have_changed(before, now):
        raise ValueError("The stream cannot be resumed: sizes or contents of the shards have changed.")
    if may_have_changed(before, now):
        tell(
            "The shards have the same sizes as before, but the server gives other ETags or times of change. If they"
            " were replaced by others, this is not the run of before."
        )


class StreamingBatches(torch.utils.data.IterableDataset):
    """The collated micro-batches of one process, for `DataLoader(batches, batch_size=None, num_workers=...)`.

    An image that cannot be read is left out and reported; the next readable one of the lane takes its place. The
    images of a batch depend only on (seed, shuffle_buffer, lanes, batch_size, shards) and the number of the batch.

    Args:
        stream: of `open_stream`.
        image_size: of the samples.
        collate_fn: gets B samples, dicts of `pixel_values` uint8 (C, H, W) and the ints `step`, `slot_block`, `shard`
            and `row`, and returns a dict, as `MaskingCollator` does.
        batch_size: B, images per process and micro-batch.
        total_steps: the optimizer step after the last one.
        lanes: of `choose_lanes`.
        shuffle_buffer: images of a lane that are shuffled with one another and held in memory, encoded.
        seed: of the order and of the crops, which are a pure function of (seed, epoch of the lane, shard, row).
        start_step: the optimizer step to go on with after an interruption.
        start: where the lanes go on; it must have the lanes of all processes.
        accumulation_steps, rank, world_size: as in `PretrainingBatchSampler`.
        crop_settings: as in `RandomCrops`.

    Yields:
        What `collate_fn` returns, plus `lane` (int), `position` (the five ints of the lane's `Position` after this
        batch) and `bad_images` (a list of `{"name", "reason"}` of the images that were left out).

    Raises:
        ValueError: if a value is out of range, `start` belongs to a run with other settings, or the lanes cannot be
            divided among the workers.
        BadImageError: if MAX_SUBSTITUTES images in a row cannot be read.
        OSError: if a shard is missing or cannot be read.
    """

    def __init__(
        self,
        stream: ImageStream,
        image_size: int | Sequence[int],
        *,
        collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]],
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
        **crop_settings: Unpack[CropSettings],
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
        self.crops = RandomCrops(image_size, seed=seed, **crop_settings)
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
        """The settings that must be the same when a run is resumed."""
        return {
            "lanes": self.lanes,
            "shards": self.stream.num_shards,
            "fingerprint": self.stream.fingerprint,
            "contents": self.stream.contents,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "batch_size": self.batch_size,
            "slot_blocks": self.slot_blocks,
        }

    def _checked(self, start: LanePositions | None) -> dict[int, Position]:
        start = start or LanePositions(self.settings)
        for name, words in _SETTING_NAMES.items():
            now = self.settings[name]
            before = start.settings.get(name, now)
            if before != now:
                raise ValueError(f"The stream cannot be resumed: {words} changed from {before} to {now}.")
        _check_contents(str(start.settings.get("contents", "")), self.stream.contents)  # older checkpoints have none
        begun = range(min(self.lanes, self.start_step * self.slot_blocks))
        missing = [lane for lane in begun if lane not in start.positions]
        if missing:
            raise ValueError(
                f"To go on at step {self.start_step}, the positions of the lanes {missing} are missing: merge those "
                "of all processes with merge_positions."
            )
        return dict(start.positions)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.lanes % (self.world_size * num_workers):
            raise ValueError(
                f"{self.world_size} processes x {num_workers} workers cannot share {self.lanes} lanes evenly: take "
                "the number of workers from choose_lanes"
            )
        if worker:
            fsspec.asyn.reset_lock()  # the event loop copied from the main process does not run in a worker
        readers: dict[int, Iterator[StreamedImage]] = {}
        for number in range(first, len(self), num_workers):
            yield self._batch(*divmod(number, self.accumulation_steps), readers)

    def _batch(self, steps_done: int, micro_step: int, readers: dict[int, Iterator[StreamedImage]]) -> dict[str, Any]:
        place = {"step": self.start_step + steps_done, "slot_block": micro_step * self.world_size + self.rank}
        lane = (place["step"] * self.slot_blocks + place["slot_block"]) % self.lanes
        if lane not in readers:
            begin = self.start.get(lane, Position())
            readers[lane] = read_lane(self.stream, lane, self.lanes, self.seed, self.shuffle_buffer, begin)
        samples = []
        bad_images: list[dict[str, str]] = []
        for _ in range(self.batch_size):
            image, pixel_values = self._next_readable(readers[lane], bad_images)
            samples.append({"pixel_values": pixel_values, **place, "shard": image.shard, "row": image.row})
        batch = self.collate_fn(samples)
        return {**batch, "lane": lane, "position": list(image.after), "bad_images": bad_images}

    def _next_readable(
        self, reader: Iterator[StreamedImage], bad_images: list[dict[str, str]]
    ) -> tuple[StreamedImage, torch.Tensor]:
        """The next image of a lane that can be read, and its crop; those before it are added to `bad_images`."""
        for image in itertools.islice(reader, MAX_SUBSTITUTES):
            name = self._name(image)
            try:
                return image, self.crops.read_crop(image.value, name, image.epoch, image.shard, image.row)
            except BadImageError as error:
                bad_images.append({"name": name, "reason": error.reason})
        raise BadImageError(
            f"{MAX_SUBSTITUTES} images in a row cannot be read; the last one is {name}: {bad_images[-1]['reason']}"
        )

    def _name(self, image: StreamedImage) -> str:
        stored = image.value.get("path") if image.value else None
        return without_secrets(stored or f"{self.stream.names[image.shard]} row {image.row}")
