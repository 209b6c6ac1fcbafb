# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Floating-point operations of a pretraining step, from its token counts: matrix products and attention only.

They are those of the plain recipe: every patch of the grid is embedded, the context goes through the whole predictor
once per target block, the target encoder reads every patch. A faster way to the same gradients does fewer, and is
still counted with these ("model FLOPs"), so that rates compare. A multiplication and an addition are two operations.
tests/benchmarks/test_flops.py holds the formula against torch's FlopCounterMode.
"""

import math
from dataclasses import dataclass

from ijepa_transformers import IJepaConfig
from ijepa_transformers.pretraining.token_counts import TokenCounts


@dataclass(frozen=True)
class StepFlops:
    """Operations per image: forward and backward of context encoder and predictor, forward of the target encoder."""

    context: int
    predictor: int
    target: int

    @property
    def total(self) -> int:
        return self.context + self.predictor + self.target


def linear_flops(num_tokens: int, inputs: int, outputs: int) -> int:
    return 2 * num_tokens * inputs * outputs


def layers_flops(num_layers: int, num_tokens: int, width: int, intermediate: int) -> int:
    """Forward of transformer layers: four projections, the two halves of the MLP, scores and their mix of values."""
    projections = 4 * linear_flops(num_tokens, width, width) + 2 * linear_flops(num_tokens, width, intermediate)
    attention = 2 * linear_flops(num_tokens, width, num_tokens)
    return num_layers * (projections + attention)


def encoder_flops(config: IJepaConfig, num_tokens: int) -> int:
    """Forward of the encoder's layers; without the patch embedding."""
    return layers_flops(config.num_hidden_layers, num_tokens, config.hidden_size, config.intermediate_size)


def embedding_flops(config: IJepaConfig) -> int:
    """Forward of the patch embedding of one whole image."""
    return linear_flops(
        config.num_patches, config.num_channels * math.prod(config.patch_height_and_width), config.hidden_size
    )


def predictor_flops(config: IJepaConfig, tokens: TokenCounts) -> int:
    """Forward of the predictor: the context is projected once and repeated for each target block."""
    width, outer = config.predictor_hidden_size, config.hidden_size
    pairs = tokens.num_contexts * tokens.num_targets
    layers = layers_flops(
        config.predictor_num_hidden_layers, tokens.context + tokens.target, width, config.predictor_intermediate_size
    )
    ends = linear_flops(tokens.num_contexts * tokens.context, outer, width)
    ends += linear_flops(pairs * tokens.target, width, outer)
    return pairs * layers + ends


def step_flops(config: IJepaConfig, tokens: TokenCounts) -> StepFlops:
    """Operations per image of a step with these token counts.

    A backward pass costs twice its forward pass: one product for the gradient of the weights, one for that of the
    input, which the images do not need.
    """
    context = tokens.num_contexts * (3 * encoder_flops(config, tokens.context) + 2 * embedding_flops(config))
    target = encoder_flops(config, config.num_patches) + embedding_flops(config)
    return StepFlops(context=context, predictor=3 * predictor_flops(config, tokens), target=target)
