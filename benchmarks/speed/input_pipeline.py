# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""From encoded JPEG files to a batch of 224 pixels, on one thread: this package against torchvision's pipelines.

    python benchmarks/speed/input_pipeline.py [--turns 30] [--sizes 500x375 1600x1200 4000x3000] [--allocator keep]
        [--output FILE]

All pipelines read the same generated photographs from memory, draw crops of 30 to 100 % of the area and collate. Ours
ends in uint8 batches, because normalisation is done on the device; what it costs on one CPU thread is measured too.
`torchvision v1` is the usual pipeline, Meta's too: PIL, RandomResizedCrop, ToTensor, Normalize, float batches.
`torchvision v2` decodes to tensors; `v2, uint8` leaves normalisation to the device, as ours does. `ours, from memory`
has decoded every image before (`cache_images`).

The pipelines take turns of one batch, so that other load on the machine meets all of them. Speeds are given by wall
and by processor time (`cpu`). `speedup` is torchvision v1's time over a pipeline's in the same turn. Figures are
medians and quartiles over the turns. `difference` compares with PIL's decoder and PIL's antialiased bilinear resize
of the same box, in grey levels. `profile` is microseconds of processor time per image in each part, in turns of their
own. The last line of the output is one JSON object, which is added to a file too.
"""

import argparse
import io
import statistics
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import default_collate


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation


from benchmarks.speed.timing import Seconds, add_common_arguments, prepare, report, rounded, seconds_of
from ijepa_transformers.data import datasets as data_datasets
from ijepa_transformers.data import decoding as data_decoding
from ijepa_transformers.data.datasets import PretrainingImages
from ijepa_transformers.data.image_cache import DecodedImages
from ijepa_transformers.data.transforms import default_image_statistics, normalize_pixel_values, sample_crop


try:
    import torchvision
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor, v2
except ImportError:
    torchvision = None

IMAGE_SIZE, SCALE, RATIO = 224, (0.3, 1.0), (3 / 4, 4 / 3)
MEAN, STD = default_image_statistics(3)
BASELINE = "torchvision v1"

# Number of different photographs and of those in a batch. `texture` is how rough they are, pixel by pixel: small
# photographs are usually large ones made smaller, and sharper for it.
CASES = {
    "500x375": {"photos": 64, "batch": 16, "texture": 12.0},
    "1600x1200": {"photos": 8, "batch": 4, "texture": 7.0},
    "4000x3000": {"photos": 2, "batch": 2, "texture": 5.0},
}


# Photographs


def photograph(width: int, height: int, texture: float, seed: int) -> Image.Image:
    """Noise of all scales, weaker the finer it is, over shapes with sharp edges: it encodes to a photo's size."""
    generator, amplitude = np.random.default_rng(seed), 64.0
    planes = [np.zeros((3, 4), np.float32) for _ in range(3)]
    while True:
        shape = planes[0].shape
        grey = amplitude * generator.standard_normal(shape, np.float32)
        for plane in planes:
            plane += grey
            if shape[0] < 200:  # colours change slowly
                plane += amplitude / 3 * generator.standard_normal(shape, np.float32)
        if shape == (height, width):
            break
        larger = min(2 * shape[1], width), min(2 * shape[0], height)
        planes = [np.array(Image.fromarray(plane).resize(larger, Image.Resampling.BICUBIC)) for plane in planes]
        amplitude = max(texture, 0.62 * amplitude)
    background = np.asarray(shapes(width, height, generator))
    layers = [plane + background[..., channel] for channel, plane in enumerate(planes)]
    return Image.fromarray(np.stack([layer.clip(0, 255).astype(np.uint8) for layer in layers], axis=2))


