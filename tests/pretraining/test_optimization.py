"""Schedules depend on the step alone; groups hold every trained parameter once; optimizers read the groups."""

import math
import sys

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.ijepa import modeling_ijepa as stock

from ijepa_transformers import IJepaForImageClassification
from ijepa_transformers.optimization import (
    Schedules,
    build_optimizer,
    half_life_of_momentum,
    layer_decay_groups,
    momentum_of_half_life,
    parameter_groups,
    parameter_places,
)


def test_learning_rate_rises_to_the_peak_then_falls_to_its_final_value():
    schedules = Schedules(total_steps=100, warmup_steps=10)
    rates = [schedules.learning_rate(step) for step in range(100)]
    assert rates[9] == max(rates) == schedules.peak_learning_rate
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[0] > schedules.start_learning_rate
    assert rates[-1] == pytest.approx(schedules.final_learning_rate)


@pytest.mark.parametrize("steps", [0.5, 1, 68, 10_000])
def test_within_its_half_life_a_moving_average_forgets_half(steps):
    momentum = momentum_of_half_life(steps)
    assert momentum**steps == pytest.approx(0.5)
    assert half_life_of_momentum(momentum) == pytest.approx(steps)


def test_the_extremes_of_momentum_have_a_half_life_too():
    assert (half_life_of_momentum(0.0), half_life_of_momentum(1.0)) == (0, math.inf)


def test_weight_decay_and_momentum_move_from_start_to_end():
    schedules = Schedules(total_steps=50)
    assert schedules.weight_decay(49) == pytest.approx(schedules.final_weight_decay)
    assert schedules.momentum(0) == schedules.start_momentum
    assert schedules.momentum(49) < schedules.momentum(50) == schedules.final_momentum


def test_schedules_hold_their_final_values_after_the_last_step():
    schedules = Schedules(total_steps=10, warmup_steps=2)
    for value in (schedules.learning_rate, schedules.weight_decay):
        assert value(30) == value(9)
    assert schedules.momentum(30) == schedules.final_momentum


def test_warmup_may_be_absent_or_the_whole_run():
    assert Schedules(total_steps=5).learning_rate(0) < 1e-3
    assert Schedules(total_steps=5, warmup_steps=5).learning_rate(4) == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps 0"),
        ({"total_steps": 5, "warmup_steps": 6}, "warmup_steps 6"),
        ({"total_steps": 5, "start_momentum": 1.5}, "start_momentum.*1.5"),
        ({"total_steps": 5, "peak_learning_rate": float("nan")}, "peak_learning_rate.*nan"),
        ({"total_steps": 5, "start_weight_decay": -1.0}, "start_weight_decay.*-1.0"),
    ],
)
def test_impossible_schedules_are_refused_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedules(**settings)


