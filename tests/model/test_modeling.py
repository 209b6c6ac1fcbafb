"""Laws of the model: what each network sees, what takes gradient, what the moving average does, which sizes work."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForImageClassification
from transformers.models.ijepa import modeling_ijepa as stock

from ijepa_transformers import (
    IJepaBackbone,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaForPretraining,
    IJepaModel,
    modeling_ijepa,
)
from ijepa_transformers.masking import MultiBlockMasking
from ijepa_transformers.modeling_ijepa import sincos_position_embeddings


def changed(config, **fields):
    return IJepaConfig(**{**config.to_dict(), **fields})


# What each network sees


def test_dropped_patches_cannot_influence_the_encoder(tiny_model, tiny_batch):
    indices = tiny_batch["context_indices"][:, 0]
    encoder = tiny_model.context_encoder.eval()
    pixel_values = tiny_batch["pixel_values"].clone()
    before = encoder(pixel_values, patch_indices=indices).last_hidden_state
    pixel_values[:, :, 24:, :] = 7.0  # the last row of patches, 12 to 15, is in neither context
    assert torch.equal(before, encoder(pixel_values, patch_indices=indices).last_hidden_state)
    pixel_values[:, :, :8, :8] = 7.0  # patch 0 is in the first image's context only
    after = encoder(pixel_values, patch_indices=indices).last_hidden_state
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_all_patches_by_index_equal_the_whole_image_and_order_follows_the_indices(tiny_model, tiny_batch):
    encoder, pixel_values = tiny_model.ijepa, tiny_batch["pixel_values"]
    whole = encoder(pixel_values).last_hidden_state
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    chosen = encoder(pixel_values, patch_indices=order).last_hidden_state
    torch.testing.assert_close(chosen, whole[:, order[0]], atol=1e-6, rtol=0)


def test_predictions_see_target_positions_and_context_but_not_target_pixels(tiny_model, tiny_batch):
    tiny_model.eval()
    before = tiny_model(**tiny_batch)
    pixel_values = tiny_batch["pixel_values"].clone()
    pixel_values[:, :, 24:, :] = 7.0
    after = tiny_model(**{**tiny_batch, "pixel_values": pixel_values})
    assert torch.equal(before.predictions, after.predictions)
    assert not torch.equal(before.targets, after.targets)
    moved = {**tiny_batch, "target_indices": tiny_batch["target_indices"].flip(2)}
    torch.testing.assert_close(tiny_model(**moved).predictions.flip(3), before.predictions, atol=1e-6, rtol=0)


def test_target_blocks_are_predicted_independently_of_each_other(tiny_model, tiny_batch):
    tiny_model.eval()
    both = tiny_model(**tiny_batch).predictions
    alone = tiny_model(**{**tiny_batch, "target_indices": tiny_batch["target_indices"][:, 1:]}).predictions
    torch.testing.assert_close(both[:, :, 1:], alone, atol=1e-6, rtol=0)


def test_several_contexts_are_encoded_and_predicted_from_separately(tiny_model, tiny_batch):
    tiny_model.eval()
    contexts = torch.cat([tiny_batch["context_indices"], tiny_batch["context_indices"].flip(0)], dim=1)
    output = tiny_model(**{**tiny_batch, "context_indices": contexts})
    assert output.predictions.shape == output.targets.shape == (2, 2, 2, 3, 32)
    for context in range(2):
        single = tiny_model(**{**tiny_batch, "context_indices": contexts[:, context : context + 1]})
        torch.testing.assert_close(output.predictions[:, context], single.predictions[:, 0], atol=1e-6, rtol=0)
    assert torch.equal(output.targets[:, 0], output.targets[:, 1])


def with_own_targets(batch):
    """Three contexts for each image of the tiny batch, each with two target blocks of its own."""
    patches = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    contexts, targets = patches[:, :5].unflatten(0, (2, 3)), patches[:, 5:13].reshape(2, 3, 2, 4)
    return {**batch, "context_indices": contexts, "target_indices": targets}


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("fields", [{}, {"target_normalization": "batch"}], ids=str)
def test_contexts_with_targets_of_their_own_equal_a_loop_over_the_contexts(tiny_config, tiny_batch, fields):
    torch.manual_seed(0)
    model = IJepaForPretraining(changed(tiny_config, **fields)).double()
    batch = with_own_targets({**tiny_batch, "pixel_values": tiny_batch["pixel_values"].double()})
    output, loop = model(**batch), []
    for context in range(3):
        one = {name: batch[name][:, context] for name in ("context_indices", "target_indices")}
        loop.append(model(batch["pixel_values"], one["context_indices"][:, None], one["target_indices"]))
    assert output.predictions.shape == output.targets.shape == (2, 3, 2, 4, 32)
    for name in ("predictions", "targets", "context_hidden_states"):
        separate = torch.cat([getattr(each, name) for each in loop], dim=1)
        torch.testing.assert_close(getattr(output, name), separate, atol=1e-6, rtol=0)
    mean = torch.stack([each.loss for each in loop]).mean()
    torch.testing.assert_close(output.loss, mean, atol=1e-6, rtol=0)
    ours, separate = gradients_of(model, output.loss), gradients_of(model, mean)
    assert ours.keys() == separate.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], separate[name], atol=1e-7, rtol=1e-5)


def test_targets_of_their_own_that_are_all_the_same_are_shared_targets(tiny_model, tiny_batch):
    tiny_model.eval()
    contexts = torch.cat([tiny_batch["context_indices"], tiny_batch["context_indices"].flip(0)], dim=1)
    shared = tiny_model(**{**tiny_batch, "context_indices": contexts})
    targets = tiny_batch["target_indices"].unsqueeze(1).expand(-1, 2, -1, -1)
    own = tiny_model(**{**tiny_batch, "context_indices": contexts, "target_indices": targets})
    assert torch.equal(shared.predictions, own.predictions) and torch.equal(shared.targets, own.targets)
    assert torch.equal(shared.loss, own.loss)


@pytest.mark.parametrize("shape", ["shared", "own"])
def test_the_target_encoder_runs_once_for_each_image_whatever_the_contexts(tiny_model, tiny_batch, shape):
    batch, calls = with_own_targets(tiny_batch), []
    if shape == "shared":
        batch["target_indices"] = batch["target_indices"][:, 0]
    tiny_model.ijepa.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    tiny_model(**batch)
    assert calls == [(2, 3, 32, 32)]


# What is computed only once, or not at all


def plain_predictions(model, context, context_indices, target_indices):
    """The predictor written out, every token in every layer; (B, N_ctx, D), (B, N_ctx), (B, M, N_tgt)."""
    predictor, num_context = model.predictor, context_indices.shape[1]
    positions = predictor.position_embeddings[0]
    context = predictor.input_projection(context) + positions[context_indices]
    blocks = predictor.mask_token + positions[target_indices]  # (B, M, N_tgt, P)
    outputs = []
    for block in blocks.unbind(1):
        hidden_states = torch.cat([context, block], dim=1)
        for layer in predictor.layers:
            hidden_states = layer(hidden_states)
        outputs.append(hidden_states[:, num_context:])
    tokens = torch.cat(outputs, dim=1).unflatten(1, blocks.shape[1:3])
    return predictor.output_projection(predictor.layernorm(tokens))


@pytest.mark.parametrize("depth", [1, 3])
def test_what_the_predictor_leaves_out_changes_neither_predictions_nor_gradients(tiny_config, tiny_batch, depth):
    torch.manual_seed(0)
    config = changed(tiny_config, predictor_num_hidden_layers=depth)
    model = IJepaForPretraining(config).double()
    contexts, targets = tiny_batch["context_indices"], tiny_batch["target_indices"]
    context = torch.randn(2, contexts.shape[2], 32, dtype=torch.float64, requires_grad=True)
    plain = plain_predictions(model, context, contexts[:, 0], targets)
    weights = torch.randn_like(plain)
    trained = [context, *model.predictor.parameters()]
    expected = torch.autograd.grad((plain * weights).sum(), trained)
    predictions = model.predictor(context[:, None], contexts, targets)[:, 0]
    gradients = torch.autograd.grad((predictions * weights).sum(), trained)
    torch.testing.assert_close(predictions, plain, atol=1e-12, rtol=0)
    for gradient, plain_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, plain_gradient, atol=1e-11, rtol=0)


def test_a_predictor_without_layers_sees_only_positions(tiny_config, tiny_batch):
    model = IJepaForPretraining(changed(tiny_config, predictor_num_hidden_layers=0)).eval()
    assert model(**tiny_batch).predictions.shape == (2, 1, 2, 3, 32)


@pytest.mark.parametrize("image_size", [32, (24, 40), (30, 45)])
def test_the_embedding_of_kept_patches_is_the_convolution_there(tiny_config, image_size):
    torch.manual_seed(0)
    encoder = IJepaModel(changed(tiny_config, image_size=image_size)).double()
    embed, num_patches = encoder.embeddings, encoder.config.num_patches
    indices = torch.rand(2, num_patches).argsort(1)[:, :5]
    pixel_values = torch.randn(2, 3, *encoder.config.image_height_and_width, dtype=torch.float64)
    whole, kept = embed(pixel_values), embed(pixel_values, indices)
    torch.testing.assert_close(kept, whole.gather(1, indices[..., None].expand(-1, -1, 32)), atol=1e-13, rtol=0)
    weights = torch.randn_like(kept)
    expected = torch.autograd.grad(
        (whole.gather(1, indices[..., None].expand(-1, -1, 32)) * weights).sum(), embed.parameters()
    )
    for gradient, plain in zip(torch.autograd.grad((kept * weights).sum(), embed.parameters()), expected, strict=True):
        torch.testing.assert_close(gradient, plain, atol=1e-12, rtol=0)


def test_the_residual_stream_lies_in_memory_token_by_token(tiny_model, tiny_batch):
    """The convolution's order would be kept from sum to sum, and every layer norm would have to turn it."""
    output = tiny_model.ijepa(tiny_batch["pixel_values"], output_hidden_states=True)
    assert all(hidden_states.is_contiguous() for hidden_states in output.hidden_states)


