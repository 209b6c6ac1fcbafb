# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writers of PNG and TIFF files that PIL does not write: 16-bit colours, bands, signs, pages."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def cells(seed=0, samples=1, side=40):
    """uint8 (side, side, samples): cells of 8 x 8 pixels that span 0..255 in every sample."""
    values = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, samples), dtype=np.uint8)
    values[0, 0], values[0, 1] = 0, 255
    return values.repeat(8, axis=0).repeat(8, axis=1)


def in_bits(pixels, white):
    """8-bit pixels as uint16, of which `white` is white."""
    return np.rint(pixels / 255 * white).astype(np.uint16)


def png(pixels, *before):
    """A PNG of (H, W, S), 8 or 16 bits: grey, grey and alpha, RGB or RGBA. `before` are chunks before the pixels."""
    height, width, samples = pixels.shape
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(*pages, photometric=1, extra=None, order="<", deflate=False, separate=False, orientation=1):
    """A TIFF of pages (H, W, S).

    Args:
        photometric: 0 WhiteIsZero, 1 BlackIsZero, 2 RGB, 5 CMYK.
        extra: ExtraSamples (0 unspecified, 1 premultiplied alpha, 2 alpha), or None to leave the tag out.
        order: "<" or ">".
        separate: one strip for each band.
    """
    content = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    for number, pixels in enumerate(pages):
        strips = _strips(pixels, order, deflate, separate)
        tags = _tags(pixels, strips, photometric, extra, 8 if deflate else 1, separate, orientation)
        content += _page(tags, strips, len(content), order, is_last=number == len(pages) - 1)
    return content


def _strips(pixels, order, deflate, separate):
    planes = np.moveaxis(pixels, 2, 0) if separate else [pixels]
    strips = [np.ascontiguousarray(plane).astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    return [zlib.compress(strip) for strip in strips] if deflate else strips


def _tags(pixels, strips, photometric, extra, compression, separate, orientation):
    height, width, samples = pixels.shape
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * samples, 259: [compression], 262: [photometric]}
    tags |= {273: [0] * len(strips), 274: [orientation], 277: [samples], 278: [height], 279: list(map(len, strips))}
    tags |= {284: [2 if separate else 1], 339: [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * samples}
    return tags | ({} if extra is None else {338: extra})


def _page(tags, strips, start, order, is_last):
    """A directory, the values that it has no room for, and the strips."""
    form = dict.fromkeys(tags, "H") | {273: "I", 279: "I"}
    outside = start + 2 + 12 * len(tags) + 4
    table, values = b"", b""
    sizes = {tag: len(entries) * struct.calcsize(f"={form[tag]}") for tag, entries in tags.items()}
    pixels = outside + sum(size for size in sizes.values() if size > 4)
    pixels += pixels % 2
    tags[273] = [pixels + sum(map(len, strips[:place])) for place in range(len(strips))]
    for tag, entries in sorted(tags.items()):
        value = struct.pack(f"{order}{len(entries)}{form[tag]}", *entries)
        table += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[form[tag]], len(entries))
        table += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", outside + len(values))
        values += value if len(value) > 4 else b""
    body = b"".join(strips)
    end = pixels + len(body) + len(body) % 2
    following = struct.pack(f"{order}I", 0 if is_last else end)
    head = struct.pack(f"{order}H", len(tags)) + table + following + values
    return head.ljust(pixels - start, b"\0") + body.ljust(end - pixels, b"\0")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def jpeg_2000(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG2000")
    return file.getvalue()
