# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads a checkpoint file of Meta's code without running any code of the file."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .key_mapping import NETWORKS
from .meta_layout import FACTS, StateDict


def load_checkpoint(file: Path) -> dict[Any, Any]:
    """Opens a file of `torch.save`, memory-mapped, without running any code of it.

    Raises:
        ValueError: if the file is missing, no checkpoint, cut short or damaged, or if loading it would run code.
    """
    _refuse_damaged(file)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} was refused because loading it would run code{_wanted_code(file)}.") from None
    except Exception as error:  # for broken content torch raises anything from AssertionError to struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a checkpoint of torch.save ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint of I-JEPA.")
    return checkpoint


def _refuse_damaged(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as stream:
            starts_as_zip = stream.read(4) == b"PK\x03\x04"
        problem = "is cut short: its end is missing" if starts_as_zip else "is not a checkpoint of torch.save"
        raise ValueError(f"{file} ({file.stat().st_size:,} bytes) {problem}.")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # reads everything and compares it with the checksums of torch.save
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged: {error}.") from None
    if damaged:
        raise ValueError(f"{file} is damaged: the checksum of its part {damaged!r} is wrong.")


def _wanted_code(file: Path) -> str:
    """The names of the code that the file would run, in brackets. Empty if they are unknown."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the pickle is too broken to be read; the file is refused anyway
        names = []
    return f" ({', '.join(sorted(names))})" if names else ""


def read_networks(checkpoint: Mapping, needed: tuple[str, ...]) -> dict[str, StateDict]:
    """The state dicts of all networks in a checkpoint, without the "module." of distributed training.

    Args:
        checkpoint: from `load_checkpoint`.
        needed: names of networks that must be there.

    Raises:
        ValueError: if a needed network is missing, a top-level key is unknown, or a value is not a floating tensor.
    """
    unknown = sorted(set(map(str, checkpoint)) - {*NETWORKS, *FACTS, "opt"})
    if unknown:
        raise ValueError(f"The checkpoint has the surplus top-level key {unknown[0]!r}; Meta's have no such key.")
    missing = [network for network in needed if network not in checkpoint]
    if missing:
        raise ValueError(f"The checkpoint lacks {missing[0]!r}; it has {', '.join(sorted(checkpoint)) or 'nothing'}.")
    return {network: _plain_state_dict(network, checkpoint[network]) for network in NETWORKS if network in checkpoint}


def _plain_state_dict(network: str, state_dict: Any) -> StateDict:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{network!r} is a {type(state_dict).__name__}, not a state dict.")
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{network}.{key.removeprefix('module.')} is {kind}, not a tensor of floating-point numbers."
            )
    plain = {key.removeprefix("module."): value.detach() for key, value in state_dict.items()}
    if len(plain) < len(state_dict):
        raise ValueError(f"{network!r} has keys both with and without 'module.'.")
    return plain
