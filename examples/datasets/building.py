# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the builders of image sets share: packages, fetched without root, in; labelled Parquet files out.

A builder's `main` makes a `command_line`, and under `errors_in_one_sentence` takes its files from `source_folder`,
makes a dataset of each split with `as_dataset`, and gives them to `write_splits`.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ijepa_transformers.files import written_aside


def command_line(description: str, source_help: str) -> argparse.ArgumentParser:
    """A parser with `--output` and `--source`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", required=True, type=folder, help="folder for train.parquet and test.parquet")
    parser.add_argument("--source", help=source_help)
    return parser


def folder(name: str) -> str:
    """The type of an argument that names a folder, which need not be there yet. Building takes a while, so a file is
    refused at once."""
    if Path(name).exists() and not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} is a file, not a folder")
    return name


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` up."""

    def whole_number(word: str) -> int:
        number = int(word)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return whole_number


@contextmanager
def errors_in_one_sentence(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with status 1 and the message of a ValueError or an OSError, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def unpack_from_debian(package: str, folder: Path) -> None:
    """Downloads Debian's package and unpacks it into `folder`/unpacked. Nothing is installed.

    Raises:
        ValueError: if it cannot be fetched.
    """
    try:
        _run(["apt-get", "download", "--quiet", package], folder)
        (archive,) = folder.glob(f"{package}_*.deb")
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], folder)
    except OSError as error:
        raise ValueError(f"Debian's package {package} cannot be fetched ({error}); name a --source.") from error


def unpack_from_pypi(requirement: str, folder: Path) -> None:
    """Downloads a wheel, such as "name==1.0", and unpacks it into `folder`/unpacked. Nothing is installed.

    Raises:
        ValueError: if it cannot be fetched.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    try:
        _run([*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", "wheels", requirement], folder)
        (wheel,) = folder.glob("wheels/*.whl")
        shutil.unpack_archive(wheel, folder / "unpacked", "zip")
    except OSError as error:
        raise ValueError(f"PyPI's package {requirement} cannot be fetched ({error}); name a --source.") from error


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise OSError(f"{Path(command[0]).name}: {last_line.removeprefix('E: ').removeprefix('ERROR: ')}")


@contextmanager
def source_folder(
    source: str | None, packages: Sequence[str], unpack: Callable[[str, Path], None] = unpack_from_debian
) -> Iterator[Path]:
    """The folder the user named, or a temporary one with the packages unpacked: usr/share and so on lie in it.

    Raises:
        ValueError: if `source` is no folder, or a package cannot be fetched.
    """
    if source is not None:
        if not Path(source).is_dir():
            raise ValueError(f"--source {source!r} is not a folder.")
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for package in packages:
            unpack(package, Path(temporary))
        yield Path(temporary) / "unpacked"


def read_image(path: Path | zipfile.Path, mode: str) -> Image.Image:
    """The image in Pillow's `mode`; the file may lie in a ZIP archive.

    Raises:
        ValueError: if it cannot be decoded.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, zipfile.BadZipFile) as error:  # a SyntaxError is Pillow's for a damaged PNG
        raise ValueError(f"{str(path)!r} cannot be read as an image ({error}).") from error


def as_dataset(images: Iterable[np.ndarray], labels: Sequence[int], class_names: Sequence[str]) -> datasets.Dataset:
    """Columns `image` (PNG of a grey (H, W) or coloured (H, W, 3) uint8 array) and `label` (with class names)."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": list(labels)}
    return datasets.Dataset.from_dict(rows, features=features)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_splits(splits: Mapping[str, datasets.Dataset], output: Path) -> None:
    """Writes `output`/SPLIT.parquet of all splits, or of none, and says how many images each has."""
    with ExitStack() as files:
        for split, dataset in splits.items():
            dataset.to_parquet(files.enter_context(written_aside(output / f"{split}.parquet")))
    for split, dataset in splits.items():
        classes = dataset.features["label"].num_classes
        print(f"{len(dataset):,} images of {classes} classes in {output / split}.parquet")
