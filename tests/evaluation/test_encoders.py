"""Encoders: which one a spec opens, and which features are read from it.

Shapes: B images, N tokens, D features.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ijepa_transformers import IJepaForImageClassification, IJepaModel
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.encoders import (
    EncoderSpec,
    RawPixels,
    architecture,
    encoder_features,
    feature_widths,
    load_classifier,
    load_config,
    load_encoder,
    load_pretraining_model,
    load_processor,
    open_encoder,
    random_encoder,
    weights_digest,
)


FLOAT = torch.float32


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(trained, tmp_path):
    """A pretraining directory whose two encoders differ."""
    trained.save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def stock(kind, directory, head="Model", **changes):
    """A tiny model of Transformers, with fresh weights, saved with `head`."""
    transformer = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    sizes = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ViTMAE": {**transformer, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2},
    }.get(kind, transformer)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    model.save_pretrained(directory)
    return model


# Specs


@pytest.mark.parametrize(
    "text, spec",
    [
        ("runs/a", EncoderSpec("model", "runs/a", "target")),
        ("runs/a@context", EncoderSpec("model", "runs/a", "context")),
        ("runs/me@home", EncoderSpec("model", "runs/me@home", "target")),
        ("runs/a#1", EncoderSpec("model", "runs/a#1", "target")),
        ("random:runs/a", EncoderSpec("random", "runs/a", "target", 0)),
        ("random:runs/a#12", EncoderSpec("random", "runs/a", "target", 12)),
        ("random:runs/a@context#3", EncoderSpec("random", "runs/a", "context", 3)),
        ("raw_pixels:runs/a@context", EncoderSpec("raw_pixels", "runs/a", "target")),
    ],
)
def test_specs(text, spec):
    assert EncoderSpec.parse(text) == spec
    assert EncoderSpec.parse(str(spec)) in (spec, EncoderSpec(spec.kind, spec.source, "target", spec.seed))


def test_a_spec_without_an_encoder_has_the_default_encoder():
    assert EncoderSpec.parse("a", "context").encoder == "context"
    assert EncoderSpec.parse("a@target", "context").encoder == "target"
    for text in ("", "random:", "@context", "raw_pixels:"):
        with pytest.raises(ValueError, match="names no model"):
            EncoderSpec.parse(text)


def test_target_and_context_are_the_two_encoders(saved, trained, images):
    for name, network in (("target", trained.ijepa), ("context", trained.context_encoder)):
        model = open_encoder(EncoderSpec.parse(f"{saved}@{name}"), FLOAT)
        assert weights_digest(model) == weights_digest(network) and not model.training
    assert weights_digest(trained.ijepa) != weights_digest(trained.context_encoder)


def test_a_random_encoder_has_the_architecture_and_other_weights_for_each_seed(saved):
    digests = {}
    for text in (saved, f"random:{saved}", f"random:{saved}#0", f"random:{saved}#1"):
        state = torch.random.get_rng_state()
        model = open_encoder(EncoderSpec.parse(text), FLOAT)
        assert type(model) is IJepaModel and not model.training
        assert torch.equal(torch.random.get_rng_state(), state) or not text.startswith("random")
        digests[text] = weights_digest(model)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        assert shapes == {name: value.shape for name, value in IJepaModel(model.config).state_dict().items()}
    assert digests[f"random:{saved}"] == digests[f"random:{saved}#0"]
    assert len(set(digests.values())) == 3


def test_a_random_encoder_is_what_pretraining_starts_from(saved, tiny_config):
    model = open_encoder(EncoderSpec.parse(f"random:{saved}#5"), FLOAT)
    torch.manual_seed(5)
    assert weights_digest(model) == weights_digest(IJepaModel._from_config(tiny_config))


def test_precision(saved):
    for spec in (saved, f"random:{saved}"):
        assert open_encoder(EncoderSpec.parse(spec), torch.bfloat16).dtype == torch.bfloat16


# Other models


def test_the_encoder_of_a_classifier_has_no_random_pooler(tmp_path, images):
    """The checkpoint has no pooler. Transformers would add one with random weights and only warn."""
    classifier = stock("ViT", tmp_path, "ForImageClassification")
    model = load_encoder(str(tmp_path), "target", FLOAT)
    expected = classifier.vit(images).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder_features(model, images, ["last"])["last"], expected)
    random = open_encoder(EncoderSpec.parse(f"random:{tmp_path}"), FLOAT)
    assert random.pooler is None and not any("pooler" in name for name in random.state_dict())


def test_a_pooler_with_weights_is_used(tmp_path, images):
    model = stock("ViT", tmp_path)
    loaded = load_encoder(str(tmp_path), "target", FLOAT)
    torch.testing.assert_close(encoder_features(loaded, images, ["last"])["last"], model(images).pooler_output)
    assert open_encoder(EncoderSpec.parse(f"random:{tmp_path}"), FLOAT).pooler is not None


def test_an_encoder_with_missing_weights_is_an_error(tmp_path):
    model = stock("ViT", tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.fc1" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="it lacks 2 weights of ViTModel, for example"):
        load_encoder(str(tmp_path), "target", FLOAT)


def harm(directory, name, content):
    """Replaces the file by `content`, or changes the settings in it."""
    path = Path(directory, name)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content}).encode()
    path.write_bytes(content)


def ways_to_open(saved):
    """Whatever opens the directory of a pretraining run."""
    return (
        lambda: load_encoder(saved, "target", FLOAT),
        lambda: load_encoder(saved, "context", FLOAT),
        lambda: load_pretraining_model(saved),
        lambda: load_classifier(saved, load_config(saved)),
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", b"\x80"),
        ("model.safetensors", b""),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"hidden_size": 64}),
        ("config.json", {"patch_size": 0}),
        ("config.json", {"num_hidden_layers": 1}),
        ("config.json", {"hidden_act": "nothing"}),
    ],
)
def test_a_damaged_model_is_one_sentence_with_its_name(saved, name, content):
    harm(saved, name, content)
    for open_it in ways_to_open(saved):
        with pytest.raises(ValueError, match=re.escape(f"The model {saved!r} cannot be opened: ")):
            open_it()


def test_a_weight_of_another_shape_is_named(saved):
    harm(saved, "config.json", {"num_channels": 1})
    with pytest.raises(ValueError, match=r"projection\.weight"):
        load_encoder(saved, "target", FLOAT)


def test_a_weight_of_another_shape_is_named_in_other_encoders(tmp_path):
    stock("ViT", tmp_path)
    harm(tmp_path, "config.json", {"num_channels": 1})
    with pytest.raises(ValueError, match=r"its weight '.*projection\.weight' has the shape \(.*config.json asks"):
        load_encoder(str(tmp_path), "target", FLOAT)


def cast(directory, part, dtype):
    """Saves the weights of which the name has `part` in another type. The first one is returned."""
    path = Path(directory, "model.safetensors")
    weights = load_file(path)
    names = sorted(name for name in weights if part in name)
    save_file(weights | {name: weights[name].to(dtype) for name in names}, path, metadata={"format": "pt"})
    return names[0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_in_the_place_of_weights_are_refused(saved, dtype):
    name = cast(saved, "fc1.weight", dtype)
    sentence = (
        f"The model {saved!r} cannot be opened: model.safetensors holds {name!r} as {dtype}, and the model needs"
        " floating-point numbers."
    )
    for open_it in ways_to_open(saved):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            open_it()


def test_integers_in_the_weights_of_a_hub_model_are_refused(saved, tmp_path, monkeypatch):
    cast(saved, "fc1.weight", torch.int8)
    cached = tmp_path / "hub" / "models--me--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    Path(saved).rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("ijepa_transformers.hub.why_unreachable", lambda: "there is no network")
    with pytest.raises(ValueError, match=r"'me/model' cannot be opened: model\.safetensors holds .* as torch\.int8"):
        load_encoder("me/model", "target", FLOAT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_usual_precision_are_opened(saved, dtype):
    cast(saved, "", dtype)
    assert load_encoder(saved, "target", FLOAT).dtype == FLOAT


def test_integers_that_are_no_weights_are_left_alone(tmp_path, saved):
    """Counts of batches; and weights of which Transformers knows how they were quantized."""
    stock("ResNet", tmp_path / "resnet")
    assert cast(tmp_path / "resnet", "num_batches_tracked", torch.int64)
    load_encoder(str(tmp_path / "resnet"), "target", FLOAT)
    cast(saved, "fc1.weight", torch.int8)
    harm(saved, "config.json", {"quantization_config": {"quant_method": "another library"}})
    load_encoder(saved, "target", FLOAT)


def test_a_pointer_in_the_place_of_weights_is_told(saved):
    harm(saved, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match="weights are damaged, cut short, or only a pointer of Git LFS"):
        load_encoder(saved, "target", FLOAT)


def test_the_image_processor_of_copies_on_the_hub_is_told(saved, capsys):
    load_processor(saved)
    assert capsys.readouterr().err == ""
    transformers.ViTImageProcessor().save_pretrained(saved)
    load_processor(saved)
    assert f"The image processor of {saved!r} is ViT's" in capsys.readouterr().err


def test_a_processor_that_does_not_normalise_may_have_any_mean(saved):
    transformers.ViTImageProcessor(do_normalize=False, image_mean=0.5).save_pretrained(saved)
    assert not load_processor(saved).do_normalize


def test_a_damaged_configuration_is_not_called_the_image_processor_alone(saved):
    harm(saved, "config.json", b"{bad")
    with pytest.raises(ValueError, match=r"cannot be opened: config\.json is damaged: Expecting"):
        load_processor(saved)


@pytest.mark.parametrize("content", [b"[]", b"{", {"image_processor_type": 5}, {"size": "x"}])
def test_a_damaged_image_processor_is_one_sentence(saved, content):
    harm(saved, "preprocessor_config.json", content)
    with pytest.raises(ValueError, match=r"image processor of .* cannot be opened: "):
        load_processor(saved)


@pytest.mark.parametrize("content, kind", [(b"[]", "list"), (b"3", "int"), (b'"x"', "str")])
@pytest.mark.parametrize(
    "name, open_it", [("preprocessor_config.json", load_processor), ("config.json", load_encoder)]
)
def test_a_file_without_settings_is_named(saved, name, open_it, content, kind):
    harm(saved, name, content)
    sentence = f"cannot be opened: {name} must hold settings by name ({{...}}), and it holds a {kind}."
    with pytest.raises(ValueError, match=f"{re.escape(sentence)}$"):
        open_it(saved)


@pytest.mark.parametrize(
    "name, value", [("image_mean", "x"), ("image_mean", [math.nan] * 3), ("image_std", [1, 0, 1]), ("image_std", -1)]
)
def test_a_normalisation_that_cannot_be_right_is_refused(saved, name, value):
    harm(saved, "preprocessor_config.json", {name: value})
    with pytest.raises(ValueError, match=f"^{name} of the image processor of .* must be numbers"):
        load_processor(saved)


def test_one_mean_for_all_channels_is_that_of_each(saved):
    harm(saved, "preprocessor_config.json", {"image_mean": 0.25})
    assert load_processor(saved).image_mean == [0.25] * 3


def test_weights_that_are_no_numbers_are_refused_where_they_would_be_trained(trained, saved):
    trained.predictor.layernorm.weight.data[0] = torch.nan
    trained.save_pretrained(saved)
    with pytest.raises(ValueError, match=r"its weight predictor\.layernorm\.weight holds NaN"):
        load_pretraining_model(saved)


def test_a_masked_autoencoder_sees_the_whole_image_every_time(tmp_path, images):
    stock("ViTMAE", tmp_path, "ForPreTraining", decoder_num_hidden_layers=1, decoder_intermediate_size=16)
    model = load_encoder(str(tmp_path), "target", FLOAT)
    first, again = (encoder_features(model, images, ["last", "tokens"]) for _ in range(2))
    assert first["tokens"].shape[1] == 16 + 1
    torch.testing.assert_close(first["last"], again["last"])


def test_a_random_masked_autoencoder_has_the_position_table_of_the_trained_one(tmp_path, images):
    """Transformers 5.x leaves the constant table of a fresh `ViTMAEModel` at zero. Trained weights stay out."""
    model = stock("ViTMAE", tmp_path, mask_ratio=0.0)
    table = torch.randn(1, 16 + 1, 16, generator=torch.Generator().manual_seed(1))
    model.embeddings.position_embeddings.copy_(table)
    model.save_pretrained(tmp_path)
    trained = load_encoder(str(tmp_path), "target", FLOAT)
    first, again, other = (open_encoder(EncoderSpec.parse(f"random:{tmp_path}#{seed}"), FLOAT) for seed in (1, 1, 2))
    for random in (first, other):
        assert torch.equal(random.embeddings.position_embeddings, table)
    weights = [name for name, value in trained.named_parameters() if name.startswith("layers.") and value.ndim > 1]
    for a, b in ((first, trained), (first, other)):
        assert weights and not any(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in weights)
    assert weights_digest(first) == weights_digest(again)


def test_a_random_convolutional_network_has_no_statistics_of_the_trained_one(tmp_path, images):
    """They are learned from images."""
    model = stock("ResNet", tmp_path).train()
    model(images)
    model.save_pretrained(tmp_path)
    random = open_encoder(EncoderSpec.parse(f"random:{tmp_path}"), FLOAT)
    name = "embedder.embedder.normalization.running_mean"
    assert model.state_dict()[name].any() and not random.state_dict()[name].any()


def test_our_classifier_and_stock_ijepa_open_with_the_same_features(tmp_path, tiny_config, images):
    classifier = IJepaForImageClassification(tiny_config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    stock_model = transformers.IJepaModel.from_pretrained(tmp_path / "classifier").eval()
    stock_model.save_pretrained(tmp_path / "stock")
    expected = classifier.ijepa(images).pooler_output
    for place in ("classifier", "stock"):
        model = load_encoder(str(tmp_path / place), "target", FLOAT)
        torch.testing.assert_close(encoder_features(model, images, ["last"])["last"], expected)


def test_models_that_take_more_than_images_are_one_sentence(images):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    with pytest.raises(ValueError, match="CLIPModel cannot be evaluated on images"):
        encoder_features(transformers.CLIPModel(config), images, ["last"])


def test_the_architecture_has_settings_that_the_weights_do_not_show(tmp_path, tiny_config, saved, trained):
    classifier = IJepaForImageClassification(tiny_config)
    classifier.save_pretrained(tmp_path / "classifier")
    own, of_classifier = (load_encoder(str(path), "target", FLOAT) for path in (saved, tmp_path / "classifier"))
    assert architecture(own) == architecture(of_classifier) == architecture(trained.context_encoder)
    half = load_encoder(saved, "target", torch.bfloat16)
    assert architecture(half) == architecture(own) == architecture(random_encoder(own, 0))
    for name, value in {"num_attention_heads": 1, "layer_norm_eps": 1e-3, "hidden_act": "relu"}.items():
        config = type(tiny_config)(**{**tiny_config.to_dict(), name: value})
        assert architecture(IJepaModel(config)) != architecture(own)
        assert weights_shapes(IJepaModel(config)) == weights_shapes(own)
    assert architecture(RawPixels()) == ["RawPixels", None]


def weights_shapes(model):
    return {name: value.shape for name, value in model.state_dict().items()}


# Features


def test_widths_are_those_of_the_features_and_a_failing_pass_is_one_sentence(trained, images):
    widths, token_shape = feature_widths(trained.ijepa, images[:1], ["last", "last4", "tokens"])
    assert widths == {"last": 32, "last4": 96, "tokens": 32} and token_shape == (16, 32)
    assert feature_widths(RawPixels(), images, ["last"]) == ({"last": 3072}, (0, 0))
    convolution = stock_resnet()
    with pytest.raises(ValueError, match="ResNetModel cannot be evaluated on images"):
        feature_widths(convolution, images[:, :1, :0], ["last"])


def stock_resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetModel(config).eval()


def test_features_of_our_encoder_equal_those_computed_by_hand(trained, images):
    model = trained.ijepa
    outputs = model(images, output_hidden_states=True)
    features = encoder_features(model, images, ["last", "last4", "layers", "tokens"])
    means = [model.layernorm(state).mean(1) for state in outputs.hidden_states]  # embedding and 3 layers
    torch.testing.assert_close(features["last"], outputs.pooler_output)
    torch.testing.assert_close(features["tokens"], outputs.last_hidden_state)
    torch.testing.assert_close(features["last4"], torch.cat(means[1:], dim=1))  # it has only 3 layers
    for index, mean in enumerate(means):
        torch.testing.assert_close(features[f"layer_{index}"], mean)
    assert features["token_shape"].tolist() == [[16, 32]] * 2 and not features["last"].requires_grad


def test_last4_is_the_last_four_of_more_layers(tiny_config, images):
    tiny_config.num_hidden_layers = 6
    model = IJepaModel(tiny_config).eval()
    features = encoder_features(model, images, ["last4", "layers"])
    expected = torch.cat([features[f"layer_{index}"] for index in (3, 4, 5, 6)], dim=1)
    assert torch.equal(features["last4"], expected) and "last" not in features
    torch.testing.assert_close(features["layer_6"], model(images).pooler_output)


def test_only_the_given_kinds_are_computed(trained, images):
    assert set(encoder_features(trained.ijepa, images, ["last"])) == {"last", "token_shape"}


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "ResNet"])
def test_the_last_layer_of_stock_models_is_their_own_output(kind, tmp_path, images):
    """`hidden_states` ends before or after the final norm, which depends on the class. The features do not."""
    model = stock(kind, tmp_path)
    outputs = model(images)
    features = encoder_features(model, images, ["last", "layers", "last4", "tokens"])
    tokens = outputs.last_hidden_state
    tokens = tokens.flatten(2).transpose(1, 2) if tokens.dim() == 4 else tokens
    torch.testing.assert_close(features["last"], outputs.pooler_output.flatten(1))
    torch.testing.assert_close(features["tokens"], tokens)
    torch.testing.assert_close(features["layer_2"], tokens.mean(1))
    assert features["last4"].shape == (2, 8 + 16 if kind == "ResNet" else 32)


def test_raw_pixels_are_shrunk_only_where_they_are_large():
    pixels = torch.randn(2, 3, 64, 16)
    features = encoder_features(RawPixels(), pixels, ["last", "last4", "tokens"])
    assert set(features) == {"last"}
    expected = pixels.unflatten(2, (32, 2)).mean(3).flatten(1)
    torch.testing.assert_close(features["last"], expected)


def test_weights_and_processor_errors(tmp_path):
    for open_it in (lambda: load_encoder("no/such/model", "target", FLOAT), lambda: load_processor(str(tmp_path))):
        with pytest.raises(ValueError, match="cannot be opened") as error:
            open_it()
        assert "\n" not in str(error.value)


def test_a_model_that_is_not_there_is_one_short_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("steps: 1\n")
    for name, reason in (
        ("nowhere", "there is no directory {!r}."),
        ("empty", "this directory has no config.json."),
        ("run", "this run has saved no model yet."),
    ):
        source = str(tmp_path / name)
        for open_it in (load_config, load_encoder, load_pretraining_model):
            with pytest.raises(ValueError) as refused:
                open_it(source)
            assert str(refused.value) == f"The model {source!r} cannot be opened: {reason.format(source)}"
    with pytest.raises(ValueError, match=r"processor of .* cannot be opened: this run has saved no model yet\.$"):
        load_processor(source)


def test_a_model_without_an_image_processor_is_one_short_sentence(saved):
    (Path(saved) / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be opened: this directory has no preprocessor_config\.json\.$"):
        load_processor(saved)


def test_a_name_that_the_hub_does_not_know_is_one_short_sentence(monkeypatch):
    def unknown(*_, **__):
        raise OSError(
            "x is not a local folder and is not a valid identifier on 'https://huggingface.co/models'\nIf ..."
        )

    monkeypatch.setattr("ijepa_transformers.hub.why_unreachable", lambda: None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", unknown)
    with pytest.raises(ValueError, match="no model of this name on the Hub that you may read"):
        load_processor("my_model")
    with pytest.raises(ValueError) as refused:
        load_config("my_model")
    assert str(refused.value) == (
        "The model 'my_model' cannot be opened: there is no directory 'my_model', and no model of this name on the"
        " Hub that you may read."
    )
