# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Streaming of Parquet and tar shards against random access: time to the first batch, memory, speed, resuming.

    python benchmarks/speed/streaming.py [--images 1000000] [--shards 100] [--seconds 15] [--directory DIR]
        [--output FILE]

Builds small JPEG files of 32 x 32 pixels (about 800 bytes each) in shards, in a temporary directory that is removed
again. Every figure comes from a process of its own, whose files are not in the page cache when it starts.
`first_batch` counts from the call that opens the data to the first batch of 64, imports not included. Peak memory is
that of the process and of its largest worker; `imports` is a process that only imports. `cpu` is processor time of the
reading process without its workers; `process_seconds` are those of the whole process with imports and workers. The
last line is one JSON object, which is added to a file too.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.timing import Seconds, add_common_arguments, prepare, report
from ijepa_transformers.data.datasets import PretrainingImages
from ijepa_transformers.data.order import PretrainingBatchSampler
from ijepa_transformers.data.shards import open_stream
from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.data.streaming import LanePositions, Position, StreamingBatches, choose_lanes, read_lane


BATCH_SIZE = 64
IMAGE_SIZE = 32
ROW_GROUP = 1000  # images
SHUFFLE_BUFFER = 1000
MANY_STEPS = 10**6


# Building


def jpegs(count, seed=0):
    """A few hundred different pictures, encoded."""
    generator, files = np.random.default_rng(seed), []
    for _ in range(count):
        file = io.BytesIO()
        noise = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        noise.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def image_files(shard, count, pictures):
    """(name, bytes) of each image; the number after the end of the picture makes all files different."""
    for row in range(count):
        yield f"{shard:04}-{row:06}", pictures[(shard * 7 + row) % len(pictures)] + b"%016d" % (shard * count + row)


