"""What leaves this package works elsewhere: code beside weights, pipelines, torch.export and ONNX."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from torch.export import Dim
from transformers.dynamic_module_utils import get_imports

from ijepa_transformers import IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from ijepa_transformers.conversion import arguments as conversion_arguments
from ijepa_transformers.conversion import onnx as conversion_onnx
from ijepa_transformers.data.transforms import build_image_processor
from tests import forked
from tests.printed import proposed


REPOSITORY = Path(__file__).parents[2]

# float32, values up to 4; measured 2.4e-6 (torch 2.13, onnxruntime 1.31 and torch 2.8, onnxruntime 1.23).
ONNX_TOLERANCE = 1e-5

AUTO_CLASSES = {
    "IJepaModel": "AutoModel",
    "IJepaForPretraining": "AutoModelForPreTraining",
    "IJepaForImageClassification": "AutoModelForImageClassification",
}

REFUSE_THIS_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ijepa_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Refuse())
"""


def run_without_this_package(program, tmp_path):
    """Another process, in another folder, in which `import ijepa_transformers` fails."""
    return forked.run(["-c", REFUSE_THIS_PACKAGE + program], cwd=tmp_path, kind="stock", check=True).stdout


@pytest.fixture
def classifier(trained, tmp_path):
    """A classifier of three named classes around the same target encoder."""
    torch.manual_seed(1)
    trained.save_pretrained(tmp_path / "start")
    names = {0: "cat", 1: "dog", 2: "owl"}
    return IJepaForImageClassification.from_pretrained(tmp_path / "start", id2label=names).eval()


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Code beside weights


@pytest.fixture
def directories_with_code(trained, classifier, tmp_path, monkeypatch):
    """One directory for each class, saved after `register_for_auto_class`."""
    for model in (trained.ijepa, trained, classifier):
        name = type(model).__name__
        monkeypatch.setattr(type(model), "_auto_class", None)  # undone after the test
        type(model).register_for_auto_class(AUTO_CLASSES[name])
        model.save_pretrained(tmp_path / name)
        monkeypatch.undo()
    return [tmp_path / name for name in AUTO_CLASSES]


def test_saving_any_class_names_all_of_them_and_brings_both_files(directories_with_code):
    for directory in directories_with_code:
        auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_ijepa.IJepaConfig"
        assert {auto_map[auto_class]: name for name, auto_class in AUTO_CLASSES.items()} == {
            f"modeling_ijepa.{name}": name for name in AUTO_CLASSES
        }
        code = {file.name for file in directory.glob("*.py")}
        assert code == {"configuration_ijepa.py", "modeling_ijepa.py"}


def test_the_code_needs_only_torch_and_transformers(directories_with_code):
    for file in directories_with_code[0].glob("*.py"):
        needed = set(get_imports(file)) - set(sys.stdlib_module_names)
        own = {"huggingface_hub", "safetensors"}  # come with transformers
        assert needed <= {"torch", "transformers"} | own


