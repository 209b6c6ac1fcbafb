"""`ijepa extract`: the model's own features, in the order of the data, also after an interruption."""

import ast
import glob
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ijepa_transformers import IJepaModel, encoders, execution, extract_features
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.evaluation import extraction, shard_files
from ijepa_transformers.execution import configure
from tests import forked
from tests.printed import proposed
from tests.runs import reset_accelerate


SCRIPT = Path(__file__).parents[2] / "run_feature_extraction.py"
NUM_IMAGES = 11

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def model(tiny_model):
    """A pretraining model whose two encoders differ."""
    for parameter in tiny_model.context_encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tiny_model.eval()


@pytest.fixture
def place(model, tmp_path):
    """A folder with a model and a folder of images of different sizes; sub-folders are classes."""
    model.save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = tmp_path / "images" / ("cat" if number < 6 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (40 + 3 * number, 60, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path


def words(place, **changes):
    values = {
        "model": place / "model",
        "data": place / "images",
        "output_dir": place / "features",
        "features": ["pooled", "patch"],
        "batch_size": 2,
        "shard_size": 4,
        "num_workers": 0,
        **changes,
    }
    result = []
    for key, value in values.items():
        result += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return result


def extract(place, **changes):
    reset_accelerate()
    extraction.main(words(place, **changes))
    return Path(changes.get("output_dir", place / "features"))


def read(directory):
    """All shards as one dictionary of arrays and lists."""
    if list(directory.glob("*.parquet")):
        table = pyarrow.parquet.read_table(sorted(directory.glob("*.parquet"))).to_pydict()
        return {k: np.array(v, np.float32) if isinstance(v[0], list) else v for k, v in table.items()}
    parts = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            words_of_shard = json.loads(file.metadata()["columns"])
        for name, value in {**load_file(path), **words_of_shard}.items():
            parts.setdefault(name, []).append(value)
    return {
        name: torch.cat(values) if torch.is_tensor(values[0]) else list(itertools.chain(*values))
        for name, values in parts.items()
    }


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def expected_features(encoder, folder):
    """The model's outputs image by image, through the image processor of its directory."""
    processor = encoders.load_processor(folder / "model")
    pooled, patches = [], []
    for path in sorted((folder / "images").rglob("*.png")):
        with torch.no_grad():
            outputs = encoder(**processor(Image.open(path), return_tensors="pt"))
        pooled.append(outputs.pooler_output[0])
        patches.append(outputs.last_hidden_state[0])
    return torch.stack(pooled), torch.stack(patches)


# Right features, right rows


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
@pytest.mark.parametrize("encoder", ["target", "context"])
def test_features_equal_the_models_outputs_image_by_image(place, model, file_format, encoder):
    rows = read(extract(place, format=file_format, encoder=encoder))
    network = model.ijepa if encoder == "target" else model.context_encoder
    pooled, patches = expected_features(network, place)
    torch.testing.assert_close(torch.as_tensor(rows["pooler_output"]), pooled, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.as_tensor(rows["last_hidden_state"]), patches, atol=2e-6, rtol=0)
    assert (pooled - expected_features(model.ijepa, place)[0]).abs().max().item() > 0.01 or encoder == "target"


def test_with_one_image_per_batch_the_features_are_equal_bit_for_bit(place, model):
    rows = read(extract(place, batch_size=1))
    configure(model.ijepa, "cpu", "no")  # as the command does
    assert torch.equal(torch.from_numpy(rows["pooler_output"]), expected_features(model.ijepa, place)[0])


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_order_names_and_labels_are_those_of_the_data_set(place, file_format):
    rows = read(extract(place, format=file_format))
    assert list(rows["index"]) == list(range(NUM_IMAGES))
    assert rows["name"] == [f"{'cat' if number < 6 else 'dog'}/{number:02}.png" for number in range(NUM_IMAGES)]
    assert list(rows["label"]) == [0] * 6 + [1] * 5
    assert rows["error"] == [None] * NUM_IMAGES


def test_parquet_and_safetensors_have_the_same_content(place):
    parquet = read(extract(place, output_dir=place / "a"))
    safetensors = read(extract(place, output_dir=place / "b", format="safetensors"))
    assert set(parquet) == set(safetensors)
    for name in ("pooler_output", "last_hidden_state", "index", "label"):
        assert np.array_equal(parquet[name], safetensors[name].numpy())
    assert parquet["name"] == safetensors["name"]


def test_datasets_opens_the_parquet_files(place, model):
    files = str(extract(place) / "*.parquet")
    opened = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(place / "cache"))
    features = opened.with_format("torch")["last_hidden_state"][:]
    torch.testing.assert_close(features, expected_features(model.ijepa, place)[1], atol=2e-6, rtol=0)


def test_the_command_that_opens_the_files_works_for_a_folder_with_brackets(place, capsys):
    extract(place, output_dir=place / "fe[1]")
    ((_, code),) = proposed(capsys.readouterr().out)
    (pattern,) = (word for word in ast.walk(code) if isinstance(word, ast.keyword) and word.arg == "data_files")
    assert len(glob.glob(pattern.value.value)) == 3


def test_only_the_given_features_are_written(place):
    rows = read(extract(place, features=["pooled"]))
    assert "pooler_output" in rows and "last_hidden_state" not in rows


def test_half_precision(place, model):
    pooled = expected_features(model.ijepa, place)[0]
    in_bf16 = {
        kind: read(extract(place, output_dir=place / kind, format=kind, dtype="bf16"))["pooler_output"]
        for kind in ("safetensors", "parquet")
    }
    assert in_bf16["safetensors"].dtype == torch.bfloat16 and in_bf16["parquet"].dtype == np.float32
    assert np.array_equal(in_bf16["safetensors"].float().numpy(), in_bf16["parquet"])
    torch.testing.assert_close(in_bf16["safetensors"].float(), pooled, atol=0.05, rtol=0)


def test_workers_change_nothing(place):
    assert contents(extract(place, output_dir=place / "a")) == contents(
        extract(place, output_dir=place / "b", num_workers=2)
    )


def test_grey_images_of_a_data_set_in_the_archive(tiny_config, tmp_path):
    tiny_config.num_channels = 1
    IJepaModel(tiny_config).save_pretrained(tmp_path / "model")
    build_image_processor(32, num_channels=1).save_pretrained(tmp_path / "model")
    rows = read(extract(tmp_path, data="digits", split="test", shard_size=300, batch_size=100))
    assert rows["name"][0] == "digits/1297.png" and rows["pooler_output"].shape == (500, 32)


@pytest.mark.parametrize("kind", ["Dinov2", "ResNet"])
def test_stock_models_work(place, kind):
    """A transformer, and a convolutional network whose pooled output is (B, D, 1, 1)."""
    sizes = {
        "Dinov2": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    }[kind]
    network = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    network.save_pretrained(place / "model")
    build_image_processor(28).save_pretrained(place / "model")
    rows = read(extract(place, features=["pooled"]))
    pooled = expected_features(network, place)[0].flatten(1)
    torch.testing.assert_close(torch.from_numpy(rows["pooler_output"]), pooled, atol=1e-5, rtol=0)


# Bad images


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_a_bad_image_keeps_its_row_and_changes_no_other(place, file_format):
    good = read(extract(place, output_dir=place / "good", format=file_format))
    for name in ("cat/01", "cat/04", "dog/08", "dog/09"):  # the last, the first and all images of a batch
        (place / "images" / f"{name}.png").write_bytes(b"this is not an image")
    rows = read(extract(place, format=file_format))
    bad = [1, 4, 8, 9]
    assert [index for index, error in enumerate(rows["error"]) if error] == bad
    assert rows["name"] == good["name"] and list(rows["label"]) == list(good["label"])
    for name in ("pooler_output", "last_hidden_state"):
        assert np.isnan(np.asarray(rows[name])[bad]).all()
        assert np.array_equal(*(np.delete(np.asarray(values[name]), bad, axis=0) for values in (rows, good)))
    listed = [json.loads(line) for line in (place / "features" / "bad_images.jsonl").read_text().splitlines()]
    reason = "this is not an image that PIL knows"
    names = ["cat/01.png", "cat/04.png", "dog/08.png", "dog/09.png"]
    assert listed == [{"index": i, "name": n, "reason": reason} for i, n in zip(bad, names, strict=True)]
    assert json.loads((place / "features" / "manifest.json").read_text())["num_bad_images"] == 4


# Interruption


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_a_run_killed_while_it_writes_a_file_continues_to_the_same_bytes(place, monkeypatch, file_format):
    (place / "images" / "cat" / "02.png").write_bytes(b"")
    whole = contents(extract(place, output_dir=place / "whole", format=file_format))
    writer = getattr(shard_files, f"_write_{file_format}")

    def write_half(path, *args):
        writer(path, *args)
        if "000001" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, f"_write_{file_format}", write_half)
        with pytest.raises(SystemExit):
            extract(place, format=file_format)
    left = set(contents(place / "features"))
    assert f"features-000000.{file_format}" in left and f"features-000001.{file_format}" not in left
    assert "manifest.json" not in left
    stamp = (place / "features" / f"features-000000.{file_format}").stat().st_mtime_ns
    assert contents(extract(place, format=file_format)) == whole
    assert (place / "features" / f"features-000000.{file_format}").stat().st_mtime_ns == stamp  # not done again


