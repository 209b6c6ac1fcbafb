# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A small decoder from the features of a target block to its pixels. The encoder stays frozen.

Shapes: K images, N patches of V values (channels x height x width), D features, T patches of a block.

The decoder sees the features of one block at a time, as the predictor predicts them. Features of the context never
enter: the target encoder has seen the whole image, so its features of the context also know what is hidden.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import mse_loss

from ..display import SECONDS_BETWEEN_LINES, Progress
from ..files import disk_errors, written_aside
from ..masking import Masking


NUM_LAYERS, HEAD_WIDTH, WIDEST = 2, 32, 256
LEARNING_RATE, WARMUP_SHARE, WEIGHT_DECAY = 1e-3, 0.05, 0.01
IMAGES_PER_STEP = 16
LEAST_SPREAD = 1e-6  # of a feature; a constant feature is not scaled up


class PixelDecoder(nn.Module):
    """Two transformer layers between two linear ones, with a trained position for each patch."""

    feature_mean: torch.Tensor
    feature_std: torch.Tensor

    def __init__(self, num_features: int, num_patches: int, num_values: int):
        super().__init__()
        width = min(WIDEST, HEAD_WIDTH * math.ceil(num_features / HEAD_WIDTH))
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("feature_std", torch.ones(num_features))
        self.input_projection = nn.Linear(num_features, width)
        self.positions = nn.Parameter(torch.empty(num_patches, width).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, NUM_LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)
        self.output_projection = nn.Linear(width, num_values)

    def forward(self, features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Pixels (B, T, V), 0 to 1 if the guess is right, of features (B, T, D) of the patches `indices` (B, T)."""
        features = (features - self.feature_mean) / self.feature_std
        hidden_states = self.input_projection(features) + self.positions[indices]
        return self.output_projection(self.layers(hidden_states)) + 0.5


def train_decoder(
    features: torch.Tensor, pixels: torch.Tensor, masking: Masking, num_steps: int, seed: int, device: torch.device
) -> PixelDecoder:
    """Trains a decoder on target blocks of images by the mean squared error.

    Args:
        features: (K, N, D), normalised like the targets of the predictor.
        pixels: (K, N, V), uint8.
        masking: draws the blocks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = PixelDecoder(features.shape[2], features.shape[1], pixels.shape[2])
    decoder.feature_mean.copy_(features.mean(dim=(0, 1)))
    decoder.feature_std.copy_(features.std(dim=(0, 1)).clamp(min=LEAST_SPREAD))
    decoder.to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, num_steps))
    generator = torch.Generator().manual_seed(seed)
    with Progress(num_steps, "decoder step", seconds_between_lines=SECONDS_BETWEEN_LINES, leave=False) as progress:
        for step in range(num_steps):
            images = torch.randint(len(features), (IMAGES_PER_STEP,), generator=generator)
            blocks = first_blocks(masking.sample(len(images), seed + step)[1])  # (B, M, T)
            rows = images[:, None, None]
            chosen = features[rows, blocks].flatten(0, 1).to(device), blocks.flatten(0, 1).to(device)
            truth = pixels[rows, blocks].flatten(0, 1).to(device).float() / 255
            optimizer.zero_grad()
            mse_loss(decoder(*chosen), truth).backward()
            optimizer.step()
            schedule.step()
            progress.update()
    return decoder.cpu().eval()


def _learning_rate_share(step: int, num_steps: int) -> float:
    """Rises over the first steps, then falls along a cosine."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def first_blocks(targets: torch.Tensor) -> torch.Tensor:
    """The target blocks of the first context, (B, M, T)."""
    return targets if targets.dim() == 3 else targets[:, 0]


@torch.no_grad()
def decode_blocks(decoder: PixelDecoder, features: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Pixels (B, M, T, V), 0 to 1, of the features (B, M, T, D) of blocks (B, M, T). Blocks do not see each other."""
    decoded = [decoder(*pair) for pair in zip(features.float().unbind(), blocks.unbind(), strict=True)]
    return torch.stack(decoded).clamp(0, 1)


def fill_blocks(pixels: torch.Tensor, decoded: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The images (B, N, V), 0 to 1, with decoded blocks (B, M, T, V) in their places. Overlaps become their mean."""
    sums, counts = torch.zeros_like(pixels), torch.zeros_like(pixels[..., :1])
    places = blocks.flatten(1).unsqueeze(-1)  # (B, M * T, 1)
    sums.scatter_add_(1, places.expand(-1, -1, pixels.shape[-1]), decoded.flatten(1, 2))
    counts.scatter_add_(1, places, torch.ones_like(places, dtype=counts.dtype))
    return torch.where(counts > 0, sums / counts.clamp(min=1), pixels)


@dataclass
class DecoderPair:
    """The decoder of the encoder, the one of an untrained encoder, and the mean features of each place."""

    trained: PixelDecoder
    untrained: PixelDecoder
    place_mean: torch.Tensor  # (N, D), over the images that the decoders were trained on


IDENTITY = "identity"  # the key of the file's metadata


def save_decoders(pair: DecoderPair, path: Path, identity: Mapping[str, Any]) -> None:
    """Writes the decoders as one safetensors file, with what they belong to.

    Raises:
        OSError: if the disk refuses.
    """
    tensors = {"place_mean": pair.place_mean.contiguous()}
    for name in ("trained", "untrained"):
        state = getattr(pair, name).state_dict()
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    with disk_errors(path), written_aside(path) as temporary:
        save_file(tensors, temporary, {IDENTITY: json.dumps(dict(identity), sort_keys=True)})


def load_decoders(path: Path, identity: Mapping[str, Any], sizes: tuple[int, int, int]) -> DecoderPair | str:
    """The decoders of a file, or the reason why they cannot be used here, as the end of a sentence.

    Args:
        identity: what they must belong to.
        sizes: D, N and V.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(IDENTITY, "{}"))
            other = _first_difference(found, identity)
            if other is not None:
                return other
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        pair = DecoderPair(PixelDecoder(*sizes), PixelDecoder(*sizes), tensors.pop("place_mean"))
        for name in ("trained", "untrained"):
            state = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
            getattr(pair, name).load_state_dict(state)
            getattr(pair, name).eval()
        return pair
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        return f"it cannot be read ({' '.join(str(error).split())[:200]})"


def _first_difference(found: Any, identity: Mapping[str, Any]) -> str | None:
    keys: Iterable[str] = (key for key, value in identity.items() if found.get(key) != value)
    key = next(iter(keys), None)
    return None if key is None else f"it belongs to another {key}"
