# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The small pictures that sheets are made of: enlarged images, hidden patches, heat, and the sheet itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


CELL_PIXELS = 112  # images are enlarged by a whole factor to at least this height
GAP = 8  # pixels
OUTLINE = (214, 0, 110)  # magenta
HATCHING = (168, 120)  # greys of hidden patches: the ground and the stripes; both show on white and on black
STRIPE, STRIPE_DISTANCE = 3, 8  # pixels
HEAT_COLORS = "inferno"  # black over red to yellow, in the same order for colour-blind readers and in grey


def height_and_width_pair(patch_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a patch.

    Raises:
        ValueError: if there are not one or two numbers.
    """
    if isinstance(patch_size, int):
        return patch_size, patch_size
    height, width = patch_size
    return height, width


def check_images(images: torch.Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patch grid.

    Raises:
        ValueError: if the images are not uint8 (B, 1 or 3, H, W) or do not divide into patches.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch[0]} x {patch[1]}")
    return height // patch[0], width // patch[1]


def check_shape(name: str, values: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Checks a shape. A string stands for any size.

    Raises:
        ValueError: if the shape is another one.
    """
    fits = zip(values.shape, expected, strict=False)
    if values.dim() != len(expected) or not all(isinstance(size, str) or real == size for real, size in fits):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must be ({wanted}), got {tuple(values.shape)}")


def to_picture(image: torch.Tensor) -> np.ndarray:
    """(1 or 3, H, W) -> (H, W, 3)."""
    return np.moveaxis(image.expand(3, -1, -1).cpu().numpy(), 0, -1)


def visible_patches(indices: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """Which patches are visible, (rows, columns), bool."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[indices.cpu().numpy()] = True
    return mask.reshape(rows, columns)


def enlarge(
    picture: np.ndarray,
    patch: tuple[int, int],
    visible: np.ndarray | None = None,
    outlined: np.ndarray | None = None,
) -> Image.Image:
    """The picture (H, W, 3), enlarged by a whole factor.

    Args:
        visible: (rows, columns), bool. The other patches are hatched.
        outlined: (rows, columns), bool. These patches get an outline.
    """
    factor = max(1, math.ceil(CELL_PIXELS / picture.shape[0]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    block = np.ones((factor * patch[0], factor * patch[1]), dtype=bool)
    if visible is not None:
        seen = np.kron(visible, block).astype(bool)  # (H, W)
        picture = np.where(seen[..., None], picture, hatching(*seen.shape)[..., None])
    if outlined is not None:
        inside = np.kron(outlined, block).astype(bool)  # (H, W)
        inner = np.pad(inside, 2)
        inner = inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]  # without a border of 2 pixels
        picture[inside & ~inner] = OUTLINE
    return Image.fromarray(picture)


def hatching(height: int, width: int) -> np.ndarray:
    """Stripes in two greys, (height, width), uint8. No image looks like this, so nobody takes it for one."""
    rows, columns = np.indices((height, width))
    return np.where((rows + columns) % STRIPE_DISTANCE < STRIPE, HATCHING[1], HATCHING[0]).astype(np.uint8)


def faded(picture: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) in middle greys, so that colours laid over it stand out. Dark pictures stay visible."""
    return np.repeat(64 + 0.45 * picture.mean(axis=2, keepdims=True), 3, axis=2).round().astype(np.uint8)


def shares_of(values: torch.Tensor, low: float, high: float, grid: tuple[int, int]) -> np.ndarray:
    """The values (N,) of the patches from `low` to `high` as 0 to 1, (rows, columns)."""
    return ((values.double() - low) / (high - low)).clamp(0, 1).cpu().numpy().reshape(grid)


def heat(values: torch.Tensor, low: float, high: float, grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """The values (N,) of the patches as colours (H, W, 3), from `low` (dark) to `high` (bright)."""
    colors = _heat_colors(shares_of(values, low, high, grid))
    return colors.repeat(patch[0], axis=0).repeat(patch[1], axis=1)


def _heat_colors(shares: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    return (255 * colormaps[HEAT_COLORS](shares)[..., :3]).round().astype(np.uint8)


def heat_over(picture: np.ndarray, values: torch.Tensor, low: float, high: float, grid: tuple[int, int]) -> np.ndarray:
    """The values (N,) of the patches as heat on the picture (H, W, 3), which stays dark where they are low."""
    height, width = picture.shape[:2]
    small = Image.fromarray((255 * shares_of(values, low, high, grid)).round().astype(np.uint8))
    shares = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)) / 255
    opacity = 0.85 * shares[..., None]
    return ((1 - opacity) * faded(picture) + opacity * _heat_colors(shares)).round().astype(np.uint8)


@dataclass(frozen=True)
class Sheet:
    """Rows of equal pictures.

    Attributes:
        cells: row by row.
        headers: two lines above each column, if any.
        titles: a line above each row, if any.
        scale: labels of a colour strip at the bottom, from the darkest to the brightest colour.
    """

    cells: list[list[Image.Image]]
    headers: Sequence[tuple[str, str]] = ()
    titles: Sequence[str] = ()
    scale: Sequence[str] = ()

    def draw(self) -> Image.Image:
        """The sheet as one picture, on white."""
        width, height = self.cells[0][0].width + GAP, self.cells[0][0].height + GAP
        letter = self.cells[0][0].width // 8  # so "14 x 14 patches" fits into a column
        top, between = (2 * GAP + 2 * letter if self.headers else 0), (GAP + letter if self.titles else 0)
        bottom = 2 * GAP + 3 * letter if self.scale else 0
        size = GAP + width * len(self.cells[0]), top + GAP + (height + between) * len(self.cells) + bottom
        sheet = Image.new("RGB", size, "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letter)
        for column, lines in enumerate(self.headers):
            draw.multiline_text((GAP + width * column, GAP), "\n".join(lines), fill="black", font=font, spacing=2)
        for row, line in enumerate(self.cells):
            upper = top + GAP + (height + between) * row
            if self.titles:
                draw.text((GAP, upper), self.titles[row], fill="black", font=font)
            for column, picture in enumerate(line):
                sheet.paste(picture, (GAP + width * column, upper + between))
        if self.scale:
            _draw_scale(sheet, self.scale, letter)
        return sheet


def _draw_scale(sheet: Image.Image, labels: Sequence[str], letter: int) -> None:
    """Draws the colour strip at the bottom of the sheet, with two or three labels below it."""
    width, upper = sheet.width - 2 * GAP, sheet.height - GAP - 3 * letter
    strip = heat(torch.arange(width), 0, width - 1, (1, width), (letter, 1))
    sheet.paste(Image.fromarray(strip), (GAP, upper))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letter)
    anchors = ("la", "ma", "ra") if len(labels) == 3 else ("la", "ra")
    for place, (label, anchor) in enumerate(zip(labels, anchors, strict=True)):
        left = GAP + width * place // (len(labels) - 1)
        draw.text((left, upper + letter + 4), label, fill="black", font=font, anchor=anchor)


def cut_patches(images: torch.Tensor, patch_size: int | tuple[int, int]) -> torch.Tensor:
    """The pixels of the patches of images, (B, N, channels, patch height, patch width)."""
    patch = height_and_width_pair(patch_size)
    check_images(images, patch)
    pieces = images.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])  # (B, channels, rows, columns, h, w)
    return pieces.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def paste(image: torch.Tensor, indices: torch.Tensor, pieces: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The image (channels, H, W) with other patches (T, channels, patch height, patch width) at some places."""
    image, (height, width) = image.clone(), pieces.shape[-2:]
    for index, piece in zip(indices.tolist(), pieces, strict=True):
        row, column = divmod(index, grid[1])
        image[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = piece
    return image
