# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Tells whether images are still those of an earlier run: by names and sizes, or by the bytes of all files.

Shape legend: n images.
"""

import glob
import hashlib
import json
import os
import stat
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..files import write_text
from .decoding import FILE_URI, MAX_FILE_BYTES, path_of_uri


Result = TypeVar("Result")
_BLOCK = 1000  # images whose contents have one hash in the memory of `ContentDigests`
_THREADS = 8  # reading files, above all remote ones, is mostly waiting
_READ_BYTES = 2**20

_FEW_BYTES = 2**28  # images of so many bytes are read to notice that they have changed


class StoredBytes(NamedTuple):
    """The bytes of an image in a table, or the path of its file. Both are None for a row without an image."""

    path: str | None
    content: pa.Buffer | None


def _blocks(dataset: datasets.Dataset, rows: Sequence[int]) -> Iterator[list[StoredBytes]]:
    """These rows, in blocks. Bytes in a table are not copied."""
    table = dataset.select_columns(["image"]).with_format("arrow")
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        column = (table[part.start : part.stop] if isinstance(part, range) else table[list(part)])["image"]
        stored = pc.struct_field(column, "bytes")
        only_paths = stored.null_count == len(stored)
        contents = [None] * len(stored) if only_paths else [scalar.as_buffer() for scalar in stored]
        yield list(map(StoredBytes, pc.struct_field(column, "path").to_pylist(), contents))


def _in_threads(
    threads: ThreadPoolExecutor, function: Callable[[StoredBytes], Result], block: list[StoredBytes]
) -> list[Result]:
    """The results of a function for each image of a block. A thread takes many at a time: handing over costs more than
    to ask for the size of a local file."""
    share = -(-len(block) // _THREADS)
    parts = [block[first : first + share] for first in range(0, len(block), share)]
    return [result for results in threads.map(lambda part: list(map(function, part)), parts) for result in results]


# Names and sizes
def image_fingerprints(dataset: datasets.Dataset, source: str) -> torch.Tensor:
    """A number (n,), int32, for each image, made of its name and its size in bytes.

    Its content counts too if all images together are at most 256 MiB, because reading more would delay each start.

    Args:
        dataset: of `load_image_dataset`.
        source: where it was opened from. Names are relative to this folder, so a folder that was moved keeps them.
    """
    root, rows = _root(source), range(len(dataset))
    prefixes = (root, FILE_URI + urllib.parse.quote(os.fsencode(root)))
    hashes, num_bytes = bytearray(), 0
    with ThreadPoolExecutor(_THREADS) as threads:
        for block in _blocks(dataset, rows):
            sizes = _in_threads(threads, _size, block)
            num_bytes += sum(sizes)
            hashes += _short_hashes(block, sizes, prefixes)
        if num_bytes <= _FEW_BYTES:
            hashes = bytearray()
            for block in _blocks(dataset, rows):
                hashes += _short_hashes(block, _in_threads(threads, _content_digest, block), prefixes)
    return torch.frombuffer(hashes, dtype=torch.int32)


def _short_hashes(block: Sequence[StoredBytes], facts: Sequence[object], prefixes: tuple[str, str]) -> bytes:
    """Four bytes for each image, of its name and what is known about it."""
    told = (
        f"{_without_prefix(stored.path, prefixes)} {fact!r}".encode()
        for stored, fact in zip(block, facts, strict=True)
    )
    return b"".join(hashlib.blake2b(each, digest_size=4).digest() for each in told)


def _root(source: str) -> str:
    """The folder of a source with a "/" at its end. Of a glob, it is the part without wildcards."""
    path = Path(source).expanduser().absolute()
    while glob.has_magic(str(path)):
        path = path.parent
    return os.path.join(path, "")


def _without_prefix(path: str | None, prefixes: tuple[str, str]) -> str:
    if path is None:
        return ""
    plain, uri = prefixes
    return path.removeprefix(plain if path.startswith(plain) else uri)


def _size(stored: StoredBytes) -> int:
    if stored.content is not None:
        return stored.content.size
    status = _status(stored.path)
    return -1 if status is None else status.st_size


def _status(path: str | None) -> os.stat_result | None:
    try:
        return os.stat(path_of_uri(path)) if path else None
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None


def files_digest(paths: Sequence[str]) -> str:
    """A hash of the sizes of files, in this order, or of their bytes if all of them together have at most 256 MiB.

    Names do not count. A file that cannot be read counts as of no size.
    """
    stored = [StoredBytes(path, None) for path in paths]
    with ThreadPoolExecutor(_THREADS) as threads:
        sizes = list(threads.map(_size, stored))
        facts = list(threads.map(_content_digest, stored)) if sum(sizes) <= _FEW_BYTES else sizes
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


# Contents
def contents_digest(dataset: datasets.Dataset, rows: Sequence[int]) -> str:
    """A SHA-256 of the bytes of these images, in this order. All of them are read. Names do not count.

    All files that cannot be read count as the same content, so that a folder may move.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as threads:
        for block in _blocks(dataset, rows):
            digest.update(b"".join(_in_threads(threads, _content_digest, block)))
    return digest.hexdigest()


