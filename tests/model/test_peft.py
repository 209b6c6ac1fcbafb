"""Adapters of peft go into every layer, the patch projection included, and leave with the weights."""

import copy

import peft
import pytest
import torch
from torch import nn

from ijepa_transformers import IJepaForImageClassification, IJepaForPretraining, IJepaModel


CONVOLUTION = ["patch_embeddings.projection"]
ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=[*CONVOLUTION, "q_proj"]),
    "dora": peft.LoraConfig(target_modules=CONVOLUTION, use_dora=True),
    "loha": peft.LoHaConfig(target_modules=CONVOLUTION, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(target_modules=CONVOLUTION),
    "all linear": peft.LoraConfig(target_modules="all-linear"),
}


def stirred(model):
    """Adapters start at zero. These have values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def test_the_patch_projection_gives_what_a_convolution_gives(tiny_model):
    projection = tiny_model.ijepa.embeddings.patch_embeddings.projection
    plain = nn.Conv2d(3, 32, projection.kernel_size, stride=projection.stride)
    plain.load_state_dict(projection.state_dict())
    rows, columns = projection.kernel_size
    for pixel_values in (torch.randn(2, 3, 4 * rows, 3 * columns + 1), torch.randn(2, 3, 5 * rows, columns)):
        torch.testing.assert_close(projection(pixel_values), plain(pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_see_all_patches_and_chosen_ones_alike_and_can_be_merged(tiny_model, tiny_batch, kind):
    encoder = copy.deepcopy(tiny_model.ijepa).requires_grad_(True)
    pixel_values = tiny_batch["pixel_values"]
    before = encoder(pixel_values).last_hidden_state
    model = stirred(peft.get_peft_model(encoder, copy.deepcopy(ADAPTERS[kind])))
    tokens = model(pixel_values).last_hidden_state
    assert (tokens - before).abs().max() > 1e-3
    everything = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    torch.testing.assert_close(model(pixel_values, patch_indices=everything)[0], tokens, atol=1e-4, rtol=0)
    model(pixel_values, patch_indices=everything[:, :3])[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    merged = model.merge_and_unload()
    assert type(merged) is IJepaModel and "lora" not in "".join(merged.state_dict())
    torch.testing.assert_close(merged(pixel_values).last_hidden_state, tokens, atol=1e-4, rtol=0)


def test_a_classifier_with_adapters_is_saved_and_opened(tiny_config, tiny_batch, tmp_path):
    tiny_config.num_labels = 3
    IJepaForImageClassification(tiny_config).save_pretrained(tmp_path / "base")
    base = IJepaForImageClassification.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["projection", "v_proj"], modules_to_save=["classifier"])
    model = stirred(peft.get_peft_model(base, settings))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        IJepaForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(again(tiny_batch["pixel_values"]).logits, model(tiny_batch["pixel_values"]).logits)


def test_pretraining_with_adapters_in_both_encoders_updates_the_target(tiny_model, tiny_batch):
    model = stirred(peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["projection", "q_proj"])))
    model(**tiny_batch).loss.backward()
    inner = model.base_model.model
    assert isinstance(inner, IJepaForPretraining)
    inner.update_target_encoder(0.0)
    pairs = zip(inner.ijepa.parameters(), inner.context_encoder.parameters(), strict=True)
    assert all(torch.equal(target, context) for target, context in pairs)


def test_adapters_in_one_encoder_only_are_refused_by_the_moving_average(tiny_model):
    model = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=r"context_encoder.*q_proj"))
    with pytest.raises(ValueError, match="Adapters must be in both encoders"):
        model.base_model.model.update_target_encoder(0.5)
