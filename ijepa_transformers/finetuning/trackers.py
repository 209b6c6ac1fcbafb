# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Trackers of `Trainer`, such as TensorBoard, whose failure does not end the run."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..trackers import cannot_start, tell_of, tell_of_threads


class GuardedTracker(TrainerCallback):
    """A tracker of `Trainer` that is told of and left out when it fails.

    Args:
        name: as `report_to` has it.

    Raises:
        ValueError: when training begins, if the tracker cannot start.
    """

    def __init__(self, name: str, tracker: TrainerCallback):
        self.name, self.tracker = name, tracker
        self.has_failed = False

    def __getattribute__(self, name: str) -> Any:
        return self._guarded(name) if name.startswith("on_") else super().__getattribute__(name)

    def _guarded(self, event: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.has_failed:
                return None
            try:
                return getattr(self.tracker, event)(*args, **kwargs)
            except Exception as error:
                self.has_failed = True
                if event == "on_train_begin":
                    raise cannot_start("report_to", self.name, error) from error
                tell_of(self.name, error)
                return None
            finally:
                if event == "on_train_end":
                    tell_of_threads()

        return call
