"""A pretraining directory: the target encoder in the file where every class looks, the other two beside it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.ijepa import modeling_ijepa as stock

from ijepa_transformers import IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from tests import forked


INDEX = "pretraining.safetensors.index.json"


@pytest.fixture
def directory(trained, tmp_path):
    trained.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same(model, expected):
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_encoder_is_alone_in_its_file_and_the_index_knows_all_weights(directory, trained):
    assert {key.split(".")[0] for key in load_file(directory / "model.safetensors")} == {"ijepa"}
    others = {key.split(".")[0] for key in load_file(directory / "pretraining.safetensors")}
    assert others == {"context_encoder", "predictor"}
    assert set(json.loads((directory / INDEX).read_text())["weight_map"]) == set(trained.state_dict())


def test_stock_classes_open_it_without_a_word_and_without_surplus_weights(directory, tmp_path):
    program = f"""
from transformers import AutoModel, AutoModelForImageClassification
model, report = AutoModel.from_pretrained({str(directory)!r}, add_pooling_layer=False, output_loading_info=True)
assert type(model).__module__.startswith("transformers.") and not report["unexpected_keys"], report
"""
    done = forked.run(["-c", program], cwd=tmp_path, kind="stock", check=True)
    assert "UNEXPECTED" not in done.stdout + done.stderr
    for stock_class in (stock.IJepaModel, stock.IJepaForImageClassification):
        _, report = stock_class.from_pretrained(directory, output_loading_info=True)
        assert not report["unexpected_keys"]


@pytest.mark.parametrize("size", ["20KB", "50GB"])
@pytest.mark.parametrize("variant", [None, "fp32"])
def test_sharded_and_named_variants_come_back(trained, tmp_path, size, variant):
    trained.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    shards = list(tmp_path.glob("*-of-*.safetensors"))
    assert bool(shards) == (size == "20KB")
    model, report = IJepaForPretraining.from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert_same(model, trained)
    assert not report["missing_keys"] and "transformers_weights" not in vars(model.config)
    assert_same(IJepaModel.from_pretrained(tmp_path, variant=variant), trained.ijepa)
    assert_same(stock.IJepaModel.from_pretrained(tmp_path, variant=variant), trained.ijepa)
    trained.save_pretrained(tmp_path, variant=variant)
    assert not list(tmp_path.glob("*-of-*.safetensors"))
    assert_same(IJepaForPretraining.from_pretrained(tmp_path, variant=variant), trained)


def test_a_configuration_or_a_changed_field_can_be_given(directory, trained):
    config = IJepaConfig.from_pretrained(directory, loss_type="mse")
    model = IJepaForPretraining.from_pretrained(directory, config=config)
    assert_same(model, trained)
    assert model.config.loss_type == "mse" and config.transformers_weights is None
    assert IJepaForPretraining.from_pretrained(directory, loss_type="mse").config.loss_type == "mse"


def test_a_directory_of_an_earlier_version_with_one_file_opens(trained, tmp_path):
    trained.save_pretrained(tmp_path / "checkpoint-7")  # one file, as the Trainer needs it
    assert set(load_file(tmp_path / "checkpoint-7" / "model.safetensors")) == set(trained.state_dict())
    assert_same(IJepaForPretraining.from_pretrained(tmp_path / "checkpoint-7"), trained)
    assert_same(IJepaModel.from_pretrained(tmp_path / "checkpoint-7"), trained.ijepa)


@pytest.mark.parametrize("model_class", [IJepaModel, IJepaForImageClassification, stock.IJepaModel])
def test_an_encoder_that_is_saved_over_it_is_not_mixed_with_the_old_networks(directory, tiny_config, model_class):
    config = tiny_config if model_class is not stock.IJepaModel else stock.IJepaConfig.from_pretrained(directory)
    other = model_class(config)
    other.save_pretrained(directory)
    model = IJepaForPretraining.from_pretrained(directory)
    assert torch.equal(model.context_encoder.layernorm.weight, model.ijepa.layernorm.weight)
    weight = getattr(other, "ijepa", other).layers[0].mlp.fc1.weight
    assert torch.equal(model.context_encoder.layers[0].mlp.fc1.weight, weight)


def test_lost_or_cut_networks_are_an_error(directory):
    path = directory / "pretraining.safetensors"
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if key != "predictor.mask_token"}, path)
    with pytest.raises((ValueError, KeyError), match=r"predictor\.mask_token"):
        IJepaForPretraining.from_pretrained(directory)
    path.unlink()
    with pytest.raises(OSError, match=r"pretraining\.safetensors"):
        IJepaForPretraining.from_pretrained(directory)
    (directory / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"lacks {INDEX}"):
        IJepaForPretraining.from_pretrained(directory)


def test_a_push_uploads_all_files(trained, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "ijepa_transformers.modeling_ijepa.create_repo", lambda name, **_: type("Url", (), {"repo_id": f"me/{name}"})
    )
    monkeypatch.setattr(
        IJepaForPretraining,
        "_upload_modified_files",
        lambda self, directory, name, before, **_: pushed.append((name, before)),
    )
    trained.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert pushed == [("me/mine", {})]
    assert (tmp_path / "mine" / "pretraining.safetensors").is_file()