@pytest.mark.parametrize("index", [-1, 16])
def test_an_index_without_a_patch_is_refused(tiny_model, tiny_batch, index):
    """-1 must not mean the last patch."""
    indices = tiny_batch["context_indices"].clone()
    indices[1, 0, -1] = index
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        tiny_model(**{**tiny_batch, "context_indices": indices})


@torch.no_grad()  # flex attention has no gradient on CPU
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_every_attention_gives_the_same_predictions(tiny_config, tiny_batch, implementation):
    # Heads of 32 features: for 16, flex attention of PyTorch 2.14 is wrong on CPUs without AVX-512.
    config = changed(tiny_config, hidden_size=128, predictor_hidden_size=128)
    torch.manual_seed(0)
    model = IJepaForPretraining(config).eval()
    model.set_attn_implementation("eager")
    expected = model(**tiny_batch)
    model.set_attn_implementation(implementation)
    output = model(**tiny_batch)
    for name in ("predictions", "context_hidden_states", "target_hidden_states"):
        torch.testing.assert_close(output[name], expected[name], atol=2e-6, rtol=0)


# Loss and gradient


def test_gradient_reaches_context_encoder_and_predictor_and_never_the_target_encoder(tiny_model, tiny_batch):
    tiny_model.train()
    output = tiny_model(**tiny_batch)
    output.loss.backward()
    assert not output.targets.requires_grad
    for name, parameter in tiny_model.named_parameters():
        assert (parameter.grad is None) == name.startswith("ijepa."), name
    tiny_model.requires_grad_(True)  # whatever a user or a trainer does, targets are targets
    assert not tiny_model(**tiny_batch).targets.requires_grad


