"""The model is the published one: outputs, gradients, initial weights and a training run agree with Meta's released
code on the numbers in tests/fixtures (MANIFEST.json says how each was made, and the tolerances)."""

import math

import pytest
import torch

from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa_transformers.conversion.key_mapping import NETWORKS, from_meta
from ijepa_transformers.modeling_ijepa import sincos_position_embeddings
from ijepa_transformers.optimization import parameter_groups
from tests.conftest import (
    FIXTURES,
    config_of_reference,
    masks_of_reference,
    reference_json,
    reference_tensors,
    schedules_of_reference,
    weights_of_reference,
    without_key_bias,
)


def reference_order(features):
    """Ours, (B, C, M, N_tgt, D), in the reference's row order: target block major, then context, then image."""
    return features.permute(2, 1, 0, 3, 4).flatten(0, 2)


def assert_close(ours, reference, tolerance):
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=0)


@pytest.fixture(params=["sdpa", "eager"])
def forward_case(request):
    """The reference checkpoint in our model, with the reference's batch."""
    model = IJepaForPretraining(config_of_reference(reference_json("forward.json")["config"]))
    model.set_attn_implementation(request.param)
    checkpoint = torch.load(FIXTURES / "meta_tiny_checkpoint.pth.tar", weights_only=True)
    weights = {}
    for network in NETWORKS:
        weights.update(from_meta(network, checkpoint[network]))
    model.load_state_dict(weights)
    tensors = reference_tensors("forward.safetensors")
    return model, tensors, masks_of_reference(tensors)


def test_outputs_equal_the_reference(forward_case, tolerances):
    model, tensors, (context_indices, target_indices) = forward_case
    pixel_values = tensors["pixel_values"]
    output = model(pixel_values, context_indices, target_indices)
    assert_close(model.context_encoder(pixel_values)[0], tensors["encoder_full"], tolerances["output_abs"])
    assert_close(model.ijepa(pixel_values)[0], tensors["target_encoder_full"], tolerances["target_abs"])
    assert_close(output.context_hidden_states[:, 0], tensors["encoder_masked"], tolerances["output_abs"])
    assert_close(reference_order(output.predictions), tensors["predictor_out"], tolerances["output_abs"])
    assert_close(reference_order(output.targets), tensors["targets"], tolerances["target_abs"])
    assert_close(output.loss, tensors["loss"], tolerances["loss_abs"])


def test_hidden_states_equal_the_reference(forward_case, tolerances):
    model, tensors, _ = forward_case
    hidden_states = model.context_encoder(tensors["pixel_values"], output_hidden_states=True).hidden_states
    for index, ours in enumerate(hidden_states):
        assert_close(ours[0], tensors[f"encoder_hidden_image0.{index}"], tolerances["output_abs"])


def test_every_gradient_equals_the_reference(forward_case, tolerances):
    model, tensors, (context_indices, target_indices) = forward_case
    model(tensors["pixel_values"], context_indices, target_indices).loss.backward()
    expected = weights_of_reference(tensors, "grad.", networks=("encoder", "predictor"))
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(ours) == set(expected)
    for name in ours:
        bound = tolerances["grad_rel_to_tensor_max"] * expected[name].abs().max().item()
        assert_close(ours[name], expected[name], max(bound, tolerances["grad_key_bias_abs"]))
    assert all(parameter.grad is None for parameter in model.ijepa.parameters())


def test_layer_norm_epsilons_are_the_published_ones(tolerances):
    """A net with a tiny residual stream and two contexts shows a wrong epsilon or a wrong order of predictions."""
    reference = reference_json("eps_probe.json")
    tensors = reference_tensors("eps_probe.safetensors")
    model = IJepaForPretraining(config_of_reference(reference["config"]))
    model.load_state_dict(weights_of_reference(tensors))
    output = model(tensors["pixel_values"], *masks_of_reference(tensors))
    encoded_contexts = output.context_hidden_states.transpose(0, 1).flatten(0, 1)
    assert_close(encoded_contexts, tensors["encoder_masked"], tolerances["output_abs_large"])
    assert_close(reference_order(output.predictions), tensors["predictor_out"], tolerances["output_abs_large"])
    assert_close(reference_order(output.targets), tensors["targets"], tolerances["target_abs_large"])
    assert_close(output.loss, tensors["loss"], tolerances["loss_abs"])


def test_position_embeddings_equal_the_reference(tolerances):
    tables = reference_tensors("pos_embed.safetensors")
    for width, side in ((24, 8), (48, 8)):
        ours = sincos_position_embeddings(width, (side, side))[0]
        assert_close(ours, tables[f"dim{width}_grid{side}"], tolerances["table_abs"])
    for width, side in ((1280, 16), (384, 14)):
        rows = sincos_position_embeddings(width, (side, side))[0][tables[f"dim{width}_grid{side}.row_index"]]
        assert_close(rows, tables[f"dim{width}_grid{side}.rows"], tolerances["table_abs"])


