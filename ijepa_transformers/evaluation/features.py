# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of frozen encoders. The processes divide the images, and features are computed once and cached in files.

Shape legend: B images of a batch, N images of a split, n some of these images, D features.
"""

import functools
import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from .. import __version__
from ..data.bit_depth import DepthSample, setting_of, settle
from ..data.contents import ContentDigests
from ..data.datasets import PretrainingImages, ProcessedImages, prepare_image
from ..data.decoding import BadImageError
from ..data.order import epoch_order
from ..data.sources import image_name
from ..data.workers import prepare_worker
from ..display import SECONDS_BETWEEN_LINES, Progress
from ..distributed import on_main_process
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
from ..failures import DivergedError
from ..files import written_aside
from ..locks import alone_with
from .arguments import PLAIN_PROBES, ProbingArguments, head_features
from .heads import concatenate, split_holdout


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CONTENTS = "contents.json"
CACHE_FILES = (_CONTENTS, f"{'[0-9a-f]' * 32}.safetensors")  # patterns of their names
_CROP_SCALE, _CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # random resized crop as usual for classification
_MAX_TOKEN_BYTES = 2**31  # if the patch tokens need more memory, the encoder runs again in every epoch of the heads
_MAX_COLLAPSE_IMAGES = 5000  # of the validation split; the measures compare each image with all others


# The run
@dataclass(frozen=True)
class Entry:
    """An encoder and the name of its row in the table."""

    name: str
    spec: EncoderSpec


@dataclass
class Split:
    """The labelled images of a split that are used: `indices` (N,) in the data set and `labels` (N,), int64.

    Where an image has several classes, `labels` are 0 or 1, (N, classes), float32.
    `contents` is a hash of the bytes of these images. `note_contents` takes it.
    """

    name: str
    dataset: datasets.Dataset
    indices: torch.Tensor
    labels: torch.Tensor
    contents: str = ""

    @property
    def has_several(self) -> bool:
        """Whether an image has a list of classes."""
        return self.labels.dim() == 2


@dataclass
class Run:
    """All that the evaluation needs. `build_run` builds and checks it before anything is written."""

    arguments: ProbingArguments
    accelerator: Accelerator
    entries: list[Entry]
    train: Split
    validation: Split
    trials: dict[EncoderSpec, "Trial"]
    depth: DepthSample
    notes: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def cache_dir(self) -> Path:
        return Path(self.arguments.cache_dir) if self.arguments.cache_dir else self.output_dir / "cache"

    @cached_property
    def contents(self) -> ContentDigests:
        return ContentDigests(self.cache_dir / _CONTENTS)

    def add_note(self, sentence: str) -> None:
        """Adds a sentence to the notes below the table, unless it is there."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def sample_indices(indices: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """A random sample of `count` of the indices, in their order; all of them if there are fewer."""
    order = torch.from_numpy(epoch_order(len(indices), seed, epoch=0))
    return indices[order[:count].sort().values]


def note_contents(run: Run) -> None:
    """Takes the hashes of the contents of both splits. Notes if images have changed since an earlier run."""
    for split in (run.train, run.validation):
        ask = functools.partial(run.contents.digest, split.dataset, split.indices.tolist())
        split.contents, has_changed = on_main_process(run.accelerator, ask)
        if has_changed:
            run.add_note(
                f"Images of the {split.name!r} split have changed since an earlier run, so their features were"
                " computed again."
            )


# Features
@dataclass
class OpenedEncoder:
    """An encoder on its device, with all that its features depend on."""

    spec: EncoderSpec
    model: torch.nn.Module
    processor: BaseImageProcessor
    num_channels: int

    @property
    def is_raw(self) -> bool:
        return self.spec.kind == "raw_pixels"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.model)

    @cached_property
    def all_but_weights(self) -> str:
        """All that features depend on except weights, images and precision, as JSON."""
        processor = [type(self.processor).__name__, json.loads(self.processor.to_json_string())]
        parts = {"encoder": architecture(self.model), "processor": processor, "num_channels": self.num_channels}
        return json.dumps(parts, sort_keys=True)

    def images(self, dataset: datasets.Dataset) -> ProcessedImages:
        """The images of a data set as the encoder takes them."""
        return ProcessedImages(dataset, self.processor, self.num_channels)


def open_entry(run: Run, entry: Entry) -> OpenedEncoder:
    opened = open_spec(run.arguments, entry.spec, run.accelerator.device)
    settle(opened.processor, run.depth, run.arguments.sixteen_bit_max)
    return opened


def open_spec(arguments: ProbingArguments, spec: EncoderSpec, device: torch.device) -> OpenedEncoder:
    """Opens an encoder and its image processor.

    Raises:
        ValueError: if one of them cannot be opened.
    """
    processor = load_processor(spec.source)  # first, because it fails more quickly
    model = open_encoder(spec, DTYPES[arguments.dtype])
    configure(model, device.type, arguments.dtype)
    config = getattr(model, "config", None) or transformers.AutoConfig.from_pretrained(spec.source)
    return OpenedEncoder(spec, model.to(device), processor, getattr(config, "num_channels", 3))


@dataclass(frozen=True)
class Trial:
    """The widths of an encoder's features by name, and the number and width of its tokens."""

    widths: dict[str, int]
    token_shape: tuple[int, int]


