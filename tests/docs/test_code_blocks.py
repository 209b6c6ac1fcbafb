"""The code blocks of README and guides, as far as it can be told without running them.

Their flags are those of the commands, their imports and keywords exist, and what is not run says why. The slow test
`test_blocks_run.py` runs them.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

from ijepa_transformers import cli
from ijepa_transformers.arguments import flags_of
from ijepa_transformers.evaluation.arguments import GROUPS as PROBING
from ijepa_transformers.evaluation.extraction_arguments import GROUPS as EXTRACTION
from ijepa_transformers.finetuning.training_arguments import GROUPS as FINE_TUNING
from ijepa_transformers.pretraining.arguments import GROUPS as PRETRAINING
from ijepa_transformers.recipe_files import find_recipe, list_recipes
from ijepa_transformers.retrieval.arguments import GROUPS as RETRIEVAL
from tests.markdown_files import (
    REPOSITORY,
    code_blocks,
    ijepa_arguments,
    shell_lines,
    short_name,
    tokens_of,
    user_pages,
)


BLOCKS = [block for page in user_pages() for block in code_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
FUNCTIONS = {
    "pretrain": flags_of(PRETRAINING),
    "probe": flags_of(PROBING),
    "extract_features": flags_of(EXTRACTION),
    "finetune": flags_of(FINE_TUNING),
    "search": flags_of(RETRIEVAL),
}
# Flags of launchers and other programs that pages name.
OF_OTHERS = {
    *("num_processes", "config_file", "multi_gpu", "num_machines", "dynamo_backend", "nodes", "shm-size", "local-dir"),
    *("logdir", "fsdp_use_orig_params", "help", "version", "use_fsdp", "flag"),
}


def test_every_block_says_its_language():
    faults = [str(block) for block in BLOCKS if block.language not in ("bash", "python", "text", "bibtex")]
    assert faults == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the recipes lie that pages let their readers copy and change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pages"))
        Path("my_recipe.yaml").write_text(Path(find_recipe("small_images")).read_text())
        lines = Path(find_recipe("custom_images_single_gpu")).read_text().splitlines()
        sizes = ("size:", "image_size:", "patch_size:", "initializer_range:")  # as docs/pretrain.md says
        Path("continue.yaml").write_text("\n".join(line for line in lines if not line.startswith(sizes)))
        yield


@pytest.mark.parametrize("page", user_pages(), ids=short_name)
def test_commands_have_the_flags_that_pages_give_them(page, place, capsys):
    faults = []
    for block in (block for block in SHELL if block.path == page):
        for words in shell_lines(block):
            arguments = ijepa_arguments(words)
            if arguments and arguments[0] in cli.COMMANDS and (told := refusal(arguments, capsys)):
                faults.append(f"{block} {told}")
            elif arguments and arguments[0] == "recipes":
                copied_before = "exists already"
                told = refusal(arguments, capsys)
                assert told is None or copied_before in told
    assert faults == []


def refusal(arguments: list[str], capsys) -> str | None:
    """What `ijepa` says against arguments, which are read and not carried out; None if it accepts them."""
    try:
        if arguments[0] == "recipes":
            cli.recipes(arguments[1:])
        else:
            module, _, function = cli.COMMANDS[arguments[0]].arguments.partition(":")
            getattr(importlib.import_module(f"ijepa_transformers.{module}"), function)(arguments[1:])
    except SystemExit as stop:
        return capsys.readouterr().err if stop.code else None
    return None


def test_flags_in_the_text_are_flags_of_a_command(capsys):
    known = set(OF_OTHERS)
    for name in cli.COMMANDS:
        refusal([name, "--help"], capsys)
        known |= set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
    faults = []
    for page in user_pages():
        for token in tokens_of(page):
            for child in token.children or ():
                flags = re.findall(r"(?<!\S)--([a-z][\w-]+)", child.content) if child.type == "code_inline" else ()
                faults += [
                    f"{short_name(page)} --{flag}" for flag in flags if not {flag, flag.removeprefix("no_")} & known
                ]
    assert faults == []


def test_shell_blocks_that_are_not_run_say_why():
    """Only `ijepa`, `pip install` and README's two commands need no marker."""
    faults = []
    for block in SHELL:
        free = (words[0] in ("ijepa", "pip") or words[:3] == ["python3", "-m", "venv"] for words in shell_lines(block))
        if block.marker is None and not all(free):
            faults.append(str(block))
    assert faults == []


def test_extras_that_pages_install_exist():
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE))
    for page in user_pages():
        for names in re.findall(r"ijepa-transformers\[([\w,]+)\]", page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras, f"{short_name(page)}: {names}"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_compile_and_what_they_import_exists(block):
    for node in ast.walk(ast.parse(block.code, str(block))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert missing == []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            keywords = {keyword.arg for keyword in node.keywords} - {"recipe", None}
            assert keywords <= FUNCTIONS[node.func.id].keys()


def test_the_page_of_commands_lists_all_of_them():
    page = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `ijepa (\w+)` \|", page, flags=re.MULTILINE) == [*cli.COMMANDS, "recipes", "launch"]


def test_pages_name_every_recipe():
    text = "".join(page.read_text(encoding="utf-8") for page in user_pages())
    assert [name for name in list_recipes() if f"`{name}`" not in text] == []


def test_readme_is_short_and_has_the_two_commands_of_a_fresh_machine():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    commands = re.findall(r"^python3 -m venv .*$", text, flags=re.MULTILINE)
    assert [command.rpartition("/")[2] for command in commands] == [
        "ijepa pretrain --recipe quickstart",
        "python -m pytest",
    ]
    assert text.index(commands[1]) < 3000