def shapes(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for number in range(12):
        x, y, w, h = generator.random(4) * [width, height, width / 3, height / 3]
        draw_shape = draw.ellipse if number % 2 else draw.rectangle
        draw_shape((x, y, x + w, y + h), fill=tuple(generator.integers(64, 192, 3).tolist()))
    return image


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


# Pipelines: a function of the turn to a collated batch


class OurPipeline:
    """`decoder` is "simplejpeg" or "PIL"."""

    def __init__(
        self,
        photos: list[bytes],
        batch_size: int,
        decoder: str,
        fast_large_photos: bool = False,
        cache: DecodedImages | None = None,
    ):
        rows = [{"image": {"bytes": photo, "path": None}} for photo in photos]
        self.images = PretrainingImages(rows, IMAGE_SIZE, fast_large_photos=fast_large_photos, cache=cache)
        self.num_photos, self.batch_size, self.decoder = len(photos), batch_size, decoder

    def __call__(self, turn: int) -> dict:
        with self.decoding():
            keys = [(turn, 0, turn, index) for index in places(turn, self.num_photos, self.batch_size)]
            return default_collate([self.images[key] for key in keys])

    @contextmanager
    def decoding(self):
        installed = data_decoding.simplejpeg
        data_decoding.simplejpeg = installed if self.decoder == "simplejpeg" else None
        yield
        data_decoding.simplejpeg = installed

    def box(self, photo: Image.Image, turn: int, index: int) -> tuple[int, int, int, int]:
        """The (top, left, height, width) of a crop."""
        generator = self.images.crop_generator(turn, index)
        return sample_crop(photo.height, photo.width, 1.0, SCALE, RATIO, generator)


def places(turn: int, num_photos: int, batch_size: int) -> list[int]:
    return [(turn * batch_size + place) % num_photos for place in range(batch_size)]


class TorchvisionPipeline:
    """The photograph `index` through `read` and `transform`."""

    def __init__(self, photos: list[bytes], batch_size: int, read, transform):
        self.photos, self.batch_size, self.read, self.transform = photos, batch_size, read, transform

    def __call__(self, turn: int) -> list:
        indices = places(turn, len(self.photos), self.batch_size)
        return default_collate([(self.transform(self.read(self.photos[index])), index) for index in indices])


def open_with_pil(photo: bytes) -> Image.Image:
    with Image.open(io.BytesIO(photo)) as image:
        return image.convert("RGB")


def open_with_torchvision(photo: bytes) -> torch.Tensor:
    return decode_image(torch.frombuffer(bytearray(photo), dtype=torch.uint8), ImageReadMode.RGB)


def pipelines_for(photos: list[bytes], batch_size: int) -> dict:
    ours = partial(OurPipeline, photos, batch_size)
    pipelines = {"ours, PIL": ours("PIL"), "ours, PIL, fast_large_photos": ours("PIL", True)}
    if data_decoding.simplejpeg is not None:
        pipelines["ours, simplejpeg"] = ours("simplejpeg")
        pipelines["ours, simplejpeg, fast_large_photos"] = ours("simplejpeg", True)
    cache = DecodedImages(len(photos), sum(open_with_pil(photo).width ** 2 * 3 for photo in photos))
    pipelines["ours, from memory"] = OurPipeline(photos, batch_size, "PIL", cache=cache)
    for index, photo in enumerate(photos):
        cache.get(index, lambda photo=photo: np.asarray(open_with_pil(photo)))
    if torchvision is None:
        return pipelines
    theirs = partial(TorchvisionPipeline, photos, batch_size)
    crop = v2.RandomResizedCrop(IMAGE_SIZE, scale=SCALE, antialias=True)
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return {
        BASELINE: theirs(
            open_with_pil, Compose([RandomResizedCrop(IMAGE_SIZE, scale=SCALE), ToTensor(), Normalize(MEAN, STD)])
        ),
        "torchvision v2": theirs(open_with_torchvision, v2.Compose([crop, *to_float])),
        "torchvision v2, uint8": theirs(open_with_torchvision, crop),
        **pipelines,
    }


# Measuring


def race(pipelines: dict, batch_size: int, num_turns: int) -> dict:
    """Images per second of each pipeline, and how many times faster than the baseline it is; two turns to warm up."""
    names, times = list(pipelines), {name: [] for name in pipelines}
    for turn in range(num_turns + 2):
        shift = turn % len(names)  # other load on the machine, and warm caches, meet all of them
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds_of(partial(pipelines[name], turn)))
    times = {name: values[2:] for name, values in times.items()}
    results = {}
    for name, values in times.items():
        results[name] = {
            "images_per_second": rounded((batch_size / own.wall for own in values), 1),
            "images_per_cpu_second": rounded((batch_size / own.cpu for own in values), 1),
        }
        if torchvision is not None:
            results[name] |= speedups(values, times[BASELINE])
    return results


def speedups(times: list[Seconds], baseline: list[Seconds]) -> dict:
    pairs = list(zip(times, baseline, strict=True))
    return {
        "speedup": rounded((theirs.wall / own.wall for own, theirs in pairs), 2),
        "speedup_by_cpu": rounded((theirs.cpu / own.cpu for own, theirs in pairs), 2),
    }


