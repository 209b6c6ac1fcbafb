"""The estimate of memory against counted and recorded bytes, and the batch size that is chosen by it."""

import json
import weakref
from itertools import pairwise

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa_transformers.masking import MultiBlockMasking, build_masking
from ijepa_transformers.modeling_ijepa import IJepaLayer
from ijepa_transformers.optimization import build_optimizer, parameter_groups
from ijepa_transformers.pretraining import batch_size as batch_size_module
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining.arguments import parse_pretraining_arguments
from ijepa_transformers.pretraining.batch_size import fitting_batch_size, memory_estimate
from ijepa_transformers.pretraining.dry_run import (
    StorageCounter,
    build_training_model,
    count_pass,
    dry_runs,
    empty_batch,
)
from ijepa_transformers.pretraining.memory import (
    GIB,
    estimate_memory,
    format_memory_estimate,
    largest_batch_size,
    optimizer_bytes,
)
from ijepa_transformers.pretraining.token_counts import TokenCounts, sampled_tokens, worst_case_tokens
from tests import forked
from tests.runs import cut_back, environment_of, launched_environment, pretrain, pretraining_argv


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
SMALL |= {"image_size": 48, "patch_size": 8, "predictor_hidden_size": 48, "predictor_num_hidden_layers": 1}
CONFIGS = {
    "deep": {"num_hidden_layers": 3, "predictor_num_hidden_layers": 2, "image_size": [64, 96], "patch_size": 16},
    "wide": {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 3, "qkv_bias": False},
    "grey": {
        "num_channels": 1,
        "loss_type": "mse",
        "image_size": 32,
        "target_normalization": "batch",
        "target_image_mean": 0.5,
    },
}
TOKENS = TokenCounts(context=90, target=50)

# Every pair of values occurs: configuration, precision, attention, checkpointing, contexts.
COMBINATIONS = [
    ("deep", "no", "sdpa", False, 1),
    ("deep", "bf16", "eager", True, 2),
    ("wide", "no", "eager", True, 1),
    ("wide", "bf16", "sdpa", False, 2),
    ("grey", "no", "sdpa", True, 2),
    ("grey", "bf16", "eager", False, 1),
]


def small_config(name):
    return IJepaConfig(**{**SMALL, **CONFIGS[name]})


@pytest.fixture
def wide_layers():
    """Layers of the published ViT-H, but few, so that a dry run takes half a second."""
    sizes = {**IJEPA_SIZES["huge"], "num_hidden_layers": 4, "predictor_num_hidden_layers": 2}
    return IJepaConfig(**sizes, patch_size=14)


# Against real steps, on real tensors


