"""Reads the commands that a command prints at its end, as a shell and their own parsers read them."""

import ast
import shlex
from importlib import import_module
from typing import Any

from ijepa_transformers import cli


def parsed(line: str) -> tuple[str, Any]:
    """The name of a command of `ijepa`, and its arguments; of `python -c`, the syntax tree of its code."""
    program, name, *argv = shlex.split(line)
    if program == "python":
        assert name == "-c" and len(argv) == 1
        return "python", ast.parse(argv[0])
    module, _, function = cli.COMMANDS[name].arguments.partition(":")
    assert program == "ijepa"
    return name, getattr(import_module(f"ijepa_transformers.{module}"), function)(argv)


def proposed(text: str) -> list[tuple[str, Any]]:
    """What stands below "What next:", which is there once."""
    _, end = text.split("\nWhat next:\n\n")
    return [parsed(line.strip()) for line in end.splitlines()]
