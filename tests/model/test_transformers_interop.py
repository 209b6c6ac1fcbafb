"""Directories cross between this package and stock Transformers, in both directions, bit for bit or not at all."""

import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.ijepa import modeling_ijepa as stock

from ijepa_transformers import IJepaBackbone, IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from ijepa_transformers.modeling_ijepa import PRETRAINING_INDEX, weight_files, write_pretraining_index
from tests import forked


EARLY_HUB_NAMES = {  # stock name now -> name in the first converted directories on the Hub
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@pytest.fixture
def directory(trained, tmp_path):
    trained.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(directory, edit):
    for path in weight_files(directory):
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    if (directory / PRETRAINING_INDEX).exists():
        write_pretraining_index(directory)


def rename_to_early_hub_names(weights):
    renamed = {}
    for key, value in weights.items():
        for now, early in EARLY_HUB_NAMES.items():
            key = key.replace(now, early)
        renamed[key] = value
    return renamed


def test_auto_classes_give_this_packages_models(directory):
    expected = {
        transformers.AutoModel: IJepaModel,
        transformers.AutoModelForPreTraining: IJepaForPretraining,
        transformers.AutoModelForImageClassification: IJepaForImageClassification,
    }
    assert type(transformers.AutoConfig.from_pretrained(directory)) is IJepaConfig
    for auto_class, model_class in expected.items():
        assert type(auto_class.from_pretrained(directory)) is model_class
    config = IJepaConfig.from_pretrained(directory)
    assert type(transformers.AutoBackbone.from_config(config)) is IJepaBackbone


def test_stock_classes_go_on_working_beside_ours(directory, tiny_batch):
    model = stock.IJepaModel.from_pretrained(directory)
    assert type(model.config) is stock.IJepaConfig and type(model).__module__.startswith("transformers.")
    assert type(transformers.AutoModel.from_config(stock.IJepaConfig(hidden_size=24))) is stock.IJepaModel
    assert torch.equal(
        model(tiny_batch["pixel_values"])[0], IJepaModel.from_pretrained(directory)(tiny_batch["pixel_values"])[0]
    )


def test_stock_auto_model_reads_the_target_encoder_without_this_package(directory, trained, tiny_batch, tmp_path):
    torch.save(tiny_batch["pixel_values"], tmp_path / "pixels.pt")
    program = f"""
import sys, torch
from transformers import AutoModel, AutoModelForImageClassification
pixels = torch.load({str(tmp_path / "pixels.pt")!r})
encoder = AutoModel.from_pretrained({str(directory)!r})
classifier = AutoModelForImageClassification.from_pretrained({str(directory)!r})
with torch.no_grad():
    torch.save([encoder(pixels)[0], classifier.ijepa(pixels)[0]], {str(tmp_path / "features.pt")!r})
assert "ijepa_transformers" not in sys.modules and type(encoder).__module__.startswith("transformers.")
"""
    forked.run(["-c", program], cwd=tmp_path, kind="stock", check=True)
    expected = trained.ijepa(tiny_batch["pixel_values"])[0]
    for features in torch.load(tmp_path / "features.pt"):
        assert torch.equal(features, expected)


def test_every_class_reads_the_target_encoder_from_a_pretraining_directory(directory, trained):
    expected = trained.ijepa.state_dict()
    for model in (
        IJepaModel.from_pretrained(directory),
        IJepaBackbone.from_pretrained(directory),
        IJepaForImageClassification.from_pretrained(directory).ijepa,
    ):
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_a_pretraining_directory_comes_back_bit_for_bit_and_trainable_as_before(directory, trained):
    again = IJepaForPretraining.from_pretrained(directory)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in again.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in trained.parameters()]


