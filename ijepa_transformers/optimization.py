# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Schedules as pure functions of the optimizer step, and the parameter groups they act on.

Steps count optimizer updates from 0. Accumulation and the number of processes do not change them, so a run can be
resumed from its step alone. The values are those of Meta's released code, which differ from the paper's text in two
places: the weight decay follows a cosine (the paper says linear) and the warm-up is longer (40 epochs, the paper says
15).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def momentum_of_half_life(steps: float) -> float:
    """The momentum with which a moving average forgets half of its old value within `steps` steps."""
    return 0.5 ** (1 / steps)


def half_life_of_momentum(momentum: float) -> float:
    """Steps within which a moving average forgets half of its old value: 0 for momentum 0, infinite for 1."""
    if momentum in (0, 1):
        return math.inf if momentum else 0.0
    return math.log(0.5) / math.log(momentum)


@dataclass(frozen=True)
class Schedules:
    """
    Learning rate, weight decay and momentum of every optimizer step of a run.

    Learning rate and weight decay are taken at `step` + 1: the first update is already past the starting learning
    rate, update number `warmup_steps` has exactly the peak, and the last one exactly the final values. The momentum is
    taken at `step`, so a run never quite reaches the final momentum. Both are as in Meta's released code.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warm-up from `start_learning_rate` to `learning_rate`.
        start_learning_rate, peak_learning_rate, final_learning_rate: a linear rise, then half a cosine down.
        start_weight_decay, final_weight_decay: half a cosine over the whole run.
        start_momentum, final_momentum: linear over the whole run.

    Raises:
        ValueError: if there is no step, the warm-up is longer than the run, or a value is out of range.
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

    def __post_init__(self) -> None:
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


def _takes_weight_decay(name: str, parameter: torch.nn.Parameter) -> bool:
    # DeepSpeed's ZeRO-3 replaces a parameter by an empty vector, and keeps the shape of the whole in `ds_shape`.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not name.endswith(".bias")


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The trained parameters of an `IJepaForPretraining` in the four groups of Meta's released code, in its order:
    decayed context encoder, decayed predictor, undecayed context encoder, undecayed predictor.

    Biases and other one-dimensional parameters (of layer norms) take no weight decay. The mask token does, because it
    has three dimensions. Each group has the keys `name` and `decayed`, which `Schedules.apply` reads.
    """
    groups = []
    for decayed in (True, False):
        for network in ("context_encoder", "predictor"):
            parameters = [
                parameter
                for name, parameter in getattr(model, network).named_parameters()
                if parameter.requires_grad and decayed == _takes_weight_decay(name, parameter)
            ]
            name = f"{network}_{'decayed' if decayed else 'undecayed'}"
            groups.append({"params": parameters, "name": name, "decayed": decayed, "weight_decay": 0.0})
    return groups


def build_optimizer(
    groups: list[dict[str, Any]],
    *,
    name: str,
    learning_rate: float,
    betas: Sequence[float],
    epsilon: float,
    device_type: str,
) -> torch.optim.Optimizer:
    """AdamW with float32 states, or AdamW of bitsandbytes with states of 8 bits.

    Both read the learning rate and the weight decay from the groups at every step and keep the groups' other keys.

    Args:
        groups: of `parameter_groups`; each has its own weight decay.
        name: "adamw" or "adamw_8bit". The latter keeps states in blocks of 256 numbers, each block with its scale;
            tensors below 4,096 numbers (most norms and biases) keep float32 states. It does not work with FSDP2,
            whose weights bitsandbytes cannot read.
        learning_rate, betas, epsilon: of AdamW.
        device_type: of the weights. AdamW is fused on CUDA and on the CPU, which takes a quarter of the time.

    Raises:
        ValueError: for another name, or if bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {"lr": learning_rate, "betas": tuple(betas), "eps": epsilon}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device_type in ("cuda", "cpu"), **settings)
    if name != "adamw_8bit":
        raise ValueError(f"optimizer must be adamw or adamw_8bit, got {name!r}.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes ({error}).") from None
    return AdamW8bit(groups, **settings)


# Parts that FSDP version 1, activation checkpointing and torch.compile add to the names of parameters.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def _plain_name(name: str) -> str:
    """The name that a parameter has in the model without its wrappers."""
    plain = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
    return plain.removeprefix("module.")  # DistributedDataParallel and DeepSpeed wrap the whole model only


def parameter_places(model: torch.nn.Module, layer_decay: float) -> dict[str, tuple[int, bool]]:
    """Name -> (depth below the head, takes weight decay) of every trained parameter of a classifier.

    Call this before the model is wrapped: under FSDP version 1 a parameter is a flat part of the weights, from which
    neither can be told.

    Raises:
        ValueError: if layer_decay is not in (0, 1], or below 1 for a model that is not an I-JEPA classifier.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}.")
    return {
        _plain_name(name): (
            _depth_below_head(model, name) if layer_decay < 1 else 0,
            _takes_weight_decay(name, parameter),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def layer_decay_groups(
    model: torch.nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
    places: dict[str, tuple[int, bool]] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of a classifier in groups whose learning rate falls from the head to the first layer, as
    in the fine-tuning of the paper's appendix A.

    With L layers, the head and the final layer norm take `learning_rate`, layer i (from 0) takes
    learning_rate x layer_decay^(L - i), the patch embedding learning_rate x layer_decay^(L + 1). Biases and other
    one-dimensional parameters take no weight decay.

    Args:
        model: `IJepaForImageClassification`, of this package or the stock one; any classifier if layer_decay is 1.
        learning_rate: of the head.
        weight_decay: of all parameters that take weight decay.
        layer_decay: factor of the learning rate from one layer to the one below it, in (0, 1].
        places: `parameter_places` of the model without its wrappers; needed if `model` is wrapped.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and a `name`, from the head down. Trainer logs the learning rate of
        the first group.

    Raises:
        ValueError: as `parameter_places`, or if the trained parameters are not those of `places`.
    """
    places = parameter_places(model, layer_decay) if places is None else places
    parameters = {_plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    strange = sorted(set(parameters) ^ set(places))
    if strange:
        raise ValueError(
            f"The wrapped model has other trained parameters than the model in it, for example {strange[0]!r}, so"
            " their learning rates and weight decay are unknown; FSDP version 1 needs use_orig_params."
        )
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        depth, decayed = places[name]
        groups.setdefault((depth, not decayed), []).append(parameter)
    return [
        {
            "params": members,
            "lr": learning_rate * layer_decay**depth,
            "weight_decay": 0.0 if undecayed else weight_decay,
            "name": f"depth_{depth}_{'undecayed' if undecayed else 'decayed'}",
        }
        for (depth, undecayed), members in sorted(groups.items())
    ]


def _depth_below_head(model: torch.nn.Module, name: str) -> int:
    """0 for the head and the final layer norm, 1 for the last of L layers, L + 1 for the patch embedding."""
    if name.startswith(("classifier.", "ijepa.layernorm.")):
        return 0
    layer = re.match(r"ijepa\.layers\.(\d+)\.", name)
    if layer is None and not name.startswith("ijepa.embeddings."):
        raise ValueError(
            f"layer_decay below 1 is for I-JEPA classifiers: {type(model).__name__} has a parameter {name!r},"
            " whose depth is not known; use layer_decay 1."
        )
    num_layers = cast(PreTrainedModel, model).config.num_hidden_layers
    return num_layers - int(layer[1]) if layer else num_layers + 1
