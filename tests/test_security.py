"""What no input may do: run code, get into a page as code, or carry a token out.

docs/development/threat_model.md says it in words.
"""

import ast
import json
import pickle
import types
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.tracking import get_available_trackers

from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.conversion import convert as conversion_convert
from ijepa_transformers.conversion import directory as conversion_directory
from ijepa_transformers.conversion import export as conversion_export
from ijepa_transformers.conversion import onnx as conversion_onnx
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.evaluation import command as evaluation_command
from ijepa_transformers.evaluation import extraction
from ijepa_transformers.finetuning import command as finetuning_command
from ijepa_transformers.finetuning.trainer import write_readme
from ijepa_transformers.model_card import fenced_yaml, in_code, in_markdown, write_model_card
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.visualization import command as visualization_command
from ijepa_transformers.visualization.page import Card, Headline, Section, build_page
from tests.runs import fine_tune, pretrain


REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
# Named one by one, because a .venv may lie beside them.
PLACES = ("*.py", "ijepa_transformers/**/*.py", "conversion/*.py", "benchmarks/**/*.py", "examples/**/*.py")
SOURCES = sorted(path for place in PLACES for path in REPOSITORY.glob(place))
SCRIPT = "<script>alert(1)</script>"


# The source


def dotted(node):
    """`a.b.c` of a name or an attribute, else ""."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def literal(call, name):
    """The constant that a keyword of a call has, None where it is absent or computed."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return getattr(values[0], "value", None) if values else None


CALLS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.full_load", "yaml.unsafe_load"}
PICKLE_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def sins(tree):
    """What a module must not do, as (line, words)."""
    safe_loaders = {"SafeLoader", "yaml.SafeLoader", "CSafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(dotted(base) in safe_loaders for base in node.bases):
            safe_loaders = safe_loaders | {node.name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                is_harmless = isinstance(node, ast.Import) and module == "pickle" and imports_nothing(tree)
                if module.split(".")[0] in PICKLE_MODULES and not is_harmless:
                    yield node.lineno, f"imports {module}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument, default in defaults_of(node):
                if argument == "trust_remote_code" and getattr(default, "value", None) is not False:
                    yield node.lineno, "trust_remote_code is not off by default"
        if isinstance(node, ast.AnnAssign) and dotted(node.target) == "trust_remote_code":
            yield node.lineno, "an argument trust_remote_code: read docs/development/threat_model.md first"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, words) for words in sins_of_call(node, safe_loaders))


def imports_nothing(tree):
    """True if `pickle` is used for its error class, and for readers whose own `find_class` imports nothing."""
    uses = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node.value) == "pickle"]
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    readers = [node for node in classes if "pickle.Unpickler" in map(dotted, node.bases)]
    others = [name for name in uses if name != "UnpicklingError"]
    return others == ["Unpickler"] * len(readers) and all(map(has_inert_find_class, readers))


def has_inert_find_class(reader):
    methods = [node for node in reader.body if isinstance(node, ast.FunctionDef) and node.name == "find_class"]
    calls = [dotted(node.func) for method in methods for node in ast.walk(method) if isinstance(node, ast.Call)]
    return bool(methods) and set(calls) <= {"type"}