def test_initial_weights_follow_the_reference_law():
    """Same shapes, and mean and standard deviation equal within five standard errors of a difference."""
    reference = reference_json("init_statistics.json")["vit_small_16"]["parameters"]
    torch.manual_seed(0)
    ours = IJepaForPretraining(IJepaConfig(**IJEPA_SIZES["small"], image_size=224, patch_size=16)).state_dict()
    compared = []
    for key, statistics in reference.items():
        network, _, meta_name = key.partition(".")
        for name, expected in from_meta(network, {meta_name: torch.empty(statistics["shape"])}).items():
            assert ours[name].shape == expected.shape, name
            std, count = statistics["std"], ours[name].numel()
            if (
                statistics["min"] == -2.0
            ):  # one value in 2^24 of the reference's sampler falls on its bound, ours never
                std = (std**2 - 4.0 / math.prod(statistics["shape"])) ** 0.5
            assert ours[name].std(correction=0).item() == pytest.approx(std, abs=5 * std / count**0.5 + 1e-6), name
            error = 5 * std * (2 / count) ** 0.5 + 1e-6
            assert ours[name].mean().item() == pytest.approx(statistics["mean"], abs=error), name
            compared.append(name)
    assert sorted(compared) == sorted(
        key for key in ours if not key.startswith("ijepa.") and not key.endswith("position_embeddings")
    )


def test_weights_are_a_plain_normal_not_cut_at_two_standard_deviations(tiny_config):
    """Quirk kept: the published truncation is at +-2.0, a hundred standard deviations out."""
    weight = IJepaForPretraining(IJepaConfig(**IJEPA_SIZES["tiny"])).context_encoder.layers[0].mlp.fc1.weight
    beyond = (weight.abs() > 2 * 0.02).float().mean().item()
    assert beyond == pytest.approx(0.0455, abs=0.003)


@pytest.mark.parametrize("name", list(reference_json("schedules.json")["configs"]))
def test_schedules_of_the_published_runs(name, tolerances):
    reference = reference_json("schedules.json")["configs"][name]
    schedules = schedules_of_reference(reference["settings"])
    assert schedules.total_steps == reference["schedule_total_steps"]
    assert schedules.warmup_steps == reference["warmup_steps"]
    for step, learning_rate, weight_decay, momentum in reference["rows"]:
        ours = (schedules.learning_rate(step), schedules.weight_decay(step), schedules.momentum(step))
        assert ours == pytest.approx((learning_rate, weight_decay, momentum), rel=tolerances["schedule_rel"]), step


def test_training_run_equals_the_reference(tolerances):
    """Twelve steps of AdamW with all three schedules and the moving average: every loss, and the final weights."""
    reference = reference_json("train_trajectory.json")
    tensors = reference_tensors("train_trajectory.safetensors")
    model = IJepaForPretraining(config_of_reference(reference["config"]))
    weights = weights_of_reference(tensors, "init.", networks=("encoder", "predictor"))
    weights.update(
        {f"ijepa.{k.removeprefix('context_encoder.')}": v for k, v in weights.items() if "context_encoder." in k}
    )
    model.load_state_dict(weights)
    schedules = schedules_of_reference(reference["schedule"])
    optimizer = torch.optim.AdamW(parameter_groups(model))
    for step in range(len(tensors["loss"])):
        schedules.apply(optimizer, step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(tensors["lr"][step].item(), rel=1e-12)
        assert optimizer.param_groups[1]["weight_decay"] == pytest.approx(
            tensors["weight_decay"][step].item(), rel=1e-12
        )
        assert schedules.momentum(step) == pytest.approx(tensors["momentum"][step].item(), rel=1e-12)
        batch = tensors[f"step{step:02d}.pixel_values"].float()
        loss = model(batch, *masks_of_reference(tensors, f"step{step:02d}.")).loss
        assert loss.item() == pytest.approx(tensors["loss"][step].item(), abs=tolerances["traj_loss_abs"]), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target_encoder(schedules.momentum(step))
    ours, expected = model.state_dict(), weights_of_reference(tensors, "final.")
    assert set(ours) == set(expected)
    for name in without_key_bias(expected):
        assert_close(ours[name], expected[name], tolerances["final_weight_abs"])
    for name in set(expected) - set(without_key_bias(expected)):
        # AdamW turns rounding noise in the gradient of key biases into steps of any size up to the learning rate, so
        # the reference itself only bounds them by the sum of its learning rates.
        assert (ours[name] - expected[name]).abs().max() < tensors["lr"].sum()
