"""Images that photographs are not: 13 bands of a satellite, and the grey of a microscope in 12 of 16 bits. They are
measured, pretrained on, extracted, probed and fine-tuned; each step uses the setting of the step before."""

import json

import numpy as np
import pytest
import yaml
from transformers import AutoImageProcessor, AutoModel

from ijepa_transformers import extract_features, finetune, image_statistics, pretrain, probe
from ijepa_transformers.data import decode_image, prepare_image
from ijepa_transformers.evaluation import statistics
from ijepa_transformers.pretraining import command as pretraining_command
from tests.data.image_files import in_bits, npy, png, tiff
from tests.runs import TINY, pretraining_argv, reset_accelerate


def tile(generator, is_bright, samples):
    """uint8 (24, 24, samples); bright tiles have a bright square."""
    pixels = generator.integers(0, 90, (24, 24, samples), dtype=np.uint8)
    if is_bright:
        pixels[6:18, 6:18] += 150
    pixels[0, 0] = 255
    return pixels


def write_folder(root, encode, extension, samples):
    """Two splits of two classes of eight images each, whose pixels are a function of the place."""
    for split_number, split in enumerate(("train", "validation")):
        for label, name in enumerate(("field", "town")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = tile(np.random.default_rng([split_number, label, number]), bool(label), samples)
                (folder / f"{number}.{extension}").write_bytes(encode(pixels))
    return root


def satellite(pixels):
    return tiff(in_bits(pixels, 3000), extra=[0] * 12)


def microscope(pixels):
    return png(in_bits(pixels, 4095))


KINDS = {
    "satellite": (satellite, "tif", 13, 3000),
    "arrays": (lambda pixels: npy(np.moveaxis(in_bits(pixels, 3000), 2, 0)), "npy", 5, 3000),
    "microscope": (microscope, "png", 1, 4095),
}


@pytest.mark.parametrize("kind", ["satellite", "microscope", pytest.param("arrays", marks=pytest.mark.slow)])
def test_from_statistics_to_a_classifier(tmp_path, kind):
    encode, extension, channels, white = KINDS[kind]
    if kind == "satellite":
        pytest.importorskip("tifffile")
    data = write_folder(tmp_path / "data", encode, extension, channels)
    measured = image_statistics(data=data, num_channels=channels, sixteen_bit_max=white, num_workers=0)
    assert len(measured["image_mean"]) == channels and measured["sixteen_bit_max"] == white
    run = pretrain(**{**TINY, "data": data, "max_steps": 2, **measured, "output_dir": tmp_path / "run"})
    model = run.directory
    assert yaml.safe_load((model / "recipe.yaml").read_text())["sixteen_bit_max"] == white
    assert f"{white:,} is white" in (model / "README.md").read_text()

    # The directory's own commands need no setting.
    extracted = extract_features(
        model=model, data=data, split="validation", output_dir=tmp_path / "features", num_workers=0
    )
    assert extracted.metrics["num_bad_images"] == 0 and extracted.metrics["processor"]["sixteen_bit_max"] == white
    probes = {"probes": ["knn"], "k": [1], "num_workers": 0, "output_dir": tmp_path / "probes"}
    assert probe(models=[f"ours={model}"], data=data, **probes).metrics["ours"]
    tuned = finetune(
        model=model,
        data=data,
        validation_split="validation",
        max_steps=2,
        per_device_train_batch_size=4,
        dataloader_num_workers=0,
        report_to="none",
        output_dir=tmp_path / "classifier",
    )
    assert json.loads((tuned.directory / "preprocessor_config.json").read_text())["sixteen_bit_max"] == white

    # In Python, with stock classes.
    processor, encoder = AutoImageProcessor.from_pretrained(model), AutoModel.from_pretrained(model)
    path = str(data / "train" / "town" / f"0.{extension}")
    image = decode_image({"path": path, "bytes": None}, channels, sixteen_bit_max=processor.sixteen_bit_max)
    assert np.array_equal(image, tile(np.random.default_rng([0, 1, 0]), True, channels))
    assert encoder(prepare_image(processor, image)[None]).pooler_output.shape == (1, 16)


def test_the_statistics_are_those_of_all_pixels(tmp_path, capsys):
    data = write_folder(tmp_path, png, "png", 3)
    (tmp_path / "train" / "town" / "9.png").write_bytes(b"no image")
    statistics.main(["--data", str(data), "--num_workers", "0"])
    printed = capsys.readouterr()
    pixels = [
        tile(np.random.default_rng([0, label, number]), bool(label), 3) for label in range(2) for number in range(8)
    ]
    expected = np.concatenate(pixels).reshape(-1, 3) / 255
    measured = yaml.safe_load(printed.out)
    assert list(measured) == ["num_channels", "image_mean", "image_std"]
    np.testing.assert_allclose(measured["image_mean"], expected.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(measured["image_std"], expected.std(axis=0), rtol=1e-3)
    assert "17 images\n" in printed.err and "1 image of those looked at cannot be read" in printed.err
    assert "9.png" in printed.err


def test_a_constant_channel_is_told_and_can_be_divided_by(tmp_path, capsys):
    data = write_folder(tmp_path, lambda pixels: npy(pixels * np.uint8([1, 0, 1, 1, 1])), "npy", 5)
    measured = image_statistics(data=data, num_channels=5, num_workers=0)
    assert measured["image_std"][1] == 1.0 and "channel 2 has one value" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, flags",
    [
        (pretraining_command, lambda out: pretraining_argv(out, num_channels=1)),
        (statistics, lambda out: ["--num_channels", "1"]),
    ],
)
def test_dark_images_stop_a_command_before_it_begins(tmp_path, capsys, command, flags):
    data = write_folder(tmp_path / "data", lambda pixels: png(in_bits(pixels, 4080)), "png", 1)
    reset_accelerate()
    with pytest.raises(SystemExit) as stopped:
        command.main([*flags(tmp_path / "out"), "--data", str(data)])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    printed = capsys.readouterr()
    assert "16-bit images use at most 4,080 of 65,535: set --sixteen_bit_max 4095" in printed.err
    assert printed.err.count("error:") == 1


def test_data_of_other_channels_stop_an_extraction_before_it_begins(tmp_path, gray_pretrained):
    data = write_folder(tmp_path / "data", lambda pixels: tiff(pixels, photometric=2, extra=[0, 0]), "tif", 5)
    with pytest.raises(ValueError, match=r"No image of .* can be read, of 16 looked at.*0\.tif: .*it has 5 bands"):
        extract_features(model=gray_pretrained, data=data, output_dir=tmp_path / "features", num_workers=0)
    assert not (tmp_path / "features").exists()


def test_values_without_a_range_stop_an_extraction_before_it_begins(tmp_path, gray_pretrained):
    data = write_folder(tmp_path / "data", lambda pixels: tiff(pixels.astype(np.int16) - 300), "tif", 1)
    with pytest.raises(ValueError, match=r"No image of .* can be read, of 16 .*0\.tif: .*integer pixels from -"):
        extract_features(model=gray_pretrained, data=data, output_dir=tmp_path / "features", num_workers=0)
    assert not (tmp_path / "features").exists()


def test_data_of_other_bits_than_the_models_are_refused_unless_they_are_meant(tmp_path):
    data = write_folder(tmp_path / "data", microscope, "png", 1)
    run = pretrain(
        **{
            **TINY,
            "data": data,
            "max_steps": 1,
            "sixteen_bit_max": 4095,
            "output_dir": tmp_path / "run",
            "warmup_steps": 0,
        }
    )
    for name, white, problem in (("dark", 255, "use at most 255"), ("bright", 65535, "go up to 65,535")):
        other = write_folder(tmp_path / name, lambda pixels, white=white: png(in_bits(pixels, white)), "png", 1)
        flags = {"model": run.directory, "data": other, "num_workers": 0, "output_dir": tmp_path / f"features-{name}"}
        with pytest.raises(ValueError, match=f"{problem}.* but the model was trained with sixteen_bit_max 4095"):
            extract_features(**flags)
        assert extract_features(**flags, sixteen_bit_max=white).metrics["processor"]["sixteen_bit_max"] == white
