# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures the time of training, without evaluations and checkpoints, and estimates how long the run will take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


# The estimate comes after the tenth step of this process, from the speed of the last five. The first steps are slower:
# workers start, memory is allocated, layers are compiled.
IGNORED_STEPS, MEASURED_STEPS = 5, 5


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


class TimeEstimate:
    """Estimates once how much time is left. A step is an optimizer step, however many forward passes it has.

    Args:
        first_step: steps that were done before this process started; more than 0 in a resumed run.
        total_steps: of the whole run.
    """

    def __init__(self, stopwatch: Stopwatch, first_step: int, total_steps: int):
        self.stopwatch, self.first_step, self.total_steps = stopwatch, first_step, total_steps
        self.began = 0.0  # seconds after the ignored steps

    def after(self, done: int) -> str | None:
        """The estimate in a sentence after step `done` (from 1), if this is the step to give it."""
        steps = done - self.first_step
        if steps == IGNORED_STEPS:
            self.began = self.stopwatch.seconds
        if steps != IGNORED_STEPS + MEASURED_STEPS or done == self.total_steps:
            return None
        seconds = (self.stopwatch.seconds - self.began) / MEASURED_STEPS * (self.total_steps - done)
        return (
            f"about {in_words(seconds)} left at the speed of steps {done - MEASURED_STEPS + 1:,} to {done:,};"
            " evaluations and checkpoints are not counted"
        )


def in_words(seconds: float) -> str:
    """A length of time in two units: 3 h 20 min, 2 d 4 h, 5 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
