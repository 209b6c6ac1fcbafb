# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Where `datasets` keeps the Arrow files that it makes of Parquet files, tar files and data sets of the Hub."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import datasets


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def cache_errors_told(cache_dir: str | os.PathLike | None) -> Iterator[None]:
    """Names the cache if its disk is full or may not be written to. `datasets` hides this in errors of its own.

    Args:
        cache_dir: as given to `datasets`.

    Raises:
        OSError: with the folder of the cache.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                place = os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE)
                reason = f"{os.strerror(cause.errno)}; HF_DATASETS_CACHE names another place for this cache"
                raise OSError(cause.errno, reason, place) from error
            cause = cause.__cause__ or cause.__context__
        raise
