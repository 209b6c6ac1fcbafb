"""What every command shares: recipes under flags, and the check of its launch."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from ijepa.recipe import CPU_REMEDY, argument, check_launch, parse_arguments


REPOSITORY = Path(__file__).parent.parent


@dataclass
class Settings:
    rate: float = argument(1.0, "a number")
    mirror: bool = argument(False, "a choice")
    size: list[int] | None = argument(None, "a list without a default")
    shots: list[int] = argument([1, 5], "a list with one")
    names: list[str] = argument([], "a list that may be empty")


def parse(*words):
    return parse_arguments(list(map(str, words)), [Settings], Settings, "command", "A command.")


def refusal(capsys, *words):
    """The last line of the error."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rate: 2.0\nshots: [3]\n")
    return path


def test_a_recipe_is_read_however_it_is_named_and_flags_go_over_it(recipe):
    for words in (("--recipe", recipe), (f"--recipe={recipe}",), ("--shots", 3, "--recipe", recipe)):
        assert parse(*words) == Settings(rate=2.0, shots=[3])
    assert parse("--rate", 4, f"--recipe={recipe}") == Settings(rate=4.0, shots=[3])
    assert parse("--rate", 4) == Settings(rate=4.0)


def test_a_second_recipe_is_refused(recipe, capsys):
    for words in (("--recipe", recipe, "--recipe", "b.yaml"), (f"--recipe={recipe}", "--recipe", "b.yaml")):
        assert "error: --recipe is given 2 times" in refusal(capsys, *words)


def test_a_recipe_without_a_name_or_a_file_is_an_error(tmp_path, capsys):
    assert "argument --recipe: expected one argument" in refusal(capsys, "--recipe")
    assert "There is no recipe 'nowhere.yaml'" in refusal(capsys, "--recipe=nowhere.yaml")
    assert "unrecognized arguments: --rec" in refusal(capsys, "--rec", "nowhere.yaml")


@pytest.mark.parametrize("key", ["shots", "size", "mirror"])
def test_an_empty_list_is_no_silent_default(tmp_path, capsys, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{key}: []\n")
    assert f"error: {key} is an empty list in the recipe" in refusal(capsys, "--recipe", path)


def test_an_empty_list_may_be_given_where_it_is_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("names: []\nsize: null\n")
    assert parse("--recipe", path) == Settings()


def test_several_processes_that_do_not_see_each_other_are_an_error(monkeypatch):
    """What torchrun on the CPU without ACCELERATE_USE_CPU is: two runs that write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but 1 would work together; on the CPU, set"):
        check_launch(1, CPU_REMEDY)
    check_launch(2, CPU_REMEDY)


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_what_it_costs_and_how_to_run_it(recipe):
    header = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Reproduces:", "Cost:", "Command:", "Expected:"):
        assert word in header, word