def test_groups_hold_every_trained_parameter_once_and_none_of_the_target(tiny_model):
    grouped = [id(parameter) for group in parameter_groups(tiny_model) for parameter in group["params"]]
    trained = [id(parameter) for parameter in tiny_model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert not set(grouped) & {id(parameter) for parameter in tiny_model.ijepa.parameters()}


def test_biases_and_norms_are_not_decayed_and_the_mask_token_is(tiny_model):
    groups = {group["name"]: group for group in parameter_groups(tiny_model)}
    assert any(parameter is tiny_model.predictor.mask_token for parameter in groups["predictor_decayed"]["params"])
    assert all(parameter.ndim > 1 for name in groups if "_decayed" in name for parameter in groups[name]["params"])
    assert all(parameter.ndim == 1 for name in groups if "undecayed" in name for parameter in groups[name]["params"])


def test_apply_sets_both_rates_and_leaves_undecayed_groups_alone(tiny_model):
    optimizer = torch.optim.AdamW(parameter_groups(tiny_model))
    schedules = Schedules(total_steps=10, warmup_steps=2)
    schedules.apply(optimizer, 4)
    for group in optimizer.param_groups:
        assert group["lr"] == schedules.learning_rate(4)
        assert group["weight_decay"] == (schedules.weight_decay(4) if group["decayed"] else 0.0)


def rates_by_name(model, **options):
    """(learning rate, weight decay) of every parameter in the groups; each may be there once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in layer_decay_groups(model, **options):
        for parameter in group["params"]:
            assert names[id(parameter)] not in rates
            rates[names[id(parameter)]] = group["lr"], group["weight_decay"]
    return rates


@pytest.mark.parametrize("is_stock", [False, True])
def test_layer_decay_falls_from_the_head_to_the_patch_embedding(tiny_config, is_stock):
    model = IJepaForImageClassification(tiny_config)
    if is_stock:
        model = stock.IJepaForImageClassification(stock.IJepaConfig(**tiny_config.to_dict()))
    rates = rates_by_name(model, learning_rate=2.0, weight_decay=0.1, layer_decay=0.5)
    assert set(rates) == {name for name, _ in model.named_parameters()}
    expected = {
        "classifier.weight": (2.0, 0.1),
        "classifier.bias": (2.0, 0.0),
        "ijepa.layernorm.weight": (2.0, 0.0),
        "ijepa.layers.2.mlp.fc1.weight": (1.0, 0.1),
        "ijepa.layers.2.layernorm_after.weight": (1.0, 0.0),
        "ijepa.layers.1.attention.q_proj.bias": (0.5, 0.0),
        "ijepa.layers.0.attention.o_proj.weight": (0.25, 0.1),
        "ijepa.embeddings.patch_embeddings.projection.weight": (0.125, 0.1),
        "ijepa.embeddings.patch_embeddings.projection.bias": (0.125, 0.0),
    }
    assert {name: rates[name] for name in expected} == expected
    assert len({rate for rate, _ in rates.values()}) == tiny_config.num_hidden_layers + 2


def test_layer_decay_is_that_of_timm(tiny_config):
    """But for the final layer norm, which timm counts to the last layer."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    theirs = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=2,
        class_token=False,
        global_pool="avg",
        pos_embed="none",
    )
    scales = {}
    for group in param_groups_layer_decay(theirs, weight_decay=0.1, layer_decay=0.75):
        for parameter in group["params"]:
            scales[id(parameter)] = group["lr_scale"], group["weight_decay"]
    ours = rates_by_name(
        IJepaForImageClassification(tiny_config), learning_rate=1.0, weight_decay=0.1, layer_decay=0.75
    )
    pairs = {"head": "classifier", "patch_embed.proj": "ijepa.embeddings.patch_embeddings.projection"}
    pairs |= {f"blocks.{i}.mlp.fc1": f"ijepa.layers.{i}.mlp.fc1" for i in range(3)}
    pairs |= {f"blocks.{i}.norm1": f"ijepa.layers.{i}.layernorm_before" for i in range(3)}
    for theirs_name, ours_name in pairs.items():
        for kind in ("weight", "bias"):
            parameter = theirs.get_parameter(f"{theirs_name}.{kind}")
            assert ours[f"{ours_name}.{kind}"] == pytest.approx(scales[id(parameter)])


def test_layer_decay_leaves_frozen_weights_out_and_starts_with_the_head(tiny_config):
    model = IJepaForImageClassification(tiny_config)
    groups = layer_decay_groups(model, 1.0, 0.1, 0.75)
    assert [group["lr"] for group in groups] == sorted((group["lr"] for group in groups), reverse=True)
    model.ijepa.requires_grad_(False)
    assert set(rates_by_name(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.75)) == {
        "classifier.weight",
        "classifier.bias",
    }


def flatten_as_fsdp_does(model):
    """Wraps every layer and the whole as FSDP version 1 does, and leaves flat, partly empty shards as parameters."""
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            shard = parameter.data.flatten()[: 0 if name.endswith("fc1") else 3].clone()
            setattr(module, key, torch.nn.Parameter(shard))
    layers = model.ijepa.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.nn.ModuleDict({"_fsdp_wrapped_module": layer})
    return torch.nn.ModuleDict({"_fsdp_wrapped_module": model})


@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_wrapped_and_flattened_weights_keep_their_rates(tiny_config, layer_decay):
    model = IJepaForImageClassification(tiny_config)
    options = {"learning_rate": 2.0, "weight_decay": 0.1, "layer_decay": layer_decay}
    expected = rates_by_name(model, **options)
    places = parameter_places(model, layer_decay)
    wrapped = rates_by_name(flatten_as_fsdp_does(model), **options, places=places)
    assert {name.replace("_fsdp_wrapped_module.", ""): rates for name, rates in wrapped.items()} == expected
    assert {decay for _, decay in wrapped.values()} == {0.0, 0.1}


def test_a_wrapped_model_with_other_parameters_is_an_error(tiny_config):
    model = IJepaForImageClassification(tiny_config)
    places = parameter_places(model, 1.0)
    model.ijepa.layers[0].flat = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"for example 'ijepa\.layers\.0\.flat'.*use_orig_params"):
        layer_decay_groups(model, 1.0, 0.1, 1.0, places)
    del model.ijepa.layers[0].flat
    model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'classifier\."):
        layer_decay_groups(model, 1.0, 0.1, 1.0, places)


def test_weights_that_zero_3_has_emptied_are_decayed_by_the_shape_of_the_whole(tiny_config, tiny_model):
    model = IJepaForImageClassification(tiny_config)
    expected = parameter_places(model, 0.5), [len(group["params"]) for group in parameter_groups(tiny_model)]
    for parameter in (*model.parameters(), *tiny_model.parameters()):
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert (parameter_places(model, 0.5), [len(group["params"]) for group in parameter_groups(tiny_model)]) == expected