def test_targets_are_normalised_over_features(tiny_model, tiny_batch):
    targets = tiny_model(**tiny_batch).targets
    torch.testing.assert_close(targets.mean(-1), torch.zeros_like(targets.mean(-1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(targets.var(-1, correction=0), torch.ones_like(targets.mean(-1)), atol=1e-3, rtol=0)


def test_targets_normalised_over_the_batch_do_not_depend_on_the_scale_of_a_feature(tiny_config, tiny_batch):
    """Whatever multiplies a feature or is added to it in all patches, the targets stay."""
    model = IJepaForPretraining(changed(tiny_config, target_normalization="batch"))
    features = torch.randn(32, tiny_config.num_patches, tiny_config.hidden_size)
    targets = model.normalize_targets(features)
    scales, shifts = torch.rand(2, tiny_config.hidden_size) + 0.5
    torch.testing.assert_close(model.normalize_targets(scales * features + shifts), targets, atol=1e-3, rtol=0)
    torch.testing.assert_close(targets.mean(dim=(0, 1)), torch.zeros_like(targets[0, 0]), atol=1e-5, rtol=0)
    spread = targets.square().mean(dim=(0, 1)).sqrt()
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-3, rtol=0)
    output = model(**tiny_batch)
    rows = torch.arange(len(tiny_batch["pixel_values"]))[:, None, None]
    expected = model.normalize_targets(output.target_hidden_states)[rows, tiny_batch["target_indices"]]
    assert torch.equal(output.targets[:, 0], expected)


@pytest.mark.parametrize("normalization", ["none", "layer", "batch"])
def test_what_all_patches_of_an_image_have_in_common_can_leave_the_targets(tiny_config, normalization):
    """With no share of the image's mean, a shift of all its patches changes nothing. With half, it counts half."""
    features = torch.randn(4, tiny_config.num_patches, tiny_config.hidden_size)
    shifted = features + 3 * torch.randn(4, 1, tiny_config.hidden_size)

    def targets(share, features):
        config = changed(tiny_config, target_normalization=normalization, target_image_mean=share)
        return IJepaForPretraining(config).normalize_targets(features)

    assert not torch.allclose(targets(1.0, features), targets(1.0, shifted), atol=0.1)
    torch.testing.assert_close(targets(0.0, features), targets(0.0, shifted), atol=1e-4, rtol=1e-4)
    means = features.mean(dim=1, keepdim=True)
    torch.testing.assert_close(targets(0.5, features), targets(1.0, features - means / 2))


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_a_feature_that_never_changes_is_no_target(tiny_config, noise):
    """Not even its rounding errors are."""
    model = IJepaForPretraining(changed(tiny_config, target_normalization="batch"))
    features = torch.randn(8, tiny_config.num_patches, tiny_config.hidden_size)
    features[..., 0] = 0.7 + noise * features[..., 0]
    targets = model.normalize_targets(features)
    assert targets[..., 0].abs().max() < 0.1 and targets.isfinite().all()
    assert targets[..., 1].abs().max() > 1


def test_loss_type_and_normalisation_are_choices(tiny_config, tiny_batch):
    for loss_type, distance in (
        ("mse", lambda d: d**2),
        ("smooth_l1", lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)),
    ):
        torch.manual_seed(0)
        model = IJepaForPretraining(changed(tiny_config, loss_type=loss_type, target_normalization="none"))
        output = model(**tiny_batch)
        rows = torch.arange(2)[:, None, None]
        expected = model.ijepa(tiny_batch["pixel_values"])[0][rows, tiny_batch["target_indices"]]
        assert torch.equal(output.targets[:, 0], expected)
        torch.testing.assert_close(output.loss, distance(output.predictions - output.targets).mean())


def test_loss_of_a_batch_is_the_mean_over_its_parts(tiny_model, tiny_batch):
    """No term crosses images, so accumulating gradients over parts equals the large batch."""
    tiny_model.double()
    tiny_batch["pixel_values"] = tiny_batch["pixel_values"].double()
    tiny_model(**tiny_batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}
    tiny_model.zero_grad()
    for image in range(2):
        (tiny_model(**{key: value[image : image + 1] for key, value in tiny_batch.items()}).loss / 2).backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(tiny_model.get_parameter(name).grad, gradient, atol=1e-7, rtol=1e-5)


# Target encoder


def test_a_new_model_starts_with_equal_encoders(tiny_model):
    for target, context in zip(
        tiny_model.ijepa.state_dict().values(), tiny_model.context_encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(target, context)


def test_moving_average(tiny_model):
    for parameter in tiny_model.context_encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    before = {name: value.clone() for name, value in tiny_model.ijepa.state_dict().items()}
    tiny_model.update_target_encoder(momentum=0.9)
    for name, context in tiny_model.context_encoder.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * context
        torch.testing.assert_close(tiny_model.ijepa.state_dict()[name], expected, atol=1e-6, rtol=0)
    tiny_model.update_target_encoder(momentum=1.0)
    kept = tiny_model.ijepa.state_dict()
    tiny_model.update_target_encoder(momentum=0.0)
    for name, context in tiny_model.context_encoder.state_dict().items():
        torch.testing.assert_close(kept[name], context)


def test_moving_average_refuses_half_precision_and_a_momentum_above_one(tiny_model):
    with pytest.raises(ValueError, match=r"momentum.*1\.5"):
        tiny_model.update_target_encoder(1.5)
    with pytest.raises(ValueError, match="bfloat16"):
        tiny_model.to(torch.bfloat16).update_target_encoder(0.996)


def test_target_encoder_is_never_in_training_mode(tiny_config, tiny_batch):
    model = IJepaForPretraining(changed(tiny_config, drop_path_rate=0.5, hidden_dropout_prob=0.5)).train()
    assert model.context_encoder.training and not model.ijepa.training
    assert torch.equal(model(**tiny_batch).targets, model(**tiny_batch).targets)


# Positions and sizes


def test_positions_are_fixed_and_stored(tiny_model):
    assert "ijepa.embeddings.position_embeddings" in tiny_model.state_dict()
    assert not any("position_embeddings" in name for name, _ in tiny_model.named_parameters())
    assert torch.equal(tiny_model.ijepa.embeddings.position_embeddings, sincos_position_embeddings(32, (4, 4)))


def test_positions_code_the_column_in_the_first_half_and_the_row_in_the_second():
    table = sincos_position_embeddings(16, (3, 5))[0].view(3, 5, 16)
    assert (table[..., :8] == table[:1, :, :8]).all() and (table[..., 8:] == table[:, :1, 8:]).all()
    assert len(table.view(15, 16).unique(dim=0)) == 15


@pytest.mark.parametrize(
    ("image_size", "patch_size", "channels"), [((24, 40), 8, 3), ((32, 48), (16, 8), 1), (36, 8, 5)]
)
def test_any_image_and_patch_shape_and_number_of_channels(tiny_config, image_size, patch_size, channels):
    config = changed(tiny_config, image_size=image_size, patch_size=patch_size, num_channels=channels)
    model = IJepaForPretraining(config)
    pixel_values = torch.randn(2, channels, *config.image_height_and_width)
    indices = torch.arange(config.num_patches).expand(2, 1, -1)
    output = model(pixel_values, indices[..., :4], indices[..., 4:])
    assert output.predictions.shape[3] == config.num_patches - 4
    output.loss.backward()


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (16, 40)])
def test_other_resolutions_run_through_all_three_networks(tiny_model, tiny_batch, size):
    pixel_values = torch.randn(2, 3, *size)
    with pytest.raises(ValueError, match=rf"{size[0]}, {size[1]}.*image_size.*interpolate_pos_encoding"):
        tiny_model(**{**tiny_batch, "pixel_values": pixel_values})
    last_patch = size[0] // 8 * size[1] // 8 - 1
    tiny_batch["target_indices"][:] = last_patch - torch.arange(3)
    tiny_batch["context_indices"] %= last_patch
    output = tiny_model(**{**tiny_batch, "pixel_values": pixel_values}, interpolate_pos_encoding=True)
    assert torch.isfinite(output.loss) and output.target_hidden_states.shape[1] == last_patch + 1