@pytest.mark.parametrize("early_names", [False, True])
@pytest.mark.parametrize("stock_class", [stock.IJepaModel, stock.IJepaForImageClassification])
def test_stock_directories_load_completely(tiny_config, tiny_batch, tmp_path, stock_class, early_names):
    theirs = stock_class(stock.IJepaConfig(**tiny_config.to_dict())).eval()
    theirs.save_pretrained(tmp_path, save_original_format=False)
    if early_names:
        edit_weights(tmp_path, rename_to_early_hub_names)
        assert any("attention.attention.query" in key for key in load_file(tmp_path / "model.safetensors"))
    encoder = theirs if stock_class is stock.IJepaModel else theirs.ijepa
    expected = encoder(tiny_batch["pixel_values"])[0]
    for model in (IJepaModel.from_pretrained(tmp_path), IJepaForPretraining.from_pretrained(tmp_path).context_encoder):
        assert torch.equal(model(tiny_batch["pixel_values"])[0], expected)
    if stock_class is stock.IJepaForImageClassification:
        ours = IJepaForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(ours(tiny_batch["pixel_values"]).logits, theirs(tiny_batch["pixel_values"]).logits)


def test_what_stock_saves_by_default_loads_here(directory, tiny_batch, tmp_path):
    theirs = stock.IJepaModel.from_pretrained(directory)
    theirs.save_pretrained(tmp_path / "stock")
    ours = IJepaModel.from_pretrained(tmp_path / "stock")
    assert torch.equal(ours(tiny_batch["pixel_values"])[0], theirs(tiny_batch["pixel_values"])[0])


def test_own_saves_use_own_names_even_after_loading_early_ones(tiny_config, tmp_path):
    stock.IJepaModel(stock.IJepaConfig(**tiny_config.to_dict())).save_pretrained(tmp_path / "a")
    edit_weights(tmp_path / "a", rename_to_early_hub_names)
    ours = IJepaModel.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == set(ours.state_dict())


