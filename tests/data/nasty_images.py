"""Files that a folder of photographs may hold by accident or by malice, made on the spot: bytes, names and file types.

`ACCEPTED` are contents that must be decoded, each with the colour (or None) and the shape that must come out;
`REFUSED` are contents that must be bad images, each with a part of the reason. Both hold functions, because some are
large. `mutations` damages sound files at random, always in the same way.
"""

import io
import struct
import time
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageCms, features


FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", *(["JPEG2000"] if features.check("jpg_2000") else []))
RED, GRAY = (250, 10, 20), (128, 128, 128)


def photo(height=40, width=56, seed=0):
    """A smooth coloured picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, file_format="PNG", **options):
    """A PIL image, or uint8 pixels (H, W, C), as the bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def solid(mode="RGB", color=RED, size=(24, 16)):
    return Image.new("RGB", size, color).convert(mode)


# PNG by hand


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, rows, *before, depth=8, color_type=0):
    """A PNG from its filtered rows, already compressed, and the chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, chunk(b"IDAT", rows), chunk(b"IEND")])


def zeros(count):
    """`count` zeros, compressed piece by piece, so that the bomb does not go off where it is made."""
    packer, piece = zlib.compressobj(9), bytes(2**20)
    parts = [packer.compress(piece) for _ in range(count // len(piece))]
    return b"".join([*parts, packer.compress(bytes(count % len(piece))), packer.flush()])


def small_png(*before):
    rows = b"".join(b"\x00" + bytes(RED) * 24 for _ in range(16))
    return png(24, 16, zlib.compress(rows), *before, color_type=2)


def gray_png(width, height):
    return png(width, height, zeros((width + 1) * height))


def rgb16_png():
    rows = b"".join(b"\x00" + struct.pack(">HHH", *(value * 257 for value in RED)) * 24 for _ in range(16))
    return png(24, 16, zlib.compress(rows), depth=16, color_type=2)


# TIFF by hand


def tiff(tags, data=b""):
    """A little-endian TIFF of one directory of LONG tags; `data` stands at byte 8."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\x00" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiled_tiff(tile):
    data = zlib.compress(bytes(1000))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(data)}
    return tiff(tags, data)


def bomb_tiff(side):
    data = zeros(2**20)
    return tiff({256: side, 257: side, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: side, 279: len(data)}, data)


# Other formats by hand


def bomb_gif(width, height):
    """A logical screen of any size with a frame of one pixel."""
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00" + bytes(6) + frame_gif(1, 1) + b";"


def frame_gif(width, height):
    return b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\x00\x02\x02\x4c\x01\x00"


