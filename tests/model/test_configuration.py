"""The configuration is read by both sides, and refuses sizes that do not fit."""

import pytest
import transformers
from transformers.utils.auto_docstring import get_checkpoint_from_config_class

from ijepa_transformers import IJEPA_SIZES, IJepaConfig


def test_every_stock_field_exists_here_with_the_same_default_but_the_layer_norm_epsilon():
    stock = transformers.models.ijepa.configuration_ijepa.IJepaConfig().to_dict()
    ours = IJepaConfig().to_dict()
    different = {key for key in stock if key != "transformers_version" and stock[key] != ours.get(key, "absent")}
    assert different == {"layer_norm_eps"}
    assert ours["layer_norm_eps"] == 1e-6


def test_each_side_reads_the_others_file(tmp_path):
    ours = IJepaConfig(hidden_size=32, num_attention_heads=2, image_size=(32, 64), patch_size=8, loss_type="mse")
    ours.save_pretrained(tmp_path / "ours")
    stock = transformers.models.ijepa.configuration_ijepa.IJepaConfig.from_pretrained(tmp_path / "ours")
    assert (stock.hidden_size, list(stock.image_size), stock.layer_norm_eps) == (32, [32, 64], 1e-6)
    stock.save_pretrained(tmp_path / "stock")
    back = IJepaConfig.from_pretrained(tmp_path / "stock")
    assert (back.loss_type, back.grid_size, back.predictor_num_attention_heads) == ("mse", (4, 8), 2)


def test_predictor_takes_the_encoders_heads_and_four_times_its_width_by_default():
    config = IJepaConfig(**IJEPA_SIZES["large"])
    assert (config.predictor_num_attention_heads, config.predictor_intermediate_size) == (16, 1536)


def test_published_sizes_have_the_papers_predictor_depths():
    depths = {name: size["predictor_num_hidden_layers"] for name, size in IJEPA_SIZES.items()}
    assert depths == {"tiny": 6, "small": 6, "base": 6, "large": 12, "huge": 12, "giant": 16}
    for size in IJEPA_SIZES.values():
        IJepaConfig(**size)


def test_grid_counts_whole_patches_only():
    assert IJepaConfig(image_size=(100, 230), patch_size=(16, 32)).grid_size == (6, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 770}, "hidden_size.*multiple of 4.*770"),
        ({"num_attention_heads": 5}, "hidden_size.*num_attention_heads.*768 and 5"),
        ({"predictor_hidden_size": 100}, "predictor_hidden_size.*predictor_num_attention_heads.*100 and 12"),
        ({"image_size": 8}, "image_size 8 is smaller than one patch of patch_size 16"),
        ({"patch_size": 0}, "patch_size.*0"),
        ({"num_channels": 0}, "num_channels.*0"),
        ({"predictor_num_hidden_layers": -1}, "predictor_num_hidden_layers.*-1"),
        ({"loss_type": "l3"}, "loss_type.*smooth_l1, mse.*l3"),
        ({"patch_embedding_init": "xavier"}, "patch_embedding_init.*xavier"),
        ({"initializer_range": 0.0}, "initializer_range.*0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate.*1.0"),
        ({"attention_probs_dropout_prob": 7}, "attention_probs_dropout_prob.*7"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob.*nan"),
        ({"target_image_mean": 1.5}, "target_image_mean.*1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(fields, message):
    with pytest.raises(ValueError, match=message):
        IJepaConfig(**fields)


@pytest.mark.parametrize(
    ("name", "usual", "other"),
    [("predictor_attention", "full", "shared_context"), ("normalize_targets", True, False)],
)
def test_removed_fields_load_with_the_value_of_todays_behaviour(name, usual, other):
    today = IJepaConfig().to_dict()
    config = IJepaConfig.from_dict({**today, name: usual})
    assert config.to_dict() == IJepaConfig.from_dict(today).to_dict() and not hasattr(config, name)
    with pytest.raises(ValueError, match=f"{name} {other!r} is no longer supported"):
        IJepaConfig.from_dict({name: other})


def test_transformers_finds_a_model_for_its_examples():
    """Otherwise the import of its I-JEPA prints an error, as `pipeline("image-classification", ...)` does."""
    assert get_checkpoint_from_config_class(IJepaConfig) == "facebook/ijepa_vith14_1k"
