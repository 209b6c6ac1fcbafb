# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretraining in the `Trainer` of Transformers: a collator that draws the masks, a callback that moves the target.

    collator = PretrainingCollator(MultiBlockMasking(grid_size=(14, 14)))
    trainer = Trainer(
        model=IJepaForPretraining(IJepaConfig()),
        args=TrainingArguments("outputs/run", max_steps=1000),
        train_dataset=dataset,  # of samples {"pixel_values": (channels, height, width)}
        data_collator=collator,
        callbacks=[TargetEncoderCallback(collator)],
    )

`examples/pretraining_with_trainer.py` is a whole script.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from .distributed import gathered_on_first_process
from .masking import Masking
from .modeling_ijepa import IJepaForPretraining
from .optimization import Schedules


class PretrainingCollator:
    """Stacks the images of a batch and adds its masks. For samples with nothing but `pixel_values`.

    The masks are a function of the seed and the number of the batch. `TargetEncoderCallback` tells the collator where
    an epoch begins and when the Trainer evaluates. So a resumed run has the masks of a run that was not interrupted,
    and every evaluation has the same masks. Without the callback the collator counts from 0 in every process.

    Args:
        masking: of `build_masking`, for the grid of the model (`config.grid_size`).
        seed: of the masks.

    Raises:
        ValueError: if samples lack `pixel_values`, or these are not floats.
    """

    def __init__(self, masking: Masking, seed: int = 0):
        self.masking, self.seed = masking, seed
        self.batches_per_step = 1
        self.place = (0, 0)  # number of the first batch, and how many were collated since, in this process

    def start_from(self, step: int) -> None:
        """The next batch is the first one of optimizer step `step`. To be called before workers are started."""
        self.place = (step * self.batches_per_step, 0)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples with `pixel_values` (channels, height, width) give `pixel_values` (B, channels, height, width) and
        `context_indices` and `target_indices` in the shapes of `masking.sample`. Other entries are left out."""
        pixel_values = torch.stack([_pixel_values(sample) for sample in samples])
        step, micro_step = divmod(self._next_batch(), self.batches_per_step)
        rank = int(os.environ.get("RANK", "0"))
        slot_block = micro_step * int(os.environ.get("WORLD_SIZE", "1")) + rank
        contexts, targets = self.masking.sample(len(samples), self.seed, step, rank=slot_block)
        return {"pixel_values": pixel_values, "context_indices": contexts, "target_indices": targets}

    def _next_batch(self) -> int:
        """The number of this batch. A loader gives its batches to its workers in turn."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first, calls = self.place
        self.place = (first, calls + 1)
        return first + calls * num_workers + number


def _pixel_values(sample: Any) -> torch.Tensor:
    if not isinstance(sample, dict) or "pixel_values" not in sample:
        found = f"only {sorted(sample)}" if isinstance(sample, dict) else f"it is a {type(sample).__name__}"
        raise ValueError(
            f"A sample must be a dictionary with 'pixel_values', but {found}. If a transform makes them from other"
            " columns, set remove_unused_columns=False in TrainingArguments."
        )
    pixel_values = torch.as_tensor(sample["pixel_values"])
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be normalised floats, got {pixel_values.dtype}; an image processor makes them."
        )
    return pixel_values


class TargetEncoderCallback(TrainerCallback):
    """Updates the target encoder after every optimizer step, and tells the collator the number of the step.

    Args:
        collator: of the Trainer.
        start_momentum, final_momentum: of the moving average; linear over the steps of the run, as published.

    Raises:
        ValueError: if the model holds no `IJepaForPretraining`, or a momentum is outside [0, 1].
    """

    def __init__(
        self, collator: PretrainingCollator | None = None, start_momentum: float = 0.996, final_momentum: float = 1.0
    ):
        self.collator = collator
        self.schedules = Schedules(total_steps=1, start_momentum=start_momentum, final_momentum=final_momentum)
        self._training_place = (0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the model."""
        _pretraining_model(kwargs["model"])
        if self.collator is not None:
            self.collator.batches_per_step = args.gradient_accumulation_steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The workers of an epoch start after this."""
        if self.collator is not None:
            self.collator.start_from(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the target encoder, unless the optimizer has skipped its step (fp16)."""
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            schedules = replace(self.schedules, total_steps=max(state.max_steps, 1))
            gathering = gathered_on_first_process if is_deepspeed_zero3_enabled() else None
            momentum = schedules.momentum(state.global_step - 1)
            _pretraining_model(kwargs["model"]).update_target_encoder(momentum, gathering)
        self._note_place(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer may evaluate here."""
        self._note_place(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training continues with the masks that are next."""
        if self.collator is not None:
            self.collator.place = self._training_place

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What comes now are evaluations."""
        if self.collator is not None:
            self.collator.start_from(0)
            self._training_place = self.collator.place

    def _note_place(self, control: TrainerControl) -> None:
        if self.collator is not None:
            self._training_place = self.collator.place
            if control.should_evaluate:
                self.collator.start_from(0)


def _pretraining_model(model: torch.nn.Module) -> IJepaForPretraining:
    """The networks in a model that may be wrapped, for example by peft."""
    for module in model.modules():
        if isinstance(module, IJepaForPretraining):
            return module
    raise ValueError(f"TargetEncoderCallback needs an IJepaForPretraining, but the model is a {type(model).__name__}.")
