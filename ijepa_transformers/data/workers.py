# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Data loading processes ("workers"): they end when they cannot go on, because their parent waits for them."""

import multiprocessing.queues
import os
import sys
from typing import Any


def _end(error: Exception, item: Any) -> None:
    print(f"A data loading process cannot hand on its batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def prepare_worker(worker_index: int) -> None:
    """The `worker_init_fn` of a DataLoader.

    A batch that cannot be sent, because there are too few file descriptors or too little shared memory, ends the
    process. Python would print a traceback and drop the batch, and the main process would wait for it for ever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
