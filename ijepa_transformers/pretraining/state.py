# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""run_state.json: what a checkpoint keeps beside weights, optimizer and random numbers."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import __version__
from ..distributed import Launch
from ..files import read_json_object
from .arguments import PretrainingArguments
from .finished import STATE_FILE


_KINDS: dict[str, type] = {
    "arguments": dict,
    "baseline": dict,
    "num_images": int,
    "skipped_steps": int,
    "launch": dict,
}
UNKNOWN_VERSION = "an earlier version"  # before checkpoints carried one


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Writes the state with the version of this package."""
    (checkpoint / STATE_FILE).write_text(json.dumps({"version": __version__, **state}))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        ValueError: if it lacks something that this version of the package needs.
    """
    state = read_json_object(checkpoint / STATE_FILE)
    for name, kind in _KINDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{checkpoint / STATE_FILE} has no {name!r}. {_advice(state)}")
    try:
        Launch(**state["launch"])
    except TypeError:
        raise ValueError(f"{checkpoint / STATE_FILE} has the launch {state['launch']}. {_advice(state)}") from None
    return state


def recorded_setting(arguments: PretrainingArguments, name: str) -> Any:
    """A setting in the newest readable checkpoint of the run to resume; None if there is none."""
    if not arguments.resume:
        return None
    for path in sorted(Path(arguments.output_dir).glob(f"checkpoints/step-*/{STATE_FILE}"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return read_json_object(path)["arguments"][name]
    return None


def note_on_version(state: Mapping[str, Any], checkpoint: Path) -> str | None:
    """A sentence if another version of this package wrote the checkpoint, else None."""
    if state.get("version") == __version__:
        return None
    return f"{checkpoint} was written by {_writer(state)} of ijepa-transformers; this is version {__version__}."


def check_known_settings(arguments: Mapping[str, Any], known: set[str], state: Mapping[str, Any]) -> None:
    """Checks that this version of the package knows all settings of the run to resume.

    Raises:
        ValueError: if it does not know one.
    """
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(f"The run to resume has the setting {unknown[0]!r}, which is unknown here. {_advice(state)}")


def _writer(state: Mapping[str, Any]) -> str:
    return f"version {state['version']}" if state.get("version") else UNKNOWN_VERSION


def _advice(state: Mapping[str, Any]) -> str:
    return (
        f"It was written by {_writer(state)} of ijepa-transformers, and this is version {__version__}. Resume with the"
        " version that wrote it, or start a new run from its weights with --init_from."
    )