def try_encoder(arguments: ProbingArguments, opened: OpenedEncoder) -> Trial:
    """Computes all features that the run needs of one blank image.

    It is called for all encoders before the first one is evaluated, so that a mistake is found at once.

    Raises:
        ValueError: if the image processor or the encoder does not accept the image.
    """
    source = opened.spec.source
    try:
        pixel_values = prepare_image(opened.processor, _blank_image(opened.num_channels))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The image processor of {source!r}, a {type(opened.processor).__name__}, cannot be used, because it does"
            f" not work like the image processors of Transformers: {one_line(error)}"
        ) from error
    device = next((parameter.device for parameter in opened.model.parameters()), pixel_values.device)
    layers = ["layers"] if "collapse" in arguments.probes else []
    kinds = {"last", *head_features(arguments, opened.is_raw), *layers}
    try:
        return Trial(*feature_widths(opened.model, pixel_values[None].to(device), kinds))
    except ValueError as error:
        raise ValueError(f"The model {source!r} cannot be used: {error}") from error


def _blank_image(num_channels: int) -> np.ndarray:
    return np.zeros((256, 256, num_channels), dtype=np.uint8)


class CroppedImages(torch.utils.data.Dataset):
    """Random resized crops as the encoder takes them; half of them are mirrored.

    The key is (epoch, index). The value is the crop (C, H, W), a pure function of (seed, epoch, index), or the reason
    why the image cannot be read.
    """

    def __init__(self, images: ProcessedImages, seed: int):
        self.images = images
        self.crops = PretrainingImages(
            images.dataset,
            prepare_image(images.processor, _blank_image(images.num_channels)).shape[1:],
            num_channels=images.num_channels,
            sixteen_bit_max=setting_of(images.processor),
            crop_scale=_CROP_SCALE,
            crop_ratio=_CROP_RATIO,
            horizontal_flip=True,
            interpolation="bicubic",
            seed=seed,
        )

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor | str:
        epoch, index = key
        crop = self.crops[0, 0, epoch, index]
        if crop["num_bad"]:  # the crop is of another image; reading this one returns the reason
            return self.images[index]
        pixel_values = cast(torch.Tensor, crop["pixel_values"])  # uint8 (C, H, W)
        image = pixel_values.permute(1, 2, 0).numpy()
        return prepare_image(self.images.processor, image, do_resize=False, do_center_crop=False)


