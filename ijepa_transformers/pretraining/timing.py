# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures the time of training, without evaluations and checkpoints."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds since it was made, without those inside `paused`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.started = clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside the block, because evaluating and saving are not training."""
        began = self.clock()
        yield
        self.started += self.clock() - began
