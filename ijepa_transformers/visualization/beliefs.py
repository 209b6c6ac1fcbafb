# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the model believes, in pixels: the features of hidden blocks, made visible by a small decoder."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..arguments import require
from ..data.contents import contents_digest
from ..data.notices import counted
from ..data.sources import open_split
from ..display import show
from ..encoders import weights_digest
from ..modeling_ijepa import IJepaForPretraining
from .arguments import VisualizationArguments
from .cells import Sheet, cut_patches, enlarge, to_picture, visible_patches
from .decoder import DecoderPair, decode_blocks, fill_blocks, load_decoders, save_decoders, train_decoder
from .guesses import Guesses, guess
from .image_distance import psnr, texture_distance
from .pool import TRAIN, is_held_out, read_pool
from .study import Study, encode, fitting_masking


FILE_NAME = "pixel_decoder.safetensors"
MOST_MEASURED = 128  # held-out images that the figures are measured on
HEADERS = [
    ("image", ""),
    ("what it", "sees"),
    ("truth,", "decoded"),
    ("its guess,", "decoded"),
    ("mean of the", "place, decoded"),
    ("truth of a ran-", "dom encoder"),
]


@dataclass
class Fidelity:
    """How close decoded blocks are to the true pixels."""

    name: str
    psnr: float  # dB, higher is better
    distance: float  # of edges and textures, lower is better


@dataclass
class Beliefs:
    """Decoded blocks of images, as pixels (B, N, V) from 0 to 1 of the whole images."""

    guesses: Guesses
    truth: torch.Tensor  # the image itself
    decoded: dict[str, torch.Tensor]  # kind of features -> image with its blocks decoded
    source: str  # what happened to the decoder, a sentence


def _identity(study: Study, model: IJepaForPretraining, digest: str) -> dict[str, Any]:
    """What a decoder belongs to. Another value of one of these makes another decoder."""
    arguments = study.arguments
    return {
        "model": weights_digest(model.ijepa),
        "choice of images": digest,
        "image size": list(study.networks.config.image_height_and_width),
        "kind of masks": json.dumps(dataclasses.asdict(study.masks), sort_keys=True, default=str),
        "seed": arguments.seed,
        "number of steps": arguments.decoder_steps,
    }


def decoder_path(arguments: VisualizationArguments) -> Path:
    """Beside the model, or beside the page if the model is on the Hub or its directory cannot be written to."""
    directory = Path(arguments.model)
    if directory.is_dir() and os.access(directory, os.W_OK):
        return directory / FILE_NAME
    return Path(arguments.output).with_suffix(f".{FILE_NAME}")


def obtain_decoders(study: Study, model: IJepaForPretraining) -> tuple[DecoderPair, str]:
    """The decoders beside the model if they belong to it, otherwise new ones, which are saved there.

    Returns:
        The decoders, and a sentence that says what happened.

    Raises:
        ValueError: if the data have no images to train on.
        OSError: if the decoders cannot be saved.
    """
    arguments, path = study.arguments, decoder_path(study.arguments)
    dataset = open_split(arguments, TRAIN)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    rows = [row for row in order if not is_held_out(TRAIN, row)][: arguments.decoder_images]
    require(len(rows) >= 2, f"{arguments.data!r} has too few images in the split {TRAIN!r} to train a decoder.")
    identity = _identity(study, model, contents_digest(dataset, rows))
    (height, width), num_channels = study.patch_size, study.pool.pictures.shape[1]
    sizes = study.networks.config.hidden_size, study.grid_size[0] * study.grid_size[1], num_channels * height * width
    reason = ""
    if path.exists():
        found = load_decoders(path, identity, sizes)
        if isinstance(found, DecoderPair):
            return found, f"The decoder is the one in {path}."
        reason = f" The one in {path} was not used: {found}."
        show(f"{path}: {found}. A decoder is trained again.")
    pool = read_pool(arguments, study.networks.config, dataset, rows, len(rows))
    pixels = cut_patches(study.whole_patches(None, pool), study.patch_size).flatten(2)
    masking = fitting_masking(study.grid_size, study.masks, study.masks.mask_mode)
    show(f"training two decoders on {counted(len(pool.rows), 'image')}")
    trained = []
    for encoder in (model.ijepa, study.networks.random_encoder):
        features = model.normalize_targets(encode(encoder, pool, len(pool.rows), arguments.batch_size).patches)
        steps, seed = arguments.decoder_steps, arguments.seed
        trained.append(train_decoder(features, pixels, masking, steps, seed, model.device))
        if encoder is model.ijepa:
            place_mean = features.mean(dim=0)
    pair = DecoderPair(trained[0], trained[1], place_mean)
    save_decoders(pair, path, identity)
    return pair, f"The decoder was trained on {counted(len(pool.rows), 'image')} and saved as {path}.{reason}"


