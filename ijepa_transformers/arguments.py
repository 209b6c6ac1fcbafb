# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a command: a recipe (YAML file) under command-line flags or Python keywords.

A recipe key, a command-line flag, a keyword and an attribute of the arguments have one name. Unknown names, values of
the wrong type and values out of range are errors that show the value. This module imports nothing heavy, so that a
mistyped flag is answered at once.
"""

import argparse
import dataclasses
import enum
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import yaml

from .launcher import leave_sentence, said_by_the_first
from .recipe_files import load_recipe, near
from .url_secrets import keep_secrets, without_secrets


T = TypeVar("T")
Clean = Callable[[dict, str], dict]

MANY_UNKNOWN_KEYS = 4  # with more of them a recipe is probably one of another command
# Two ways to say one thing. Both at once are an error, but a flag of one replaces the other in the recipe.
ALTERNATIVES = [
    *(("epochs", "max_steps"), ("num_train_epochs", "max_steps")),
    *(("warmup_epochs", "warmup_steps"), ("momentum", "momentum_half_life")),
]
_NOT_SAID = {"max_steps": -1}  # in `Trainer`, which then counts epochs
WITHIN = [("warmup_epochs", "epochs"), ("warmup_steps", "max_steps")]  # the first is a part of the second
# What argparse takes as a value after a flag. Its own pattern takes -1e-3 and -inf for unknown flags.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-(inf|nan)$", re.IGNORECASE)
# Paths. A shell leaves the ~ in --output_dir=~/run as it is, and so does YAML; here it is the home folder.
_WRITTEN = ("output_dir", "output", "index", "cache_dir", "pictures_dir")
_PATHS = (*_WRITTEN, "model", "init_from", "train_list")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LONG_FLAG = re.compile(r"--\w[\w-]*(?==|$)")
TRUTH_VALUES = dict.fromkeys(("true", "yes", "t", "y", "1"), True) | dict.fromkeys(
    ("false", "no", "f", "n", "0"), False
)
KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", dict: "a JSON mapping"}
METAVARS: dict[Any, str] = {bool: "true|false", int: "INTEGER", float: "NUMBER", dict: "JSON"}


def argument(
    default: Any,
    help_text: str,
    choices: Sequence[str] | None = None,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that becomes a flag, a recipe key and a keyword.

    Args:
        default: of the field; a list is copied for every instance.
        help_text: what `--help` says. A percent sign is written twice, as in argparse.
        choices: the values that the field, or each entry of its list, may have; None for any.
        parse: reads a text where the field's type does not say how; raises argparse.ArgumentTypeError.
        metavar: what stands for the value in the help; by default it follows from the type.
    """
    metadata = {"help": help_text, "choices": choices, "parse": parse, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


MOST_WORKERS = 1024
LIMITS = {
    "least": ("at least", lambda value, limit: value >= limit),
    "above": ("above", lambda value, limit: value > limit),
    "most": ("at most", lambda value, limit: value <= limit),
    "below": ("below", lambda value, limit: value < limit),
}


def require_workers(arguments, name: str = "num_workers") -> None:
    """Raises ValueError for a number of data loading processes that is a slip: thousands take minutes to start."""
    require_numbers(arguments, name, least=0, most=MOST_WORKERS)


def require_numbers(arguments, *names: str, **limits: float) -> None:
    """Raises ValueError unless each named attribute is finite and within the limits `least`, `above`, `most` and
    `below`. None passes. Every entry of a list is checked."""
    text = " and ".join(f"{LIMITS[limit][0]} {bound:.10g}" for limit, bound in limits.items()) or "a finite number"
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            within = all(LIMITS[limit][1](number, bound) for limit, bound in limits.items())
            finite = " and finite" if within and limits else ""
            require(within and math.isfinite(number), f"{name} must be {text}{finite}, got {value}.")


def require_interval(arguments, *names: str, most: float = math.inf) -> None:
    """Raises ValueError unless each named attribute is [low, high] with 0 < low <= high <= `most`."""
    limit = "" if most == math.inf else f" <= {most:.10g}"
    for name in names:
        value = getattr(arguments, name)
        fits = len(value) == 2 and 0 < value[0] <= value[1] <= most and math.isfinite(value[1])
        require(fits, f"{name} must be two numbers with 0 < least <= most{limit}, got {value}.")


def require_text(arguments, *names: str) -> None:
    """Raises ValueError if a named attribute is an empty string; None passes."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value.strip(), f"{name} must not be empty, got {value!r}.")


def sixteen_bit_value(word: str) -> int:
    """What `sixteen_bit_max` is given."""
    if not word.isascii() or not word.isdigit() or not 1 <= int(word) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535, got {word!r}.")
    return int(word)


@dataclass
class DatasetArguments:
    """Where images and labels are; every command has these."""

    argument_group = "data"

    data: str = argument("", "images: a folder, Parquet or tar shards, a Hub dataset, or 'digits'")
    data_config: str | None = argument(None, "configuration of a Hub dataset that has several")
    image_column: str | None = argument(None, "column of the images (default: the only one)")
    label_column: str | None = argument(
        None, "column of the labels, or several with commas between them, each a class (default: the only one)"
    )
    sixteen_bit_max: int | None = argument(
        None,
        "value that is white in 16-bit images, such as 4095 if they hold 12 bits (default: that of the model, or"
        " 65535; the command stops if that does not suit the images)",
        parse=sixteen_bit_value,
        metavar="INTEGER",
    )


@dataclass(frozen=True)
class Flag:
    """One field of a group of arguments, and how its value is read."""

    name: str
    kind: Callable[[Any], Any]  # type of the value, or of each entry of a list
    is_list: bool
    takes_mapping: bool  # also a mapping, from a recipe or as a keyword
    choices: tuple[str, ...] | None
    default: Any
    help: str
    metavar: str  # what stands for the value in the help

    @property
    def text_kind(self) -> str:
        """What a value must be, in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else KINDS.get(self.kind, self.kind.__name__)

    def parse(self, text: str) -> Any:
        """The value of a text.

        Raises:
            argparse.ArgumentTypeError: if it has another type or is not among the choices.
        """
        try:
            value: Any = text
            if self.kind is bool:
                value = TRUTH_VALUES[text.lower()]
            elif self.kind is not str:
                value = json.loads(text) if self.kind is dict else self.kind(text)
        except (KeyError, TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"must be {self.text_kind}, got {text!r}.") from None
        if self.choices and value not in self.choices:
            raise argparse.ArgumentTypeError(f"must be {self.text_kind}, got {text!r}.")
        return value

    def read(self, value: Any, place: str = "") -> Any:
        """The value of a recipe or a keyword, checked as on the command line. None means: not given.

        Args:
            value: as it was given.
            place: where, for messages, such as " in the recipe".

        Raises:
            ValueError: if the value has another type or is not among the choices.
        """
        if value is None or value == self.default == []:
            return None
        require(value != [], f"{self.name} is an empty list{place}: name values, or leave it out.")
        if not self.is_list:
            return self._read_one(value, place)
        return [self._read_one(entry, place) for entry in (value if isinstance(value, list | tuple) else [value])]

    def _read_one(self, value: Any, place: str) -> Any:
        if isinstance(value, dict) and self.takes_mapping:
            return value
        nested = isinstance(value, list | tuple | dict | set)
        several = ", or a list of single values," if self.is_list else ""
        require(not nested, f"{self.name} must be one value{several}{place}, got {value!r}.")
        require(
            not (isinstance(value, bool) and self.kind is str),
            f"{self.name} is a truth value{place}, {value}: YAML reads no, off, yes and on so unless they are in"
            " quotes.",
        )
        text = str(value.value if isinstance(value, enum.Enum) else value)
        looks_like_a_flag = bool(place) and text.startswith("--")
        require(not looks_like_a_flag, f"{self.name} has the value {text!r}{place}, which looks like a flag.")
        try:
            return self.parse(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{self.name} {error}") from None

    def add_to(self, parser: "argparse._ActionsContainer") -> None:
        """Adds the flag, and `--no_NAME` where a truth value is true by default. Not given, it leaves no value."""
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "type": self.parse, "metavar": self.metavar}
        if self.kind is bool:
            options |= {"nargs": "?", "const": True}
        elif self.is_list:
            options["nargs"] = "+"
        parser.add_argument(f"--{self.name}", help=self.help + self._default_text(), **options)
        if self.default is True:
            parser.add_argument(
                f"--no_{self.name}",
                dest=self.name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )

    def _default_text(self) -> str:
        if self.default is None or self.default in ("", [], {}):
            return ""
        value = self.default.value if isinstance(self.default, enum.Enum) else self.default
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        text = text.lower() if isinstance(value, bool) else text.replace("%", "%%")
        return f" (default: {text}; off with --no_{self.name})" if value is True else f" (default: {text})"


def flags_of(groups: Iterable[type]) -> dict[str, Flag]:
    """The flags of dataclasses by name."""
    return {flag.name: flag for group in groups for flag in _flags_of(group)}


def _flags_of(group: Any) -> list[Flag]:
    hints = typing.get_type_hints(group)
    flags = []
    for entry in dataclasses.fields(group):
        if not entry.init:
            continue
        kind, is_list, named = _kind_of(hints[entry.name])
        kind = entry.metadata.get("parse") or kind
        made = entry.default_factory
        default = entry.default if made is dataclasses.MISSING else made()
        takes_mapping = dict in [typing.get_origin(hint) or hint for hint in _alternatives(hints[entry.name])]
        choices = tuple(entry.metadata.get("choices") or named) or None
        told = entry.metadata.get("help") or ""
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS.get(kind, "TEXT")
        metavar = entry.metadata.get("metavar") or metavar
        flags.append(Flag(entry.name, kind, is_list, takes_mapping, choices, default, told, metavar))
    return flags


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union but None; of another hint, itself."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return [part for part in typing.get_args(hint) if part is not type(None)] if is_union else [hint]


def _kind_of(hint: Any) -> tuple[Callable[[Any], Any], bool, tuple[str, ...]]:
    """The type of a value, whether it is a list of such, and the choices that the hint names."""
    hints = _alternatives(hint)
    if len(hints) > 1:  # as in `SchedulerType | str`, where the first says more, and `dict | str`
        telling = [part for part in hints if part is bool or (isinstance(part, type) and issubclass(part, enum.Enum))]
        hints = telling or ([str] if str in hints else hints)
    hint, origin = hints[0], typing.get_origin(hints[0])
    if origin is typing.Literal:
        return str, False, tuple(map(str, typing.get_args(hint)))
    if origin is list:
        kind, _, choices = _kind_of(typing.get_args(hint)[0])
        return kind, True, choices
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return str, False, tuple(str(member.value) for member in hint)
    return origin or hint, False, ()


class CommandParser(argparse.ArgumentParser):
    """argparse with errors of one line, a near name for a mistyped flag, and `--max-steps` read as `--max_steps`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._negative_number_matcher = NEGATIVE_NUMBER

    @property
    def known_flags(self) -> list[str]:
        """Every flag, such as `--max_steps`."""
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and one line on stderr."""
        sentence = re.sub(r"^argument --(\w+): must", r"\1 must", " ".join(message.split()))
        told = without_secrets(f"{self.prog}: error: {sentence}")
        leave_sentence(told)
        self.exit(2, "" if said_by_the_first(told) else f"{told}\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        argv = sys.argv[1:] if args is None else args
        check_flags(argv, self.known_flags, self)
        return super().parse_args(with_underscores(argv), namespace)


def with_underscores(argv: Iterable[str]) -> list[str]:
    """`argv` with the flags' own spelling: `--max-steps` becomes `--max_steps`. Values stay."""
    return [LONG_FLAG.sub(lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in map(str, argv)]


def check_flags(argv: Iterable[str], known: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """Lets `parser` exit with an error if `argv` has a flag that is not among `known`, such as `--max_steps`."""
    names = {flag.lstrip("-") for flag in known}
    flags = [flag[0] for flag in map(LONG_FLAG.match, map(str, argv)) if flag]
    unknown = [flag for flag in flags if flag[2:].replace("-", "_") not in names]
    if unknown:
        hints = dict.fromkeys(near(flag[2:].replace("-", "_"), sorted(names), "--") for flag in unknown)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{''.join(hints)}")


def read_recipe(name: str | os.PathLike[str], flags: Mapping[str, Flag], clean: Clean) -> dict[str, Any]:
    """The values that a recipe gives.

    Args:
        name: a path, or the bare name of a recipe of the package.
        flags: those of the command.
        clean: given a recipe and the name of its file, returns it without the keys of earlier versions.

    Raises:
        ValueError: if it cannot be read, or if a key or the type of a value is wrong.
    """
    path, recipe = load_recipe(name)
    recipe = clean(recipe, repr(path))
    unknown = sorted(str(key) for key in set(recipe) - set(flags))
    hints = "".join(dict.fromkeys(near(key, flags) for key in unknown))
    if len(unknown) > MANY_UNKNOWN_KEYS:
        hints = " Is it a recipe of another command?"
    require(not unknown, f"{path!r} has unknown keys: {', '.join(unknown)}.{hints}")
    values = {key: flags[key].read(value, " in the recipe") for key, value in recipe.items()}
    return {key: value for key, value in values.items() if value is not None}


def _layered(
    groups: Sequence[type], flags: Mapping[str, Flag], recipe: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Defaults, over them the recipe, over it what was given by flags or keywords.

    What is given replaces what the recipe says in another way (`ALTERNATIVES`), and what would do nothing beside it
    (`unused_settings`). Two ways in one place are an error. Where the run is given shorter than the recipe's warm-up
    (`WITHIN`), the warm-up keeps its share of the run. Given data that cannot be of the Hub replace the recipe's
    `data_config`, which is for the Hub only. URLs get their public form (`keep_secrets`).
    """
    said = _said(given)
    replaced = {one for pair in ALTERNATIVES for one, other in (pair, pair[::-1]) if other in said}
    unused = unused_settings(groups, {**recipe, **given})
    if unused.keys() != unused_settings(groups, recipe).keys():
        replaced |= unused.keys()
    if "data" in given and not may_be_on_hub(given["data"]):
        replaced.add("data_config")
    kept = {name: value for name, value in recipe.items() if name not in replaced}
    _require_one_of_two_ways(given, "")
    _require_one_of_two_ways(kept, " in the recipe")
    for part, whole in WITHIN:
        if part in kept and whole in given:
            kept[part] = _within(kept[part], given[whole], recipe.get(whole))
    values = {**{name: flag.default for name, flag in flags.items()}, **kept, **given}
    unused = unused_settings(groups, values)
    for name in sorted(given.keys() & unused.keys()):
        raise does_nothing(name, values[name], unused[name])
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = os.path.expanduser(values[name])
    for name in _WRITTEN:
        _check_written(name, values.get(name))
    return {name: keep_secrets(value) if isinstance(value, str) else value for name, value in values.items()}


def _check_written(name: str, path: str | None) -> None:
    """Raises ValueError for a path that the system does not even look for: a too long name, or one in a folder that
    this user may not enter. A name of spaces is a slip."""
    require(not path or path.strip(), f"{name} must not be empty, got {path!r}.")
    try:
        os.lstat(path or os.curdir)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is made later, or refused by its kind
    except OSError as error:
        raise ValueError(f"{name} {path!r} cannot be used: {error.strerror}.") from None


def _said(values: Mapping[str, Any]) -> set[str]:
    """The names of values that say something."""
    return {name for name, value in values.items() if value != _NOT_SAID.get(name)}


def _require_one_of_two_ways(values: Mapping[str, Any], place: str) -> None:
    """Raises ValueError if `values` say one thing in two ways."""
    for one, other in ALTERNATIVES:
        both = {one, other} <= _said(values)
        wrong = f"{one} {values.get(one)} and {other} {values.get(other)} set the same thing{place}: give one of them."
        require(not both, wrong)


def does_nothing(name: str, value: Any, reason: str) -> ValueError:
    """The error for a setting that does nothing beside another one."""
    return ValueError(f"{name} {value} does nothing with {reason}: leave it out.")


def may_be_on_hub(data: str) -> bool:
    """Whether `data` can be a name of the Hub, NAME or USER/NAME: nothing else here is called so."""
    return bool(HUB_NAME.fullmatch(data)) and data != "digits" and not os.path.exists(os.path.expanduser(data))


def _within(part: Any, whole: Any, whole_in_recipe: Any) -> Any:
    """`part`; if it is longer than `whole`, the share of `whole` that it had in the recipe (a tenth if unknown)."""
    if part <= whole or whole <= 0:  # `Trainer` has max_steps -1 for a length in epochs
        return part
    share = part / whole_in_recipe if whole_in_recipe else 0.1
    return type(part)(whole * share)


def unused_settings(groups: Iterable[Any], values: Mapping[str, Any]) -> dict[str, str]:
    """The settings that do nothing beside the others: name -> the setting that makes them useless, in words.

    A group of arguments that has such settings has a function `unused_settings` of the values.
    """
    found = [group.unused_settings(values) for group in groups if hasattr(group, "unused_settings")]
    return {name: reason for each in found for name, reason in each.items()}


def effective_values(values: Mapping[str, Any], unused: Collection[str] = ()) -> dict[str, Any]:
    """`values` as a recipe: only what has a value and is used, in types of YAML, and without tokens of the Hub."""
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}
    return {
        name: value
        for name, value in plain.items()
        if value is not None and value not in ("", []) and not name.endswith("_token") and name not in unused
    }


def build_parser(groups: Iterable[type], prog: str, description: str) -> CommandParser:
    """A parser with `--recipe`, `--print_config` and the flags of `groups`."""
    parser = CommandParser(
        prog=prog,
        description=f"{description} Values come from --recipe, then from the flags.",
        usage="%(prog)s [--recipe RECIPE] [--FLAG VALUE ...]",
    )
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        help="YAML file with any of the values below, or the name of a recipe of the package",
    )
    parser.add_argument("--print_config", action="store_true", help="print all values as a recipe, and stop")
    for group in groups:
        title = vars(group).get("argument_group")  # not that of a base class
        place = parser.add_argument_group(title) if title else parser
        title_of_inherited = vars(group).get("inherited_group")
        rest = parser.add_argument_group(title_of_inherited) if title_of_inherited else place
        own = inspect.get_annotations(group)
        for flag in flags_of([group]).values():
            flag.add_to(place if flag.name in own else rest)
    return parser


def _keep(recipe: dict, source: str) -> dict:
    return recipe


def parse_arguments(
    argv: Sequence[str] | None,
    groups: Sequence[type],
    build: Callable[..., T],
    prog: str,
    description: str,
    clean: Clean = _keep,
) -> T:
    """Arguments from the command line: defaults, then `--recipe`, then every other flag.

    Args:
        argv: the command line without the program; `sys.argv[1:]` if None.
        groups: dataclasses whose fields are the flags. All names differ.
        build: called with every value by name; what it returns is returned.
        prog, description: for `--help` and errors.
        clean: given a recipe and the name of its file, returns it without the keys of earlier versions.

    Exits with status 2 and one sentence when something is wrong, a ValueError of `build` included; with status 0
    after `--help` and `--print_config`.
    """
    parser, flags = build_parser(groups, prog, description), flags_of(groups)
    try:
        given = vars(parser.parse_args(argv))
        names, print_config = given.pop("recipe"), given.pop("print_config")
        require(len(names) < 2, f"--recipe is given {len(names)} times ({', '.join(names)}); a run has one recipe.")
        values = _layered(groups, flags, read_recipe(names[0], flags, clean) if names else {}, given)
        if print_config:
            print(yaml.safe_dump(effective_values(values, unused_settings(groups, values)), sort_keys=False), end="")
            parser.exit()
        return build(**values)
    except ValueError as error:
        parser.error(str(error))


def arguments_from_keywords(
    keywords: Mapping[str, Any], groups: Sequence[type], build: Callable[..., T], function: str, clean: Clean = _keep
) -> T:
    """Arguments from the keywords of a Python function, read as the flags of the same names.

    Args:
        keywords: values by name, and perhaps `recipe`. None means: not given.
        groups, build, clean: as in `parse_arguments`.
        function: its name, for messages.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a value of the wrong type or out of range, with the same sentence as on the command line.
    """
    flags = flags_of(groups)
    for name in keywords.keys() - flags.keys() - {"recipe"}:
        raise TypeError(f"{function}() has no argument {name!r}.{near(name, [*flags, 'recipe'])}")
    read = {name: flags[name].read(value) for name, value in keywords.items() if name != "recipe"}
    given = {name: value for name, value in read.items() if value is not None}
    source = keywords.get("recipe")
    recipe = {} if source is None else read_recipe(source, flags, clean)
    return build(**_layered(groups, flags, recipe, given))