def test_layer_decay_of_unknown_layers_is_an_error_and_one_rate_for_all_is_not():
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16)
    model = ViTForImageClassification(config)
    rates = rates_by_name(model, learning_rate=1.0, weight_decay=0.1, layer_decay=1)
    assert set(rates) == {name for name, _ in model.named_parameters()} and {rate for rate, _ in rates.values()} == {
        1.0
    }
    with pytest.raises(ValueError, match=r"ViTForImageClassification has a parameter 'vit\."):
        layer_decay_groups(model, 1.0, 0.1, 0.75)
    for value in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"layer_decay.*{value}"):
            layer_decay_groups(model, 1.0, 0.1, value)


def optimizer_named(name, groups, learning_rate=1e-2):
    return build_optimizer(
        groups, name=name, learning_rate=learning_rate, betas=(0.9, 0.95), epsilon=1e-6, device_type="cpu"
    )


def moved(name, size, steps, weight_decay=0.1):
    """How far the optimizer moves a parameter from its start, with the same random gradients for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(size, generator=generator))
    start = parameter.detach().clone()
    optimizer = optimizer_named(name, [{"params": [parameter], "weight_decay": weight_decay}])
    for _ in range(steps):
        parameter.grad = torch.randn(size, generator=generator)
        optimizer.step()
    return parameter.detach() - start


def test_adamw_is_that_of_torch_with_the_settings_given(tiny_model):
    optimizer = optimizer_named("adamw", parameter_groups(tiny_model))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.9, 0.95), 1e-6, 0.0)
    settings = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-6}
    for device_type, fused in (("cuda", True), ("cpu", True), ("xla", False)):
        optimizer = build_optimizer(parameter_groups(tiny_model), name="adamw", device_type=device_type, **settings)
        assert optimizer.param_groups[0]["fused"] is fused


@pytest.mark.parametrize(("size", "steps", "tolerance"), [(4096, 1, 1e-6), (4096, 10, 0.02), (4095, 10, 1e-5)])
def test_eight_bit_states_move_weights_as_adamw_does(size, steps, tolerance):
    """After the first step states are rounded to 8 bits, and only in tensors of 4,096 numbers or more."""
    pytest.importorskip("bitsandbytes")
    expected, found = moved("adamw", size, steps), moved("adamw_8bit", size, steps)
    assert (found - expected).norm() < tolerance * expected.norm()


def test_eight_bit_adamw_reads_rates_from_the_groups_at_every_step(tiny_model):
    pytest.importorskip("bitsandbytes")
    assert moved("adamw_8bit", 4096, 1, weight_decay=0.0).norm() < moved("adamw_8bit", 4096, 1, 100.0).norm()
    optimizer = optimizer_named("adamw_8bit", parameter_groups(tiny_model))
    assert [group["name"] for group in optimizer.param_groups] == [g["name"] for g in parameter_groups(tiny_model)]
    Schedules(total_steps=10, start_learning_rate=0.0, peak_learning_rate=0.0, final_learning_rate=0.0).apply(
        optimizer, 0
    )
    before = [parameter.clone() for parameter in tiny_model.parameters()]
    for parameter in tiny_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, tiny_model.parameters(), strict=True))


def test_eight_bit_states_go_on_exactly_from_a_saved_file(tmp_path):
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5000, generator=generator))
    groups = [{"params": [parameter], "name": "all", "decayed": True, "weight_decay": 0.1}]
    optimizer = optimizer_named("adamw_8bit", groups)
    gradients = torch.randn(4, 5000, generator=generator)
    for step, gradient in enumerate(gradients):
        if step == 2:
            torch.save((optimizer.state_dict(), parameter.detach().clone()), tmp_path / "state")
        parameter.grad = gradient.clone()
        optimizer.step()
    state, weights = torch.load(tmp_path / "state", weights_only=True)
    resumed = torch.nn.Parameter(weights)
    optimizer = optimizer_named("adamw_8bit", [{**groups[0], "params": [resumed]}])
    optimizer.load_state_dict(state)
    for gradient in gradients[2:]:
        resumed.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(resumed, parameter) and optimizer.param_groups[0]["decayed"]


def test_an_optimizer_that_is_unknown_or_not_installed_is_refused(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match="adamw or adamw_8bit, got 'lion'"):
        optimizer_named("lion", parameter_groups(tiny_model))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="adamw_8bit needs bitsandbytes: pip install bitsandbytes"):
        optimizer_named("adamw_8bit", parameter_groups(tiny_model))
