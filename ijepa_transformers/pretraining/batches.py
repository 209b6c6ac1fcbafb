# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The images of a pretraining run, indexed or streamed, behind one interface.

`IndexedData` and `StreamedData` have

    num_images              the number of images
    loader(...)             the batches of this process, starting with any step
    count(batch)            notes that a batch was trained on
    bad_images(batch)       the images that could not be read, for `log.add`
    names(batch)            the names of the images
    views(count)            whole images without random crops, the same in every call
    sixteen_bit_max         white in images of 16 bits, None if a sample has none
    log                     the bad images of the run, in bad_images.jsonl
    state()                 what a checkpoint must keep, as JSON. All processes must call it.
    write(checkpoint)       writes what else a checkpoint must keep. The main process calls it.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from ..configuration_ijepa import IJepaConfig
from ..data.bad_images import BadImageLog, bad_indices
from ..data.bit_depth import SAMPLE_SIZE, look, look_at_dataset, white_of
from ..data.contents import image_fingerprints
from ..data.datasets import PretrainingImages
from ..data.decoding import BadImageError, ImageValue, read_image
from ..data.image_cache import DecodedImages, can_share, decoded_size, free_memory, processes_here
from ..data.notices import counted
from ..data.order import PretrainingBatchSampler
from ..data.shards import count_images, open_stream
from ..data.sources import image_name, open_split
from ..data.streaming import LanePositions, StreamingBatches, choose_lanes, merge_positions
from ..data.transforms import resize_center_crop
from ..distributed import on_main_process, shared_dataset
from ..masking import Masking, MaskingCollator
from ..preemption import ignore_stop_signals
from ..url_secrets import without_secrets
from .arguments import AUTO, PretrainingArguments
from .state import read_state


USUAL_BATCH = 32  # of the recipes for small sets
_SHARDS_OF_VIEWS = 8  # at most, because opening a shard of a server takes a while
_IMAGES = "images.safetensors"  # a number for the name and size of each image


