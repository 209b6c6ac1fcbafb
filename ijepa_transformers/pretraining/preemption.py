# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Being told to stop: signals are noted when they come and acted on where a run can be saved.

A batch system sends a signal some time before it kills (Slurm: SIGTERM, or what `--signal` names), a user presses
Ctrl-C, and launchers pass both on. One process acting on its own would leave the others waiting for it, so a signal
only raises a flag here, and the training loop asks all processes together (`ijepa_transformers/distributed.py`).
"""

import multiprocessing
import os
import signal
import sys
import time


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")  # variables that torchrun and `accelerate launch` set
SECOND_THOUGHT_SECONDS = 2.0  # a launcher passes on the Ctrl-C that the terminal has sent already


class StopRequest:
    """Whether this process was asked to stop: true from then on. Used as a context, in the main thread.

    As long as `exits` is True, where there is nothing to save yet, a signal ends the process with `exit_code`.

    A second Ctrl-C, at least two seconds after the first, interrupts at once, as Ctrl-C always does.

    Signals that were ignored before, as `nohup` ignores SIGHUP, stay ignored.

    A launcher that is gone (killed, so that it could pass nothing on) counts as a request too: its orphans would go on
    writing into a directory that the next start takes for its own.
    """

    def __init__(self, exit_code: int):
        self.exit_code, self.exits = exit_code, True
        self.reason: str | None = None
        self._first_interrupt: float | None = None
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def __enter__(self):
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's SIGHUP
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        return self.reason is not None

    def _note(self, number: int, frame):
        self.reason = signal.Signals(number).name
        if self.exits:
            sys.exit(self.exit_code)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= SECOND_THOUGHT_SECONDS:
                raise KeyboardInterrupt


def ignore_stop_signals(worker_index: int) -> None:
    """For a DataLoader's `worker_init_fn`: a signal to the whole process group must not take the workers away from a
    run that still finishes its step. `end_workers` ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kills what data loading processes are left: one that waits for a slow disk would keep its parent waiting."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes the death of a worker for a fault
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join()
    signal.signal(signal.SIGCHLD, before)


class Preempted(Exception):
    """Asked to stop: everything is saved."""
