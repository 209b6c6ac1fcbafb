# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What commands show while they work: a head, a bar or lines, and an end. All commands use it, so they look alike.

A bar needs a terminal. In a file, in a pipe and in a notebook the same facts are lines.
"""

import dataclasses
import importlib.util
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from tqdm import tqdm

from .url_secrets import without_secrets


_BAR = "{bar:20} {desc}"  # 20 characters wide
_ROWS = 20  # enough for all bars at once; a terminal without a size would get none
SECONDS_BETWEEN_LINES = 60.0  # in a log file, where nothing else makes lines
NAME_WIDTH = 12  # of the names in a head and at the end
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # `ijepa onnx` needs them
FIRST_STEPS = 5  # are slower than the others: workers start, memory is allocated, layers are compiled
FEW = 10  # In a work of fewer steps than this, all count. In a longer one, at most this share does not.


def has_terminal() -> bool:
    """Whether both standard output and standard error are a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def in_words(seconds: float) -> str:
    """A length of time in two units: 3 h 20 min, 2 d 4 h, 5 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


@contextmanager
def on_standard_error() -> Iterator[None]:
    """Inside the block all is shown on standard error. For commands whose standard output is read by programs."""
    with redirect_stdout(sys.stderr):
        yield


def show(text: str = "") -> None:
    """Prints a text on standard output, above the bar if there is one."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def show_facts(facts: Mapping[str, Any]) -> None:
    """Prints a line for each fact: its name, and its value."""
    for name, value in facts.items():
        show(f"{name:{NAME_WIDTH}} {value}".rstrip())


def show_section(title: str, text: str) -> None:
    """Prints a part of the end."""
    show(f"\n{title}\n\n{text}")


def show_end(places: Mapping[str, Any], commands: Iterable[str] = ()) -> None:
    """Prints where things are, and commands to go on with.

    Args:
        places: what it is -> where it is.
        commands: whole commands, as `command` makes them.
    """
    if places:
        show()
        show_facts(places)
    commands = list(commands)
    if commands:
        show("\nWhat next:\n" + "".join(f"\n  {line}" for line in commands))


def command(name: str, **flags: Any) -> str:
    """A command of `ijepa` as it is typed in a shell. Flags that are None are left out."""
    words = ["ijepa", name]
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag}", *map(_word, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def as_typed(program: str, argv: Iterable[Any]) -> str:
    """A command as it was typed in a shell, without the secrets of its URLs."""
    return f"{program} {shlex.join(without_secrets(str(word)) for word in argv)}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def command_again(name: str, arguments: Any, **changes: Any) -> str:
    """A command with the flags that it was given, and with changes.

    Args:
        name: of the command.
        arguments: its dataclass. Flags with their default are left out.
        changes: by flag.
    """
    flags = {}
    for entry in dataclasses.fields(arguments):
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        value = getattr(arguments, entry.name)
        flags[entry.name] = None if value == default else value
    return command(name, **{**flags, **changes})


def in_python(path: Any) -> str:
    """A path as a text of Python, in double quotes, which are easy to read in a shell."""
    return json.dumps(str(path), ensure_ascii=False)


def data_flags(arguments: Any) -> dict[str, Any]:
    """The flags of a command that say where its images and labels are, for another command on the same images."""
    return {name: getattr(arguments, name) for name in ("data", "data_config", "image_column", "label_column")}


def onnx_commands(model: str, output: str) -> list[str]:
    """The command that writes a model as ONNX; none if its packages are not installed."""
    is_possible = all(importlib.util.find_spec(name) for name in ONNX_PACKAGES)
    return [command("onnx", model=model, output=output)] if is_possible else []


def _width() -> int:
    """Columns of the terminal; 80 if it does not say."""
    return shutil.get_terminal_size().columns


class Timer:
    """The time of a work so far, and an estimate of the time that is left.

    The estimate has the speed so far, with all pauses in it, but without the first steps, which are slower.

    Args:
        total: units of work to do, such as steps.
        clock: gives seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total, self.done, self.clock = total, 0, clock
        self.started = clock()
        self._ignored: tuple[int, float] | None = None  # units that do not count, and when they were done

    def count(self, units: int = 1) -> None:
        self.done += units
        if self._ignored is None and self.total >= FEW and self.done >= min(FIRST_STEPS, self.total // FEW):
            self._ignored = self.done, self.clock()

    @property
    def seconds_left(self) -> float | None:
        """None if nothing was done so far."""
        done, since = self._ignored or (0, self.started)
        units = self.done - done
        is_known = units > 0 and (self._ignored is not None or self.total < FEW)
        return (self.clock() - since) / units * (self.total - self.done) if is_known else None

    def __str__(self) -> str:
        """Such as ", 12 s so far, 3 min left"; empty before anything was done."""
        if not self.done:
            return ""
        so_far, left = in_words(self.clock() - self.started), self.seconds_left
        is_known = left is not None and self.done < self.total
        return f", {so_far} so far" + (f", {in_words(left or 0)} left" if is_known else "")


class Progress:
    """How far a long work is: a bar on a terminal, otherwise lines.

    Args:
        total: of units, such as steps.
        unit: in the singular.
        done: units that were done before, by an earlier process.
        shown: whether anything is shown; only one process of a launch shows it.
        seconds_between_lines: in a file, a line is printed after this time. None leaves lines to `report`.
        leave: whether the bar stays when the work is done, or in a file, whether there is a last line.
        clock: gives seconds.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        done: int = 0,
        shown: bool = True,
        seconds_between_lines: float | None = None,
        leave: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.unit, self.done, self.shown, self.clock = total, unit, done, shown, clock
        self.seconds_between_lines, self.leave = seconds_between_lines, leave
        self._lines_until = done  # what the last line has told
        self._timer, self._facts, self._last_line = Timer(total - done, clock), "", clock()
        self._bar: tqdm | None = None
        if shown and has_terminal():
            self._bar = tqdm(total=total, initial=done, bar_format=_BAR, leave=leave, ncols=_width(), nrows=_ROWS)
        self._redraw()

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def __str__(self) -> str:
        """Such as "step 50 of 4,000, 12 s so far, 3 min left: loss 0.5"."""
        facts = f": {self._facts}" if self._facts else ""
        return f"{self.unit} {self.done:,} of {self.total:,}{self._timer}{facts}"

    def update(self, count: int = 1) -> None:
        """Counts what was done."""
        self.done += count
        self._timer.count(count)
        if self._bar is not None:
            self._bar.set_description_str(str(self), refresh=False)
            self._bar.ncols = _width()  # the window may have changed its size
            self._bar.update(count)
            return
        wait = self.seconds_between_lines
        if wait is not None and self.clock() - self._last_line >= wait:
            self._line()

    def report(self, facts: Mapping[str, Any] | None = None, at_once: bool = True) -> None:
        """Shows facts: beside the bar, or in a file in a line of their own; without `at_once`, in its next line."""
        if facts is not None:
            self._facts = ", ".join(f"{name} {value}" for name, value in facts.items())
        if self._bar is not None:
            self._redraw()
        elif at_once:
            self._line()

    def _line(self) -> None:
        self._last_line, self._lines_until = self.clock(), self.done
        if self.shown:
            show(str(self))

    def _redraw(self) -> None:
        if self._bar is not None:
            self._bar.set_description_str(str(self))

    def close(self) -> None:
        """Ends the bar. In a file, a last line says how far the work is, unless one does already."""
        if self._bar is not None:
            self._redraw()
            self._bar.close()
        elif self.leave and self._lines_until != self.done:
            self._line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
