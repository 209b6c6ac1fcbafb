# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Recipes are YAML files, those of the package found by bare name. This module imports nothing heavy."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


RECIPES = Path(__file__).parent / "recipes"  # found by bare name: --recipe quickstart
MAX_RECIPE_BYTES = 1_000_000


def near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The sentence " Did you mean NAME?" with the known name nearest to `name`; an empty string if none is near."""
    names = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {prefix}{names[0]}?" if names else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is there twice. YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there {keys.count(key)} times")
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: if it is none, or if a key is there twice.
    """
    return yaml.load(text, Loader=_UniqueKeyLoader)


def list_recipes() -> list[str]:
    """The bare names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> str:
    """The path of a recipe.

    Args:
        name: a path, or the bare name of a recipe of the package.

    Raises:
        ValueError: for a bare name that is neither a file nor a recipe of the package.
    """
    if Path(name).name != name or Path(name).is_file() or Path(name).suffix in (".yaml", ".yml"):
        return name
    known = list_recipes()
    hint = near(Path(name).stem, known) or f" The package has {', '.join(known)}."
    if name not in known:
        raise ValueError(f"There is no recipe {name!r}.{hint}")
    return str(RECIPES / f"{name}.yaml")


def load_recipe(name: str | os.PathLike[str]) -> tuple[str, dict[Any, Any]]:
    """The path and the content of a recipe.

    Args:
        name: a path, or the bare name of a recipe of the package.

    Raises:
        ValueError: if it cannot be read.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"recipe must be the name or the path of a recipe, got {name!r}.")
    path = find_recipe(os.path.expanduser(name))
    try:
        recipe = read_yaml(_recipe_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path!r} is not a YAML file of values: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path!r} must hold `key: value` lines.")
    return path, recipe


def _recipe_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)  # whatever is behind the name, /dev/zero for one
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {path!r}.{near(Path(path).stem, list_recipes())}") from None
    except OSError as error:
        raise ValueError(f"The recipe {path!r} cannot be read: {error.strerror}.") from None
    if len(content) > MAX_RECIPE_BYTES:
        raise ValueError(f"{path!r} is no recipe: it has more than {MAX_RECIPE_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is no recipe: it is not UTF-8 text (byte {error.start}).") from None
