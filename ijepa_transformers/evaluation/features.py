# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of frozen encoders: computed once, shared out among the processes, and read back from a cache.

Shape legend: B images of a batch, N images of a split, D features.
"""

import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import __version__
from ..data.datasets import PretrainingImages, ProcessedImages
from ..data.decoding import BadImageError
from ..data.order import epoch_order
from ..data.sources import image_name
from ..encoders import (
    EncoderSpec,
    architecture,
    encoder_features,
    feature_widths,
    load_processor,
    one_line,
    open_encoder,
    weights_digest,
)
from ..execution import configure
from ..files import written_aside
from .arguments import DTYPES, PLAIN_PROBES, ProbingArguments, head_features
from .heads import concatenate, split_holdout


CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # random resized crop as usual for classification
MAX_TOKEN_BYTES = 2**31  # of patch tokens kept for the attentive probe; above it the encoder runs in every epoch
MAX_COLLAPSE_IMAGES = 5000  # of the validation split: the measures compare every image with every other


# Building: nothing is written yet
@dataclass(frozen=True)
class Entry:
    """An encoder and the name of its row."""

    name: str
    spec: EncoderSpec


@dataclass
class Split:
    """The labelled images of a split that are used: their indices (N,) in the data set, and their labels (N,)."""

    name: str
    dataset: datasets.Dataset
    indices: torch.Tensor
    labels: torch.Tensor
    fingerprint: str


@dataclass
class Run:
    """Everything the evaluation needs, built and checked by `build_run` before anything is written."""

    arguments: ProbingArguments
    accelerator: Accelerator
    entries: list[Entry]
    train: Split
    validation: Split
    trials: dict[EncoderSpec, "Trial"]
    notes: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def cache_dir(self) -> Path:
        return Path(self.arguments.cache_dir) if self.arguments.cache_dir else self.output_dir / "cache"

    def note(self, sentence: str) -> None:
        """A remark for below the table, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def sample(indices: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the indices, or all if there are fewer, in their order."""
    order = torch.from_numpy(epoch_order(len(indices), seed, epoch=0))
    return indices[order[:count].sort().values]


def fingerprint(dataset: datasets.Dataset) -> str:
    """Changes when the images or labels change: what `datasets` says of them, and size and time of every file."""
    digest = hashlib.sha256(dataset._fingerprint.encode())
    table = dataset.select_columns(["image"]).with_format("arrow")
    for start in range(0, len(table), 1000):
        column = table[start : start + 1000]["image"]
        outside = pyarrow.compute.is_null(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        for path in (path for path, is_file in zip(paths, outside, strict=True) if is_file and path):
            status = os.stat(path) if os.path.exists(path) else None
            digest.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}".encode())
    return digest.hexdigest()


# Features
class DivergedError(ValueError):
    """Features that are not finite, of which no accuracy can be measured."""


@dataclass
class OpenedEncoder:
    """An encoder on its device, with all that its features depend on."""

    spec: EncoderSpec
    model: torch.nn.Module
    processor: object
    num_channels: int

    @property
    def is_raw(self) -> bool:
        return self.spec.kind == "raw_pixels"

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        return weights_digest(self.model)

    @cached_property
    def all_but_weights(self) -> str:
        """JSON of everything beside weights, images and precision that features depend on."""
        processor = [type(self.processor).__name__, json.loads(self.processor.to_json_string())]
        parts = {"encoder": architecture(self.model), "processor": processor, "num_channels": self.num_channels}
        return json.dumps(parts, sort_keys=True)

    def images(self, dataset: datasets.Dataset) -> ProcessedImages:
        return ProcessedImages(dataset, self.processor, self.num_channels)


def open_entry(run: Run, entry: Entry) -> OpenedEncoder:
    return open_spec(run.arguments, entry.spec, run.accelerator.device)


def open_spec(arguments: ProbingArguments, spec: EncoderSpec, device: torch.device) -> OpenedEncoder:
    processor = load_processor(spec.source)  # first: it is the quicker to fail
    model = open_encoder(spec, DTYPES[arguments.dtype])
    configure(model, device.type, arguments.dtype)
    config = getattr(model, "config", None) or transformers.AutoConfig.from_pretrained(spec.source)
    return OpenedEncoder(spec, model.to(device), processor, getattr(config, "num_channels", 3))


@dataclass(frozen=True)
class Trial:
    """What one image through an encoder tells: the widths of its features, and the number and width of its tokens."""

    widths: dict[str, int]
    token_shape: tuple[int, int]


def try_out(arguments: ProbingArguments, opened: OpenedEncoder) -> Trial:
    """One blank image through image processor and encoder, for all features that the run needs.

    Raises:
        ValueError: if one of them does not take it: better now than after the encoders before it.
    """
    images, source = opened.images(None), opened.spec.source
    try:
        pixel_values = images.prepare(blank_image(images))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The image processor of {source!r}, a {type(opened.processor).__name__}, cannot be used, since it does"
            f" not work like those of Transformers' own: {one_line(error)}"
        ) from error
    device = next((parameter.device for parameter in opened.model.parameters()), pixel_values.device)
    layers = ["layers"] if "collapse" in arguments.probes else []
    kinds = {"last", *head_features(arguments, opened.is_raw), *layers}
    try:
        return Trial(*feature_widths(opened.model, pixel_values[None].to(device), kinds))
    except ValueError as error:
        raise ValueError(f"The model {source!r} cannot be used: {error}") from error


def blank_image(images: ProcessedImages) -> np.ndarray:
    return np.zeros((256, 256, images.num_channels), dtype=np.uint8)


class CroppedImages(torch.utils.data.Dataset):
    """Random resized crops, half of them mirrored, as the encoder takes them. The key is (epoch, index), and the crop
    is a pure function of (seed, epoch, index); or the reason why the image cannot be read."""

    def __init__(self, images: ProcessedImages, seed: int):
        self.images = images
        self.crops = PretrainingImages(
            images.dataset,
            tuple(images.prepare(blank_image(images)).shape[1:]),
            num_channels=images.num_channels,
            crop_scale=CROP_SCALE,
            crop_ratio=CROP_RATIO,
            horizontal_flip=True,
            interpolation="bicubic",
            seed=seed,
        )

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor | str:
        epoch, index = key
        crop = self.crops[0, 0, epoch, index]
        if crop["num_bad"]:  # it holds another image: the reason is found by reading this one
            return self.images[index]
        return self.images.processor(
            crop["pixel_values"].permute(1, 2, 0).numpy(),
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"][0]


class FlippedImages(torch.utils.data.Dataset):
    """The views of evaluation, half of them mirrored, for images that a crop would change (Clevr: counts, distances).
    Keys and values are those of `CroppedImages`."""

    def __init__(self, images: ProcessedImages, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor | str:
        view = self.images[key[1]]
        is_mirrored = np.random.default_rng([self.seed, *key]).random() < 0.5
        return view.flip(-1) if is_mirrored and not isinstance(view, str) else view


AUGMENTED = {"crop_flip": CroppedImages, "flip": FlippedImages}


def shares(count: int, round_size: int, rank: int, world_size: int) -> Iterator[tuple[int, list[int]]]:
    """Rounds of up to `round_size` places of 0..count-1: the number of places, and those of process `rank`.

    The shares of a round, one process after the other, are its places in order; all have the same length, so the last
    place may be there more than once at the end.
    """
    for start in range(0, count, round_size):
        size = min(round_size, count - start)
        share = -(-size // world_size)
        yield size, [start + min(rank * share + offset, size - 1) for offset in range(share)]


def stream(
    run: Run, opened: OpenedEncoder, images: torch.utils.data.Dataset, keys: Sequence, kinds: Collection[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """Features (up to B x processes, ...) of images[key], in the order of the keys, the same on every process.

    Raises:
        BadImageError: at the first image that cannot be read; leaving it out would change the published number.
    """
    accelerator = run.accelerator
    round_size = run.arguments.per_device_batch_size * accelerator.num_processes
    parts = list(shares(len(keys), round_size, accelerator.process_index, accelerator.num_processes))
    batches = [[keys[place] for place in places] for _, places in parts]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=list,
        num_workers=run.arguments.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for (size, _), batch, samples in zip(parts, batches, loader, strict=True):
        pixel_values = stack(images, batch, samples).to(accelerator.device)
        features = encoder_features(opened.model, pixel_values, kinds)
        features.pop("token_shape", None)  # of all images alike: `Trial` has it
        yield {name: accelerator.gather(value.contiguous())[:size] for name, value in features.items()}


def stack(images: torch.utils.data.Dataset, keys: Sequence, samples: Sequence[torch.Tensor | str]) -> torch.Tensor:
    """Pixels (B, channels, height, width)."""
    for key, value in zip(keys, samples, strict=True):
        if isinstance(value, str):
            plain, index = (images.images, key[1]) if isinstance(key, tuple) else (images, key)
            raise BadImageError(image_name(plain.dataset, index), value)
    if len({value.shape for value in samples}) > 1:
        raise ValueError("The image processor gives images of different sizes; take --per_device_batch_size 1.")
    return torch.stack(list(samples))


@dataclass
class SplitFeatures:
    """The features of a split that are kept in memory, float32 on the CPU.

    Args:
        places: of each kind, the places of the split (N,), in order, whose features there are.
        values: of each kind, the features (N, ...) by name; a kind has its own name, but "layers" one name per layer.
    """

    split: Split
    places: dict[str, torch.Tensor]
    values: dict[str, dict[str, torch.Tensor]]

    def at(self, kind: str, places: torch.Tensor) -> torch.Tensor:
        """Features (n, ...) of some places (n,) of the split."""
        return self.values[kind][kind][torch.searchsorted(self.places[kind], places)]

    def require_finite(self) -> None:
        """Raises DivergedError if there are features, other than the report's, that are not finite."""
        for kind in (kind for kind in self.values if kind != "layers"):
            values = self.values[kind][kind]
            bad = int((~values.flatten(1).isfinite().all(dim=1)).sum())
            if bad:
                raise DivergedError(f"NaN or infinity in {bad:,} of {len(values):,} {self.split.name!r} images")


def wanted_features(run: Run, opened: OpenedEncoder, split: Split) -> dict[str, torch.Tensor]:
    """The kinds of features that the probes read from memory, and of which places of the split (N,), in order."""
    arguments, everything, wanted = run.arguments, torch.arange(len(split.indices)), {}
    is_training = split is run.train
    if not streams_evaluation(run, opened):
        # Random views are seen once and not kept, so what is left is the part that the best head is chosen on.
        is_augmented = is_training and arguments.augment != "none"
        places = split_holdout(len(everything), arguments.holdout, arguments.seed)[1] if is_augmented else everything
        if len(places):
            wanted = dict.fromkeys(head_features(arguments, opened.is_raw), places)
    if PLAIN_PROBES & set(arguments.probes):
        wanted["last"] = everything
    if "collapse" in arguments.probes and not (is_training or opened.is_raw):
        wanted["layers"] = sample(everything, MAX_COLLAPSE_IMAGES, arguments.seed)
    return wanted


def frozen_features(run: Run, opened: OpenedEncoder, split: Split) -> SplitFeatures:
    """All that this run keeps of a split, from the cache; what is not there is computed in one pass and put there.

    Each kind has a file of its own, so that other probes, or a probe more, compute no kind again.
    """
    wanted = wanted_features(run, opened, split)
    if not wanted:
        return SplitFeatures(split, {}, {})
    keys = {kind: cache_key(run, opened, split, split.indices[places], kind) for kind, places in wanted.items()}
    paths = {kind: cache_path(run, key) for kind, key in keys.items()}
    values = {kind: read_cache(run, paths[kind], key) for kind, key in keys.items()}
    found = torch.tensor([[values[kind] is not None for kind in wanted]], device=run.accelerator.device)
    is_found = dict(zip(wanted, run.accelerator.gather(found).all(dim=0).tolist(), strict=True))
    missing = {kind: places for kind, places in wanted.items() if not is_found[kind]}
    computed = compute_features(run, opened, split, missing) if missing else {}
    if run.accelerator.is_main_process:
        for kind, features in computed.items():
            write_cache(paths[kind], keys[kind], features)
    return SplitFeatures(split, wanted, {**values, **computed})


def compute_features(
    run: Run, opened: OpenedEncoder, split: Split, wanted: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Features by kind and name, by one pass over all places that any kind wants."""
    is_wanted = {kind: torch.zeros(len(split.indices), dtype=torch.bool) for kind in wanted}
    for kind, places in wanted.items():
        is_wanted[kind][places] = True
    places = torch.stack([*is_wanted.values()]).any(dim=0).nonzero().flatten()
    parts = stream(run, opened, opened.images(split.dataset), split.indices[places].tolist(), list(wanted))
    is_shown = run.accelerator.is_main_process and sys.stderr.isatty()
    kept, start = {kind: [] for kind in wanted}, 0
    for part in tqdm(parts, f"{split.name} batches", disable=not is_shown):
        chunk = places[start : start + len(next(iter(part.values())))]
        start += len(chunk)
        for kind in wanted:
            kept[kind].append(
                {name: value.cpu()[is_wanted[kind][chunk]] for name, value in part.items() if kind_of(name) == kind}
            )
    return {kind: concatenate(parts) for kind, parts in kept.items()}


def kind_of(name: str) -> str:
    """The kind that asks for features of this name; see `encoder_features`."""
    return "layers" if name.startswith("layer_") else name


def cache_key(run: Run, opened: OpenedEncoder, split: Split, indices: torch.Tensor, kind: str) -> str:
    """All that features depend on, as JSON."""
    key = {
        "weights": opened.digest,
        "all_but_weights": opened.all_but_weights,
        "data": split.fingerprint,
        "split": split.name,
        "indices": hashlib.sha256(indices.numpy().tobytes()).hexdigest(),
        "kind": kind,
        "dtype": run.arguments.dtype,
        "versions": [__version__, transformers.__version__],
    }
    return json.dumps(key, sort_keys=True)


def cache_path(run: Run, key: str) -> Path:
    return run.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def read_cache(run: Run, path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The features of a cache file, or None if there is none that can be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError):
        pass
    run.note(f"The cache file {path} was damaged, so its features were computed again.")
    return None


def write_cache(path: Path, key: str, features: dict[str, torch.Tensor]) -> None:
    with written_aside(path) as unfinished:
        save_file(features, unfinished, metadata={"key": key})


def streams_evaluation(run: Run, opened: OpenedEncoder) -> bool:
    """Whether heads read patch tokens that are too many to stay in memory, so that the encoder runs beside them."""
    num_images = len(run.train.indices) + len(run.validation.indices)
    num_tokens, width = run.trials[opened.spec].token_shape
    has_tokens = "tokens" in head_features(run.arguments, opened.is_raw)
    return has_tokens and 4 * num_images * num_tokens * width > MAX_TOKEN_BYTES
