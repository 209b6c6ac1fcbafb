"""The estimate of memory against counted bytes: saved tensors one by one, and peaks of whole steps on fake tensors."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from benchmarks.memory import build, counted_peak, random_batch
from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa_transformers.masking import MultiBlockMasking
from ijepa_transformers.pretraining.memory import (
    GIB,
    TokenCounts,
    estimate_memory,
    format_memory_estimate,
    largest_batch_size,
    optimizer_bytes,
    parameter_counts,
    sampled_tokens,
    saved_activation_bytes,
    trained_tensors,
    worst_case_tokens,
)


CONFIGS = {
    "deep": {"num_hidden_layers": 3, "predictor_num_hidden_layers": 2, "image_size": [64, 96], "patch_size": 16},
    "wide": {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 3, "qkv_bias": False},
    "no predictor": {"predictor_num_hidden_layers": 0, "num_channels": 1, "loss_type": "mse", "image_size": 32},
    "one predictor layer": {"image_size": [40, 48]},
}


def small_config(name):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    sizes |= {"image_size": 48, "patch_size": 8, "predictor_hidden_size": 48, "predictor_num_hidden_layers": 1}
    return IJepaConfig(**{**sizes, **CONFIGS[name]})


@pytest.fixture
def huge():
    return IJepaConfig(**IJEPA_SIZES["huge"], patch_size=14)


TOKENS = TokenCounts(context=90, target=50)


def autocast(precision):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


# Saved activations, counted


def counted_bytes(model, batch, precision):
    """Bytes of the storages that autograd saves: no parameters, no copies of them, nothing of the batch."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch)}
    saved, shapes = {}, {parameter.shape for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}  # a linear layer saves the transposed view

    def remember(tensor):
        is_cast_weight = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if tensor.untyped_storage().data_ptr() not in own and not is_cast_weight:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), autocast(precision):
        model(*batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_activations_are_those_that_autograd_saves(name, precision, attention, checkpointing, num_contexts):
    config, tokens = small_config(name), TokenCounts(10, 5, num_contexts, num_targets=3)
    model, batch = build(config, attention, checkpointing), random_batch(config, tokens, batch_size=2)
    counted = counted_bytes(model, batch, precision)
    estimated = saved_activation_bytes(config, tokens, 2, precision, checkpointing, attention)
    assert estimated == pytest.approx(counted, rel=0.001)


# The peak of whole steps, counted on tensors without content


def assert_near_the_peak(config, tokens, batch_size, precision, attention, checkpointing):
    counted = counted_peak(config, tokens, batch_size, precision, attention, checkpointing)
    estimate = estimate_memory(
        config,
        tokens,
        batch_size,
        precision=precision,
        attention=attention,
        gradient_checkpointing=checkpointing,
    )
    assert estimate.allocated == pytest.approx(counted, rel=0.05)
    assert estimate.total > counted


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_estimate_is_near_the_peak_of_whole_steps(precision, attention, checkpointing):
    """Activations outweigh everything else here, and the predictor outweighs the encoder."""
    sizes = {**IJEPA_SIZES["tiny"], "num_hidden_layers": 3, "predictor_num_hidden_layers": 2}
    config = IJepaConfig(**sizes)
    assert_near_the_peak(config, TokenCounts(120, 35), 32, precision, attention, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_near_the_peak_with_several_contexts(checkpointing):
    sizes = {**IJEPA_SIZES["base"], "num_hidden_layers": 2, "predictor_num_hidden_layers": 3}
    config = IJepaConfig(**sizes)
    assert_near_the_peak(config, TokenCounts(60, 35, num_contexts=2), 16, "bf16", "sdpa", checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_near_the_peak_where_weights_outweigh_activations(checkpointing):
    """Layers of the published ViT-H; all 32 of them: benchmarks/memory.py --count."""
    sizes = {**IJEPA_SIZES["huge"], "num_hidden_layers": 4, "predictor_num_hidden_layers": 2}
    assert_near_the_peak(IJepaConfig(**sizes, patch_size=14), TOKENS, 4, "bf16", "sdpa", checkpointing)


# Parameters and optimizer states


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_tensor_by_tensor(name):
    config = small_config(name)
    model = IJepaForPretraining(config)
    assert trained_tensors(config) == Counter(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameter_counts(config) == {
        "encoder": sum(parameter.numel() for parameter in model.ijepa.parameters()),
        "predictor": sum(parameter.numel() for parameter in model.predictor.parameters()),
        "position_tables": sum(table.numel() for table in model.buffers()),
    }


def test_eight_bit_states_are_those_that_bitsandbytes_makes():
    optimizers = pytest.importorskip("bitsandbytes").optim
    sizes = [100, 4095, 4096, 5000, 70_000]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = optimizers.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    made = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")  # two small tables for all tensors
    )
    assert optimizer_bytes(Counter(sizes), "adamw_8bit") == made
    assert optimizer_bytes(Counter(sizes), "adamw") == 8 * sum(sizes)


# Tokens


@pytest.mark.parametrize("settings", [{}, {"context_scale": (0.3, 0.9)}, {"num_contexts": 2, "num_targets": 2}])
@pytest.mark.parametrize("mode", ["unbiased", "meta"])
@pytest.mark.parametrize("grid_size", [(14, 14), (16, 16), (11, 17)])
def test_no_batch_holds_more_tokens_than_the_worst_case(grid_size, mode, settings):
    masking = MultiBlockMasking(grid_size, mode=mode, **settings)
    worst = worst_case_tokens(masking)
    for step in range(2000):
        contexts, targets = masking.sample(1, seed=0, step=step)  # one image: no other context cuts it
        assert contexts.shape[1:2] == (worst.num_contexts,) and contexts.shape[2] <= worst.context
        assert targets.shape[1:2] == (worst.num_targets,) and targets.shape[2] <= worst.target


def test_no_batch_holds_more_tokens_than_the_worst_case_where_targets_are_forgiven():
    masking = MultiBlockMasking((8, 8), mode="meta", context_scale=(0.3, 0.4), target_scale=(0.3, 0.35))
    worst = worst_case_tokens(masking)
    longest = max(masking.sample(1, 0, step)[0].shape[2] for step in range(200))
    smallest_target = 4 * 5
    assert worst.context >= longest > 5 * 5 - smallest_target  # more than any context that meets a target


@pytest.mark.parametrize("mode", ["unbiased", "meta"])
def test_the_worst_case_is_met_where_two_targets_are_easily_stacked(mode):
    masking = MultiBlockMasking((14, 14), mode=mode, num_targets=1, context_scale=(1.0, 1.0))
    assert sampled_tokens(masking, 1, num_batches=500) == worst_case_tokens(masking)


def test_worst_case_by_hand():
    masking = MultiBlockMasking((10, 10), target_scale=(0.16, 0.16), target_aspect_ratio=(1.0, 1.0))
    assert worst_case_tokens(masking) == TokenCounts(100 - 16, 16, 1, 4)
    masking = MultiBlockMasking((10, 10), target_scale=(0.16, 0.16), target_aspect_ratio=(1.0, 1.0), mode="meta")
    assert worst_case_tokens(masking) == TokenCounts(81 - 16, 16, 1, 4)
    masking = MultiBlockMasking((10, 10), num_context_tokens=30, num_target_tokens=12)
    assert worst_case_tokens(masking) == TokenCounts(30, 12, 1, 4)
    masking = MultiBlockMasking((10, 10), allow_overlap=True)
    assert worst_case_tokens(masking).context == 100


# Laws of the estimate


def test_parts_add_up(huge):
    estimate = estimate_memory(huge, TOKENS, 8, mode="ddp", num_processes=2)
    assert estimate.total == sum(vars(estimate).values()) == estimate.allocated + estimate.margin
    assert all(part > 0 for part in vars(estimate).values())


def test_checkpointing_lowers_activations_and_nothing_that_is_kept(huge):
    plain, saving = (estimate_memory(huge, TOKENS, 64, gradient_checkpointing=value) for value in (False, True))
    assert saving.activations < 0.2 * plain.activations and saving.total < plain.total
    for part in ("parameters", "gradients", "optimizer", "autocast", "batch"):
        assert getattr(saving, part) == getattr(plain, part)


def test_sharding_divides_what_each_mode_promises(huge):
    whole = estimate_memory(huge, TOKENS, 8, mode="ddp", num_processes=8)
    tables = 4 * parameter_counts(huge)["position_tables"]
    copy = whole.gradients  # DeepSpeed trains a float32 copy of the weights
    for mode, divided in (("fsdp2", "pgo"), ("zero1", "o"), ("zero2", "go"), ("zero3", "pgo")):
        part = estimate_memory(huge, TOKENS, 8, mode=mode, num_processes=8)
        states = whole.optimizer + copy * mode.startswith("zero")
        parameters = whole.parameters - tables
        assert part.parameters - tables == pytest.approx(parameters / (8 if "p" in divided else 1), abs=8)
        assert part.gradients == pytest.approx(whole.gradients / (8 if "g" in divided else 1), abs=8)
        assert part.optimizer == pytest.approx(states / (8 if "o" in divided else 1), abs=8)
        assert part.activations == whole.activations


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_part_grows_with_the_batch_or_stays(huge, precision, checkpointing):
    sizes = [1, 2, 3, 8, 64, 65]
    estimates = [
        estimate_memory(huge, TOKENS, size, precision=precision, gradient_checkpointing=checkpointing)
        for size in sizes
    ]
    for smaller, larger in pairwise(estimates):
        assert larger.total > smaller.total
        assert all(getattr(larger, part) >= getattr(smaller, part) for part in vars(larger))


def test_low_precision_saves_activations_and_costs_copies_of_weights(huge):
    full, low = (estimate_memory(huge, TOKENS, 8, precision=precision) for precision in ("no", "bf16"))
    assert low.activations < 0.7 * full.activations
    assert full.autocast == 0 and low.autocast == low.gradients / 2


def test_eight_bit_states_take_about_a_quarter(huge):
    full, low = (estimate_memory(huge, TOKENS, 8, optimizer=name) for name in ("adamw", "adamw_8bit"))
    assert 0.25 < low.optimizer / full.optimizer < 0.26


def test_the_largest_batch_fits_and_the_next_does_not(huge):
    device = 80 * GIB
    size = largest_batch_size(device, huge, TOKENS)
    assert estimate_memory(huge, TOKENS, size).total <= device < estimate_memory(huge, TOKENS, size + 1).total
    assert largest_batch_size(4 * GIB, huge, TOKENS) == 0
    assert largest_batch_size(device, huge, TOKENS, limit=2) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "precision.*fp8"),
        ({"optimizer": "sgd"}, "optimizer.*sgd"),
        ({"mode": "fsdp"}, "mode.*'fsdp'"),
        ({"num_processes": 2}, "2 processes.*'single'"),
        ({"mode": "ddp", "num_processes": 0}, "0 processes"),
        ({"per_device_batch_size": 0}, "per_device_batch_size.*0"),
        ({"mode": "fsdp2", "optimizer": "adamw_8bit"}, "adamw_8bit.*FSDP2"),
    ],
)
def test_settings_that_do_not_exist_are_refused_with_their_value(huge, settings, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(huge, TOKENS, **{"per_device_batch_size": 8, **settings})


def test_the_printed_table_shows_every_part_and_advises_only_when_it_does_not_fit(huge):
    estimate = estimate_memory(huge, TOKENS, 8)
    fitting = format_memory_estimate(estimate, device_bytes=80 * GIB)
    assert f"{estimate.total / GIB:.2f} GiB" in fitting and "does not fit" not in fitting
    assert all(f"{part / GIB:.2f} GiB" in fitting for part in vars(estimate).values())
    too_large = format_memory_estimate(estimate, device_bytes=12 * GIB, largest=3)
    for word in ("does not fit", "gradient_checkpointing", "adamw_8bit", "FSDP2", "per_device_batch_size 3 fits"):
        assert word in too_large
    assert "not even one image fits" in format_memory_estimate(estimate, device_bytes=GIB, largest=0)