class Saved:
    """What autograd keeps in place of a tensor, so that the test sees for how long."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(model, batch, precision):
    """Bytes that autograd saves in a real forward pass: no parameters, no copies of them, nothing of the batch."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch)}
    shapes = {parameter.shape for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}  # a linear layer saves the transposed view
    alive = weakref.WeakSet()

    def keep(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor), autocast(precision):
        output = model(*batch)
        tensors = [saved.tensor for saved in alive]
    del output
    tensors = [tensor for tensor in tensors if not (tensor.dtype == torch.bfloat16 and tensor.shape in shapes)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
    return sum(size for address, size in storages.items() if address not in own)


def autocast(precision, device="cpu"):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


@pytest.mark.parametrize("own_targets", [False, True])
def test_activations_and_batch_of_contexts_with_targets_of_their_own(own_targets):
    config, tokens = small_config("deep"), TokenCounts(10, 5, 3, num_targets=2, own_targets=own_targets)
    batch = empty_batch(config, tokens, 2)
    estimate = estimate_memory(config, tokens, 2, precision="no", attention="sdpa")
    saved = saved_bytes(build_training_model(config, "sdpa", False), batch, "no")
    assert estimate.activations == pytest.approx(saved, rel=0.001)
    assert estimate.batch == sum(each.nbytes for each in batch) + batch[0].numel()  # images also come as bytes


@pytest.mark.parametrize(("name", "precision", "attention", "checkpointing", "num_contexts"), COMBINATIONS)
def test_activations_are_those_that_autograd_saves(name, precision, attention, checkpointing, num_contexts):
    config, tokens = small_config(name), TokenCounts(10, 5, num_contexts, num_targets=3)
    model = build_training_model(config, attention, checkpointing)
    settings = {"precision": precision, "attention": attention, "gradient_checkpointing": checkpointing}
    estimate = estimate_memory(config, tokens, 2, **settings)
    saved = saved_bytes(model, empty_batch(config, tokens, 2), precision)
    assert estimate.activations == pytest.approx(saved, rel=0.001)


def train_two_steps(model, optimizer, batch, precision):
    """Two optimizer steps of two passes each. The second step has gradients, states and activations at once."""
    for index in range(4):
        with autocast(precision, batch[0].device.type):
            output = model(*batch)
        output.loss.backward()
        del output  # as in the training loop
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


def peak_of_two_steps(config, tokens, batch_size, precision, attention, checkpointing):
    """Bytes alive at most in two steps with AdamW, weights and batch included."""
    model = build_training_model(config, attention, checkpointing)
    model.zero_grad()
    optimizer = torch.optim.AdamW(parameter_groups(model), foreach=False)  # tensor by tensor, as fused AdamW works
    batch = empty_batch(config, tokens, batch_size)
    before = [*model.parameters(), *model.buffers(), *batch]
    with StorageCounter(before) as counter:
        train_two_steps(model, optimizer, batch, precision)
    return counter.peak + sum(tensor.nbytes for tensor in before)


def assert_near_the_peak(config, tokens, batch_size, precision, attention, checkpointing):
    counted = peak_of_two_steps(config, tokens, batch_size, precision, attention, checkpointing)
    settings = {"precision": precision, "attention": attention, "gradient_checkpointing": checkpointing}
    estimate = estimate_memory(config, tokens, batch_size, **settings)
    assert estimate.allocated == pytest.approx(counted, rel=0.03)
    assert estimate.total > counted


@pytest.mark.parametrize(("name", "precision", "attention", "checkpointing", "num_contexts"), COMBINATIONS)
def test_the_estimate_is_near_the_peak_of_real_steps(name, precision, attention, checkpointing, num_contexts):
    tokens = TokenCounts(10, 5, num_contexts, num_targets=3)
    assert_near_the_peak(small_config(name), tokens, 24, precision, attention, checkpointing)


@pytest.mark.parametrize(("attention", "checkpointing"), [("sdpa", False), ("eager", True)])
def test_the_estimate_is_near_the_peak_where_weights_outweigh_activations(wide_layers, attention, checkpointing):
    with FakeTensorMode():
        assert_near_the_peak(wide_layers, TOKENS, 4, "bf16", attention, checkpointing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with what PyTorch allocates on a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_estimate_is_near_what_a_gpu_allocates(precision, checkpointing):
    config, batch_size = IJepaConfig(**IJEPA_SIZES["small"]), 32
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = build_training_model(config, "sdpa", checkpointing).cuda()
    model.zero_grad()
    rates = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-8}
    optimizer = build_optimizer(parameter_groups(model), name="adamw", device_type="cuda", **rates)
    train_two_steps(model, optimizer, [part.cuda() for part in empty_batch(config, TOKENS, batch_size)], precision)
    allocated = torch.cuda.max_memory_allocated() - before
    estimate = estimate_memory(config, TOKENS, batch_size, precision=precision, gradient_checkpointing=checkpointing)
    assert estimate.allocated == pytest.approx(allocated, rel=0.1)
    assert estimate.total > allocated


# Linear in the batch


@pytest.mark.parametrize(
    ("precision", "attention", "checkpointing"),
    [
        ("no", "sdpa", False),
        ("bf16", "sdpa", True),
        ("bf16", "eager", True),
    ],
)
def test_passes_with_other_batches_lie_on_the_line(wide_layers, precision, attention, checkpointing):
    line = dry_runs(wide_layers, TOKENS, precision, checkpointing, attention)
    with FakeTensorMode():
        model = build_training_model(wide_layers, attention, checkpointing)
        for size in (2, 40, 600):
            counted, expected = count_pass(model, TOKENS, size, precision), line.pass_of(size)
            assert (counted.saved, counted.casts) == (expected.saved, expected.casts)
            peaks = [max(each.forward_peak, each.backward_peak) for each in (counted, expected)]
            # With very few images, gradients of single weights show; beside all weights they are little.
            weights = 4 * line.weights.parameters
            assert peaks[0] + weights == pytest.approx(peaks[1] + weights, rel=0.02)


@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("no", False), ("bf16", False), ("no", True), ("bf16", True)]
)
def test_every_part_grows_with_the_batch_or_stays(wide_layers, precision, checkpointing):
    settings = {"precision": precision, "gradient_checkpointing": checkpointing}
    estimates = [estimate_memory(wide_layers, TOKENS, size, **settings) for size in (1, 2, 3, 8, 64, 65)]
    for smaller, larger in pairwise(estimates):
        assert larger.total > smaller.total
        assert all(getattr(larger, part) >= getattr(smaller, part) for part in vars(larger))


