"""What commands show: a bar on a terminal, lines elsewhere, and commands that can be pasted into a shell."""

import os
import pty
import shlex
import sys
from contextlib import suppress

import pytest

from ijepa_transformers import cli
from ijepa_transformers.display import Progress, command, in_words, show_end


class Clock:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def work(progress, clock, steps, seconds):
    for _ in range(steps):
        clock.now += seconds
        progress.update()


# Lines


@pytest.mark.parametrize("done", [0, 1000])
def test_the_time_left_is_that_of_the_steps_after_the_slow_first_ones(done):
    """A resumed run counts from where it began."""
    clock = Clock()
    progress = Progress(done + 6010, "step", done=done, clock=clock)
    assert "left" not in str(progress)
    work(progress, clock, 5, 50.0)
    work(progress, clock, 5, 2.0)
    assert str(progress) == f"step {done + 10:,} of {done + 6010:,}, 4 min so far, 3 h 20 min left"


def test_in_a_file_a_report_is_a_line_with_the_time(capsys):
    clock = Clock()
    progress = Progress(30, "step", clock=clock)
    work(progress, clock, 20, 1.0)
    assert capsys.readouterr().out == ""
    progress.report({"loss": "0.519"})
    work(progress, clock, 10, 1.0)
    progress.report({"loss": "0.5"})
    progress.close()
    written = capsys.readouterr()
    assert written.out == "step 20 of 30, 20 s so far, 10 s left: loss 0.519\nstep 30 of 30, 30 s so far: loss 0.5\n"
    assert written.err == ""


def test_in_a_file_a_line_comes_after_some_time(capsys):
    clock = Clock()
    progress = Progress(100, "image", seconds_between_lines=30.0, clock=clock)
    work(progress, clock, 100, 1.0)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "image 30 of 100",
        "image 60 of 100",
        "image 90 of 100",
    ]


@pytest.mark.parametrize(("leave", "lines"), [(True, ["image 7 of 10, 7 s so far, 3 s left"]), (False, [])])
def test_in_a_file_the_last_line_says_how_far_it_came(capsys, leave, lines):
    clock = Clock()
    with Progress(10, "image", leave=leave, clock=clock) as progress:
        work(progress, clock, 7, 1.0)
    assert capsys.readouterr().out.splitlines() == lines


def test_facts_that_can_wait_stand_in_the_next_line(capsys):
    with Progress(3, "image", clock=Clock()) as progress:
        for number in range(3):
            progress.update()
            progress.report({"shard": number + 1}, at_once=False)
    assert capsys.readouterr().out == "image 3 of 3, 1 s so far: shard 3\n"


def test_a_process_that_is_not_shown_prints_nothing(capsys):
    progress = Progress(2, "step", shown=False, seconds_between_lines=0.0)
    progress.update()
    progress.report({"loss": "1"})
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "1 s"), (59, "59 s"), (59.8, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (190_000, "2 d 5 h")],
)
def test_times_are_said_in_two_units(seconds, words):
    assert in_words(seconds) == words


# The bar


def all_of(window):
    """What a terminal shows. Its programs have ended."""
    shown = b""
    with suppress(OSError):  # Linux: nothing is left
        while part := os.read(window, 100_000):  # a part at a time
            shown += part
    return shown.decode()


def test_on_a_terminal_a_bar_has_the_facts_and_the_time(monkeypatch):
    window, end = pty.openpty()
    clock = Clock()
    with os.fdopen(end, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress(30, "step", clock=clock) as progress:
            assert progress.has_bar
            work(progress, clock, 20, 1.0)
            progress.report({"loss": "0.519"})
        monkeypatch.undo()
    shown = all_of(window)
    os.close(window)
    assert "█" in shown and "step 20 of 30, 20 s so far, 10 s left: loss 0.519" in shown


# The end


def test_the_end_shows_places_and_commands(capsys):
    show_end({"model": "out", "bad images": "none"}, ["ijepa extract --model out"])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "model        out",
        "bad images   none",
        "",
        "What next:",
        "",
        "  ijepa extract --model out",
    ]


def test_a_command_is_what_a_shell_reads(capsys):
    line = command("extract", model="my model", data="it's", split=None, features=["pooled", "patch"])
    assert line == """ijepa extract --model 'my model' --data 'it'"'"'s' --features pooled patch"""
    assert shlex.split(line)[1] in cli.COMMANDS