def defaults_of(function):
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    pairs = [*zip(with_default, arguments.defaults, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return [(argument.arg, default) for argument, default in pairs]


def sins_of_call(call, safe_loaders):
    name = dotted(call.func)
    if name in CALLS_CODE:
        yield f"calls {name}"
    if name in ("torch.load", "load") and name != "load" and literal(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name.endswith(("np.load", "numpy.load")) and literal(call, "allow_pickle") not in (None, False):
        yield "np.load with allow_pickle"
    if name == "yaml.load":
        loaders = [keyword.value for keyword in call.keywords if keyword.arg == "Loader"] + call.args[1:]
        if not loaders or dotted(loaders[0]) not in safe_loaders:
            yield "yaml.load without a SafeLoader"
    if literal(call, "shell") is True:
        yield "a shell"
    if literal(call, "trust_remote_code") is True:
        yield "trust_remote_code=True"
    if literal(call, "weights_only") is False:
        yield "weights_only=False"
    if literal(call, "use_safetensors") is False:
        yield "use_safetensors=False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_loads_pickles_runs_shells_or_trusts_remote_code(path):
    assert list(sins(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "import pickle\nclass Reader(pickle.Unpickler): pass",
        "import pickle\nclass Reader(pickle.Unpickler):\n def find_class(self, *n): return super().find_class(*n)",
        "import joblib",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(words, shell=True)",
        "os.system(words)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def open_model(name, *, trust_remote_code=True): pass",
        "eval(text)",
    ],
)
def test_the_law_on_sources_finds_what_it_is_for(code):
    assert list(sins(ast.parse(code)))


# Pickles


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def commands(model, checkpoint, output):
    """Every script, with a path that holds pickles in the place of a model or checkpoint."""
    data, to = ["--data", "digits"], ["--output", output]
    words = ["--output_dir", output, *data]
    return {
        "convert_meta_checkpoint": (conversion_convert.main, ["--checkpoint", checkpoint, *to]),
        "export_meta_checkpoint": (conversion_export.main, ["--model", model, *to]),
        "convert_meta_checkpoint --from_directory": (
            conversion_convert.main,
            ["--from_directory", model, *to],
        ),
        "export_onnx": (conversion_onnx.main, ["--model", model, "--output", f"{output}.onnx"]),
        "run_feature_extraction": (extraction.main, ["--model", model, *words]),
        "run_image_classification": (finetuning_command.main, ["--model", model, "--use_cpu", *words]),
        "run_pretraining": (pretraining_command.main, ["--init_from", model, "--max_steps", "1", *words]),
        "run_probing": (evaluation_command.main, ["--models", model, *words]),
        "run_visualization": (visualization_command.main, ["--model", model, *data, "--output", f"{output}.html"]),
    }


@pytest.fixture
def poisoned(tmp_path):
    """A model directory whose weights are a pickle that runs code, and the same as a checkpoint file."""
    model, marker = tmp_path / "model", tmp_path / "executed"
    config = IJepaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    config.architectures = ["IJepaForPretraining"]
    config.save_pretrained(model)
    build_image_processor(16).save_pretrained(model)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.bin"):
        torch.save({"encoder": Evil(marker), "ijepa.layernorm.weight": Evil(marker)}, model / name)
    yield model, model / "pytorch_model.bin", marker
    assert not marker.exists()


@pytest.mark.parametrize("name", commands("", "", ""))
@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_runs_code_is_refused_by_every_command(name, old_format, poisoned, tmp_path):
    model, checkpoint, marker = poisoned
    if old_format:
        checkpoint.write_bytes(pickle.dumps(Evil(marker)))
    main, words = commands(str(model), str(checkpoint), str(tmp_path / "output"))[name]
    with pytest.raises((SystemExit, ValueError, OSError, pickle.UnpicklingError)) as stopped:
        main(words)
    assert getattr(stopped.value, "code", 2) == 2
    assert not marker.exists()


def test_the_pickle_of_these_tests_does_run_code(tmp_path):
    """Or the tests above would prove nothing."""
    torch.save({"encoder": Evil(tmp_path / "executed")}, tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_directory_that_brings_code_is_not_trusted(poisoned):
    model, _, marker = poisoned
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(Exception):  # noqa: B017 (whatever it says about the pickle beside it)
        IJepaForPretraining.from_pretrained(model)


# Pages and cards


def test_a_hostile_name_is_text_in_the_report():
    verdict, card = Headline(SCRIPT, sentences=[SCRIPT]), Card(SCRIPT, SCRIPT, SCRIPT)
    hostile = {f"File {SCRIPT}": f'{SCRIPT}.png" onload="x'}
    page = build_page(SCRIPT, verdict, [card], [Section(SCRIPT, note=SCRIPT)], hostile)
    assert SCRIPT not in page and page.count("&lt;script&gt;") == 11 and '" onload' not in page
    assert page.count("<script") == 1  # our own


def test_a_hostile_name_is_text_in_the_model_card(tmp_path):
    name = f'run\n# Free money\n{SCRIPT} [click](http://x) "); evil("'
    recipe = {"data": "photos\n\n```\n\n<script>\n", "output_dir": "````"}
    write_model_card(tmp_path, name, summary={}, metrics={}, recipe=recipe)
    _, header, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert "<script" not in yaml.safe_load(header)
    title, *lines = body.strip().splitlines()
    assert "\\<script\\>" in title and "\\[click\\]" in title and title.startswith("# run # Free money")
    assert "# Free money" not in lines
    calls = ast.parse("\n".join(line for line in lines if "from_pretrained" in line)).body
    assert [call.value.args[0].value for call in calls] == [name, name]  # one string, whatever is in it
    block = body[body.index("`````yaml") :]
    assert yaml.safe_load(block.split("`````")[1].removeprefix("yaml")) == recipe


HOSTILE = f"x\n\n# Heading\n{SCRIPT} | `a` *b* __c__ [d](http://e) ~~f~~ &lt;\r\n---\u2028```\n\u202ey"


def assert_text_only(directory):
    """HOSTILE is in the card, in lines that are whole, and nothing of it is markup."""
    _, header, body = (directory / "README.md").read_text().split("---\n", 2)
    assert not {"# Heading", "---", SCRIPT} & set(body.splitlines()) and "<script>" not in header + body
    assert "\u2028" not in body and "\u202e" not in body
    lines = [line for line in body.splitlines() if "Heading" in line and "\\n" not in line]
    for line in lines:
        assert r"\`a\` \*b\* \_\_c\_\_ \[d\](http" in line and "x # Heading" in line
    assert lines
    return lines


def test_a_hostile_folder_is_text_in_the_card_of_pretraining(tmp_path):
    recipe = {"data": HOSTILE, "init_from": SCRIPT}
    summary = {"data": f"{HOSTILE} (9 images)", "batch": "2 images"}
    write_model_card(tmp_path, "run", summary=summary, metrics={}, recipe=recipe)
    (line,) = assert_text_only(tmp_path)
    assert line.startswith("- data: x ") and line.endswith("y (9 images)")
    assert "- batch: 2 images" in (tmp_path / "README.md").read_text().splitlines()
    block = (tmp_path / "README.md").read_text().split("````")[1]
    assert yaml.safe_load(block.removeprefix("yaml")) == recipe


def test_hostile_classes_splits_and_models_are_text_in_the_card_of_a_classifier(tmp_path):
    config = types.SimpleNamespace(id2label={0: HOSTILE, 1: "b"}, model_type="ijepa", problem_type=None)
    source = tmp_path / HOSTILE.replace("/script", "script").replace("http://", "http:||")
    source.mkdir()
    data = types.SimpleNamespace(data=HOSTILE, train_split=SCRIPT, validation_split=f"\n{SCRIPT}")
    trainer = types.SimpleNamespace(
        arguments=types.SimpleNamespace(
            model=types.SimpleNamespace(model=str(source), tune="all", from_scratch=False),
            data=data,
            recipe={"a": HOSTILE},
        ),
        model=types.SimpleNamespace(config=config),
        run_state={"history": [HOSTILE]},
        results={"eval_accuracy": 0.5},
        args=types.SimpleNamespace(hub_model_id=HOSTILE, output_dir=tmp_path),
        train_dataset=[1, 2],
    )
    write_readme(trainer, tmp_path)
    assert len(assert_text_only(tmp_path)) == 5  # name, class, data, model and history


def test_hostile_files_are_text_in_the_cards_of_conversions(tmp_path):
    config = types.SimpleNamespace(num_attention_heads=2, layer_norm_eps=1e-6)
    conversion_convert._write_readme(tmp_path, HOSTILE, HOSTILE, "both", config)
    assert len(assert_text_only(tmp_path)) == 2
    conversion_directory._write_readme(tmp_path, HOSTILE, tmp_path / HOSTILE.replace("/", ":"), [HOSTILE])
    assert "<script>" not in (tmp_path / "README.md").read_text()
    assert "# Heading" not in (tmp_path / "README.md").read_text().splitlines()


def test_ordinary_names_stay_as_they_are():
    assert in_markdown("lab/my_model-1.0 (small)") == "lab/my_model-1.0 (small)"
    assert fenced_yaml({"a": 1}) == "```yaml\na: 1\n```"
    assert in_code("jepa-vit_h.pth.tar") == "`jepa-vit_h.pth.tar`"


@pytest.mark.parametrize("name", ["- a", "+ a", "1. a", "2) a", "# a", "a #", "=", "---", "www.a.b", "_a_", "a\tb"])
def test_a_name_cannot_be_a_list_or_a_heading(name):
    text = in_markdown(name)
    assert text.replace("\\", "") == " ".join(name.split()) and (text != name or "\t" in name)


def test_a_name_that_is_not_unicode_does_not_stop_the_card(tmp_path):
    write_model_card(tmp_path, "caf\udce9", summary={}, metrics={}, recipe={"output_dir": "caf\udce9"})
    assert "caf\\udce9" in (tmp_path / "README.md").read_text(encoding="utf-8")


# Tokens

TOKEN = "hf_ThisIsATokenThatNobodyMayEverRead"


def files_with(text, directory):
    return [path for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_pretraining_writes_no_token(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    tracker = "tensorboard" if "tensorboard" in map(str, get_available_trackers()) else None
    pretrain(tmp_path / "run", max_steps=2, warmup_steps=1, trackers=tracker)
    assert files_with(TOKEN, tmp_path) == [] and TOKEN not in "".join(capfd.readouterr())


def test_fine_tuning_writes_no_token(gray_pretrained, tmp_path, monkeypatch, capfd):
    """Trainer pickles its arguments, and uploads them."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fine_tune(gray_pretrained, tmp_path / "run", hub_token=TOKEN)
    assert files_with(TOKEN, tmp_path / "run") == [] and TOKEN not in "".join(capfd.readouterr())