@pytest.mark.parametrize("resolution", [(32, 32), (48, 48), (64, 64)])
def test_stock_and_own_encoder_agree_layer_by_layer(directory, resolution):
    pixel_values = torch.randn(2, 3, *resolution)
    outputs = [
        model_class.from_pretrained(directory, attn_implementation="eager")(
            pixel_values, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True
        )
        for model_class in (stock.IJepaModel, IJepaModel)
    ]
    for theirs, ours in zip(*(output.hidden_states + output.attentions for output in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_an_encoder_only_checkpoint_starts_both_encoders_and_warns_once(directory, trained, tmp_path, caplog):
    trained.ijepa.save_pretrained(tmp_path / "encoder")
    logger = logging.getLogger("ijepa_transformers.modeling_ijepa")
    logger.addHandler(caplog.handler)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        model, loading = IJepaForPretraining.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
        transformers_logger.removeHandler(caplog.handler)
    (warning,) = {record.getMessage() for record in caplog.records}
    assert "one encoder only" in warning
    assert loading["missing_keys"] == {key for key in model.state_dict() if not key.startswith("ijepa.")}
    for encoder in (model.ijepa, model.context_encoder):
        assert all(torch.equal(v, trained.ijepa.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert model.predictor.mask_token.std() > 0 and model.context_encoder.layers[0].mlp.fc1.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in model.ijepa.parameters())


@pytest.mark.parametrize("lost", ["ijepa.layers.1.mlp.fc1.weight", "ijepa.embeddings.position_embeddings"])
@pytest.mark.parametrize("model_class", [IJepaModel, IJepaForImageClassification, IJepaBackbone, IJepaForPretraining])
def test_a_partly_random_encoder_is_an_error(directory, lost, model_class):
    edit_weights(directory, lambda weights: {key: value for key, value in weights.items() if key != lost})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights.*" + lost.removeprefix("ijepa.")):
        model_class.from_pretrained(directory)


@pytest.mark.parametrize("lost", ["context_encoder.layers.0.mlp.fc1.bias", "predictor.mask_token"])
def test_a_partly_lost_context_encoder_or_predictor_is_an_error(directory, lost):
    edit_weights(directory, lambda weights: {key: value for key, value in weights.items() if key != lost})
    with pytest.raises(ValueError, match=lost):
        IJepaForPretraining.from_pretrained(directory)


def test_weights_of_another_shape_are_an_error(directory):
    with pytest.raises(RuntimeError, match="size"):
        IJepaModel.from_pretrained(directory, config=IJepaConfig.from_pretrained(directory, intermediate_size=128))


def test_ignoring_mismatched_sizes_is_for_the_classifier_only(tiny_config, directory, tmp_path):
    config = IJepaConfig.from_pretrained(directory, num_labels=3)
    IJepaForImageClassification(config).save_pretrained(tmp_path / "three")
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    model = IJepaForImageClassification.from_pretrained(tmp_path / "three", **options)
    assert model.classifier.weight.shape[0] == 7
    with pytest.raises(ValueError, match=r"lacks.*or has them in another shape.*position_embeddings"):
        IJepaForImageClassification.from_pretrained(tmp_path / "three", image_size=64, **options)


def test_half_precision_loading_runs_in_half_precision(directory, trained, tiny_batch):
    expected = trained(**tiny_batch)
    output = IJepaForPretraining.from_pretrained(directory, dtype=torch.bfloat16)(**tiny_batch)
    assert output.predictions.dtype == output.target_hidden_states.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)


OWN_CLASSES = [IJepaModel, IJepaBackbone, IJepaForImageClassification, IJepaForPretraining]


@pytest.mark.parametrize("model_class", OWN_CLASSES)
def test_a_stock_configuration_makes_the_model_that_ours_makes(tiny_config, model_class):
    theirs = stock.IJepaConfig(**tiny_config.to_dict(), num_labels=3, attn_implementation="eager")
    for model in (model_class(theirs), model_class._from_config(theirs)):
        assert type(model.config) is IJepaConfig and model.config.num_labels == 3
        assert model.config.hidden_size == 32 and model.config._attn_implementation == "eager"
    assert type(theirs) is stock.IJepaConfig


@pytest.mark.parametrize("model_class", OWN_CLASSES)
def test_a_directory_opens_with_a_stock_configuration(directory, trained, model_class):
    model = model_class.from_pretrained(directory, config=stock.IJepaConfig.from_pretrained(directory))
    encoder = getattr(model, "ijepa", model)
    assert type(model.config) is IJepaConfig
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in trained.ijepa.state_dict().items())
    if model_class is IJepaForPretraining:
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.state_dict().items())


def test_the_configuration_of_another_model_is_refused_by_name():
    with pytest.raises(ValueError, match="need an IJepaConfig, got a ViTConfig of model type 'vit'"):
        IJepaModel(transformers.ViTConfig())


def test_arguments_of_the_stock_class_work_or_are_refused_by_name(directory, tiny_batch):
    pixel_values = tiny_batch["pixel_values"]
    model = transformers.AutoModel.from_pretrained(directory, add_pooling_layer=False, use_mask_token=False)
    assert type(model) is IJepaModel
    for name in ("add_pooling_layer", "use_mask_token"):
        with pytest.raises(ValueError, match=f"{name} must be False"):
            IJepaModel.from_pretrained(directory, **{name: True})
    mask = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(model(pixel_values, bool_masked_pos=None)[0], model(pixel_values)[0])
    for name in ("bool_masked_pos", "attention_mask", "head_mask"):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            model(pixel_values, **{name: mask})
    with pytest.raises(ValueError, match=r"patch_indices must be indices.*torch\.bool"):
        model(pixel_values, mask)


def test_loading_info_names_the_new_predictor_and_the_new_classifier(trained, tmp_path):
    trained.ijepa.save_pretrained(tmp_path)
    model, loading = transformers.AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {key for key in model.state_dict() if key.startswith("predictor.")} <= set(loading["missing_keys"])
    _, loading = IJepaForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}
