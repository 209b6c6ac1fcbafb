# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Decoded images in memory that a process and its data loading processes share, so that each is decoded once.

The memory belongs to no file. Processes that are forked after the cache was made see the same pages. A page takes
memory only when something was written to it.
"""

import mmap
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np

from .decoding import BadImageError, read_image


_SAMPLE_SIZE = 16  # images whose size is measured
_EMPTY, _RESERVED, _KEPT = range(3)
_FORK = "fork"  # with another start of processes nothing would be shared
_CGROUP_FILES = (  # limit and use of a container's memory, of cgroup versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class DecodedImages:
    """Keeps decoded images, uint8 (H, W, C), until `num_bytes` are used. Further images are decoded each time.

    A kept image has the pixels that decoding gives. Call `get` in any process that was forked from this one.

    Args:
        num_images: their indices are 0 to num_images - 1.
        num_bytes: of pixels, in all.
    """

    def __init__(self, num_images: int, num_bytes: int):
        self._lock = multiprocessing.get_context(_FORK).Lock()
        self._pixels = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)
        # Of each image: its state, where its pixels begin, and its height, width and channels.
        self._places = np.frombuffer(mmap.mmap(-1, 40 * max(num_images, 1)), np.int64).reshape(-1, 5)
        self._used = np.frombuffer(mmap.mmap(-1, 8), np.int64)  # bytes

    def get(self, index: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The image with this index; `decode` makes it if it is not kept. The array may be read-only.

        Raises:
            what `decode` raises. Then nothing is kept.
        """
        state, start, *shape = self._places[index].tolist()
        if state == _KEPT:
            pixels = self._pixels[start : start + shape[0] * shape[1] * shape[2]].view()
            pixels.flags.writeable = False
            return pixels.reshape(shape)
        image = decode()
        start = self._reserve(index, image.size)
        if start is not None:
            self._pixels[start : start + image.size] = image.reshape(-1)
            with self._lock:  # other processes look at the state first
                self._places[index] = (_KEPT, start, *image.shape)
        return image

    def _reserve(self, index: int, num_bytes: int) -> int | None:
        """Where to write an image; None if there is no room, or another process writes it already."""
        with self._lock:
            start = int(self._used[0])
            if self._places[index, 0] != _EMPTY or start + num_bytes > len(self._pixels):
                return None
            self._places[index, 0] = _RESERVED
            self._used[0] = start + num_bytes
            return start

    @property
    def num_kept(self) -> int:
        """How many images are kept."""
        return int((self._places[:, 0] == _KEPT).sum())


def decoded_size(dataset: datasets.Dataset, num_channels: int) -> int:
    """Bytes of all decoded images, estimated from a few that are spread over the data set.

    Images that cannot be read count as nothing. Their turn tells about them.
    """
    sizes = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE_SIZE).round().astype(int)).tolist():
        try:
            sizes.append(read_image(dataset[index]["image"], index, num_channels).size)
        except BadImageError:
            sizes.append(0)
    return len(dataset) * sum(sizes) // max(len(sizes), 1)


def can_share(num_workers: int) -> bool:
    """Whether data loading processes, if there are any, are forked here, so that they share this process's memory."""
    has_fork = _FORK in multiprocessing.get_all_start_methods()
    return has_fork and (num_workers == 0 or multiprocessing.get_context().get_start_method() == _FORK)


def free_memory(files: Sequence[tuple[str, str]] = _CGROUP_FILES) -> int:
    """Bytes that are available to this process, within the limit of its container. 0 if the system does not say."""
    free = 0
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = 1024 * int(found[1]) if found else 0
    for limit, used in files:
        with suppress(OSError, ValueError):  # no container, or "max"
            free = min(free, max(int(Path(limit).read_text()) - int(Path(used).read_text()), 0))
    return free


def processes_here() -> int:
    """Processes of a run on this machine; each has a cache of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