def difference(pipeline: OurPipeline, photos: list[bytes], num_crops: int = 8) -> dict:
    """Of the crops to PIL's, in grey levels."""
    differences = []
    for turn in range(num_crops):
        index = turn % len(photos)
        photo = open_with_pil(photos[index])
        top, left, height, width = pipeline.box(photo, turn, index)
        crop = photo.crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)).astype(int)
        with pipeline.decoding():
            found = pipeline.images[(turn, 0, turn, index)]["pixel_values"].permute(1, 2, 0).numpy()
        differences.append(np.abs(found - expected))
    found = np.concatenate(differences)
    return {
        "largest": int(found.max()),
        "99th_percentile": int(np.percentile(found, 99)),
        "mean": round(float(found.mean()), 3),
    }


OUR_PARTS = {
    "header": (data_decoding.OpenedImage, "__init__"),
    "decode": (data_decoding.OpenedImage, "decode"),
    "crop and resize": (data_datasets, "random_resized_crop"),
    "collate": (sys.modules[__name__], "default_collate"),
}


def profile(pipeline, parts: dict, batch_size: int, num_turns: int) -> dict:
    """Microseconds per image in each part of a pipeline, the rest being what is between them."""
    spent = dict.fromkeys(parts, 0.0)
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}

    def timed(name):
        def function(*arguments, **options):
            start = time.process_time()
            try:
                return originals[name](*arguments, **options)
            finally:
                spent[name] += time.process_time() - start

        return function

    try:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, timed(name))
        total = sum(seconds_of(partial(pipeline, turn)).cpu for turn in range(num_turns))
    finally:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, originals[name])
    spent["rest"] = total - sum(spent.values())
    return {name: round(value / num_turns / batch_size * 1e6) for name, value in spent.items() if value > 0}


def parts_of(pipeline) -> dict:
    if isinstance(pipeline, OurPipeline):
        return OUR_PARTS
    collate = {"collate": OUR_PARTS["collate"], "header and decode": (pipeline, "read")}
    steps = pipeline.transform.transforms if hasattr(pipeline.transform, "transforms") else [pipeline.transform]
    places = [(step, "forward") if hasattr(step, "forward") else (type(step), "__call__") for step in steps]
    return {**collate, **{type(step).__name__: place for step, place in zip(steps, places, strict=True)}}


def normalisation() -> float:
    """Microseconds per image of what ours leaves to the device, if the device is one CPU thread."""
    batch = torch.randint(0, 256, (16, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    times = [seconds_of(partial(normalize_pixel_values, batch, MEAN, STD)).cpu for _ in range(20)]
    return round(statistics.median(times) / len(batch) * 1e6)


def measure(size: str, num_turns: int) -> dict:
    width, height = map(int, size.split("x"))
    settings = CASES[size]
    start = time.perf_counter()
    photos = [jpeg(photograph(width, height, settings["texture"], seed)) for seed in range(settings["photos"])]
    kilobytes = sum(map(len, photos)) / len(photos) / 1000
    print(f"{size}: {len(photos)} photographs of {kilobytes:.0f} kB, {time.perf_counter() - start:.0f} s", flush=True)
    pipelines, batch_size = pipelines_for(photos, settings["batch"]), settings["batch"]
    result = {"size": size, "kilobytes": round(kilobytes), "batch": batch_size, "pipelines": {}}
    speeds = race(pipelines, batch_size, num_turns)
    for name, pipeline in pipelines.items():
        parts = profile(pipeline, parts_of(pipeline), batch_size, max(2, num_turns // 5))
        result["pipelines"][name] = {**speeds[name], "profile": parts}
        if isinstance(pipeline, OurPipeline):
            result["pipelines"][name]["difference"] = difference(pipeline, photos)
        print(f"{size} {name}: {result['pipelines'][name]}", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=30, help="timed turns of one batch of each pipeline")
    parser.add_argument("--sizes", nargs="+", choices=list(CASES), default=list(CASES))
    add_common_arguments(parser)
    arguments = parser.parse_args()
    prepare(arguments)
    torch.set_num_threads(1)  # a data-loading worker has one
    if torchvision is None:
        print("torchvision is not installed: its pipelines are left out", flush=True)
    results = [measure(size, arguments.turns) for size in arguments.sizes]
    result = {
        "jpeg_decoder": data_decoding.jpeg_decoder(),
        "turns": arguments.turns,
        "normalisation_cpu_us_per_image": normalisation(),
        "results": results,
    }
    report("input_pipeline", arguments, result, peers=("pillow", "torchvision", "simplejpeg"))


if __name__ == "__main__":
    main()