def _check_batch(num_images: int, arguments: PretrainingArguments, num_processes: int) -> None:
    """Raises ValueError if the images do not fill a batch."""
    if num_images < arguments.batch_size:
        share = max(1, min(USUAL_BATCH, num_images) // num_processes)
        raise ValueError(
            f"{counted(num_images, 'image')} cannot fill one batch of batch_size {arguments.batch_size}; lower both"
            f" sizes, for example --batch_size {share * num_processes} --per_device_batch_size {share}."
        )


def _check_number(num_images: int, arguments: PretrainingArguments, state: dict, difference: str = "") -> None:
    """Raises ValueError if the run to resume had another number of images. `difference` tells more about them."""
    if state["num_images"] != num_images:
        raise ValueError(
            f"The run to resume had {counted(state['num_images'], 'image')}, but {arguments.data!r} has"
            f" {num_images}{difference}: the order of images would not continue."
        )


class IndexedData:
    """A data set with random access to its images. `notes` are sentences for the user.

    Args:
        dataset: from `load_image_dataset`.
        checkpoint: to resume, or None.

    Raises:
        ValueError: if the images do not fill a batch, or if the run to resume had other images.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        arguments: PretrainingArguments,
        config: IJepaConfig,
        accelerator: Accelerator,
        checkpoint: Path | None,
        inherited_white: int | None = None,
    ):
        _check_batch(len(dataset), arguments, accelerator.num_processes)
        self.notes: list[str] = []
        self.dataset, self.arguments, self.config, self.accelerator = dataset, arguments, config, accelerator
        self.num_images = len(dataset)
        sample = look_at_dataset(dataset, config.num_channels, arguments.data)
        self.sixteen_bit_max = white_of(sample, arguments.sixteen_bit_max, inherited_white, self.notes.append)
        self.fingerprints: torch.Tensor | None = None  # (num_images,) on the main process
        on_main_process(accelerator, lambda: self._take_fingerprints(checkpoint))
        self.log = _open_log(self, is_resumed=checkpoint is not None)

    def _take_fingerprints(self, checkpoint: Path | None) -> None:
        """Raises ValueError if the names, sizes or contents of the images are not those of the run to resume."""
        self.fingerprints = image_fingerprints(self.dataset, self.arguments.data)
        if checkpoint is None:
            return
        place = _first_difference(checkpoint, self.fingerprints)
        what = "" if place is None else f"image {place}, {image_name(self.dataset, place)!r}"
        _check_number(self.num_images, self.arguments, read_state(checkpoint), what and f" (first difference: {what})")
        if what:
            raise ValueError(
                f"The images are not those of the run to resume: {what}, has another name, size or content than"
                " before. The order of images would not continue. Restore them, or start a new run with --init_from."
            )

    def loader(self, masking: Masking, total_steps: int, first_step: int) -> DataLoader:
        arguments, accelerator = self.arguments, self.accelerator
        images = PretrainingImages(
            self.dataset,
            self.config.image_height_and_width,
            seed=arguments.seed,
            cache=self._cache((total_steps - first_step) * arguments.batch_size),
            **_crop_settings(self),
        )
        sampler = PretrainingBatchSampler(
            self.num_images,
            arguments.images_per_pass,
            total_steps=total_steps,
            seed=arguments.seed,
            start_step=first_step,
            accumulation_steps=accelerator.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        collator = MaskingCollator(masking, arguments.seed)
        settings = _loader_settings(accelerator, arguments.num_workers)
        return DataLoader(images, batch_sampler=sampler, collate_fn=collator, **settings)

    def _cache(self, num_samples: int) -> DecodedImages | None:
        """Memory for decoded images, if `cache_images` asks for it, or if it is "auto" and they fit and come again.

        Args:
            num_samples: images that will be read, over all processes.
        """
        mode, share = self.arguments.cache_images, {"ram": 0.5, AUTO: 0.25}
        if mode == "none" or (mode == AUTO and (self.arguments.fast_large_photos or num_samples <= self.num_images)):
            return None
        if not can_share(self.arguments.num_workers):
            if mode == "ram":
                self.notes.append("cache_images ram needs processes that are forked; images are decoded each time.")
            return None
        free = free_memory()
        room = int(share[mode] * free / processes_here())
        needed = decoded_size(self.dataset, self.config.num_channels)
        if mode == AUTO and needed > room:
            return None
        sizes = f"{math.ceil(needed / 2**20):,} MiB of {free // 2**20:,} MiB that are free"
        self.notes.append(f"Decoded images are kept in memory, about {sizes} (cache_images).")
        return DecodedImages(self.num_images, min(room, 2 * needed))

    def count(self, batch: dict) -> None:
        """Does nothing, because the step alone decides which images come next."""

    def bad_images(self, batch: dict) -> list[int]:
        return bad_indices(batch, self.num_images)

    def names(self, batch: dict) -> list[str]:
        return [image_name(self.dataset, index) for index in batch["index"].tolist()]

    def views(self, count: int) -> Iterator[torch.Tensor]:
        """Up to `count` images of all parts of the data, uint8 (C, H, W). Those that cannot be read are left out."""
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(0))[:count]
        return _views(self, ((self.dataset[index]["image"], index) for index in order.sort().values.tolist()))

    def state(self) -> dict:
        return {"num_images": self.num_images}

    def write(self, checkpoint: Path) -> None:
        assert self.fingerprints is not None  # this is the main process
        save_file({"images": self.fingerprints}, checkpoint / _IMAGES)


def _first_difference(checkpoint: Path, fingerprints: torch.Tensor) -> int | None:
    """The first image whose name, size or content differs from that in the checkpoint. None if there is none."""
    if not (checkpoint / _IMAGES).exists():  # checkpoints of earlier versions have none
        return None
    before = load_file(checkpoint / _IMAGES)["images"]
    count = min(len(before), len(fingerprints))
    different = (before[:count] != fingerprints[:count]).nonzero().flatten()
    return int(different[0]) if len(different) else None


class StreamedData:
    """Shards that are read one after the other (`data/streaming.py`).

    Args:
        checkpoint: as in `IndexedData`.

    Raises:
        ValueError: if the shards cannot be opened or shared among the processes, if their number of images is unknown,
            and as `IndexedData`.
    """

    def __init__(
        self,
        arguments: PretrainingArguments,
        config: IJepaConfig,
        accelerator: Accelerator,
        checkpoint: Path | None,
        inherited_white: int | None = None,
    ):
        state = read_state(checkpoint) if checkpoint else None
        self.notes: list[str] = []
        self.arguments, self.config, self.accelerator = arguments, config, accelerator
        self.stream = open_stream(
            arguments.data,
            split=arguments.train_split,
            config_name=arguments.data_config,
            image_column=arguments.image_column,
        )
        # Servers behind one URL may differ in what they say.
        self.stream.contents = on_main_process(accelerator, lambda: self.stream.contents)
        self.num_images = self._find_num_images()
        _check_batch(self.num_images, arguments, accelerator.num_processes)
        if state:
            _check_number(self.num_images, arguments, state)
        self.start = LanePositions.from_state_dict(state["stream"]) if state else None
        lanes_before = int(self.start.settings["lanes"]) if self.start else None
        sample = look(self._first_images(), config.num_channels, arguments.data)
        self.sixteen_bit_max = white_of(sample, arguments.sixteen_bit_max, inherited_white, self.notes.append)
        self.lanes, self.num_workers = choose_lanes(
            self.stream.num_shards, accelerator.num_processes, arguments.num_workers, lanes_before
        )
        self.log = _open_log(self, is_resumed=checkpoint is not None)

    def _first_images(self) -> Iterator[ImageValue]:
        """Some of the first shard. If it cannot be read, the run says so when its turn comes."""
        try:
            for _, value in itertools.islice(self.stream.rows(0), SAMPLE_SIZE):
                yield value
        except OSError:
            return

    def _find_num_images(self) -> int:
        found = self.arguments.num_images or on_main_process(self.accelerator, lambda: count_images(self.stream))
        if found is None:
            unknown = f"{self.arguments.data!r} does not say how many images it holds: give num_images."
            raise ValueError(" ".join(filter(None, [unknown, self._known_length()])))
        return found

    def _known_length(self) -> str:
        """What is known about the length of the run without the number of images."""
        steps, batch_size = self.arguments.max_steps, self.arguments.batch_size
        return (
            f"The run reads {steps * batch_size:,}, {counted(steps, 'step')} of batch {batch_size:,}." if steps else ""
        )

    def loader(self, masking: Masking, total_steps: int, first_step: int) -> DataLoader:
        arguments, accelerator = self.arguments, self.accelerator
        batches = StreamingBatches(
            self.stream,
            self.config.image_height_and_width,
            collate_fn=MaskingCollator(masking, arguments.seed),
            batch_size=arguments.images_per_pass,
            total_steps=total_steps,
            lanes=self.lanes,
            shuffle_buffer=arguments.shuffle_buffer,
            seed=arguments.seed,
            start_step=first_step,
            start=self.start,
            accumulation_steps=accelerator.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            **_crop_settings(self),
        )
        self.positions = LanePositions(batches.settings, self.start.positions if self.start else None)
        return DataLoader(batches, batch_size=None, **_loader_settings(accelerator, self.num_workers))

    def count(self, batch: dict) -> None:
        """Moves the position to resume from. The workers have read further, but only trained images count."""
        self.positions.update(batch)

    def bad_images(self, batch: dict) -> list[dict]:
        return batch["bad_images"]

    def names(self, batch: dict) -> list[str]:
        pairs = zip(batch["shard"].tolist(), batch["row"].tolist(), strict=True)
        return [without_secrets(f"{self.stream.names[shard]} row {row}") for shard, row in pairs]

    def views(self, count: int) -> Iterator[torch.Tensor]:
        """Up to `count` images from the beginnings of some shards, as in `IndexedData`."""
        step = math.ceil(self.stream.num_shards / _SHARDS_OF_VIEWS)
        shards = range(0, self.stream.num_shards, step)
        rows = (itertools.islice(self.stream.rows(shard), math.ceil(count / len(shards))) for shard in shards)
        values = ((value, row) for row, value in itertools.chain.from_iterable(rows) if value is not None)
        return _views(self, itertools.islice(values, count))

    def state(self) -> dict:
        positions = merge_positions(gather_object([self.positions.state_dict()]))
        return {"num_images": self.num_images, "stream": positions}

    def write(self, checkpoint: Path) -> None:
        """Does nothing, because `state` is all."""


def _views(data: IndexedData | StreamedData, values: Iterable[tuple[ImageValue, int]]) -> Iterator[torch.Tensor]:
    """The readable ones of images and their numbers, resized and cropped as for an evaluation."""
    size, channels = data.config.image_height_and_width, data.config.num_channels
    for value, number in values:
        with suppress(BadImageError):  # training has reported it
            image = read_image(value, number, channels, data.sixteen_bit_max)
            yield resize_center_crop(image, size, data.arguments.eval_resize_ratio)


def _open_log(data: IndexedData | StreamedData, is_resumed: bool) -> BadImageLog:
    arguments = data.arguments
    return BadImageLog(
        Path(arguments.output_dir) / "bad_images.jsonl",
        arguments.bad_image_limit,
        getattr(data, "dataset", None),
        data.config.num_channels,
        writes=data.accelerator.is_main_process,
        num_images=data.num_images,
        is_resumed=is_resumed,
        sixteen_bit_max=data.sixteen_bit_max,
    )


def _crop_settings(data: IndexedData | StreamedData) -> dict[str, Any]:
    arguments = data.arguments
    return {
        "num_channels": data.config.num_channels,
        "sixteen_bit_max": data.sixteen_bit_max,
        "crop_scale": tuple(arguments.crop_scale),
        "crop_ratio": tuple(arguments.crop_ratio),
        "horizontal_flip": arguments.horizontal_flip,
        "interpolation": arguments.interpolation,
        "fast_large_photos": arguments.fast_large_photos,
    }


def _loader_settings(accelerator: Accelerator, num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "worker_init_fn": ignore_stop_signals,
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),  # without it, starting workers would advance the generator that training uses
    }


def open_batches(
    arguments: PretrainingArguments,
    config: IJepaConfig,
    accelerator: Accelerator,
    checkpoint: Path | None,
    inherited_white: int | None = None,
) -> IndexedData | StreamedData:
    """The images of a run, indexed or streamed, with the log of its bad images.

    Args:
        checkpoint: the one to resume.
        inherited_white: `sixteen_bit_max` of the images that the weights of `init_from` were trained on.

    Raises:
        ValueError: as `IndexedData` and `StreamedData`.
        BadImageError: if the run to resume already had too many bad images.
    """
    if arguments.streaming:
        return StreamedData(arguments, config, accelerator, checkpoint, inherited_white)
    dataset = shared_dataset(accelerator, lambda: open_split(arguments, arguments.train_split))
    return IndexedData(dataset, arguments, config, accelerator, checkpoint, inherited_white)