def test_a_finished_run_computes_nothing_again(place, monkeypatch):
    before = contents(extract(place))
    monkeypatch.setattr(extraction, "write_shard", None)
    assert contents(extract(place)) == before


def cut_by(path):
    os.truncate(path, path.stat().st_size - 9)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def swap(path):
    other, content = path.with_name(path.name.replace("000001", "000000")), path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
@pytest.mark.parametrize("harm", [cut_by, flip, swap], ids=["cut", "flipped", "swapped"])
def test_a_damaged_shard_is_computed_again_and_it_is_said(place, capsys, harm, file_format):
    whole = contents(extract(place, format=file_format))
    harm(place / "features" / f"features-000001.{file_format}")
    capsys.readouterr()
    assert contents(extract(place, format=file_format)) == whole
    assert f"features-000001.{file_format} is computed again: the file has changed" in capsys.readouterr().out


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "killed"])
def test_images_that_were_replaced_are_computed_again_whatever_their_size_and_time(
    place, monkeypatch, capsys, is_finished
):
    if is_finished:
        extract(place)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(extraction, "finish", lambda run: None)
            extract(place)
    path = place / "images/cat/05.png"  # in the second of three shards
    status = path.stat()
    Image.new("RGB", (40, 40), "red").save(path)
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(place / "images/dog/10.png")  # the same content, so nothing to do
    capsys.readouterr()
    rows = read(extract(place))
    said = capsys.readouterr().out
    assert "3 files, 2 of them done" in said and "features-000001.parquet is computed again: its images" in said
    fresh = read(extract(place, output_dir=place / "fresh"))
    assert all(np.array_equal(rows[name], fresh[name]) for name in fresh)


