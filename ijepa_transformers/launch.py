# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa launch`: starts a command in several processes with the launcher of Accelerate.

It adds nothing but a quiet end. `accelerate launch` prints notices, a summary and a traceback around the sentence of a
process that fails, and ends with code 1. Here the sentence stands last, and the code is that of the process.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .arguments import LONG_FLAG
from .recipe_files import near


FAILED = 1
USE_CPU = "ACCELERATE_USE_CPU"


def launch(argv: Sequence[str], commands: Collection[str]) -> None:
    """Runs a command in several processes. Ends this process with the code of the first one that fails.

    Args:
        argv: flags of `accelerate launch`, then the command with its own flags.
        commands: the names of all commands.

    Raises:
        ValueError: if no command is named, or if a flag of `accelerate launch` is wrong.
    """
    place = next((number for number, word in enumerate(argv) if word in commands), None)
    if place is None:
        raise ValueError(f"Name a command after the flags of accelerate launch: {', '.join(commands)}.")
    arguments = _parse([*argv[:place], "-m", "ijepa_transformers.cli", *argv[place:]], argv[:place])
    logging.disable(logging.ERROR)  # of the launcher; the processes that it starts are not concerned
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # Below 0 are those that the launcher has ended, because another one had failed.
        _end(next((code for code in codes if code > 0), error.get_first_failure()[1].exitcode))
    except subprocess.CalledProcessError as error:
        _end(error.returncode)
    except SignalException as error:
        sys.exit(128 + error.sigval.value)  # as a shell reports it; the processes have got the signal too


def _parse(words: Sequence[str], flags: Sequence[str]) -> argparse.Namespace:
    """The arguments of `accelerate launch`. Raises ValueError where it would print all its flags."""
    parser = launch_command_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    known = sorted({flag.lstrip("-").replace("-", "_") for flag in parser._option_string_actions})
    for name in (found[0][2:] for found in map(LONG_FLAG.match, flags) if found):
        if name.replace("-", "_") not in known:
            raise ValueError(f"accelerate launch has no flag --{name}.{near(name.replace('-', '_'), known, '--')}")
    arguments = parser.parse_args(words)
    _use_all_processes(arguments)
    return arguments


def _refuse(message: str) -> NoReturn:
    sentence = re.sub(r"^argument (--\w+)/\S+:", r"\1:", message.rstrip("."))  # it names both spellings
    raise ValueError(f"{sentence}.")


def _use_all_processes(arguments: argparse.Namespace) -> None:
    """Lets several processes work together on the CPU if there is no GPU. Accelerate would start one without a word.

    Raises:
        ValueError: if there are fewer GPUs than processes, or no process.
    """
    number = arguments.num_processes
    if number is None:
        return
    if number < 1:
        raise ValueError(f"num_processes must be at least 1, got {number}.")
    several_machines = (arguments.num_machines or 1) > 1 or arguments.mpirun_hostfile
    other_ways = arguments.config_file or arguments.tpu or arguments.use_deepspeed or arguments.use_fsdp
    if number == 1 or several_machines or other_ways or os.environ.get(USE_CPU, "").lower() in ("1", "true", "yes"):
        return
    devices = 0 if arguments.cpu or not torch.accelerator.is_available() else torch.accelerator.device_count()
    if 0 < devices < number:
        raise ValueError(f"num_processes is {number}, but only {devices} GPU{'s' * (devices > 1)} can be seen.")
    if not devices:
        os.environ[USE_CPU] = "true"
        arguments.cpu, arguments.multi_gpu = False, True
        print(f"ijepa launch: {number} processes compute on the CPU.", file=sys.stderr)


def _end(code: int) -> NoReturn:
    """Ends with the code of a process, which has said why it failed unless a signal killed it."""
    if code < 0:
        print(f"ijepa launch: error: a process was killed by signal {-code}.", file=sys.stderr)
    sys.exit(code if code > 0 else FAILED)