def test_interpolation_at_the_trained_resolution_changes_nothing(tiny_model, tiny_batch):
    plain, interpolated = (
        tiny_model.ijepa(tiny_batch["pixel_values"], interpolate_pos_encoding=flag)[0] for flag in (False, True)
    )
    assert torch.equal(plain, interpolated)


def test_wrong_channels_and_masks_are_refused(tiny_model, tiny_batch):
    with pytest.raises(ValueError, match=r"1 channels.*built for 3"):
        tiny_model.ijepa(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"context_indices.*\(2, masks, patches\).*\(2, 5\)"):
        tiny_model(**{**tiny_batch, "context_indices": tiny_batch["context_indices"][:, 0]})
    for targets in (torch.zeros(2, 5), torch.zeros(3, 1, 5), torch.zeros(2, 2, 1, 5), torch.zeros(3, 1, 1, 5)):
        message = (
            rf"target_indices.*\(2, masks, patches\) or \(2, 1 contexts.*got \({', '.join(map(str, targets.shape))}\)"
        )
        with pytest.raises(ValueError, match=message):
            tiny_model(**{**tiny_batch, "target_indices": targets.long()})


def test_pooler_output_is_the_mean_of_the_encoded_patches(tiny_model, tiny_batch):
    for indices in (None, tiny_batch["context_indices"][:, 0]):
        output = tiny_model.ijepa(tiny_batch["pixel_values"], patch_indices=indices)
        assert torch.equal(output.pooler_output, output.last_hidden_state.mean(1))