def test_images_that_change_while_they_are_read_are_not_taken_for_complete(place, monkeypatch, capsys):
    original = extraction._compute_shard

    def compute(run, shard, *others):
        if shard.number == 1:
            Image.new("RGB", (40, 40), "red").save(place / "images/cat/05.png")
        return original(run, shard, *others)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_compute_shard", compute)
        with pytest.raises(SystemExit) as stopped:
            extract(place)
    assert stopped.value.code == 1 and "Images of features-000001.parquet changed" in capsys.readouterr().err
    assert not (place / "features/manifest.json").exists()
    extract(place)
    assert (place / "features/manifest.json").exists() and not (place / "features/.shards").exists()


@pytest.mark.parametrize("files", ["null", "5", '[5, {}, {"file": ["x"]}, {"file": null}]'])
def test_a_manifest_of_another_form_is_made_again(place, files):
    whole = contents(extract(place))
    (place / "features/manifest.json").write_text(f'{{"files": {files}}}')
    assert contents(extract(place)) == whole


def test_another_image_processor_is_told_by_the_settings_that_differ(place, capsys):
    extract(place)
    build_image_processor(32, image_mean=[0.25, 0.5, 0.75]).save_pretrained(place / "model")
    with pytest.raises(SystemExit) as stopped:
        extract(place)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "is [0.25, 0.5, 0.75])" in error and error.count(" was ") == 1
    assert "(processor.image_mean was [0.485, 0.456, 0.406]" in error


def test_a_model_that_gives_no_numbers_is_refused(place, model, capsys):
    model.ijepa.layernorm.weight.data[0] = torch.nan
    model.save_pretrained(place / "model")
    with pytest.raises(SystemExit) as stopped:
        extract(place)
    assert stopped.value.code == 2 and "gives NaN or infinity" in capsys.readouterr().err
    assert not (place / "features").exists()


