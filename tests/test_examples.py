"""The segmentation example trains what it says it trains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import readme_picture, semantic_segmentation
from examples.semantic_segmentation import CLASSES, SIDE, Scenes, build_model, mean_iou, train
from ijepa_transformers import IJepaModel
from ijepa_transformers.data.transforms import build_image_processor


DIGITS_ENCODER = str(Path(__file__).parent / "fixtures" / "digits_encoder")


@pytest.fixture(scope="module")
def scenes():
    return Scenes("test")


def test_every_digit_of_a_scene_is_labelled_where_its_ink_is(scenes):
    pixels, labels = scenes.draw(20, np.random.default_rng(0))
    assert pixels.shape == (20, 1, SIDE, SIDE) and labels.shape == (20, SIDE, SIDE)
    assert (pixels[:, 0][labels > 0] > 0.4).all() and (pixels[:, 0][labels == 0] <= 0.4).all()
    assert set(labels.unique().tolist()) == set(range(CLASSES))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_pretrained_backbone_is_the_encoder_and_stays_so_when_frozen(scenes, frozen):
    model = build_model(DIGITS_ENCODER, pretrained=True, frozen=frozen)
    encoder = IJepaModel.from_pretrained(DIGITS_ENCODER, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in model.backbone.state_dict().items())
    train(model, scenes, lambda pixels: pixels, steps=2, batch_size=2, learning_rate=1e-3, seed=0)
    unchanged = all(torch.equal(value, encoder[name]) for name, value in model.backbone.state_dict().items())
    assert unchanged == frozen


def test_the_measure_is_one_for_the_truth_and_low_for_background_alone(scenes, monkeypatch):
    monkeypatch.setattr(semantic_segmentation, "NUM_TEST_SCENES", 8)
    truth = iter(scenes.draw(8, np.random.default_rng(12345))[1].split(50))

    class Oracle(torch.nn.Module):
        def forward(self, pixels):
            logits = torch.nn.functional.one_hot(next(truth), CLASSES).movedim(-1, 1).float()
            return type("Output", (), {"logits": logits})

    class Background(torch.nn.Module):
        def forward(self, pixels):
            return type(
                "Output", (), {"logits": torch.eye(CLASSES)[0].view(1, CLASSES, 1, 1).expand(8, -1, SIDE, SIDE)}
            )

    assert mean_iou(Oracle(), scenes, lambda pixels: pixels) == 1.0
    assert 0.05 < mean_iou(Background(), scenes, lambda pixels: pixels) < 0.1  # one of 11 classes


# The picture of the README


@pytest.fixture
def photographs(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "data" / ("train" if number < 24 else "test") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def test_the_picture_of_the_readme_has_a_row_for_each_photograph(trained, photographs, tmp_path, capsys):
    trained.save_pretrained(tmp_path / "run")
    build_image_processor(32).save_pretrained(tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text("mask_mode: random\n")
    words = ["--model", str(tmp_path / "run"), "--data", str(photographs), "--decoder_steps", "2"]
    sizes = []
    for across in ("1", "2"):
        output = tmp_path / f"{across}.png"
        choice = ["--candidates", "3", "--shown", "2", "0", "--across", across]
        readme_picture.main([*words, "--output", str(output), *choice])
        sizes.append(Image.open(output).size)
    with pytest.raises(SystemExit):
        readme_picture.main([*words, "--output", str(output), "--candidates", "3", "--shown", "3"])
    assert "--shown 3: there are the photographs 0 to 2 (--candidates)" in capsys.readouterr().err
    (width, height), (wide, low) = sizes
    assert width > 4 * readme_picture.CELL and height > 2 * readme_picture.CELL
    assert wide > 2 * (width - readme_picture.GAP) and low < height


def test_the_picture_of_the_readme_needs_a_predictor(photographs, tmp_path, tiny_config, capsys):
    IJepaModel(tiny_config).save_pretrained(tmp_path / "run")
    build_image_processor(32).save_pretrained(tmp_path / "run")
    output = tmp_path / "picture.png"
    with pytest.raises(SystemExit):
        readme_picture.main(["--model", str(tmp_path / "run"), "--data", str(photographs), "--output", str(output)])
    assert "holds one encoder" in capsys.readouterr().err and not output.exists()