# Transformers conventions


def test_hidden_states_and_attentions(tiny_config, tiny_batch):
    model = IJepaModel._from_config(tiny_config, attn_implementation="eager").eval()
    output = model(tiny_batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 16))
    assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    assert torch.equal(model(tiny_batch["pixel_values"], return_dict=False)[0], output.last_hidden_state)


def test_pretraining_gives_hidden_states_and_attentions_of_the_context_encoder(tiny_config, tiny_batch):
    model = IJepaForPretraining._from_config(tiny_config, attn_implementation="eager").eval()
    output = model(**tiny_batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 5, 32)] * 4
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 4, 5, 5)] * 3
    normed = model.context_encoder.layernorm(output.hidden_states[-1])
    assert torch.equal(normed.unsqueeze(1), output.context_hidden_states)
    assert model(**tiny_batch).hidden_states is None


def test_gradient_checkpointing_changes_no_gradient(tiny_model, tiny_batch):
    tiny_model.train()
    tiny_model(**tiny_batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}
    tiny_model.zero_grad()
    tiny_model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in tiny_model.predictor.layers)
    tiny_model(**tiny_batch).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(tiny_model.get_parameter(name).grad, gradient, atol=1e-7, rtol=1e-5)


def test_stochastic_depth_drops_whole_branches_in_training_and_nothing_in_evaluation(tiny_config):
    torch.manual_seed(0)
    model = IJepaModel(changed(tiny_config, drop_path_rate=0.9)).train()
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.45, 0.9])
    dropped = model.layers[2].drop_path(torch.ones(4000, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0.0, 10.0])
    assert (dropped == dropped[:, :1, :1]).all() and dropped.mean().item() == pytest.approx(1.0, abs=0.2)
    assert torch.equal(model.eval().layers[2].drop_path(dropped), dropped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tiny_model, tiny_batch, dtype):
    expected = tiny_model(**tiny_batch)
    output = tiny_model.to(dtype)(**tiny_batch)
    assert output.predictions.dtype == dtype and output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)