def test_features_that_are_not_finite_are_told_as_bad_images(place, monkeypatch):
    original = extraction.embed

    def embed(encoder, pixel_values, outputs):
        features = original(encoder, pixel_values, outputs)
        if len(pixel_values) == 2:  # not the blank image
            features["last_hidden_state"][1, 0, 0] = torch.inf
        return features

    monkeypatch.setattr(extraction, "embed", embed)
    rows = read(extract(place))
    bad = ["NaN or infinity" in (error or "") for error in rows["error"]]
    assert bad == [index % 4 in (1, 3) for index in range(NUM_IMAGES)]
    assert np.isnan(rows["pooler_output"][bad]).all() and np.isfinite(rows["pooler_output"][~np.array(bad)]).all()
    assert json.loads((place / "features/manifest.json").read_text())["num_bad_images"] == sum(bad)


def test_features_of_no_image_are_a_failure(place, capsys):
    """The header of each file is whole, so that only decoding finds out; and so does the next start."""
    for path in (place / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            extract(place)
        message = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 1 and f"None of the {NUM_IMAGES} images could be read" in message
        assert "cat/00.png" in message and "bad_images.jsonl" in message


def test_a_damaged_manifest_or_settings_file_is_no_traceback(place, capsys):
    whole = contents(extract(place))
    (place / "features/manifest.json").write_text("{")
    assert contents(extract(place)) == whole
    (place / "features/settings.json").write_text("{")
    assert_refused(place, capsys, "settings.json' is damaged")


def forked_extraction(place, count=1, **changes):
    """The output of the command in forked processes."""
    argv = [SCRIPT, *words(place, **changes)]
    done = forked.run(argv) if count == 1 else forked.fork_ranks(count, argv)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def many_images(place):
    """130 copies of an image with other names and brightness."""
    image = np.asarray(Image.open(place / "images" / "cat" / "00.png"))
    for number in range(130):
        Image.fromarray(image // 2 + number // 2).save(place / "images" / "dog" / f"x{number:03}.png")
    return place


def test_a_run_killed_by_a_signal_continues_to_the_same_bytes(many_images):
    place, changes = many_images, {"shard_size": 2, "batch_size": 1}
    forked_extraction(place, output_dir=place / "whole", **changes)
    process = forked.start([SCRIPT, *words(place, **changes)])
    while not list((place / "features").glob("features-*")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 0 < len(list((place / "features").glob("features-*"))) < 71
    assert not (place / "features" / "manifest.json").exists()
    forked_extraction(place, **changes)
    assert contents(place / "features") == contents(place / "whole")


def test_two_processes_write_what_one_writes(many_images):
    place = many_images
    (place / "images" / "dog" / "x007.png").write_bytes(b"")
    assert "computation  cpu\n" in forked_extraction(place, output_dir=place / "one")
    output = forked_extraction(place, count=2, output_dir=place / "two")
    assert (
        "computation  cpu, 2 processes\n" in output and "file 18 of 18" in output
    )  # of 36; the other process has the others
    assert contents(place / "two") == contents(place / "one")


# Wrong input


def assert_refused(place, capsys, sentence, **changes):
    """Status 2, the sentence, and no new file."""
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        extract(place, **changes)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model": ""}, "model is missing"),
        ({"data": "/no/such/folder"}, "'/no/such/folder' is neither a file nor a folder"),
        ({"split": "test"}, "has no split 'test'; it has 'train'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"features": ["pooled", "pixels"]}, "features must be one of pooled, patch, got 'pixels'"),
        ({"format": "csv"}, "format must be one of parquet, safetensors, got 'csv'"),
        ({"dtype": "fp8"}, "dtype must be one of fp32, bf16, got 'fp8'"),
        ({"encoder": "student"}, "encoder must be one of target, context, got 'student'"),
        ({"speed": "high"}, "speed"),
        ({"model": "no-such-model"}, "The image processor of 'no-such-model' cannot be opened"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_nothing_is_written(place, capsys, changes, sentence):
    assert_refused(place, capsys, sentence, **changes)


def test_a_model_without_image_processor_is_an_error(place, capsys):
    (place / "model" / "preprocessor_config.json").unlink()
    assert_refused(place, capsys, "The image processor of")


def test_a_missing_context_encoder_is_an_error(place, model, capsys):
    model.ijepa.save_pretrained(place / "encoder")
    build_image_processor(32).save_pretrained(place / "encoder")
    assert_refused(place, capsys, "holds no context encoder", model=place / "encoder", encoder="context")


def test_features_of_two_runs_are_never_mixed(place, model, capsys):
    extract(place)
    assert_refused(place, capsys, "(batch_size was 2, is 3)", batch_size=3)
    Image.new("RGB", (50, 50)).save(place / "images" / "dog" / "new.png")
    assert_refused(place, capsys, "(images: 11 then, 12 now; 'dog/new.png' is new)")
    (place / "images" / "dog" / "new.png").unlink()
    model.ijepa.layernorm.bias.data += 1e-3  # the model was trained further
    model.save_pretrained(place / "model")
    assert_refused(place, capsys, "the weights of the model differ")
    assert_refused(place, capsys, "choose another place", output_dir=place / "images")


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_an_image_that_was_renamed_or_removed_is_named(place, capsys, file_format):
    extract(place, format=file_format)
    last = place / "images" / "dog" / "10.png"
    last.rename(place / "last.png")
    assert_refused(place, capsys, "images: 11 then, 10 now; 'dog/10.png' was image 10, and is", format=file_format)
    (place / "last.png").rename(last)
    (place / "images" / "cat" / "03.png").rename(place / "images" / "cat" / "3.png")
    said = "run (the first image that differs is image 3: it was 'cat/03.png', is 'cat/04.png')"
    assert_refused(place, capsys, said, format=file_format)


@pytest.mark.parametrize("name", ["features-000001.parquet", "manifest.json", "settings.json", "bad_images.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_named(place, capsys, name):
    (extract(place) / name).unlink()
    (place / "features" / name).mkdir()
    assert_refused(place, capsys, f"{place / 'features' / name} is a folder, and a file belongs there: move it away")


def test_a_file_that_only_looks_like_a_shard_is_told(place, capsys):
    (extract(place) / "features-000009.parquet").write_bytes(b"")
    capsys.readouterr()
    extract(place)
    assert "features-000009.parquet in" in (said := capsys.readouterr().err) and "is not of this run" in said


def test_a_missing_output_of_the_model_is_an_error():
    class WithoutPooler(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, pixel_values):
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=pixel_values.flatten(2))

    with pytest.raises(ValueError, match="WithoutPooler has no output 'pooler_output'"):
        extraction.embed(WithoutPooler(), torch.zeros(1, 3, 8, 8), ["pooler_output"])


# torch.compile


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_compiled_encoder_gives_the_same_features_and_is_compiled_once(place, monkeypatch, dtype):
    """Files of 4, 4 and 3 images in batches of 3: two batches are shorter."""
    compiled, shapes = [], []
    monkeypatch.setattr(execution, "compile_for_inference", spy(execution.compile_for_inference, compiled))
    monkeypatch.setattr(extraction, "embed", spy(extraction.embed, shapes, lambda *own: len(own[1])))
    plain = read(extract(place, batch_size=3, dtype=dtype, output_dir=place / "plain"))
    shapes.clear()
    torch._dynamo.utils.counters.clear()
    directory = extract(place, batch_size=3, dtype=dtype, torch_compile="true")
    assert len(compiled) == 1 and shapes == [1, *[3] * 5]  # first a blank image, to see whether the model works
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    found = read(directory)
    for name in ("pooler_output", "last_hidden_state"):
        np.testing.assert_allclose(found[name], plain[name], atol=2e-5 if dtype == "fp32" else 0.1)
    before = contents(directory)
    extract(place, batch_size=3, dtype=dtype, torch_compile="true")
    assert contents(directory) == before
    with pytest.raises(SystemExit):
        extract(place, batch_size=3, dtype=dtype)


def spy(function, calls, note=lambda *own: own):
    def call(*own):
        calls.append(note(*own))
        return function(*own)

    return call


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_any_number_of_encoders_are_compiled_in_a_process(place):
    """PyTorch stops at a number for each class. Here it is one."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    options = {"model": str(place / "model"), "data": str(place / "images"), "num_workers": 0, "torch_compile": True}
    with torch._dynamo.config.patch(recompile_limit=1):
        for number in range(2):
            extract_features(**options, output_dir=str(place / f"features_{number}"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_features_of_versions_without_torch_compile_are_not_of_another_run(place):
    directory = extract(place)
    settings = json.loads((directory / "settings.json").read_text())
    assert settings.pop("torch_compile") is False
    (directory / "settings.json").write_text(json.dumps(settings))
    before = (directory / "features-000000.parquet").read_bytes()
    extract(place)
    assert (directory / "features-000000.parquet").read_bytes() == before


def test_a_missing_compiler_is_named_before_anything_is_written(place, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no_such_compiler")
    with pytest.raises(SystemExit) as end:
        extract(place, torch_compile="true")
    assert end.value.code == 2 and "'no_such_compiler' does not work" in capsys.readouterr().err
    assert not (place / "features").exists()