def test_directories_with_code_open_where_this_package_is_not(directories_with_code, trained, classifier, tiny_batch):
    """Every directory in every Auto class; also after being opened and saved once more over there."""
    tmp_path = directories_with_code[0].parent
    torch.save(tiny_batch, tmp_path / "batch.pt")
    directories = {directory.name: str(directory) for directory in directories_with_code}
    program = f"""
import torch, transformers
batch = torch.load("batch.pt")
pixels = batch["pixel_values"]
results = {{}}
for name, directory in {directories}.items():
    stock = transformers.AutoModel.from_pretrained(directory)
    assert type(stock).__module__ == "transformers.models.ijepa.modeling_ijepa"
    for round in ("first", "again"):
        opened = [
            auto_class.from_pretrained(directory, trust_remote_code=True).eval()
            for auto_class in (transformers.AutoModel, transformers.AutoModelForImageClassification)
        ] + [transformers.AutoModelForPreTraining.from_pretrained(directory, trust_remote_code=True).eval()]
        assert all(type(model).__module__.startswith("transformers_modules.") for model in opened)
        assert [type(model).__name__ for model in opened] == [
            "IJepaModel", "IJepaForImageClassification", "IJepaForPretraining"
        ]
        encoder, classifier, pretraining = opened
        with torch.no_grad():
            results[name, round] = {{
                "stock": stock(pixels).last_hidden_state,
                "encoder": encoder(pixels).last_hidden_state,
                "logits": classifier(pixels).logits,
                "loss": pretraining(**batch).loss,
            }}
        saved = dict(zip({list(AUTO_CLASSES)}, (encoder, pretraining, classifier)))[name]
        directory = name + "-again"
        saved.save_pretrained(directory)
try:
    import ijepa_transformers
except ModuleNotFoundError:
    torch.save(results, "results.pt")
"""
    run_without_this_package(program, tmp_path)
    with torch.no_grad():
        features = trained.ijepa(tiny_batch["pixel_values"]).last_hidden_state
        logits, loss = classifier(tiny_batch["pixel_values"]).logits, trained(**tiny_batch).loss
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == 2 * len(AUTO_CLASSES)
    for (name, _), result in results.items():
        assert torch.equal(result["stock"], features) and torch.equal(result["encoder"], features)
        assert name != "IJepaForImageClassification" or torch.equal(result["logits"], logits)
        assert name != "IJepaForPretraining" or torch.equal(result["loss"], loss)


def test_a_directory_without_code_never_says_that_it_has_some(directories_with_code, tmp_path):
    model = IJepaModel.from_pretrained(directories_with_code[0])
    assert model.config.auto_map
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not list((tmp_path / "plain").glob("*.py"))


# Pipelines


@pytest.fixture
def model_directories(trained, classifier, image, tmp_path):
    for name, model in (("pretrained", trained), ("classifier", classifier)):
        model.save_pretrained(tmp_path / name)
        build_image_processor(32).save_pretrained(tmp_path / name)
    image.save(tmp_path / "image.png")
    return tmp_path


def expected_of_pipelines(trained, classifier, image):
    """Features (1, N, D), pooled features (1, D) and class probabilities, computed without a pipeline."""
    with torch.no_grad():
        pixel_values = build_image_processor(32)(image, return_tensors="pt")["pixel_values"]
        outputs = trained.ijepa(pixel_values)
        return outputs.last_hidden_state, outputs.pooler_output, classifier(pixel_values).logits.softmax(-1)[0]


def assert_pipelines(features, scores, expected):
    # torchvision, where it is installed, resizes within one level of PIL; hence not 1e-6.
    np.testing.assert_allclose(features, expected[0], atol=0.05)
    found = {entry["label"]: entry["score"] for entry in scores}
    assert found == pytest.approx(dict(zip(("cat", "dog", "owl"), expected[2].tolist(), strict=True)), abs=0.01)


def test_the_pipelines_of_transformers_work_with_this_package(model_directories, trained, classifier, image):
    expected = expected_of_pipelines(trained, classifier, image)
    extract = transformers.pipeline("image-feature-extraction", model=str(model_directories / "pretrained"))
    classify = transformers.pipeline("image-classification", model=str(model_directories / "classifier"))
    assert type(extract.model) is IJepaModel and type(classify.model) is IJepaForImageClassification
    assert_pipelines(extract(image), classify(image), expected)
    np.testing.assert_allclose(extract(image, pool=True), expected[1], atol=0.05)


def test_the_pipelines_of_transformers_work_without_this_package(model_directories, trained, classifier, image):
    program = """
import json, transformers
extract = transformers.pipeline("image-feature-extraction", model="pretrained")
classify = transformers.pipeline("image-classification", model="classifier")
assert type(extract.model).__module__ == "transformers.models.ijepa.modeling_ijepa"
print("RESULT", json.dumps([extract("image.png"), classify("image.png")]))
"""
    output = run_without_this_package(program, model_directories)
    results = json.loads(output.split("RESULT")[1])
    assert_pipelines(*results, expected_of_pipelines(trained, classifier, image))


