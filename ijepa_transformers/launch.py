# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa launch`: starts a command in several processes with the launcher of Accelerate.

It adds nothing but a quiet end. `accelerate launch` prints notices, a summary and a traceback around the sentence of a
process that fails, and ends with code 1. Here the sentence stands last, and the code is that of the process.
"""

import logging
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


FAILED = 1


def launch(argv: Sequence[str], commands: Collection[str]) -> None:
    """Runs a command in several processes. Ends this process with the code of the first one that fails.

    Args:
        argv: flags of `accelerate launch`, then the command with its own flags.
        commands: the names of all commands.

    Raises:
        ValueError: if no command is named.
    """
    place = next((number for number, word in enumerate(argv) if word in commands), None)
    if place is None:
        raise ValueError(f"Name a command after the flags of accelerate launch: {', '.join(commands)}.")
    logging.disable(logging.ERROR)  # of the launcher; the processes that it starts are not concerned
    words = [*argv[:place], "-m", "ijepa_transformers.cli", *argv[place:]]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # Below 0 are those that the launcher has ended, because another one had failed.
        _end(next((code for code in codes if code > 0), error.get_first_failure()[1].exitcode))
    except subprocess.CalledProcessError as error:
        _end(error.returncode)
    except SignalException as error:
        sys.exit(128 + error.sigval.value)  # as a shell reports it; the processes have got the signal too


def _end(code: int) -> NoReturn:
    """Ends with the code of a process, which has said why it failed unless a signal killed it."""
    if code < 0:
        print(f"ijepa launch: error: a process was killed by signal {-code}.", file=sys.stderr)
    sys.exit(code if code > 0 else FAILED)
