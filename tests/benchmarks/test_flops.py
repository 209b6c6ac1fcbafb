# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The formula of benchmarks/speed/flops.py against operations counted while they run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.flops import step_flops
from benchmarks.speed.peers import Batch, Ours, Reference
from ijepa_transformers import IJEPA_SIZES, IJepaConfig
from ijepa_transformers.pretraining.token_counts import TokenCounts


CPU = torch.device("cpu")


def small(**changes) -> IJepaConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    predictor = {"predictor_hidden_size": 32, "predictor_num_hidden_layers": 2, "predictor_intermediate_size": 80}
    return IJepaConfig(**{**sizes, **predictor, "image_size": 64, "patch_size": 8, **changes})


def counted_flops(config: IJepaConfig, tokens: TokenCounts, batch_size: int) -> float:
    """Per image, of the whole reference step."""
    reference = Reference(config, CPU, "fp32", Ours(config, CPU, "fp32"), "highest")
    pixel_values = torch.randn(batch_size, config.num_channels, *config.image_height_and_width)
    contexts, targets = (
        torch.randint(config.num_patches, (batch_size, masks, count))
        for masks, count in ((tokens.num_contexts, tokens.context), (tokens.num_targets, tokens.target))
    )
    with FlopCounterMode(display=False) as counter:
        reference.step(Batch(pixel_values, contexts, targets))
    return counter.get_total_flops() / batch_size


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (small(), TokenCounts(context=20, target=9)),
        (small(image_size=(48, 80), num_channels=1), TokenCounts(context=13, target=5, num_targets=2)),
        (small(hidden_size=32, predictor_hidden_size=64), TokenCounts(context=40, target=12, num_targets=1)),
    ],
    ids=["square", "wide, grey, two targets", "wide predictor, one target"],
)
def test_formula_equals_the_count_of_the_plain_step(config, tokens):
    assert counted_flops(config, tokens, batch_size=2) == pytest.approx(step_flops(config, tokens).total, rel=0.01)


@pytest.mark.parametrize(
    ("size", "patch_size", "tokens", "gflop"),
    [
        ("base", 16, TokenCounts(context=50, target=34), 83.8),
        ("large", 16, TokenCounts(context=50, target=34), 259.7),
        ("huge", 14, TokenCounts(context=69, target=44), 656.2),
    ],
)
def test_formula_gives_the_counted_cost_of_published_sizes(size, patch_size, tokens, gflop):
    """GFLOP per image, counted over many batches of 128 with varying masks; here at their mean token counts."""
    config = IJepaConfig(**IJEPA_SIZES[size], patch_size=patch_size)
    assert step_flops(config, tokens).total / 1e9 == pytest.approx(gflop, rel=0.02)