def measured_images(study: Study) -> list[int]:
    """Numbers of images of the pool whose patch features are kept and that the decoder was not trained on."""
    number = min(len(study.pool.rows), study.num_patch_images)
    held_out = [place for place in range(number) if is_held_out(study.arguments.split, study.pool.rows[place])]
    return held_out[:MOST_MEASURED]


def decode_beliefs(study: Study, model: IJepaForPretraining) -> Beliefs:
    """Decodes the blocks of held-out images.

    Raises:
        ValueError: if no image is held out.
    """
    images = measured_images(study)
    require(images, "No image is left that the decoder is not trained on; more images are needed.")
    pair, source = obtain_decoders(study, model)
    guesses = guess(study, model, images)
    places = torch.as_tensor(images)[:, None, None], guesses.blocks
    untrained = model.normalize_targets(study.random_features.patches)[places]
    truth = cut_patches(study.whole_patches(None)[images], study.patch_size).flatten(2).float() / 255
    features = {
        "truth": (pair.trained, guesses.truths),
        "guess": (pair.trained, guesses.predictions),
        "place": (pair.trained, pair.place_mean[guesses.blocks]),
        "untrained": (pair.untrained, untrained),
    }
    decoded = {
        name: fill_blocks(truth, decode_blocks(decoder, values, guesses.blocks), guesses.blocks)
        for name, (decoder, values) in features.items()
    }
    return Beliefs(guesses, truth, decoded, source)


NAMES = {
    "truth": "truth",
    "guess": "its guess",
    "place": "mean of the place",
    "untrained": "truth of a random encoder",
}


def fidelities(study: Study, beliefs: Beliefs) -> list[Fidelity]:
    """PSNR and distance of the decoded blocks to the true pixels, over all images."""
    truth, mask = _as_images(study, beliefs.truth), _hidden(study, beliefs)
    found = []
    for key, name in NAMES.items():
        images = _as_images(study, beliefs.decoded[key])
        found.append(Fidelity(name, psnr(images, truth, mask), texture_distance(images, truth, mask)))
    return found


def _as_images(study: Study, pixels: torch.Tensor) -> torch.Tensor:
    """(B, N, V) -> (B, channels, H, W)."""
    (rows, columns), (height, width) = study.grid_size, study.patch_size
    pieces = pixels.unflatten(2, (-1, height, width)).unflatten(1, (rows, columns))  # (B, rows, columns, c, h, w)
    return pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _hidden(study: Study, beliefs: Beliefs) -> torch.Tensor:
    """The pixels in the blocks, (B, 1, H, W), bool."""
    (height, width), blocks = study.patch_size, beliefs.guesses.blocks
    mask = torch.zeros(*beliefs.truth.shape[:2], 1)
    mask.scatter_(1, blocks.flatten(1).unsqueeze(-1), 1.0)
    return _as_images(study, mask.expand(-1, -1, height * width)).bool()


def belief_sheet(study: Study, beliefs: Beliefs, number: int) -> Sheet:
    """A row for each of the first images: what is seen, and what the features of the hidden blocks decode to."""
    patch, grid = study.patch_size, study.grid_size
    versions = [beliefs.decoded[key] for key in NAMES]
    shown = [_as_images(study, each[:number]) for each in (beliefs.truth, *versions)]
    pictures = [(255 * each).round().to(torch.uint8) for each in shown]
    cells = []
    for place in range(min(number, len(beliefs.truth))):
        seen = visible_patches(beliefs.guesses.contexts[place], *grid)
        hidden = visible_patches(beliefs.guesses.blocks[place].flatten(), *grid)
        image, *decoded = (to_picture(each[place]) for each in pictures)
        cells.append([enlarge(image, patch), enlarge(image, patch, seen)])
        cells[-1] += [enlarge(each, patch, seen | hidden) for each in decoded]
    return Sheet(cells, HEADERS)
