# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Ends a fine-tuning on a signal, with a checkpoint. Pretraining does the same in a loop of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..display import show
from ..distributed import any_process
from ..preemption import Preempted, StopRequest


class _SaveAndStop(TrainerCallback):
    """Asks for a checkpoint after the step in which a process was asked to stop, and ends the training after it.

    It raises `Preempted`, because `Trainer` would go on after a training that only ends early: it would load the best
    weights, and remove checkpoints.
    """

    def __init__(self, stop: StopRequest, accelerator: Accelerator):
        self.stop, self.accelerator, self.stops = stop, accelerator, False
        self.epoch_is_over = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch_is_over = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.epoch is None or not float(state.epoch).is_integer():
            self._save_if_asked(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step of an epoch, so that its evaluation is not left out: a resumed run begins after it."""
        self.epoch_is_over = True
        self._save_if_asked(args, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last epoch no step follows that would end the run."""
        if self.epoch_is_over:
            self._save_if_asked(args, control)

    def _save_if_asked(self, args: TrainingArguments, control: TrainerControl) -> None:
        if any_process(self.accelerator, bool(self.stop)):
            self.stops = control.should_save = True
            args.save_only_model = False  # the run could not continue from such a checkpoint
            if args.save_strategy == SaveStrategy.BEST:  # an evaluation that is not the best would take the wish back
                args.save_strategy = SaveStrategy.STEPS

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = self.epoch_is_over and not args.save_only_model and any_process(self.accelerator, bool(self.stop))
        if self.stops or asked:  # the second while the checkpoint of the last epoch was written
            raise Preempted


@contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """In the block a signal ends the training after the step, with a checkpoint. It says so.

    Python tells signals to the main thread only. In another thread nothing is done.

    Raises:
        Preempted: after a signal. A checkpoint is saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with StopRequest() as stop:
        stop.raises_at_once = False
        callback = _SaveAndStop(stop, trainer.accelerator)
        trainer.add_callback(callback)
        try:
            yield
        except Preempted:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # closes the bar
            if trainer.is_world_process_zero():
                reason = stop.reason or "another process was asked to"
                step = trainer.state.global_step
                show(f"stopped ({reason}) after step {step:,}; --resume_from_checkpoint last continues.")
            raise
        finally:
            trainer.remove_callback(callback)