def write_parquet(path, files):
    values = [{"bytes": content, "path": f"{name}.jpg"} for name, content in files]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    table = pa.table({"image": values}, schema=schema)
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="none", use_dictionary=False)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def build(directory, num_images, num_shards):
    pictures = jpegs(500)
    for kind, write in (("parquet", write_parquet), ("tar", write_tar)):
        (directory / kind).mkdir()
        for shard in range(num_shards):
            write(directory / kind / f"{shard:04}.{kind}", image_files(shard, num_images // num_shards, pictures))
    return {kind: sum(file.stat().st_size for file in (directory / kind).iterdir()) for kind in ("parquet", "tar")}


def forget(directory):
    """Takes the files out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Measuring, in a process of its own


def streaming_loader(directory, kind, num_workers, shuffle_buffer=SHUFFLE_BUFFER, place=None):
    stream = open_stream(directory / kind)
    lanes, workers = choose_lanes(stream.num_shards, 1, num_workers)

    def batches(**settings):
        return StreamingBatches(
            stream,
            IMAGE_SIZE,
            collate_fn=default_collate,
            batch_size=BATCH_SIZE,
            total_steps=MANY_STEPS,
            lanes=lanes,
            shuffle_buffer=shuffle_buffer,
            **settings,
        )

    settings = {}
    if place is not None:
        start = LanePositions(batches().settings, dict.fromkeys(range(lanes), place))
        settings = {"start_step": lanes, "start": start}
    return DataLoader(batches(**settings), batch_size=None, num_workers=workers)


def map_loader(directory, num_workers):
    dataset = load_image_dataset(directory / "parquet", cache_dir=directory / "cache")
    return DataLoader(
        PretrainingImages(dataset, IMAGE_SIZE),
        batch_sampler=PretrainingBatchSampler(len(dataset), BATCH_SIZE, MANY_STEPS, seed=0),
        num_workers=num_workers,
    )


def peak_megabytes():
    """Not from getrusage, which takes over the peak of the process that started this one."""
    workers = [_peak(worker.pid) for worker in multiprocessing.active_children()]
    return {"peak_mb": _peak("self"), "worker_peak_mb": max(workers, default=0)}


def _peak(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def drain(loader, start, seconds):
    """Time from `start` to the first batch, and images per second afterwards."""
    batches = iter(loader)
    next(batches)
    first = Seconds.now()
    count = 0
    while Seconds.now().since(first).wall < seconds:
        count += len(next(batches)["pixel_values"])
    waited = first.since(start)
    times = {"first_batch": round(waited.wall, 2), "first_batch_cpu": round(waited.cpu, 2)}
    return {**times, **(speed(count, first) if count else {}), **peak_megabytes()}


def speed(count, start):
    taken = Seconds.now().since(start)
    return {"images_per_second": round(count / taken.wall), "images_per_cpu_second": round(count / taken.cpu)}


def measure_streaming(directory, seconds, kind, num_workers):
    start = Seconds.now()
    return drain(streaming_loader(directory, kind, num_workers), start, seconds)


def measure_resuming(directory, seconds, kind):
    """In the middle of a shard and of a block."""
    rows = shard_rows(directory)
    block = rows // 2 // SHUFFLE_BUFFER
    place = Position(0, block, 0, block * SHUFFLE_BUFFER, SHUFFLE_BUFFER // 2)
    start = Seconds.now()
    return drain(streaming_loader(directory, kind, 0, place=place), start, 0)


def measure_map(directory, seconds, num_workers):
    start = Seconds.now()
    return drain(map_loader(directory, num_workers), start, seconds)


def measure_reading(directory, seconds, kind):
    """Encoded images per second of one reader, not decoded."""
    images = read_lane(open_stream(directory / kind), 0, 1, 0, SHUFFLE_BUFFER, Position())
    start, count = Seconds.now(), 0
    while Seconds.now().since(start).wall < seconds:
        count += sum(1 for _ in islice(images, 1000))
    return {**speed(count, start), **peak_megabytes()}


def shard_rows(directory):
    return pq.read_metadata(directory / "parquet/0000.parquet").num_rows


MEASUREMENTS = {
    "imports": lambda directory, seconds: peak_megabytes(),
    "parquet first": lambda directory, seconds: measure_streaming(directory, 0, "parquet", 0),
    "tar first": lambda directory, seconds: measure_streaming(directory, 0, "tar", 0),
    "map first": lambda directory, seconds: measure_map(directory, 0, 0),  # makes the cache for the ones below
    "map first, converted before": lambda directory, seconds: measure_map(directory, 0, 0),
    "parquet resumed": lambda directory, seconds: measure_resuming(directory, seconds, "parquet"),
    "tar resumed": lambda directory, seconds: measure_resuming(directory, seconds, "tar"),
    "parquet reading": lambda directory, seconds: measure_reading(directory, seconds, "parquet"),
    "tar reading": lambda directory, seconds: measure_reading(directory, seconds, "tar"),
    "parquet steady": lambda directory, seconds: measure_streaming(directory, seconds, "parquet", 0),
    "tar steady": lambda directory, seconds: measure_streaming(directory, seconds, "tar", 0),
    "map steady": lambda directory, seconds: measure_map(directory, seconds, 0),
    "parquet steady, 2 workers": lambda directory, seconds: measure_streaming(directory, seconds, "parquet", 2),
    "tar steady, 2 workers": lambda directory, seconds: measure_streaming(directory, seconds, "tar", 2),
    "map steady, 2 workers": lambda directory, seconds: measure_map(directory, seconds, 2),
}


def in_own_process(name, directory, seconds, allocator):
    forget(directory)
    words = [sys.executable, __file__, "--measure", name, "--directory", str(directory), "--seconds", str(seconds)]
    words += ["--allocator", allocator]
    start, before = Seconds.now(), cpu_of_ended_children()
    output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    taken = {"wall": Seconds.now().since(start).wall, "cpu": cpu_of_ended_children() - before}
    rounded = {name: round(value, 2) for name, value in taken.items()}
    return {**json.loads(output.splitlines()[-1]), "process_seconds": rounded}


def cpu_of_ended_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement of speed")
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    parser.add_argument("--measure", choices=list(MEASUREMENTS), help=argparse.SUPPRESS)
    add_common_arguments(parser)
    arguments = parser.parse_args()
    prepare(arguments)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # a data-loading worker has one
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments.directory, arguments.seconds)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        start = Seconds.now()
        sizes = build(Path(directory), arguments.images, arguments.shards)
        print({"built in seconds": round(Seconds.now().since(start).wall), "bytes": sizes}, flush=True)
        results = {}
        for name in MEASUREMENTS:
            results[name] = in_own_process(name, Path(directory), arguments.seconds, arguments.allocator)
            print(name, results[name], flush=True)
    settings = {"images": arguments.images, "shards": arguments.shards, "seconds": arguments.seconds}
    report("streaming", arguments, {**settings, "results": results}, peers=("datasets", "pyarrow"))


if __name__ == "__main__":
    main()
