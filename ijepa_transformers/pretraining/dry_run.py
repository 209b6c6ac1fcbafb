# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Counts the bytes of a forward and a backward pass of the real model on fake tensors, which have no content.

What grows with the batch grows linearly, so two such dry runs are enough for all batch sizes.
"""

import json
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..configuration_ijepa import IJepaConfig
from ..modeling_ijepa import IJepaForPretraining, IJepaLayer
from .token_counts import TokenCounts


DRY_RUN_BATCHES = (16, 128)  # images


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active and still alive, from operation to operation.

    Args:
        weights: parameters and buffers of the model. Low-precision copies of them are counted as `cast_bytes`.
        others: more tensors that exist before and are not counted, such as gradients and the batch.
    """

    def __init__(self, weights: Iterable[torch.Tensor], others: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.weights = {_key(tensor) for tensor in weights}
        self.known = self.weights | {_key(tensor) for tensor in others}
        self.alive: dict[int, int] = {}  # key of a storage -> bytes
        self.casts: set[int] = set()
        self.saved: set[int] = set()
        self.bytes = self.peak = 0

    @property
    def cast_bytes(self) -> int:
        """Bytes of living low-precision copies of weights."""
        return sum(self.alive[key] for key in self.casts)

    @property
    def saved_bytes(self) -> int:
        """Bytes of living tensors that autograd has saved, without copies of weights."""
        return sum(self.alive[key] for key in self.saved - self.casts)

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While this context is entered, the tensors that autograd saves are noted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note_saved, lambda tensor: tensor)

    def _note_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        if _key(tensor) in self.alive:
            self.saved.add(_key(tensor))
        return tensor

    def _add(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self.known or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)
        self.casts.discard(key)
        self.saved.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        if function is torch.ops.aten._to_copy.default and _key(args[0]) in self.weights:
            self.casts.add(_key(result))
        return result


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class PassBytes:
    """Bytes of one forward and backward pass beside weights, gradients and batch.

    Args:
        saved: tensors that autograd saves, alive at the end of the forward pass.
        casts: low-precision copies of weights, alive at the end of the forward pass.
        forward_peak: the most that is alive at once in the forward pass.
        backward_peak: the most that is alive at once in the backward pass.
    """

    saved: int
    casts: int
    forward_peak: int
    backward_peak: int


def count_pass(model: IJepaForPretraining, tokens: TokenCounts, batch_size: int, precision: str) -> PassBytes:
    """Counts a pass of a training model whose gradients exist. Call it where the model was built, under one
    `FakeTensorMode`, to compute nothing."""
    batch = empty_batch(model.config, tokens, batch_size)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with StorageCounter([*model.parameters(), *model.buffers()], [*gradients, *batch]) as counter:
        # What is alive does not depend on which of the two low precisions is taken.
        with counter.saving(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "no"):
            output = model(*batch)
            saved, casts, forward_peak = counter.saved_bytes, counter.cast_bytes, counter.peak
        counter.peak = counter.bytes
        output.loss.backward()
    return PassBytes(saved, casts, forward_peak, counter.peak)


def empty_batch(config: IJepaConfig, tokens: TokenCounts, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Black images (B, channels, height, width), and indices of contexts and targets that all name the first patch."""
    context = torch.zeros(batch_size, tokens.num_contexts, tokens.context, dtype=torch.int64)
    target = torch.zeros(batch_size, *tokens.target_shape, dtype=torch.int64)
    return torch.zeros(batch_size, config.num_channels, *config.image_height_and_width), context, target


def build_training_model(config: IJepaConfig, attention: str, gradient_checkpointing: bool) -> IJepaForPretraining:
    """The model as `run_pretraining.py` trains it, with gradients as after a first pass."""
    model = IJepaForPretraining._from_config(config, attn_implementation=attention).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


@dataclass(frozen=True)
class Weights:
    """Numbers in the weights: of each trained tensor, of all parameters, of position tables, of the largest layer,
    and of what lies outside of layers."""

    trained: tuple[int, ...]
    parameters: int
    tables: int
    layer: int
    outside: int


def _weights_of(model: IJepaForPretraining) -> Weights:
    layers = [_numbers(layer.parameters()) for layer in model.modules() if isinstance(layer, IJepaLayer)]
    trained = tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = _numbers(model.parameters())
    return Weights(trained, whole, _numbers(model.buffers()), max(layers, default=0), whole - sum(layers))


def _numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@dataclass(frozen=True)
class DryRuns:
    """The weights of a model, and its passes with the batches of `DRY_RUN_BATCHES`."""

    weights: Weights
    passes: tuple[PassBytes, ...]

    def pass_of(self, batch_size: int) -> PassBytes:
        """A pass with any batch: a straight line through the two that were counted."""
        small, large = DRY_RUN_BATCHES
        share = (batch_size - small) / (large - small)
        first, second = (vars(counted).values() for counted in self.passes)
        return PassBytes(*(round(a + (b - a) * share) for a, b in zip(first, second, strict=True)))


def dry_runs(
    config: IJepaConfig, tokens: TokenCounts, precision: str, gradient_checkpointing: bool, attention: str
) -> DryRuns:
    """Counts two passes. The results are kept, so that the same settings are counted once.

    Args:
        config, tokens, precision, gradient_checkpointing, attention: as in `estimate_memory`.
    """
    # Flash and flex attention save what the fused attention of PyTorch saves, and not every machine has them.
    attention = attention if attention == "eager" else "sdpa"
    text = config.to_json_string(use_diff=False)  # a key for the cache, which a configuration is not
    return _counted_dry_runs(text, tokens, precision, gradient_checkpointing, attention)


@lru_cache(maxsize=16)
def _counted_dry_runs(
    config: str, tokens: TokenCounts, precision: str, checkpointing: bool, attention: str
) -> DryRuns:
    with FakeTensorMode():
        model = build_training_model(IJepaConfig.from_dict(json.loads(config)), attention, checkpointing)
        passes = (count_pass(model, tokens, batch_size, precision) for batch_size in DRY_RUN_BATCHES)
        return DryRuns(_weights_of(model), tuple(passes))
