# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Ends a fine-tuning whose loss or weights are not finite, before such a model is written."""

import math
from collections.abc import Mapping

import torch
from transformers import TrainerState

from ..failures import DivergedError
from .training_arguments import FineTuningArguments


def require_finite_loss(loss: torch.Tensor, step: int, arguments: FineTuningArguments) -> None:
    """Raises DivergedError if the loss, a scalar, is not finite in a step (from 1)."""
    if not torch.isfinite(loss).all():
        raise DivergedError(
            f"The training has diverged: the loss is {loss.item()} in step {step:,}. {_advice(arguments)}"
        )


def require_finite_evaluation(
    metrics: Mapping[str, float], split: str, state: TrainerState, arguments: FineTuningArguments
) -> None:
    """Raises DivergedError if the loss on a split is not finite. Its accuracy would be that of a constant answer."""
    losses = [value for name, value in metrics.items() if name.endswith("_loss") and not math.isfinite(value)]
    if losses:
        raise DivergedError(
            f"The training has diverged: the loss on the {split!r} split is {losses[0]} after step"
            f" {state.global_step:,}. {_advice(arguments)}"
        )


def require_finite_weights(model: torch.nn.Module, step: int, arguments: FineTuningArguments) -> None:
    """Raises DivergedError if a weight is not finite after so many steps. A process looks at its own part of them."""
    for name, weight in model.named_parameters():
        own = weight.to_local() if hasattr(weight, "to_local") else weight
        if not torch.isfinite(own).all():
            raise DivergedError(
                f"The training has diverged: the weights {name} are not finite after step {step:,}."
                f" {_advice(arguments)}"
            )


def _advice(arguments: FineTuningArguments) -> str:
    return (
        f"The learning rate {arguments.learning_rate:g} may be too high: start again with a lower --learning_rate."
        " No model was written."
    )