def _content_digest(stored: StoredBytes) -> bytes:
    if stored.content is not None:
        return hashlib.sha256(stored.content).digest()
    try:
        return _file_digest(path_of_uri(stored.path or ""))
    except (OSError, ValueError):
        return hashlib.sha256(b"no file").digest()


def _file_digest(path: str) -> bytes:
    """Reads no more than the size of the file, because some files of /proc have no end.

    Raises:
        OSError: if it cannot be read, or is no regular file. Opening a pipe would wait for a writer.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("this is not a regular file")
    digest, left = hashlib.sha256(), min(status.st_size, MAX_FILE_BYTES + 1)
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, _READ_BYTES))):
            digest.update(part)
            left -= len(part)
    return digest.digest()


def status_digest(dataset: datasets.Dataset, rows: Sequence[int]) -> str | None:
    """A hash that changes whenever the bytes of these images may have changed. Nothing is read.

    It is made of the size, the times and the inode of all files. The time of the last change of an inode cannot be set
    back, so a file that was replaced or written to is noticed.

    Returns:
        None if images are in memory, where nothing tells that they changed.
    """
    table_status = [_told(file["filename"]) for file in dataset.cache_files]
    digest = hashlib.sha256()
    stored = (each for block in _blocks(dataset, rows) for each in block)
    for row, each in zip(rows, stored, strict=True):
        if each.content is None:
            digest.update(_told(each.path).encode())
        elif table_status:
            digest.update(f"{row} {dataset._fingerprint} {table_status}\n".encode())
        else:
            return None
    return digest.hexdigest()


def _told(path: str | None) -> str:
    status = _status(path)
    facts = status and (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return f"{path} {facts}\n"


class ContentDigests:
    """Hashes of the contents of images, remembered in a file, so that unchanged files are not read again.

    Args:
        path: the file. It may be absent or damaged. Then all images are read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known = _read_known(path)
        self._is_saved = True

    def digest(self, dataset: datasets.Dataset, rows: Sequence[int]) -> tuple[str, bool]:
        """A hash of the contents of these images in this order, and whether files have changed since it was last
        asked for."""
        digest, has_changed = hashlib.sha256(), False
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            key, status = _names_digest(dataset, block), status_digest(dataset, block)
            before = self.known.get(key, ["", ""])
            content = before[1] if status is not None and before[0] == status else contents_digest(dataset, block)
            has_changed |= before[1] not in ("", content)
            if status is not None and before != [status, content]:
                self.known[key], self._is_saved = [status, content], False
            digest.update(content.encode())
        return digest.hexdigest(), has_changed

    def save(self) -> None:
        """Writes the file, unless it has all hashes already.

        Raises:
            OSError: if it cannot be written.
        """
        if not self._is_saved:
            write_text(self.path, json.dumps(self.known))
            self._is_saved = True


def _names_digest(dataset: datasets.Dataset, rows: Sequence[int]) -> str:
    tables = [file["filename"] for file in dataset.cache_files]
    stored = (each for block in _blocks(dataset, rows) for each in block)
    names = [each.path if each.content is None else row for row, each in zip(rows, stored, strict=True)]
    return hashlib.sha256(json.dumps([tables, names]).encode()).hexdigest()


def _read_known(path: Path) -> dict[str, list[str]]:
    """The hash of the names of a block of images -> the hash of its files' status, and that of its contents."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = known.items() if isinstance(known, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, list) and list(map(type, value)) == [str, str]}