def test_autocast_keeps_float32_weights_and_loss(tiny_model, tiny_batch):
    expected = tiny_model(**tiny_batch).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model(**tiny_batch)
        stream = tiny_model.ijepa(tiny_batch["pixel_values"], output_hidden_states=True).hidden_states
    output.loss.backward()
    assert {hidden_states.dtype for hidden_states in stream} == {torch.float32}
    assert output.loss.dtype == torch.float32 and output.loss.item() == pytest.approx(expected, rel=0.05)
    assert tiny_model.predictor.mask_token.grad.dtype == torch.float32


def test_the_encoder_compiles_in_one_graph(tiny_model, tiny_batch):
    expected = tiny_model(**tiny_batch)
    encoder = torch.compile(tiny_model.ijepa, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(encoder(tiny_batch["pixel_values"])[0], expected.target_hidden_states)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_pretraining_compiles_for_masks_of_any_length(tiny_model, whole):
    """With Inductor, which fails where the sum of two changing lengths is in a graph."""
    tiny_model.train()
    expected, masking = copy.deepcopy(tiny_model), MultiBlockMasking((4, 4), min_patches=1)
    names = list(tiny_model.state_dict())
    if whole:
        compiled = torch.compile(tiny_model)
    else:
        compiled = tiny_model
        compiled.compile()
    assert list(tiny_model.state_dict()) == names
    lengths = set()
    for step in range(4):
        contexts, targets = masking.sample(2, 0, step)
        lengths.add((contexts.shape[-1], targets.shape[-1]))
        losses = [model(torch.ones(2, 3, 32, 32), contexts, targets).loss for model in (compiled, expected)]
        sum(losses).backward()
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    assert len(lengths) > 1
    for ours, theirs in zip(tiny_model.parameters(), expected.parameters(), strict=True):
        assert ours.grad is None or torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3) is None


def test_sharding_unit_is_the_layer_of_encoder_and_predictor(tiny_model):
    (name,) = tiny_model._no_split_modules
    assert {type(layer).__name__ for layer in (*tiny_model.ijepa.layers, *tiny_model.predictor.layers)} == {name}


# Heads


