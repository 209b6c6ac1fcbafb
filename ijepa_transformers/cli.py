# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The console command `ijepa`, also `python -m ijepa_transformers` and `python -m ijepa_transformers.cli`.

The arguments of a command are read first, by a module that imports nothing heavy; its code is imported when they are
right. So `ijepa --help` and a mistyped flag are answered at once.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .arguments import CommandParser
from .files import written_aside
from .hub import sentence_for
from .launcher import INTERRUPTED
from .process import prepare_process
from .recipe_files import RECIPES, find_recipe, list_recipes, load_recipe, near
from .terminal import lasting_output


@dataclass(frozen=True)
class Command:
    """A command: what it does, and where its arguments are read and carried out."""

    summary: str
    arguments: str  # module and function, such as "pretraining.arguments:parse_pretraining_arguments"
    module: str  # its `execute(arguments, argv)` carries the command out
    shortcut: str = ""  # a function of the command line that is True if it has done all that is to be done


COMMANDS = {
    "pretrain": Command(
        "pretrain I-JEPA on any images",
        "pretraining.arguments:parse_pretraining_arguments",
        "pretraining.command",
        "pretraining.finished:told_as_finished",
    ),
    "finetune": Command(
        "fine-tune an encoder as an image classifier",
        "finetuning.arguments:parse_fine_tuning_arguments",
        "finetuning.command",
    ),
    "probe": Command(
        "judge frozen encoders by their features",
        "evaluation.arguments:parse_probing_arguments",
        "evaluation.command",
    ),
    "extract": Command(
        "write the features of images to files",
        "evaluation.extraction_arguments:parse_extraction_arguments",
        "evaluation.extraction",
    ),
    "search": Command(
        "find similar photos, near duplicates and outliers",
        "retrieval.arguments:parse_search_arguments",
        "retrieval.command",
    ),
    "stats": Command(
        "measure mean and standard deviation of each channel of images",
        "evaluation.statistics_arguments:parse_statistics_arguments",
        "evaluation.statistics",
    ),
    "visualize": Command(
        "make a page of pictures that shows what a model learned",
        "visualization.arguments:parse_visualization_arguments",
        "visualization.command",
    ),
    "convert": Command(
        "convert a checkpoint of Meta's code to a directory",
        "conversion.arguments:parse_convert_arguments",
        "conversion.convert",
    ),
    "export": Command(
        "write a directory as a checkpoint of Meta's code",
        "conversion.arguments:parse_export_arguments",
        "conversion.export",
    ),
    "onnx": Command(
        "write an encoder or a classifier as ONNX", "conversion.arguments:parse_onnx_arguments", "conversion.onnx"
    ),
}
LAUNCH_SUMMARY = "start a command in several processes: [FLAGS of accelerate launch] COMMAND ..."
RECIPES_SUMMARY = "list, show or copy the recipes and launch configurations of the package"
LAUNCH_USAGE = f"""\
usage: ijepa launch [FLAGS] COMMAND [--FLAG VALUE ...]

To {LAUNCH_SUMMARY}

examples:
  ijepa launch --num_processes 8 pretrain --recipe small_images --data my_photos --output_dir out
  ijepa launch --config_file fsdp2.yaml pretrain --recipe small_images --data my_photos --output_dir out

Without GPUs the processes compute on the CPU. `accelerate launch --help` explains all flags, and
`ijepa recipes copy accelerate/fsdp2.yaml` writes the file of the second example.
"""
USAGE = f"""\
usage: ijepa COMMAND [--FLAG VALUE ...]

I-JEPA (arXiv 2301.08243) for Transformers.

commands:
{"".join(f"  {name:11}{command.summary}{chr(10)}" for name, command in COMMANDS.items())}  recipes    {RECIPES_SUMMARY}
  launch     {LAUNCH_SUMMARY}

options:
  --help     show this help, or that of a command: ijepa COMMAND --help
  --version  show the version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; ends with status 2 and one sentence if the command or an argument is wrong.

    Ctrl-C at any time, also while libraries are imported, is one sentence and status 130.
    """
    with lasting_output():
        try:
            _choose(argv)
        except KeyboardInterrupt:
            print("ijepa: error: interrupted.", file=sys.stderr)
            sys.exit(INTERRUPTED)


