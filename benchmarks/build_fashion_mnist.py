#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Fetches Fashion-MNIST from Debian's package, without root and without the Hub, as Parquet files:

    python benchmarks/build_fashion_mnist.py --output data/fashion_mnist

70,000 grey photographs of clothes, 28 x 28 pixels, 10 classes (Xiao et al. 2017, arXiv 1708.07747, MIT licence);
60,000 to train on, 10,000 to test on. On another system than Debian, `--source FOLDER` takes the four original files.
"""

import argparse
import gzip
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ijepa.checkpointing import written_aside


PACKAGE = "dataset-fashion-mnist"
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FILES = {"train": "train", "test": "t10k"}  # split -> first word of the files' names
HEADER_BYTES = {"images": 16, "labels": 8}  # of the IDX format; the sizes in it are known


def download(folder: Path) -> Path:
    """Downloads and unpacks the package into `folder`; nothing is installed. Returns where its files are.

    Raises:
        ValueError: if that fails.
    """
    try:
        subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=folder, check=True, capture_output=True)
        package = next(folder.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"Debian's package {PACKAGE} cannot be fetched ({error}); name a --source.") from error
    return next((folder / "unpacked").rglob("train-images-idx3-ubyte*")).parent


def read_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28), uint8, and labels (N,).

    Raises:
        ValueError: if a file is missing.
    """
    arrays = []
    for kind, header in HEADER_BYTES.items():
        paths = sorted(folder.glob(f"{prefix}-{kind}-idx*-ubyte*"))
        if not paths:
            raise ValueError(f"{str(folder)!r} holds no file {prefix}-{kind}-idx*-ubyte.gz.")
        content = paths[0].read_bytes()
        content = gzip.decompress(content) if paths[0].suffix == ".gz" else content
        arrays.append(np.frombuffer(content, np.uint8, offset=header))
    return arrays[0].reshape(-1, 28, 28), arrays[1]


def as_dataset(images: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    """Columns `image` (PNG) and `label` (with class names)."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--source", help="folder of the four original files instead of Debian's package")
    arguments = parser.parse_args(words)
    output = Path(arguments.output)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = Path(arguments.source) if arguments.source else download(Path(temporary))
            splits = {split: as_dataset(*read_split(folder, prefix)) for split, prefix in FILES.items()}
        except ValueError as error:
            print(f"build_fashion_mnist.py: error: {error}", file=sys.stderr)
            sys.exit(1)
    for split, dataset in splits.items():
        with written_aside(output / f"{split}.parquet") as unfinished:
            dataset.to_parquet(unfinished)
        print(f"{len(dataset):,} images in {output / f'{split}.parquet'}")


if __name__ == "__main__":
    main()
