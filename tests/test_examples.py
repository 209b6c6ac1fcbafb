"""The segmentation example trains what it says it trains, and the builder of Fashion-MNIST keeps pixels and labels."""

import gzip
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from benchmarks import build_fashion_mnist
from examples import semantic_segmentation
from examples.semantic_segmentation import CLASSES, SIDE, Scenes, build_model, mean_iou, train
from ijepa import IJepaModel
from ijepa.data import decode_image, load_image_dataset


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


def write_idx_files(tmp_path):
    """The four original files in small; split -> images and labels."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, prefix, count in (("train", "train", 12), ("test", "t10k", 5)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes(8) + labels.tobytes())
        arrays[split] = images, labels
    return arrays


def test_the_fashion_mnist_files_keep_every_pixel_and_label(tmp_path):
    arrays = write_idx_files(tmp_path)
    build_fashion_mnist.main(["--source", str(tmp_path), "--output", str(tmp_path / "out")])
    for split, (images, labels) in arrays.items():
        dataset = load_image_dataset(str(tmp_path / "out"), split=split)
        assert dataset["label"][:] == labels.tolist() and dataset.features["label"].names[9] == "ankle boot"
        for row, image in zip(dataset, images, strict=True):
            assert np.array_equal(decode_image(row["image"], num_channels=1)[..., 0], image)


def test_a_fashion_mnist_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_idx_files(tmp_path)

    def write_half(dataset, path):
        Path(path).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.Dataset, "to_parquet", write_half)
    with pytest.raises(KeyboardInterrupt):
        build_fashion_mnist.main(["--source", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/[!.]*"))


def test_missing_fashion_mnist_files_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        build_fashion_mnist.main(["--source", str(tmp_path), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 1 and "holds no file train-images-idx*-ubyte.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