# torch.export


def test_torch_export_takes_any_batch(trained, classifier):
    for model, output in ((trained.ijepa, "last_hidden_state"), (classifier, "logits")):
        shapes = {"pixel_values": {0: Dim("batch")}}
        program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes).module()
        for batch_size in (1, 5):
            pixel_values = torch.randn(batch_size, 3, 32, 32)
            torch.testing.assert_close(program(pixel_values)[output], model(pixel_values)[output], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(48, 80), (33, 70), (32, 32), (32, 56)])
def test_torch_export_takes_any_resolution(trained, size):
    """Non-square, not a multiple of the patch, and the model's own height, which the trace must not exclude."""
    program = torch.export.export(
        trained.ijepa,
        (torch.randn(2, 3, 40, 56),),
        {"interpolate_pos_encoding": True},
        dynamic_shapes={"pixel_values": dict.fromkeys((0, 2, 3), Dim.AUTO), "interpolate_pos_encoding": None},
    ).module()
    pixel_values = torch.randn(3, 3, *size)
    expected = trained.ijepa(pixel_values, interpolate_pos_encoding=True)
    found = program(pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(found["last_hidden_state"], expected["last_hidden_state"], atol=1e-6, rtol=0)


# ONNX


def assert_onnx_equals_torch(path, model, sizes, batch_sizes=(1, 5), **kwargs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for size in sizes:
        for batch_size in batch_sizes:
            pixel_values = torch.randn(batch_size, 3, *size)
            with torch.no_grad():
                expected = model(pixel_values, **kwargs)
            for name, found in zip(names, session.run(None, {"pixel_values": pixel_values.numpy()}), strict=True):
                torch.testing.assert_close(torch.from_numpy(found), expected[name], atol=ONNX_TOLERANCE, rtol=0)
    return names


def test_the_onnx_encoder_is_the_target_encoder(model_directories, trained, capsys):
    output = model_directories / "encoder.onnx"
    conversion_onnx.main(["--model", str(model_directories / "pretrained"), "--output", str(output)])
    names = assert_onnx_equals_torch(output, trained.ijepa, [(32, 32)])
    assert names == ["last_hidden_state", "pooler_output"]
    printed = capsys.readouterr().out
    assert [name for name, _ in proposed(printed)] == ["python"]
    assert "last_hidden_state: largest difference to PyTorch" in printed and f"\nONNX file    {output}\n" in printed
    assert not list(model_directories.glob(".tmp*"))


def test_an_onnx_encoder_of_fixed_resolution_refuses_another_one(model_directories, trained):
    conversion_onnx.export(trained.ijepa, model_directories / "encoder.onnx")
    session = onnxruntime.InferenceSession(str(model_directories / "encoder.onnx"))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"pixel_values": np.zeros((1, 3, 40, 32), np.float32)})


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=pytest.mark.slow)])
def test_onnx_of_free_resolution(model_directories, trained, classifier, opset):
    sizes = [(48, 80), (33, 70), (32, 32), (32, 56)]
    for name, model in (("pretrained", trained.ijepa), ("classifier", classifier)):
        output = model_directories / f"{name}.onnx"
        words = ["--model", str(model_directories / name), "--output", str(output), "--opset", str(opset)]
        conversion_onnx.main([*words, "--free_resolution"])
        names = assert_onnx_equals_torch(output, model, sizes, interpolate_pos_encoding=True)
        assert (names == ["logits"]) == (name == "classifier")
        assert [domain.version for domain in onnx.load(output).opset_import if domain.domain == ""] == [opset]


