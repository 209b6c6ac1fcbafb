# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Schedules as pure functions of the optimizer step, and the parameter groups they act on.

Steps count optimizer updates from 0, whatever the accumulation or the number of processes, so a run is resumed by
its step alone. The values are those of Meta's released code, which differ from the paper's text in two places: the
weight decay follows a cosine (the paper says linear) and the warm-up is longer (40 epochs, the paper says 15).
"""

import math
from dataclasses import dataclass

import torch


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class Schedules:
    """
    Learning rate, weight decay and momentum of every optimizer step of a run.

    Learning rate and weight decay are those of progress step + 1: the first update already leaves the starting
    learning rate, update `warmup_steps` has exactly the peak, the last one exactly the final values. The momentum is
    that of progress `step`, so a run never quite reaches the final momentum. Both are as in Meta's released code.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warm-up from `start_learning_rate` to `learning_rate`.
        start_learning_rate, peak_learning_rate, final_learning_rate: linear up, then a cosine down.
        start_weight_decay, final_weight_decay: a cosine over the whole run.
        start_momentum, final_momentum: linear over the whole run.

    Raises:
        ValueError: if the steps do not make a run, or a value is out of its range.
    """

    total_steps: int
    warmup_steps: int = 0
    start_learning_rate: float = 2e-4
    peak_learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    start_weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    start_momentum: float = 0.996
    final_momentum: float = 1.0

    def __post_init__(self):
        if self.total_steps < 1 or not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"A run needs at least 1 step and a warm-up within it, got total_steps {self.total_steps} and"
                f" warmup_steps {self.warmup_steps}."
            )
        for name in ("start_momentum", "final_momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in vars(self):
            if getattr(self, name) < 0 or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}.")

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0)."""
        done = step + 1
        if done <= self.warmup_steps:
            rise = self.peak_learning_rate - self.start_learning_rate
            return self.start_learning_rate + rise * done / self.warmup_steps
        progress = (done - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return _cosine(self.peak_learning_rate, self.final_learning_rate, progress)

    def weight_decay(self, step: int) -> float:
        """Weight decay of optimizer step `step` (from 0)."""
        return _cosine(self.start_weight_decay, self.final_weight_decay, (step + 1) / self.total_steps)

    def momentum(self, step: int) -> float:
        """Momentum of the moving average taken after optimizer step `step` (from 0)."""
        rise = self.final_momentum - self.start_momentum
        return self.start_momentum + rise * min(step / self.total_steps, 1.0)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets learning rate and weight decay of `step` in every group of `parameter_groups`."""
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
            group["weight_decay"] = self.weight_decay(step) if group["decayed"] else 0.0


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """The trained parameters of an `IJepaForPretraining` in the four groups of Meta's released code, in its order:
    decayed context encoder, decayed predictor, undecayed context encoder, undecayed predictor.

    Biases and other one-dimensional parameters (layer norms) take no weight decay; the mask token, three-dimensional,
    does. Each group carries its `name` and `decayed`, which `Schedules.apply` reads.
    """
    groups = []
    for decayed in (True, False):
        for network in ("context_encoder", "predictor"):
            parameters = [
                parameter
                for name, parameter in getattr(model, network).named_parameters()
                if parameter.requires_grad and decayed == (parameter.ndim > 1 and not name.endswith(".bias"))
            ]
            name = f"{network}_{'decayed' if decayed else 'undecayed'}"
            groups.append({"params": parameters, "name": name, "decayed": decayed, "weight_decay": 0.0})
    return groups
