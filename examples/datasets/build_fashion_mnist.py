#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Fetches Fashion-MNIST from Debian's package, without root and without the Hub, as Parquet files:

    python examples/datasets/build_fashion_mnist.py --output data/fashion_mnist

70,000 grey photographs of clothes, 28 x 28 pixels, 10 classes (Xiao et al. 2017, arXiv 1708.07747, MIT licence);
60,000 to train on, 10,000 to test on. On another system than Debian, `--source FOLDER` takes the four original files.
"""

import gzip
import sys
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from examples.datasets.building import as_dataset, command_line, errors_in_one_sentence, source_folder, write_splits


PACKAGE = "dataset-fashion-mnist"
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FILES = {"train": "train", "test": "t10k"}  # split -> first word of the files' names
HEADER_BYTES = {"images": 16, "labels": 8}  # of the IDX format; the sizes in it are known


def read_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28), uint8, and labels (N,), from files anywhere in `folder`.

    Raises:
        ValueError: if a file is missing.
    """
    arrays = []
    for kind, header in HEADER_BYTES.items():
        paths = sorted(folder.rglob(f"{prefix}-{kind}-idx*-ubyte*"))
        if not paths:
            raise ValueError(f"{str(folder)!r} holds no file {prefix}-{kind}-idx*-ubyte.gz.")
        content = paths[0].read_bytes()
        content = gzip.decompress(content) if paths[0].suffix == ".gz" else content
        arrays.append(np.frombuffer(content, np.uint8, offset=header))
    return arrays[0].reshape(-1, 28, 28), arrays[1]


def main(words: list[str] | None = None) -> None:
    parser = command_line(__doc__.splitlines()[0], "folder of the four original files instead of Debian's package")
    arguments = parser.parse_args(words)
    with errors_in_one_sentence(parser):
        with source_folder(arguments.source, [PACKAGE]) as source:
            splits = {split: as_dataset(*read_split(source, prefix), CLASSES) for split, prefix in FILES.items()}
        write_splits(splits, Path(arguments.output))


if __name__ == "__main__":
    main()