class FlippedImages(torch.utils.data.Dataset):
    """The images as in evaluation; half of them are mirrored. For labels that a crop would change (Clevr: counts,
    distances). Keys and values are those of `CroppedImages`."""

    def __init__(self, images: ProcessedImages, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor | str:
        view = self.images[key[1]]
        is_mirrored = np.random.default_rng([self.seed, *key]).random() < 0.5
        return view if isinstance(view, str) or not is_mirrored else view.flip(-1)


Images: TypeAlias = ProcessedImages | CroppedImages | FlippedImages
Keys: TypeAlias = Sequence[int | tuple[int, int]]  # of such images: indices, or (epoch, index)
AUGMENTED: dict[str, type[CroppedImages] | type[FlippedImages]] = {"crop_flip": CroppedImages, "flip": FlippedImages}


def _rounds(count: int, round_size: int, rank: int, world_size: int) -> Iterator[tuple[int, list[int]]]:
    """Cuts the positions 0..count-1 into rounds of up to `round_size` and divides each round among the processes.

    Yields the number of positions of a round, and those of process `rank`. All processes have the same number of them.
    One process after the other, they are the round's positions in order. The last position may be repeated at the end.
    """
    for start in range(0, count, round_size):
        size = min(round_size, count - start)
        share = -(-size // world_size)
        yield size, [start + min(rank * share + offset, size - 1) for offset in range(share)]


def stream(
    run: Run, opened: OpenedEncoder, images: Images, passes: Iterable[Keys], kinds: Collection[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """Features (up to B x processes, ...) of images[key], in the order of the keys, equal on all processes.

    Args:
        passes: the keys of each pass over the images. All passes have one set of loading processes.

    Raises:
        BadImageError: if an image cannot be read. Leaving it out would change the accuracy.
    """
    accelerator = run.accelerator
    round_size = run.arguments.per_device_batch_size * accelerator.num_processes
    asked: deque[tuple[int, list[Any]]] = deque()  # of the loader, whose processes read ahead

    def batches() -> Iterator[list[Any]]:
        for keys in passes:
            for size, positions in _rounds(
                len(keys), round_size, accelerator.process_index, accelerator.num_processes
            ):
                asked.append((size, [keys[position] for position in positions]))
                yield asked[-1][1]

    loader = DataLoader(
        images,
        batch_sampler=batches(),
        collate_fn=list,
        num_workers=run.arguments.num_workers,
        worker_init_fn=prepare_worker,
        pin_memory=accelerator.device.type == "cuda",
    )
    for samples in loader:
        size, batch = asked.popleft()
        pixel_values = _stack(images, batch, samples).to(accelerator.device)
        features = encoder_features(opened.model, pixel_values, kinds)
        features.pop("token_shape", None)  # `Trial` has it; it is the same for all images
        yield {name: accelerator.gather(value.contiguous())[:size] for name, value in features.items()}


def _stack(images: Images, keys: Keys, samples: Sequence[torch.Tensor | str]) -> torch.Tensor:
    """Pixels (B, channels, height, width).

    Raises:
        BadImageError: if a sample is a reason.
        ValueError: if the images have different sizes.
    """
    pixel_values = []
    for key, sample in zip(keys, samples, strict=True):
        if isinstance(sample, str):
            plain = images if isinstance(images, ProcessedImages) else images.images
            index = key[1] if isinstance(key, tuple) else key
            raise BadImageError(image_name(plain.dataset, index), sample)
        pixel_values.append(sample)
    if len({image.shape for image in pixel_values}) > 1:
        raise ValueError("The image processor gives images of different sizes; pass --per_device_batch_size 1.")
    return torch.stack(pixel_values)


@dataclass
class SplitFeatures:
    """The features of a split that are kept in memory, float32 on the CPU.

    Args:
        positions: by kind, the sorted positions (n,) in the split whose features are kept.
        values: by kind, the features (n, ...) by name. The name is that of the kind; "layers" has a name per layer.
    """

    split: Split
    positions: dict[str, torch.Tensor]
    values: dict[str, dict[str, torch.Tensor]]

    def at(self, kind: str, positions: torch.Tensor) -> torch.Tensor:
        """Features (n, ...) at some positions (n,) in the split."""
        return self.values[kind][kind][torch.searchsorted(self.positions[kind], positions)]

    def require_finite(self) -> None:
        """Raises DivergedError if features are not finite. Those of the collapse report are not checked."""
        for kind in (kind for kind in self.values if kind != "layers"):
            values = self.values[kind][kind]
            bad = int((~values.flatten(1).isfinite().all(dim=1)).sum())
            if bad:
                raise DivergedError(f"NaN or infinity in {bad:,} of {len(values):,} {self.split.name!r} images")


def _wanted_features(run: Run, opened: OpenedEncoder, split: Split) -> dict[str, torch.Tensor]:
    """The kinds of features that the probes read from memory, with sorted positions (n,) in the split."""
    arguments, everything = run.arguments, torch.arange(len(split.indices))
    wanted: dict[str, torch.Tensor] = {}
    is_training = split is run.train
    if not streams_tokens(run, opened):
        # Random views are not kept. With them, only the images on which the best head is chosen are wanted.
        is_augmented = is_training and arguments.augment != "none"
        positions = (
            split_holdout(len(everything), arguments.holdout, arguments.seed)[1] if is_augmented else everything
        )
        if len(positions):
            wanted = dict.fromkeys(head_features(arguments, opened.is_raw), positions)
    if PLAIN_PROBES & set(arguments.probes):
        wanted["last"] = everything
    if "collapse" in arguments.probes and not (is_training or opened.is_raw):
        wanted["layers"] = sample_indices(everything, _MAX_COLLAPSE_IMAGES, arguments.seed)
    return wanted


def frozen_features(run: Run, opened: OpenedEncoder, split: Split) -> SplitFeatures:
    """All features of a split that this run keeps: from the cache, or computed in one pass and written to the cache.

    Each kind has its own file, so a run with other probes computes only the kinds that are missing.
    """
    wanted = _wanted_features(run, opened, split)
    if not wanted:
        return SplitFeatures(split, {}, {})
    keys = {kind: _cache_key(run, opened, split, split.indices[chosen], kind) for kind, chosen in wanted.items()}
    paths = {kind: _cache_path(run, key) for kind, key in keys.items()}
    cached = {kind: _read_cache(run, paths[kind], key) for kind, key in keys.items()}
    found = torch.tensor([[cached[kind] is not None for kind in wanted]], device=run.accelerator.device)
    is_found = dict(zip(wanted, run.accelerator.gather(found).all(dim=0).tolist(), strict=True))
    missing = {kind: positions for kind, positions in wanted.items() if not is_found[kind]}
    computed = _compute_features(run, opened, split, missing) if missing else {}
    if run.accelerator.is_main_process:
        with suppress(OSError):  # without it, images are read once more in the next run
            run.contents.save()
        for kind, features in computed.items():
            _write_cache(paths[kind], keys[kind], features)
    values = {kind: features for kind, features in cached.items() if features is not None} | computed
    return SplitFeatures(split, wanted, {kind: values[kind] for kind in wanted})


def _compute_features(
    run: Run, opened: OpenedEncoder, split: Split, wanted: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Features by kind and name, from one pass over all positions that are wanted for any kind."""
    is_wanted = {kind: torch.zeros(len(split.indices), dtype=torch.bool) for kind in wanted}
    for kind, chosen in wanted.items():
        is_wanted[kind][chosen] = True
    positions = torch.stack([*is_wanted.values()]).any(dim=0).nonzero().flatten()
    parts = stream(run, opened, opened.images(split.dataset), [split.indices[positions].tolist()], list(wanted))
    progress = Progress(
        len(positions),
        f"image of {split.name!r}",
        shown=run.accelerator.is_main_process,
        seconds_between_lines=SECONDS_BETWEEN_LINES,
        leave=False,
    )
    kept: dict[str, list[dict[str, torch.Tensor]]] = {kind: [] for kind in wanted}
    start = 0
    for part in parts:
        chunk = positions[start : start + len(next(iter(part.values())))]
        start += len(chunk)
        progress.update(len(chunk))
        for kind in wanted:
            kept[kind].append(
                {name: value.cpu()[is_wanted[kind][chunk]] for name, value in part.items() if _kind_of(name) == kind}
            )
    progress.close()
    return {kind: concatenate(parts) for kind, parts in kept.items()}


def _kind_of(name: str) -> str:
    """The kind to which features of this name belong; see `encoder_features`."""
    return "layers" if name.startswith("layer_") else name


def _cache_key(run: Run, opened: OpenedEncoder, split: Split, indices: torch.Tensor, kind: str) -> str:
    """All that features depend on, as JSON."""
    key = {
        "weights": opened.digest,
        "all_but_weights": opened.all_but_weights,
        "data": split.contents,
        "split": split.name,
        "indices": hashlib.sha256(indices.numpy().tobytes()).hexdigest(),
        "kind": kind,
        "dtype": run.arguments.dtype,
        "versions": [__version__, transformers.__version__],
    }
    return json.dumps(key, sort_keys=True)


def _cache_path(run: Run, key: str) -> Path:
    return run.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _read_cache(run: Run, path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The features of a cache file, or None if it is missing or damaged.

    Raises:
        ValueError: if a folder is in its place.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and a cache file belongs there: remove it, or choose another cache_dir."
        )
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("key") == key and metadata.get("sha256") == _values_digest(features):
            return features
    except (SafetensorError, OSError):
        pass
    run.add_note(f"The cache file {path} was damaged, so its features were computed again.")
    return None


def _write_cache(path: Path, key: str, features: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(path), written_aside(path) as unfinished:  # commands with other outputs may share a cache_dir
        save_file(features, unfinished, metadata={"key": key, "sha256": _values_digest(features)})


def _values_digest(features: dict[str, torch.Tensor]) -> str:
    """A hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(features.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def streams_tokens(run: Run, opened: OpenedEncoder) -> bool:
    """Whether the heads read patch tokens that need too much memory, so that the encoder runs again in every epoch."""
    num_images = len(run.train.indices) + len(run.validation.indices)
    num_tokens, width = run.trials[opened.spec].token_shape
    has_tokens = "tokens" in head_features(run.arguments, opened.is_raw)
    return has_tokens and 4 * num_images * num_tokens * width > _MAX_TOKEN_BYTES
