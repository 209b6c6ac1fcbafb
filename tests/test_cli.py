"""The console command `ijepa`: commands, recipes, near names, and how fast it answers; the import of the package."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

import ijepa_transformers
from ijepa_transformers import cli
from ijepa_transformers.finetuning.arguments import training_flags
from ijepa_transformers.finetuning.training_arguments import FineTuningArguments
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.recipe_files import RECIPES, list_recipes


def answer(capsys, *argv):
    """Exit status, stdout and stderr of the command in this process."""
    status = 0
    try:
        cli.main(list(map(str, argv)))
    except SystemExit as stopped:
        status = stopped.code or 0
    return status, *capsys.readouterr()


def test_help_lists_every_command(capsys):
    for argv in ((), ("--help",), ("-h",)):
        status, out, _ = answer(capsys, *argv)
        assert status == 0 and all(f"\n  {name} " in out for name in [*cli.COMMANDS, "recipes"])
    assert answer(capsys, "--version") == (0, f"ijepa {ijepa_transformers.__version__}\n", "")


def test_an_unknown_command_is_one_sentence_with_a_near_name(capsys):
    assert answer(capsys, "pretrian") == (
        2,
        "",
        "ijepa: error: unknown command 'pretrian'. Did you mean pretrain?\n",
    )
    assert answer(capsys, "recipe")[2] == "ijepa: error: unknown command 'recipe'. Did you mean recipes?\n"
    assert "The commands are pretrain, finetune, probe" in answer(capsys, "xyz")[2]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_refuses_an_unknown_flag_in_one_line(capsys, name):
    status, out, _ = answer(capsys, name, "--help")
    assert status == 0 and f"usage: ijepa {name} " in out
    flag = "--dataa" if name == "stats" else "--outputt"  # stats writes no file
    status, out, err = answer(capsys, name, flag, "x")
    assert (status, out) == (2, "") and err.startswith(f"ijepa {name}: error: unrecognized arguments: {flag}. Did you")
    assert err.count("\n") == 1


# What is left out, or has to be given: there is no default to name.
WITHOUT_DEFAULT = {
    *("data", "data_config", "model", "models", "query", "output", "output_dir", "runs", "pictures_dir"),
    *("num_images", "init_from", "epochs", "max_steps", "momentum_half_life", "hub_model_id"),
}


@pytest.mark.parametrize("name", ["pretrain", "probe", "extract", "search", "stats", "visualize"])
def test_help_of_every_flag_gives_its_default(capsys, name):
    text = answer(capsys, name, "--help")[1].partition("--print_config")[2]
    flags = {flag.split()[0]: " ".join(flag.split()) for flag in re.split(r"\n  --", text)[1:]}
    assert len(flags) > 5
    assert {flag for flag, told in flags.items() if "(default:" not in told} <= WITHOUT_DEFAULT


def test_help_says_that_a_flag_takes_a_number_or_a_word(capsys):
    out = answer(capsys, "pretrain", "--help")[1]
    assert "--per_device_batch_size INTEGER|auto" in out and "--sixteen_bit_max INTEGER" in out


def test_commands_get_their_parsed_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(pretraining_command, "execute", lambda arguments, argv: calls.append((arguments, argv)))
    argv = ["--recipe", "quickstart", "--max-steps", "5", "--output_dir", "x"]
    cli.main(["pretrain", *argv])
    [(arguments, given)] = calls
    assert arguments.max_steps == 5 and given == argv


def cpu_seconds(*argv):
    """User and system time of a command, as a process of its own; its output must hold `ijepa`."""
    process = subprocess.Popen([sys.executable, "-m", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert "ijepa" in output and "Traceback" not in output
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("module", ["ijepa_transformers", "ijepa_transformers.cli"])
def test_help_of_the_command_takes_less_than_a_second(module):
    assert cpu_seconds(module, "--help") < 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_mistyped_flag_takes_less_than_a_second(name):
    assert cpu_seconds("ijepa_transformers", name, "--outputt", "x") < 1


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"finetune"}))
def test_help_of_a_command_takes_less_than_a_second(name):
    assert cpu_seconds("ijepa_transformers", name, "--help") < 1


WITHOUT_PEFT = """
import importlib.util as util, runpy, sys
find_spec = util.find_spec
util.find_spec = lambda name, *more: None if name == "peft" else find_spec(name, *more)
"""
HELP = 'sys.argv[1:] = ["finetune", "--help"]; runpy.run_module("ijepa_transformers", run_name="__main__")'
ARGUMENTS = 'from transformers import TrainingArguments; print("ijepa")'


@pytest.mark.slow
def test_help_of_fine_tuning_takes_hardly_longer_than_the_import_of_its_arguments(tmp_path, monkeypatch):
    """Where peft is installed, the arguments of Transformers import it too, which takes as long again."""
    for name, program in (("help_of_fine_tuning", HELP), ("import_of_arguments", ARGUMENTS)):
        (tmp_path / f"{name}.py").write_text(WITHOUT_PEFT + program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    shortest = {
        name: min(cpu_seconds(name) for _ in range(3)) for name in ("import_of_arguments", "help_of_fine_tuning")
    }
    assert shortest["help_of_fine_tuning"] < 1.5 * shortest["import_of_arguments"], shortest


def test_flags_of_trainer_are_known_without_importing_it():
    """Read from the source, they are those of the class."""
    assert set(training_flags()) == {field.name for field in dataclasses.fields(FineTuningArguments) if field.init}


# Recipes


def test_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in (("recipes",), ("recipes", "list")):
        out = answer(capsys, *argv)[1]
        names = [line.split()[0] for line in out.splitlines()]
        assert names[: len(list_recipes())] == list_recipes() and "accelerate/fsdp2.yaml" in names
    text = (RECIPES / "quickstart.yaml").read_text()
    assert answer(capsys, "recipes", "show", "quickstart") == (0, text, "")
    assert answer(capsys, "recipes", "copy", "quickstart") == (0, "wrote quickstart.yaml\n", "")
    assert answer(capsys, "recipes", "copy", "accelerate/ddp.yaml") == (0, "wrote ddp.yaml\n", "")
    assert answer(capsys, "recipes", "copy", "quickstart", "mine.yaml")[0] == 0
    assert (tmp_path / "quickstart.yaml").read_text() == (tmp_path / "mine.yaml").read_text() == text
    (tmp_path / "mine.yaml").write_text("mine")
    status, _, err = answer(capsys, "recipes", "copy", "quickstart", "mine.yaml")
    assert status == 2 and "'mine.yaml' exists already" in err and (tmp_path / "mine.yaml").read_text() == "mine"
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert "'link.yaml' exists already" in answer(capsys, "recipes", "copy", "quickstart", "link.yaml")[2]
    assert "Did you mean quickstart?" in answer(capsys, "recipes", "show", "quickstrat")[2]


# Several GPUs


def test_one_process_with_several_gpus_is_told_how_to_use_all(monkeypatch):
    for name in [name for name in os.environ if name == "WORLD_SIZE" or name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for count, expected in ((0, ""), (1, ""), (4, "ijepa launch --multi_gpu --num_processes 4 pretrain")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        said = pretraining_command._unused_gpus(["--data", "my photos"])
        assert expected in said and bool(said) == bool(expected)
    assert said.endswith("--num_processes 4 pretrain --data 'my photos'\n")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert pretraining_command._unused_gpus([]) == ""


# The import of the package

CLASSES = "AutoModel, AutoModelForPreTraining, AutoModelForImageClassification, AutoBackbone"
AUTO = f"from transformers import AutoConfig, {CLASSES}"
OURS = "import ijepa_transformers"
CHECK = """
config = AutoConfig.for_model("ijepa", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
print(type(config).__module__)
for auto in (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification, AutoBackbone):
    print(type(auto.from_config(config)).__module__)
"""
MODELING_AUTO = "transformers.models.auto.modeling_auto"
THREADS = f"""
import threading, ijepa_transformers
codes = ("import ijepa_transformers.modeling_ijepa", "import {MODELING_AUTO}", {AUTO!r})
threads = [threading.Thread(target=exec, args=(code, {{}})) for code in codes]
for thread in threads: thread.start()
for thread in threads: thread.join()
{AUTO}
"""
ORDERS = {
    "ours first": f"{OURS}; {AUTO}",
    "ours last": f"{AUTO}; {OURS}",
    "the model first": f"from ijepa_transformers import IJepaForPretraining; {AUTO}",
    "the model's module first": f"import ijepa_transformers.modeling_ijepa; {AUTO}",
    "between configuration and models": f"from transformers import AutoConfig; {OURS}; {AUTO}",
    "Transformers reloaded": f"{OURS}, importlib, {MODELING_AUTO} as auto; importlib.reload(auto);"
    f" from transformers import AutoConfig; from {MODELING_AUTO} import *",
    "ours reloaded": f"{OURS}, importlib; {AUTO}; importlib.reload(ijepa_transformers)",
    "threads": THREADS,
}


QUICK = ("ours first", "ours last", "the model first")


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[] if order in QUICK else pytest.mark.slow) for order in ORDERS]
)
def test_auto_classes_give_our_models_in_any_order_of_imports(order):
    done = subprocess.run(
        [sys.executable, "-c", ORDERS[order] + CHECK], capture_output=True, text=True, timeout=120, check=False
    )
    names = [f"ijepa_transformers.{name}_ijepa" for name in ("configuration", *["modeling"] * 4)]
    assert done.stdout.split() == names, done.stderr


def test_the_package_is_imported_without_torch_and_knows_its_names():
    code = (
        "import sys, ijepa_transformers as package; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        "assert set(package.__all__) <= set(dir(package)); [getattr(package, name) for name in package.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'IJepaModle'"):
        ijepa_transformers.IJepaModle  # noqa: B018