def test_the_documented_command_works_from_anywhere(model_directories):
    command = [REPOSITORY / "conversion" / "export_onnx.py", "--model", "classifier", "--output", "classifier.onnx"]
    finished = forked.run(command, cwd=model_directories, check=True)
    assert "\nONNX file    classifier.onnx\n" in finished.stdout
    assert (model_directories / "classifier.onnx").exists()


def test_an_onnx_file_that_differs_is_not_kept(model_directories, monkeypatch, capsys):
    """A quantity that tracing turns into a constant, for example, shows only at another batch size."""
    original = conversion_onnx.PlainOutputs.forward

    def forward(self, pixel_values):
        outputs = original(self, pixel_values)
        return tuple(value * (1.001 if torch.compiler.is_exporting() else 1) for value in outputs)

    monkeypatch.setattr(conversion_onnx.PlainOutputs, "forward", forward)
    before = sorted(model_directories.iterdir())
    with pytest.raises(SystemExit) as stopped:
        conversion_onnx.main(
            ["--model", str(model_directories / "pretrained"), "--output", str(model_directories / "encoder.onnx")]
        )
    assert stopped.value.code == 1 and "no file was written" in capsys.readouterr().err
    assert sorted(model_directories.iterdir()) == before


def test_weights_that_are_no_numbers_are_not_exported(model_directories, trained, capsys):
    trained.ijepa.layernorm.weight.data[0] = torch.nan
    trained.save_pretrained(model_directories / "spoilt")
    with pytest.raises(SystemExit) as stopped:
        conversion_onnx.main(
            ["--model", f"{model_directories}/spoilt", "--output", f"{model_directories}/spoilt.onnx"]
        )
    assert stopped.value.code == 2 and "layernorm.weight holds NaN or infinity" in capsys.readouterr().err
    assert not list(model_directories.glob("*spoilt.onnx*"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"--model": "nothing"}, "The model 'nothing' cannot be opened"),
        ({"--model": "vit"}, "its model_type is 'vit', not 'ijepa'"),
        ({"--opset": "17"}, "--opset must be one of 18 to 23, got 17"),
        ({"--output": "no/such/folder/a.onnx"}, "there is no folder 'no/such/folder'"),
        ({"--output": "taken.onnx"}, "'taken.onnx' exists already"),
        ({"--output": "pair.onnx"}, "'pair.onnx.data' exists already"),
        ({"--output": "link.onnx"}, "'link.onnx' exists already"),
        ({"--output": " "}, "--output must not be empty"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(model_directories, monkeypatch, capsys, changes, sentence):
    monkeypatch.chdir(model_directories)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.ViTConfig().save_pretrained("vit")
    for name in ("taken.onnx", "pair.onnx.data"):
        Path(name).touch()
    Path("link.onnx").symlink_to("nowhere")
    before = sorted(Path().rglob("*"))
    words = {"--model": "pretrained", "--output": "encoder.onnx", **changes}
    with pytest.raises(SystemExit) as stopped:
        conversion_onnx.main([word for pair in words.items() for word in pair])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_a_missing_package_is_named(model_directories, monkeypatch, capsys):
    monkeypatch.setattr(conversion_arguments, "ONNX_PACKAGES", ("onnx", "a_package_nobody_has"))
    with pytest.raises(SystemExit):
        conversion_onnx.main(["--model", str(model_directories / "pretrained"), "--output", "encoder.onnx"])
    assert "a_package_nobody_has not found; run: pip install" in capsys.readouterr().err


def test_the_model_of_an_untrained_configuration_survives_the_round_trip(tmp_path):
    """Non-square images and patches: height and width must not be swapped anywhere."""
    config = IJepaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=(16, 24),
        patch_size=(4, 8),
    )
    model = IJepaForPretraining(config).eval().ijepa
    differences = conversion_onnx.export(model, tmp_path / "encoder.onnx", free_resolution=True)
    assert differences["last_hidden_state"][0] < ONNX_TOLERANCE
    assert_onnx_equals_torch(tmp_path / "encoder.onnx", model, [(20, 48)], interpolate_pos_encoding=True)
