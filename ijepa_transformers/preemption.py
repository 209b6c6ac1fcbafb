# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Stops a run on a signal. A signal is noted when it comes; the run stops where it can be saved.

A batch system sends a signal some time before it kills (Slurm: SIGTERM, or what `--signal` names). A user presses
Ctrl-C. Launchers pass both on. If one process stopped alone, the others would wait for it. So a signal only raises a
flag here, and the training loop asks all processes together whether to stop (`ijepa_transformers/distributed.py`).
"""

import os
import signal
import time
from types import FrameType

from .data.workers import prepare_worker


PREEMPTED = 75  # exit code: stopped by a signal and saved, so that the run can continue; EX_TEMPFAIL of sysexits.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")  # variables that torchrun and `accelerate launch` set
# Seconds between two Ctrl-C of a user. Sooner, the second one is a launcher's copy of the first.
SECOND_INTERRUPT_SECONDS = 2.0


class Preempted(BaseException):
    """The run was asked to stop. What there was to save is saved.

    Like KeyboardInterrupt it is no Exception, so that no library takes it for an error of its own.
    """


class StopRequest:
    """True as soon as this process was asked to stop. Use it as a context manager in the main thread.

    `raises_at_once` is True at first, while there is nothing to save: then a signal raises `Preempted`. Set it to
    False where the training loop asks for the flag.

    A second Ctrl-C, at least two seconds after the first, interrupts at once, as Ctrl-C always does.

    Signals that were ignored before stay ignored. For example, `nohup` ignores SIGHUP.

    The death of the launcher counts as a request too. A killed launcher cannot pass a signal on, and its processes
    would go on writing into a directory that the next start uses.
    """

    def __init__(self) -> None:
        self.raises_at_once = True
        self.reason: str | None = None
        self._first_interrupt: float | None = None
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def __enter__(self) -> "StopRequest":
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if self.raises_at_once:
            raise Preempted
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= SECOND_INTERRUPT_SECONDS:
                raise KeyboardInterrupt


def ignore_stop_signals(worker_index: int) -> None:
    """The `worker_init_fn` of every DataLoader. A signal often goes to the whole process group, and a run that still
    finishes its step needs its workers. `end_workers` ends them."""
    prepare_worker(worker_index)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
