# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""How far decoded images are from the true ones: PSNR, and a distance of edges and textures."""

import math

import torch
from torch.nn.functional import avg_pool2d, conv2d


ORIENTATIONS, FILTER_SIDE, WAVELENGTH, ENVELOPE = 4, 7, 4.0, 1.5  # the last two in pixels
NUM_SCALES = 3  # each half as fine as the one before
FAINT = 0.05  # edges far below this contrast (of 1) count as none


def psnr(images: torch.Tensor, truths: torch.Tensor, mask: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the masked pixels of all images together; higher is better.

    Args:
        images, truths: (B, channels, H, W), 0 to 1.
        mask: (B, 1, H, W), bool: the pixels that count.
    """
    error = (images - truths).square().mean(dim=1, keepdim=True)[mask].mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def texture_distance(images: torch.Tensor, truths: torch.Tensor, mask: torch.Tensor) -> float:
    """How different edges and textures are, 0 (the same) to 2; lower is better. Blur counts as missing edges.

    This is LPIPS (Zhang et al. 2018) with fixed filters in place of a trained network: at several scales the responses
    of oriented filters are divided by their length at each pixel, and their squared differences are averaged. So it
    needs no weights, and its values cannot be compared with those of LPIPS.

    The arguments are those of `psnr`.
    """
    distances = []
    greys, weights = [each.mean(dim=1, keepdim=True) for each in (images, truths)], mask.float()
    for _ in range(NUM_SCALES):
        if min(weights.shape[-2:]) < 2:
            break
        first, second = (_directions(grey) for grey in greys)
        difference = (first - second).square().sum(dim=1, keepdim=True)
        distances.append((difference * weights).sum() / weights.sum().clamp(min=1e-9))
        greys, weights = [avg_pool2d(grey, 2) for grey in greys], avg_pool2d(weights, 2)
    return torch.stack(distances).mean().item()


def _directions(grey: torch.Tensor) -> torch.Tensor:
    """The responses (B, 2 * ORIENTATIONS, H, W) of the filters, of length 1 where there are edges."""
    padding = FILTER_SIDE // 2
    padded = torch.nn.functional.pad(grey, (padding,) * 4, mode="replicate")
    responses = conv2d(padded, _filters())
    return responses / responses.square().sum(dim=1, keepdim=True).add(FAINT**2).sqrt()


def _filters() -> torch.Tensor:
    """Gabor filters, even and odd, without a mean, (2 * ORIENTATIONS, 1, FILTER_SIDE, FILTER_SIDE)."""
    axis = torch.arange(FILTER_SIDE) - FILTER_SIDE // 2
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    envelope = torch.exp(-(down**2 + right**2) / (2 * ENVELOPE**2))
    filters = []
    for number in range(ORIENTATIONS):
        angle = math.pi * number / ORIENTATIONS
        phase = 2 * math.pi / WAVELENGTH * (math.cos(angle) * right + math.sin(angle) * down)
        for wave in (phase.cos(), phase.sin()):
            each = envelope * wave
            each = each - envelope * each.sum() / envelope.sum()
            filters.append(each / each.abs().sum())
    return torch.stack(filters).unsqueeze(1)