# Against the account of every layer that this estimate replaced (benchmarks/results/memory_estimate_cpu_2026-11-28.md)


@pytest.mark.parametrize(
    ("size", "batch_size", "settings", "gib"),
    [
        ("small", 128, {"precision": "no"}, 19.43),
        ("small", 128, {"gradient_checkpointing": True}, 4.60),
        ("large", 128, {"precision": "no", "mode": "fsdp2", "num_processes": 8}, 56.26),
    ],
)
def test_published_sizes_need_what_the_earlier_account_said(size, batch_size, settings, gib):
    config = IJepaConfig(**IJEPA_SIZES[size])
    estimate = estimate_memory(config, TokenCounts(139, 40), batch_size, **settings)
    assert estimate.total / GIB == pytest.approx(gib, rel=0.005)


# Weights and optimizer states


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_gradients_are_those_of_the_model(name):
    config = small_config(name)
    model = IJepaForPretraining(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    estimate = estimate_memory(config, TokenCounts(10, 5), 2)
    assert estimate.parameters == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert estimate.gradients == sum(parameter.nbytes for parameter in trained)
    assert estimate.optimizer == 2 * estimate.gradients


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
    assert optimizer_bytes(sizes, "adamw_8bit") == made
    assert optimizer_bytes(sizes, "adamw") == 8 * sum(sizes)


# Tokens


@pytest.mark.parametrize("mode", ["unbiased", "meta"])
@pytest.mark.parametrize(
    ("grid_size", "settings"),
    [((14, 14), {}), ((16, 16), {"context_scale": (0.3, 0.9)}), ((11, 17), {"num_contexts": 2, "num_targets": 2})],
)
def test_no_batch_holds_more_tokens_than_the_worst_case(grid_size, mode, settings):
    masking = MultiBlockMasking(grid_size, mode=mode, **settings)
    worst = worst_case_tokens(masking)
    for step in range(500):
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


@pytest.mark.parametrize("mode", ["random", "inverse_block"])
@pytest.mark.parametrize("num_contexts", [1, 3])
def test_masks_of_fixed_lengths_have_no_worst_case(mode, num_contexts):
    masking = build_masking((10, 10), mode, visible_share=0.3, num_contexts=num_contexts)
    tokens = worst_case_tokens(masking)
    assert tokens == TokenCounts(30, 70, num_contexts, 1, own_targets=num_contexts > 1)
    assert tokens == sampled_tokens(masking, 4, num_batches=20)
    config = IJepaConfig(**{**SMALL, "image_size": 40, "patch_size": 4})
    masks = masking.sample(2, seed=0)
    assert [each.shape for each in empty_batch(config, tokens, 2)[1:]] == [each.shape for each in masks]


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


def test_parts_add_up(wide_layers):
    estimate = estimate_memory(wide_layers, TOKENS, 8, mode="zero2", num_processes=2)
    assert estimate.total == sum(vars(estimate).values()) == estimate.allocated + estimate.margin
    assert all(part > 0 for part in vars(estimate).values())


def test_checkpointing_lowers_activations_and_nothing_that_is_kept(wide_layers):
    plain, saving = (estimate_memory(wide_layers, TOKENS, 64, gradient_checkpointing=value) for value in (False, True))
    assert saving.activations < 0.25 * plain.activations and saving.total < plain.total
    for part in ("parameters", "gradients", "optimizer", "autocast", "batch"):
        assert getattr(saving, part) == getattr(plain, part)


def test_sharding_divides_what_each_mode_promises(wide_layers):
    whole = estimate_memory(wide_layers, TOKENS, 8, mode="ddp", num_processes=8)
    tables = 4 * wide_layers.num_patches * (2 * wide_layers.hidden_size + wide_layers.predictor_hidden_size)
    copy = whole.gradients  # DeepSpeed trains a float32 copy of the weights
    for mode, divided in (("fsdp2", "pgo"), ("zero1", "o"), ("zero2", "go"), ("zero3", "pgo")):
        part = estimate_memory(wide_layers, TOKENS, 8, mode=mode, num_processes=8)
        states = whole.optimizer + copy * mode.startswith("zero")
        parameters = whole.parameters - tables
        assert part.parameters - tables == pytest.approx(parameters / (8 if "p" in divided else 1), abs=8)
        assert part.gradients == pytest.approx(whole.gradients / (8 if "g" in divided else 1), abs=8)
        assert part.optimizer == pytest.approx(states / (8 if "o" in divided else 1), abs=8)
        assert part.activations == whole.activations


def test_ddp_needs_what_one_process_needs_because_its_buckets_are_the_gradients(wide_layers):
    alone = estimate_memory(wide_layers, TOKENS, 8)
    assert estimate_memory(wide_layers, TOKENS, 8, mode="ddp", num_processes=8) == alone


def test_the_first_two_steps_of_ddp_count_where_they_need_most(wide_layers):
    """The first has two copies of the gradients and no states; before the second there are two, and no pass."""
    settings = {"mode": "ddp", "num_processes": 8, "gradient_checkpointing": True}
    for batch_size, optimizer in ((1, "adamw"), (64, "adamw_8bit"), (1, "adamw_8bit")):
        need = estimate_memory(wide_layers, TOKENS, batch_size, optimizer=optimizer, **settings)
        in_a_pass = need.activations + need.autocast + need.working
        first = need.parameters + 2 * need.gradients + in_a_pass + need.batch
        second = need.parameters + 2 * need.gradients + need.optimizer + need.batch
        assert need.communication > 0 and need.allocated == max(first, second)


GRADIENTS = """
import json, os, sys
from ijepa_transformers.pretraining import command, loop

directory, *argv = sys.argv[1:]
seen, runs = [], []
step, add = loop.optimizer_step, loop.Step.add

def watched_step(run, batches, number):
    runs[:] = [run]
    return step(run, batches, number)

def watched_add(self, *values):  # called after the backward pass
    add(self, *values)
    gradients = [each.grad for each in runs[0].model.parameters() if each.requires_grad]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in gradients}
    seen.append({"storages": sorted(storages), "bytes": sum(storages.values()), "own": sum(map(nbytes, gradients))})

def nbytes(tensor):
    return tensor.nbytes

loop.optimizer_step, loop.Step.add = watched_step, watched_add
command.main(argv)
with open(f"{directory}/rank_{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
"""


def test_under_ddp_gradients_of_all_passes_accumulate_where_they_are_averaged(tmp_path):
    """DDP orders its buckets when the second step begins. Then there is one copy of the gradients, in one place."""
    argv = ["-c", GRADIENTS, tmp_path, *pretraining_argv(tmp_path / "run", per_device_batch_size=2)]
    done = forked.fork_ranks(2, argv, environment_of("ddp") | launched_environment("ddp"))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        passes = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert len(passes) == 12  # two in each of six steps
        assert all(each["storages"] == passes[2]["storages"] for each in passes[3:])
        assert passes[2]["bytes"] == passes[2]["own"]


def test_fsdp2_gathers_in_bfloat16_so_autocast_makes_no_copies(wide_layers):
    settings = {"mode": "fsdp2", "num_processes": 8}
    low, full, half = (
        estimate_memory(wide_layers, TOKENS, 8, precision=name, **settings) for name in ("bf16", "no", "fp16")
    )
    assert low.autocast == full.autocast == 0 < half.autocast
    sizes = [sum(each.numel() for each in layer.parameters()) for layer in layers_of(wide_layers)]
    outside = full.communication - 16 * max(sizes)  # 4 bytes: two layers, the gradients of one and their bucket
    assert outside > 0
    assert low.communication == 10 * max(sizes) + outside // 2  # 2 bytes, and 4 of the bucket, which is a sum
    assert half.communication == full.communication


def layers_of(config):
    with FakeTensorMode():
        return [layer for layer in IJepaForPretraining(config).modules() if isinstance(layer, IJepaLayer)]


def test_low_precision_saves_activations_and_costs_copies_of_weights(wide_layers):
    full, low = (estimate_memory(wide_layers, TOKENS, 8, precision=precision) for precision in ("no", "bf16"))
    assert low.activations < 0.7 * full.activations
    assert full.autocast == 0
    assert 0.48 * low.gradients < low.autocast <= low.gradients / 2  # norms and the mask token stay float32


def test_eight_bit_states_take_about_a_quarter(wide_layers):
    full, low = (estimate_memory(wide_layers, TOKENS, 8, optimizer=name) for name in ("adamw", "adamw_8bit"))
    assert 0.25 < low.optimizer / full.optimizer < 0.26


def test_the_largest_batch_fits_and_the_next_does_not(wide_layers):
    device = 20 * GIB
    size = largest_batch_size(device, wide_layers, TOKENS)
    totals = [estimate_memory(wide_layers, TOKENS, number).total for number in (size, size + 1)]
    assert totals[0] <= device < totals[1]
    assert largest_batch_size(GIB, wide_layers, TOKENS) == 0
    assert largest_batch_size(device, wide_layers, TOKENS, limit=2) == 2


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
def test_settings_that_do_not_exist_are_refused_with_their_value(wide_layers, settings, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(wide_layers, TOKENS, **{"per_device_batch_size": 8, **settings})


def test_the_printed_table_shows_every_part_and_advises_only_when_it_does_not_fit(wide_layers):
    estimate = estimate_memory(wide_layers, TOKENS, 8)
    fitting = format_memory_estimate(estimate, device_bytes=80 * GIB)
    assert f"{estimate.total / GIB:.2f} GiB" in fitting and "does not fit" not in fitting
    assert all(f"{part / GIB:.2f} GiB" in fitting for part in vars(estimate).values())
    too_large = format_memory_estimate(estimate, device_bytes=2 * GIB, largest=3)
    for word in ("does not fit", "gradient_checkpointing", "adamw_8bit", "FSDP2", "per_device_batch_size 3 fits"):
        assert word in too_large
    assert "not even one image fits" in format_memory_estimate(estimate, device_bytes=GIB, largest=0)


# per_device_batch_size auto


def tiny_arguments(**changes):
    return parse_pretraining_arguments(pretraining_argv("run", **{"batch_size": 96, **changes}))


def total_of(arguments, size, num_processes=1):
    config = IJepaConfig(**arguments.model_fields())
    tokens = worst_case_tokens(build_masking(config.grid_size, **arguments.mask_fields()))
    mode = "ddp" if num_processes > 1 else "single"
    return estimate_memory(config, tokens, size, precision="no", mode=mode, num_processes=num_processes).total


@pytest.mark.parametrize(("num_processes", "sizes"), [(1, [1, 2, 6, 8, 48, 96]), (3, [1, 2, 4, 32])])
def test_auto_is_the_largest_divisor_that_fits(num_processes, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    arguments = tiny_arguments()
    share = arguments.batch_size // num_processes
    for size in sizes:
        larger = [divisor for divisor in range(size + 1, share + 1) if share % divisor == 0]
        most = total_of(arguments, larger[0], num_processes) - 1 if larger else 80 * GIB
        for device_bytes in (total_of(arguments, size, num_processes), most):
            assert fitting_batch_size(arguments, device_bytes, num_processes) == size


def test_auto_needs_room_for_one_image_and_a_batch_that_can_be_divided(monkeypatch):
    arguments = tiny_arguments()
    with pytest.raises(ValueError, match=r"not even one image fits\. It needs 1\.0 GiB, and 0\.5 GiB are free"):
        fitting_batch_size(arguments, GIB // 2, 1)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="batch_size 96 is not a multiple of 5 processes"):
        fitting_batch_size(arguments, GIB, 5)


def test_auto_without_a_gpu_is_one_sentence_and_nothing_written(tmp_path, fresh_accelerate, capsys):
    for changes in ({}, {"print_memory_estimate": "true"}):
        with pytest.raises(SystemExit) as stop:
            pretraining_command.main(pretraining_argv(tmp_path / "run", per_device_batch_size="auto", **changes))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "per_device_batch_size auto needs a GPU" in error
        assert len(error.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def recorded(output_dir):
    (state,) = output_dir.glob("checkpoints/step-*6/run_state.json")
    recipe = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    return json.loads(state.read_text())["arguments"]["per_device_batch_size"], recipe["per_device_batch_size"]


def test_a_run_with_auto_records_the_number_and_resumes_with_it(tmp_path, fresh_accelerate, monkeypatch, capsys):
    arguments = tiny_arguments(batch_size=8)
    monkeypatch.setattr(batch_size_module, "free_bytes", lambda device: total_of(arguments, 4))
    pretrain(tmp_path / "run", per_device_batch_size="auto")
    printed = capsys.readouterr().out
    assert "per_device_batch_size auto: 4" in printed and "8 images = 4 per pass x 1 process x 2" in printed
    assert recorded(tmp_path / "run") == (4, 4)
    monkeypatch.setattr(batch_size_module, "free_bytes", lambda device: None)  # what is recorded needs no GPU
    pretrain(tmp_path / "run", per_device_batch_size="auto", resume="true")
    assert "is finished: all 6 steps are done." in capsys.readouterr().out
    cut = cut_back(tmp_path, tmp_path / "cut") / "run"
    pretrain(cut, per_device_batch_size="auto", resume="true")
    assert "per_device_batch_size auto: 4, as recorded" in capsys.readouterr().out


TWO_DEVICES = """
import os, sys
from ijepa_transformers.pretraining import batch_size, command
batch_size.free_bytes = lambda device: [{first}, {second}][int(os.environ["RANK"])]
command.main(sys.argv[1:])
"""


def test_all_processes_take_the_number_that_fits_the_smallest_device(tmp_path):
    arguments = tiny_arguments(batch_size=8)
    code = TWO_DEVICES.format(first=80 * GIB, second=total_of(arguments, 2, num_processes=2))
    argv = ["-c", code, *pretraining_argv(tmp_path / "run", per_device_batch_size="auto")]
    done = forked.fork_ranks(2, argv, environment_of("ddp") | launched_environment("ddp"))
    assert done.returncode == 0, done.stderr
    assert "8 images = 2 per pass x 2 processes x 2" in done.stdout
    assert recorded(tmp_path / "run") == (2, 2)


def test_the_printed_estimate_is_that_of_the_number_behind_auto(monkeypatch):
    class Device:
        total_memory = total_of(tiny_arguments(), 6)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    text = memory_estimate(tiny_arguments(per_device_batch_size="auto"))
    assert "per_device_batch_size 6, at most" in text and "does not fit" not in text
