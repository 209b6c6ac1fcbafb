"""README's lines on a local stand-in of the copies on the Hub, and the conversion of such a copy.

The copies have early names of weights and an image processor that normalises with 0.5 and squashes to a square. No
file of the Hub is read: `from_pretrained` opens a folder of the same name in the working directory.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from transformers import IJepaConfig as StockConfig
from transformers import IJepaModel as StockModel

from ijepa_transformers.conversion.directory import convert_directory
from ijepa_transformers.encoders import load_encoder
from tests.markdown_files import REPOSITORY, code_blocks


HUB_ID = "facebook/ijepa_vith14_1k"
PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 28, "width": 28},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working directory with the copy and a photo."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = StockModel(StockConfig(**sizes, image_size=28, patch_size=14, num_channels=3, pooler_output_size=64))
    model.save_pretrained(HUB_ID)
    names = load_file(tmp_path / HUB_ID / "model.safetensors").keys()  # the early ones, as on the Hub
    assert "encoder.layer.0.attention.attention.query.weight" in names
    (tmp_path / HUB_ID / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    Image.effect_noise((60, 40), 50).convert("RGB").save("photo.jpg")
    return model.eval()


@pytest.mark.parametrize("page", ["README.md", "docs/features.md"])
def test_the_lines_give_the_features_of_the_weights(page, hub):
    (code,) = (block.code for block in code_blocks(REPOSITORY / page) if f'load_encoder("{HUB_ID}")' in block.code)
    assert len(code.replace("\n\n", "\n").strip().splitlines()) == 6  # three imports and three lines
    names: dict = {}
    exec(code, names)
    pixels = names["processor"](Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    with torch.no_grad():
        expected = hub(pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(names["features"], expected, atol=1e-5, rtol=0)


def test_the_processor_is_that_of_the_published_training(hub):
    (code,) = (block.code for block in code_blocks(REPOSITORY / "README.md") if HUB_ID in block.code)
    names: dict = {}
    exec(code, names)
    processor = names["processor"]
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert processor.do_center_crop and processor.size["shortest_edge"] == 32  # 256 / 224 of the image size


def test_a_copy_is_converted_to_a_directory_with_the_right_processor(hub, capsys):
    convert_directory(HUB_ID, "vith14")
    assert "Corrected" in capsys.readouterr().out
    processor = AutoImageProcessor.from_pretrained("vith14")
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    pixels = processor(Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(load_encoder("vith14")(pixels).last_hidden_state, hub(pixels).last_hidden_state)