def test_classifier_reads_the_mean_of_the_patches_and_has_the_usual_losses(tiny_config, tiny_batch):
    pixel_values = tiny_batch["pixel_values"]
    cases = {
        "single_label_classification": (5, torch.tensor([1, 4])),
        "multi_label_classification": (5, torch.rand(2, 5)),
        "regression": (1, torch.rand(2)),
    }
    for problem_type, (num_labels, labels) in cases.items():
        model = IJepaForImageClassification(changed(tiny_config, num_labels=num_labels)).eval()
        output = model(pixel_values, labels=labels)
        assert model.config.problem_type == problem_type
        pooled = model.ijepa(pixel_values).pooler_output
        torch.testing.assert_close(output.logits, model.classifier(pooled))
        output.loss.backward()
    expected = torch.nn.functional.mse_loss(output.logits.squeeze(), labels)
    torch.testing.assert_close(output.loss, expected)


def test_backbone_maps_are_the_encoders_tokens_in_image_shape(tiny_config):
    backbone = IJepaBackbone(changed(tiny_config, out_features=["stem", "stage2", "stage3"], out_indices=None)).eval()
    pixel_values = torch.randn(2, 3, 16, 40)  # another size than trained, not square
    output = backbone(pixel_values, output_hidden_states=True)
    assert [tuple(feature_map.shape) for feature_map in output.feature_maps] == [(2, 32, 2, 5)] * 3
    assert backbone.channels == [32, 32, 32]
    expected = backbone.layernorm(output.hidden_states[2])
    assert torch.equal(output.feature_maps[1][:, :, 1, 3], expected[:, 1 * 5 + 3])
    assert backbone(pixel_values).hidden_states is None


# Another resolution for good


