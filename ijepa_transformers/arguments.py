# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Recipes: the arguments of a command as a YAML file, overridden by the command line; and those of pretraining.

A recipe key, a command-line flag and an attribute of the arguments are one name. Unknown keys, values of the wrong
type and values out of range are errors that show the value; nothing is guessed.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import yaml
from transformers import HfArgumentParser


MAX_RECIPE_BYTES = 1_000_000
# Two ways to say one thing. Both at once are an error, but a flag of one replaces the other in the recipe.
ALTERNATIVES = [("epochs", "max_steps"), ("warmup_epochs", "warmup_steps"), ("momentum", "momentum_half_life")]
# What argparse shall take for a value after a flag; its own pattern takes -1e-3 and -inf for unknown flags.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-(inf|nan)$", re.IGNORECASE)


def argument(default, help_text: str, parse: Callable[[str], object] | None = None):
    """A dataclass field with a default (lists are copied) and the help of its flag.

    `parse` reads the flag's value where the field's type alone does not say how.
    """
    metadata = {"help": help_text} | ({} if parse is None else {"type": parse})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


LIMITS = {
    "least": ("at least", lambda value, limit: value >= limit),
    "above": ("above", lambda value, limit: value > limit),
    "most": ("at most", lambda value, limit: value <= limit),
    "below": ("below", lambda value, limit: value < limit),
}


def require_numbers(arguments, *names: str, **limits: float) -> None:
    """Raises ValueError unless each named attribute is finite and within the limits `least`, `above`, `most` and
    `below`. None passes; of a list, every entry is checked."""
    text = " and ".join(f"{LIMITS[limit][0]} {bound:.10g}" for limit, bound in limits.items()) or "a finite number"
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            within = all(LIMITS[limit][1](number, bound) for limit, bound in limits.items())
            require(within and math.isfinite(number), f"{name} must be {text}, got {value}.")


def require_interval(arguments, *names: str, most: float = math.inf) -> None:
    """Raises ValueError unless each named attribute is [low, high] with 0 < low <= high <= `most`."""
    limit = "" if most == math.inf else f" <= {most:.10g}"
    for name in names:
        value = getattr(arguments, name)
        fits = len(value) == 2 and 0 < value[0] <= value[1] <= most and math.isfinite(value[1])
        require(fits, f"{name} must be two numbers with 0 < least <= most{limit}, got {value}.")


def require_choice(arguments, name: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the attribute is None or one of `choices`."""
    value = getattr(arguments, name)
    require(value is None or value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def require_text(arguments, *names: str) -> None:
    """Raises ValueError if a named attribute is an empty text, which nothing is called; None passes."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value.strip(), f"{name} must not be empty, got {value!r}.")


@dataclass
class DatasetArguments:
    """Where images and labels are; every command has these."""

    _argument_group_name = "data"

    data: str = argument("", "images: a folder, Parquet or tar shards, a Hub dataset, or 'digits'")
    data_config: str | None = argument(None, "configuration name of a Hub dataset")
    image_column: str | None = argument(None, "column of the images; found if there is only one")
    label_column: str | None = argument(None, "column of the labels; found if there is only one")


@dataclass
class MaskArguments:
    """The blocks that are predicted and the block they are predicted from (`ijepa_transformers/masking.py`)."""

    _argument_group_name = "masks"

    mask_mode: str = argument("unbiased", "unbiased, or meta: the released sampler with its quirks")
    num_targets: int = argument(4, "target blocks per image")
    target_scale: list[float] = argument([0.15, 0.2], "area of a target block as a share of the image: least, most")
    target_aspect_ratio: list[float] = argument([0.75, 1.5], "height over width of a target block: least, most")
    num_contexts: int = argument(1, "context blocks per image")
    context_scale: list[float] = argument([0.85, 1.0], "area of the context block before targets are taken out")
    min_patches: int = argument(10, "least number of context patches")
    allow_overlap: bool = argument(False, "leave target patches in the context")
    num_context_tokens: int | None = argument(None, "fixed number of context patches (steady memory and speed)")
    num_target_tokens: int | None = argument(None, "fixed number of patches per target block")

    def mask_fields(self) -> dict:
        """Arguments of `MultiBlockMasking` but the grid."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(MaskArguments)}
        fields["mode"] = fields.pop("mask_mode")
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    def check_masks(self):
        """What does not depend on the grid, of which `MultiBlockMasking` speaks."""
        require_choice(self, "mask_mode", ("unbiased", "meta"))
        require_interval(self, "target_scale", "context_scale", most=1)
        require_interval(self, "target_aspect_ratio")
        require_numbers(self, "num_targets", "num_contexts", "min_patches", least=1)
        require_numbers(self, "num_context_tokens", "num_target_tokens", least=1)


# Keys of recipes that earlier versions wrote, with the values that mean what is done today.
REMOVED_KEYS = {
    "keep_all_context": (False,),
    "normalize_targets": (None, True),
    "predictor_attention": (None, "full"),
    "token_multiple": (1,),
}


def without_removed_keys(values: dict, source: str) -> dict:
    """`values`, which an earlier version may have written, without the keys of `REMOVED_KEYS`.

    Raises:
        ValueError: such a key has a value that this version does not support; `source` names the file in the message.
    """
    for name in REMOVED_KEYS.keys() & values.keys():
        supported = values[name] in REMOVED_KEYS[name]
        require(supported, f"{source} has {name} {values[name]!r}, which this version no longer supports.")
    return {name: value for name, value in values.items() if name not in REMOVED_KEYS}


class _RecipeLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there {keys.count(key)} times")
        return super().construct_mapping(node, deep)


def _read_recipe(path: str, groups: Sequence[type], clean: Callable) -> dict:
    try:
        recipe = yaml.load(_recipe_text(path), Loader=_RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path!r} is not a YAML file of values: {' '.join(str(error).split())}") from None
    require(isinstance(recipe, dict), f"{path!r} must hold `key: value` lines.")
    recipe = clean(recipe, repr(path))
    known = {entry.name for group in groups for entry in dataclasses.fields(group) if entry.init}
    unknown = sorted(str(key) for key in set(recipe) - known)
    require(not unknown, f"{path!r} has unknown keys: {', '.join(unknown)}.")
    return recipe


def _recipe_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)  # whatever is behind the name, /dev/zero for one
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {path!r}.") from None
    except OSError as error:
        raise ValueError(f"The recipe {path!r} cannot be read: {error.strerror}.") from None
    require(len(content) <= MAX_RECIPE_BYTES, f"{path!r} is no recipe: it has more than {MAX_RECIPE_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is no recipe: it is not UTF-8 text (byte {error.start}).") from None


def _recipe_path(words: Sequence[str], prog: str) -> str | None:
    """What --recipe names, or None; the other words are left to the parser that knows them."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", action="append", default=[])
    paths = parser.parse_known_args(words)[0].recipe
    require(len(paths) < 2, f"--recipe is given {len(paths)} times ({', '.join(paths)}); a run has one recipe.")
    return paths[0] if paths else None