def bomb_webp(width, height):
    """An extended WebP whose canvas says its own size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    image = encoded(solid(), "WEBP")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + canvas + image
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bomb_jpeg(width, height):
    """The header of a small JPEG with other sides in it."""
    content = encoded(solid(), "JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("photo.png", encoded(solid()))
    return file.getvalue()


# Contents that must be decoded: function, colour or None, (height, width)


def with_exif(content, file_format="JPEG"):
    return encoded(solid(), file_format, exif=b"Exif\x00\x00" + content)


def oriented(value):
    """An orientation that no camera writes."""
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(solid(), "JPEG", exif=exif)


def with_profile(profile):
    return encoded(solid(), "JPEG", icc_profile=profile, quality=95)


def animation(file_format):
    return encoded(solid(), file_format, save_all=True, append_images=[solid(color=(0, 0, 255))])


def sixteen_bits(file_format, mode="I;16"):
    pixels = np.full((16, 24), 128 * 257, np.uint16)
    return encoded(Image.fromarray(pixels.astype(np.int32) if mode == "I" else pixels), file_format)


def transparent_palette():
    """Everything is transparent, so everything is white."""
    image = Image.new("P", (24, 16), 0)
    image.putpalette([*RED, 0, 0, 0])
    return encoded(image, transparency=0)


def cmyk_without_adobe():
    content = encoded(solid("CMYK"), "JPEG", quality=95)
    place = content.find(b"\xff\xee")
    return content if place < 0 else content[:place] + content[place + 2 + content[place + 3] :]


def ycck():
    """The Adobe marker says which colours the four channels of a JPEG are."""
    content = encoded(Image.merge("CMYK", [Image.new("L", (24, 16), value) for value in (128, 128, 128, 255)]), "JPEG")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02"
    place = content.find(b"\xff\xee")
    return content[:2] + adobe + (content[2:] if place < 0 else content[2:place] + content[place + 16 :])


ACCEPTED = {
    "a JPEG": (lambda: encoded(solid(), "JPEG", quality=95), RED, (16, 24)),
    "a PNG named .jpg": (lambda: encoded(solid()), RED, (16, 24)),
    "one pixel": (lambda: encoded(solid(size=(1, 1))), RED, (1, 1)),
    "256 x 1 pixels": (lambda: encoded(solid(size=(256, 1))), RED, (1, 256)),
    "1 x 256 pixels": (lambda: encoded(solid(size=(1, 256))), RED, (256, 1)),
    "CMYK JPEG, inverted as Adobe does": (lambda: encoded(solid("CMYK"), "JPEG", quality=95), RED, (16, 24)),
    "CMYK JPEG without the Adobe marker": (cmyk_without_adobe, RED, (16, 24)),
    "YCCK JPEG": (ycck, None, (16, 24)),
    "CMYK TIFF": (lambda: encoded(solid("CMYK"), "TIFF"), RED, (16, 24)),
    "16-bit grey PNG": (lambda: sixteen_bits("PNG"), GRAY, (16, 24)),
    "16-bit grey TIFF": (lambda: sixteen_bits("TIFF"), GRAY, (16, 24)),
    "16-bit colour PNG": (rgb16_png, RED, (16, 24)),
    "32-bit integer TIFF with values up to 65535": (lambda: sixteen_bits("TIFF", "I"), GRAY, (16, 24)),
    "1-bit PNG": (lambda: encoded(solid("1", (255, 255, 255))), (255, 255, 255), (16, 24)),
    "palette PNG": (lambda: encoded(solid("P")), None, (16, 24)),
    "palette PNG, transparent": (transparent_palette, (255, 255, 255), (16, 24)),
    "animated GIF: the first frame": (lambda: animation("GIF"), RED, (16, 24)),
    "animated WebP: the first frame": (lambda: animation("WEBP"), None, (16, 24)),
    "animated PNG: the first frame": (lambda: animation("PNG"), RED, (16, 24)),
    "JPEG with orientation 6": (lambda: oriented(6), None, (24, 16)),
    "JPEG with orientation 99": (lambda: oriented(99), None, (16, 24)),
    "JPEG with EXIF of random bytes": (lambda: with_exif(bytes(range(256))), None, (16, 24)),
    "JPEG with EXIF cut off": (lambda: with_exif(b"MM\x00*\x00\x00\x00\x08\x00\x09\x01"), None, (16, 24)),
    "PNG with EXIF of random bytes": (lambda: with_exif(bytes(range(256)), "PNG"), RED, (16, 24)),
    "JPEG with an sRGB profile": (
        lambda: with_profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        RED,
        (16, 24),
    ),
    "JPEG with a broken profile": (lambda: with_profile(b"no profile" * 9), RED, (16, 24)),
    "JPEG with 20 MB of comments": (
        lambda: b"\xff\xd8" + (b"\xff\xfe\xff\xff" + bytes(65533)) * 305 + encoded(solid(), "JPEG")[2:],
        None,
        (16, 24),
    ),
    "JPEG that ends before most of its pixels: the rest is grey": (lambda: bomb_jpeg(500, 700), None, (700, 500)),
    "PNG with rubbish behind it": (lambda: encoded(solid()) + b"rubbish" * 1000, RED, (16, 24)),
}


# Contents that must be refused: function, part of the reason


REFUSED = {
    "nothing": (lambda: b"", "the file is empty"),
    "one byte": (lambda: b"\xff", "not an image that PIL knows"),
    "text": (lambda: b"Dear diary, " * 100, "not an image that PIL knows"),
    "an error page of the web": (lambda: b"<!DOCTYPE html><html>404 Not Found</html>", "not an image that PIL knows"),
    "a zip archive": (archive, "not an image that PIL knows"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image that PIL knows"),
    "PDF": (lambda: b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "not an image that PIL knows"),
    "PostScript, which PIL gives to Ghostscript": (
        lambda: encoded(solid(), "EPS"),
        "not an image that PIL knows",
    ),
    "HEIC": (
        lambda: struct.pack(">I", 24) + b"ftypheic\x00\x00\x00\x00mif1heic" + bytes(99),
        "HEIC",
    ),
    "zeros": (lambda: bytes(4096), "not an image that PIL knows"),
    "64-bit float TIFF": (
        lambda: tiff({256: 4, 257: 4, 258: 64, 339: 3, 262: 1, 273: 8, 277: 1}, bytes(128)),
        "floating-point pixels",
    ),
    "32-bit float TIFF": (lambda: encoded(Image.new("F", (24, 16), 0.5), "TIFF"), "floating-point pixels"),
    "32-bit integer TIFF with larger values": (
        lambda: encoded(Image.new("I", (24, 16), 2**20), "TIFF"),
        "only 8 and 16 bits have a known range",
    ),
    "30000 x 1 pixels": (lambda: gray_png(30000, 1), "one side is more than 256 times the other"),
    "1 x 30000 pixels": (lambda: gray_png(1, 30000), "one side is more than 256 times the other"),
    "PNG of no width": (lambda: png(0, 16, zlib.compress(b"")), ""),
    "PNG bomb: 50000 x 50000 zeros": (lambda: png(50000, 50000, zeros(2**22)), "DecompressionBombError"),
    "PNG bomb below PIL's own limit: 12000 x 12000": (lambda: gray_png(12000, 12000), "more than 134,217,728"),
    "GIF bomb: a screen of 65535 x 65535": (lambda: bomb_gif(65535, 65535), "DecompressionBombError"),
    "WebP bomb: a canvas of 16384 x 16384": (lambda: bomb_webp(16384, 16384), ""),
    "PNG of 2^27 pixels and a bit": (lambda: gray_png(11586, 11586), "more than 134,217,728"),
    "TIFF bomb: 60000 x 60000": (lambda: bomb_tiff(60000), "DecompressionBombError"),
    "TIFF with tiles of 40000 x 40000 round 64 x 64 pixels": (lambda: tiled_tiff(40000), "tiles of 40000 x 40000"),
    "TIFF with tiles of 2^31": (lambda: tiled_tiff(2**31), "tiles of 2147483648 x 2147483648"),
    "TIFF with tiles of 0": (lambda: tiled_tiff(0), ""),
    "JPEG header that says 65500 x 65500": (lambda: bomb_jpeg(65500, 65500), "DecompressionBombError"),
    "PPM header that says 3000 x 3000": (lambda: b"P6 3000 3000 255\n" + bytes(99), "truncated"),
    "PNG with a profile that unpacks to 64 MB": (
        lambda: small_png(chunk(b"iCCP", b"x\x00\x00" + zeros(2**26))),
        "too large",
    ),
    "PNG with a text that unpacks to 64 MB": (
        lambda: small_png(chunk(b"zTXt", b"x\x00\x00" + zeros(2**26))),
        "too large",
    ),
    "PNG with 70 texts of 1 MB": (
        lambda: small_png(*[chunk(b"zTXt", b"%d\x00\x00" % n + zeros(2**20 - 1)) for n in range(70)]),
        "Too much memory",
    ),
    "PNG with a wrong checksum": (lambda: encoded(solid()).replace(b"IDAT", b"IDAT\x00", 1), ""),
}


def truncations():
    """(name, content) of each format, cut at several places; every one of them lacks pixels."""
    for file_format in FORMATS:
        whole = encoded(photo(), file_format)
        for share in (0.02, 0.3, 0.6, 0.9):
            yield f"{file_format}, {share:.0%} of it", whole[: int(share * len(whole))]


def mutations(count, seed=0):
    """(format, content): sound files of every format with some bytes changed, cut out or put in."""
    whole = {file_format: encoded(photo(), file_format) for file_format in FORMATS}
    generator = np.random.default_rng(seed)
    for number in range(count):
        file_format = FORMATS[number % len(FORMATS)]
        content = bytearray(whole[file_format])
        reach = len(content) if number % 3 else min(len(content), 120)  # headers take more harm than pixels
        for place in generator.integers(0, reach, generator.integers(1, 12)).tolist():
            content[place % len(content)] = int(generator.integers(256))
        start, length = generator.integers(0, reach), generator.integers(0, 40)
        if number % 5 == 0:
            del content[start : start + length]
        elif number % 5 == 1:
            content[start:start] = generator.bytes(length)
        yield file_format, bytes(content)


def peak():
    """Largest memory of this process so far, in MB."""
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) / 1024


def measure(content, connection):
    """What becomes of a content, by how many MB decoding it raises the peak, and its seconds of processor time, in a
    process of its own."""
    from ijepa_transformers.data.decoding import BadImageError, decode_image

    before, start = peak(), time.process_time()
    try:
        array = decode_image({"bytes": content, "path": "photo.jpg"})
        outcome = f"decoded, {array.shape[1]} x {array.shape[0]}"
    except BadImageError as error:
        outcome = f"refused: {error.reason}"
    seconds = time.process_time() - start
    connection.send((outcome, f"{max(0, peak() - before):.0f} | {seconds:.2f}"))


def largest(mode, file_format, **options):
    """The largest square image that is accepted."""
    colors = {"L": 200, "P": 200, "I": 40_000, "I;16": 40_000}  # smaller values of 16 bits would be nearly black
    image = Image.new(mode, (11585, 11585), colors.get(mode))
    return lambda: encoded(image, file_format, **options)


LARGEST = {
    "largest JPEG": lambda: largest("RGB", "JPEG")(),
    "largest progressive JPEG": lambda: largest("RGB", "JPEG", progressive=True)(),
    "largest progressive CMYK JPEG": lambda: largest("CMYK", "JPEG", progressive=True)(),
    "largest PNG with transparency": lambda: largest("RGBA", "PNG", compress_level=1)(),
    "largest grey PNG with transparency": lambda: largest("LA", "PNG", compress_level=1)(),
    "largest 16-bit PNG": lambda: largest("I;16", "PNG", compress_level=1)(),
    "largest 32-bit TIFF": lambda: largest("I", "TIFF", compression="tiff_adobe_deflate")(),
    "JPEG of a camera": lambda: encoded(photo(3000, 4000), "JPEG", quality=90),
    "largest PNM with a largest value of 254": lambda: b"P5 2048 2048 254\n" + bytes(2**22),
    "largest PNM in plain text": lambda: b"P2 2048 2047 255\n" + b"9 " * (2048 * 2047),
    "noise as JPEG 2000": lambda: noise(1600),
    "noise as JPEG 2000, nearly the largest": lambda: noise(4500),
}


def noise(side):
    """It cannot be made smaller, so decoding it takes longest."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(pixels, "JPEG2000", irreversible=False)


def main():
    """Prints the table of docs/development/decoding.md: PYTHONPATH=. python tests/data/nasty_images.py"""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    print("| input | bytes | outcome | peak memory, MB | CPU seconds |")
    print("|---|---:|---|---:|---:|")
    for name, entry in {**ACCEPTED, **REFUSED, **LARGEST}.items():
        receiver, sender = context.Pipe()
        content = (entry[0] if isinstance(entry, tuple) else entry)()  # here: making it takes memory too
        process = context.Process(target=measure, args=(content, sender))
        process.start()
        outcome, cost = receiver.recv() if receiver.poll(120) else ("HANGS", " | ")
        process.kill() if outcome == "HANGS" else process.join()
        print(f"| {name} | {len(content):,} | {outcome} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