@pytest.mark.parametrize("image_size", [64, 24, (48, 64)])
@pytest.mark.parametrize("model_class", [IJepaModel, IJepaForImageClassification, IJepaBackbone])
def test_a_resized_model_equals_interpolation_in_every_pass(tiny_config, model_class, image_size):
    model = model_class(tiny_config).eval()
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    pixel_values = torch.randn(2, 3, height, width)
    options = {} if model_class is IJepaBackbone else {"interpolate_pos_encoding": True}
    before = model(pixel_values, **options, return_dict=False)[0]
    model.resize_image(image_size)
    after = model(pixel_values, return_dict=False)[0]
    for expected, found in zip(before, after, strict=True):
        assert torch.equal(found, expected)
    assert model.config.image_size == image_size and model.config.grid_size == (height // 8, width // 8)


def test_resizing_reaches_both_encoders_and_the_predictor(tiny_model, tiny_batch):
    tiny_model.eval()
    batch = {**tiny_batch, "pixel_values": torch.randn(2, 3, 64, 48)}
    before = tiny_model(**batch, interpolate_pos_encoding=True)
    tiny_model.resize_image((64, 48))
    assert torch.equal(tiny_model(**batch).predictions, before.predictions)
    assert torch.equal(tiny_model(**batch).targets, before.targets)
    with pytest.raises(ValueError, match="do not match the model's image_size"):
        tiny_model(**tiny_batch)


@pytest.mark.parametrize("model_class", [IJepaForImageClassification, IJepaForPretraining])
def test_a_resized_directory_opens_at_its_new_size_here_and_in_stock_transformers(tiny_config, tmp_path, model_class):
    model = model_class(tiny_config)
    model.resize_image((64, 48))
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model.eval().ijepa(pixel_values).last_hidden_state
        for reader in (IJepaModel, stock.IJepaModel):
            assert torch.equal(reader.from_pretrained(tmp_path)(pixel_values).last_hidden_state, expected)
        again = model_class.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
        if model_class is IJepaForImageClassification:
            theirs = stock.IJepaForImageClassification.from_pretrained(tmp_path)
            assert torch.equal(theirs(pixel_values).logits, model(pixel_values).logits)


def test_an_impossible_size_changes_nothing(tiny_model, tiny_batch):
    tiny_model.eval()
    before = tiny_model(**tiny_batch).loss
    for image_size in (4, (64, 4), 0):
        with pytest.raises(ValueError, match="image_size"):
            tiny_model.resize_image(image_size)
    assert tiny_model.config.image_size == 32 and torch.equal(tiny_model(**tiny_batch).loss, before)


# An untrained head


def warnings_of(action):
    """What the model's own logger and Transformers' say, and what `action` returns."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("ijepa_transformers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        return records, action()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def test_an_untrained_classifier_is_named_once_and_a_trained_one_not_at_all(trained, tmp_path):
    trained.save_pretrained(tmp_path / "pretrained")
    for reader in (IJepaForImageClassification, AutoModelForImageClassification):
        records, (model, loading) = warnings_of(
            lambda reader=reader: reader.from_pretrained(tmp_path / "pretrained", output_loading_info=True)
        )
        assert (
            len(records) == 1 and "has no trained classifier: the class names it predicts mean nothing" in records[0]
        )
        assert loading["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert model.classifier.weight.std() > 0
    model.save_pretrained(tmp_path / "fine_tuned")
    records, again = warnings_of(lambda: AutoModelForImageClassification.from_pretrained(tmp_path / "fine_tuned"))
    assert records == [] and torch.equal(again.classifier.weight, model.classifier.weight)


# Initial weights


def test_the_classifier_starts_small_whatever_the_initial_weights_of_the_encoder():
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = IJepaForImageClassification(IJepaConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.125))
    model = IJepaForImageClassification(model.config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = 0.02 if name == "classifier" else 0.125
            assert module.weight.std().item() == pytest.approx(expected, rel=0.3), name


def test_a_narrow_encoder_needs_larger_initial_weights():
    """With the published deviation the layers of a narrow encoder add next to nothing to what comes in."""
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    added = {}
    for deviation in (0.02, 96**-0.5):
        torch.manual_seed(0)
        config = IJepaConfig(
            **sizes, image_size=32, patch_size=4, patch_embedding_init="fan_in", initializer_range=deviation
        )
        states = IJepaModel(config).eval()(torch.randn(4, 3, 32, 32), output_hidden_states=True).hidden_states
        added[deviation] = ((states[-1] - states[0]).norm() / states[0].norm()).item()
    published, larger = added.values()
    assert published < 0.1 < 0.5 < larger


def test_a_configuration_that_asks_for_tuples_or_hidden_states_is_obeyed(tiny_config, tiny_batch):
    model = IJepaForPretraining(changed(tiny_config, output_hidden_states=True)).eval()
    assert len(model(**tiny_batch).hidden_states) == 4
    model = IJepaForPretraining(changed(tiny_config, return_dict=False)).eval()
    assert isinstance(model(**tiny_batch), tuple)
    model = IJepaForImageClassification(changed(tiny_config, return_dict=False)).eval()
    assert isinstance(model(tiny_batch["pixel_values"]), tuple)


def steps(model, batch, number, update):
    optimizer = torch.optim.AdamW(model.context_encoder.parameters(), fused=True)
    model.train()
    for _ in range(number):
        for _ in range(2):  # accumulated
            model(**batch).loss.backward()
        optimizer.step()
        if update:
            model.update_target_encoder(0.9)


def test_a_target_encoder_that_never_moves_is_warned_of_once(tiny_model, tiny_batch, monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_ijepa.logger, "warning", warnings.append)
    steps(tiny_model, tiny_batch, 9, update=False)
    (warning,) = warnings
    assert "target encoder has not moved" in warning and "TargetEncoderCallback" in warning


def test_no_warning_of_a_still_target_if_it_is_updated_or_nothing_is_trained(tiny_model, tiny_batch, monkeypatch):
    monkeypatch.setattr(modeling_ijepa.logger, "warning", pytest.fail)
    steps(tiny_model, tiny_batch, 0, update=True)
    for _ in range(6):
        tiny_model(**tiny_batch)
    steps(tiny_model, tiny_batch, 4, update=True)


def test_tokens_are_cast_once_for_three_products_without_gradients(tiny_config, monkeypatch):
    model = IJepaModel._from_config(tiny_config, attn_implementation="eager").eval()
    pixel_values = torch.randn(2, tiny_config.num_channels, *tiny_config.image_height_and_width)
    seen = []
    for layer in model.layers:
        layer.attention.k_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))

    def features():
        with torch.autocast("cpu", torch.bfloat16):
            return model(pixel_values).last_hidden_state

    with_gradients = features()
    with torch.no_grad():
        assert torch.equal(features(), with_gradients)
        model(pixel_values)
    depth = len(model.layers)
    assert seen == [torch.float32] * depth + [torch.bfloat16] * depth + [torch.float32] * depth