def _without_replaced(recipe: dict, words: Sequence[str]) -> dict:
    """The recipe without what a flag says in another way."""
    flags = {word.partition("=")[0] for word in words}
    pairs = [pair for one, other in ALTERNATIVES for pair in ((one, other), (other, one))]
    replaced = {key for key, flag in pairs if f"--{flag}" in flags}
    return {key: value for key, value in recipe.items() if key not in replaced}


def _as_flags(recipe: dict, actions: dict[str, argparse.Action]) -> list[str]:
    """A recipe as command-line words, so that both ways have one set of types and errors.

    Raises:
        ValueError: if no words can say a value, such as a list that is empty where it may not be.
    """
    words = []
    for key, value in recipe.items():
        action = actions[key]
        if value is None or value == action.default == []:
            continue
        require(value != [], f"{key} is an empty list in the recipe: name values, or leave the key out.")
        if isinstance(value, list) and action.nargs == "+":
            words += [f"--{key}", *(_as_word(key, entry) for entry in value)]
        else:  # one word, so that a value that starts like a flag is none
            words.append(f"--{key}={_as_word(key, value, is_text=action.type is str and action.nargs is None)}")
    return words


def _as_word(key: str, value, is_text: bool = False) -> str:
    nested = isinstance(value, (list, dict, set))
    require(not nested, f"{key} must be one value in the recipe, or for some keys a list of values: no nesting.")
    require(
        not (is_text and isinstance(value, bool)),
        f"{key} is a truth value in the recipe, {value}: YAML reads no, off, yes and on so unless they are in quotes.",
    )
    word = str(value).lower() if isinstance(value, bool) else str(value)
    require(not word.startswith("--"), f"{key} has the value {word!r} in the recipe, which looks like a flag.")
    return word


def parse_arguments(
    words: Sequence[str],
    groups: Sequence[type],
    build: Callable,
    prog: str,
    description: str,
    clean: Callable[[dict, str], dict] = lambda recipe, source: recipe,
) -> object:
    """Arguments from command-line words: `--recipe FILE` first, then every other flag over it.

    Args:
        words: as in `sys.argv[1:]`.
        groups: dataclasses whose fields are the flags; all names differ.
        build: called with every value by name; what it returns is returned.
        prog, description: for `--help` and errors.
        clean: given a recipe and the name of its file, returns it without the keys of earlier versions.

    Exits with status 2 and one sentence, as argparse does, when something is wrong, a ValueError of `build` included.
    """
    words = list(words)
    parser = HfArgumentParser(
        groups,
        prog=prog,
        description=f"{description} Values come from --recipe, then from the flags.",
        allow_abbrev=False,
    )
    parser._negative_number_matcher = NEGATIVE_NUMBER
    parse = {entry.name: entry.metadata.get("type") for group in groups for entry in dataclasses.fields(group)}
    for action in parser._actions:  # HfArgumentParser takes the field's own type
        action.type = parse.get(action.dest) or action.type
    parser.add_argument("--recipe", help="YAML file with any of the values below (recipes/ holds some)")
    try:
        path = _recipe_path(words, prog)
        recipe = {} if path is None else _read_recipe(path, groups, clean)
        recipe = _without_replaced(recipe, words)
        flags = _as_flags(recipe, {action.dest: action for action in parser._actions})
        values = vars(parser.parse_args(flags + words))
        values.pop("recipe")
        return build(**values)
    except ValueError as error:
        parser.error(str(error))