def _choose(argv: Sequence[str] | None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(USAGE, end="")
    elif name == "--version":
        print(f"ijepa {__version__}")
    elif name == "recipes":
        recipes(rest)
    elif name == "launch":
        launch(rest)
    elif name in COMMANDS:
        run(name, rest)
    else:
        hint = (
            near(name.lower(), [*COMMANDS, "recipes", "launch", "--help", "--version"])
            or f" The commands are {', '.join(COMMANDS)}, recipes and launch."
        )
        _fail(f"unknown command {name!r}.{hint}")


def run(name: str, argv: Sequence[str]) -> None:
    """Prepares the process, reads the arguments, then imports the command and carries it out."""
    command = COMMANDS[name]
    prepare_process()
    if command.shortcut and _function(command.shortcut)(argv):
        return
    if not {"--help", "-h"} & set(argv) and (sentence := sentence_for(_with_sources(name, argv))):
        CommandParser(prog=f"ijepa {name}").error(sentence)
    arguments = _function(command.arguments)(argv)
    importlib.import_module(f".{command.module}", __package__).execute(arguments, argv)


def _with_sources(name: str, argv: Sequence[str]) -> list[str]:
    """The words of a command with the model and the data that its recipe names, and the photos of `ijepa search`."""
    words = list(argv)
    if name == "search" and words and not words[0].startswith("-"):
        words = ["--data", *words]
    flags = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        flags[flag.replace("-", "_")] = value if equals else following
    if "__recipe" not in flags or any(flag.startswith("__print") for flag in flags):  # which opens no data
        return words
    with suppress(ValueError):  # the parser says what is wrong with the recipe
        _, recipe = load_recipe(flags["__recipe"])
        for key in ("data", "model", "init_from"):
            if f"__{key}" not in flags and isinstance(recipe.get(key), str):
                words += [f"--{key}", recipe[key]]
    return words


def _function(place: str) -> Callable[..., Any]:
    """The function of a place such as "pretraining.arguments:parse_pretraining_arguments"."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


def launch(argv: Sequence[str]) -> None:
    """`ijepa launch [FLAGS of accelerate launch] COMMAND [--FLAG VALUE ...]`."""
    if not argv or argv[0] in ("--help", "-h"):
        print(LAUNCH_USAGE, end="")
        return
    try:
        importlib.import_module(".launch", __package__).launch(argv, COMMANDS)
    except ValueError as error:
        _fail(str(error))


def recipes(argv: Sequence[str]) -> None:
    """`ijepa recipes [list | show NAME | copy NAME [FILE]]`."""
    parser = CommandParser(prog="ijepa recipes", description=f"To {RECIPES_SUMMARY}.")
    actions = parser.add_subparsers(dest="action", metavar="list | show NAME | copy NAME [FILE]")
    actions.add_parser("list", help="names, and what each of them is for (the default)")
    show = actions.add_parser("show", help="print one of them")
    copy = actions.add_parser("copy", help="copy one of them, to change it")
    for action in (show, copy):
        action.add_argument("name", help="as `ijepa recipes` lists it")
    copy.add_argument("file", nargs="?", help="file to write, which must not exist; the same file name by default")
    arguments = parser.parse_args(argv)
    try:
        if arguments.action in (None, "list"):
            print("".join(f"{name:34}{_purpose(name)}\n" for name in [*list_recipes(), *_launch_files()]), end="")
        elif arguments.action == "show":
            print(_source(arguments.name).read_text(encoding="utf-8"), end="")
        else:
            _copy(_source(arguments.name), arguments.file)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename!r}: {error.strerror}.")


def _launch_files() -> list[str]:
    """The configurations of `accelerate launch` and the job scripts, such as "accelerate/fsdp2.yaml"."""
    return sorted(f"accelerate/{path.name}" for path in (RECIPES / "accelerate").iterdir() if path.is_file())


def _source(name: str) -> Path:
    """The file of a recipe, a launch configuration or a job script."""
    return RECIPES / name if name in _launch_files() else Path(find_recipe(name))


def _purpose(name: str) -> str:
    """The first comment of the file that is no `#!` line."""
    lines = _source(name).read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("#").strip() for line in lines if line.startswith("# ")), "")


def _copy(source: Path, target: str | None) -> None:
    file = Path(target or source.name)
    if os.path.lexists(file):
        raise ValueError(f"{str(file)!r} exists already; name another file.")
    with written_aside(file) as unfinished:
        unfinished.write_bytes(source.read_bytes())  # an error of `shutil` would name the source
    print(f"wrote {file}")


def _fail(sentence: str) -> NoReturn:
    print(f"ijepa: error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
