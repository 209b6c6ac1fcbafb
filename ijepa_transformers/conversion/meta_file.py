# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads a checkpoint file of Meta's code without running any code of the file."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .key_mapping import NETWORKS
from .meta_layout import FACTS, StateDict, problem_of
from .torch_archive import check_archive


def load_checkpoint(file: Path) -> dict[Any, Any]:
    """Opens a file of `torch.save`, memory-mapped, without running any code of it.

    Raises:
        ValueError: if the file is missing, no checkpoint, cut short or damaged, or if loading it would run code.
    """
    is_mapped = check_archive(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of sparse tensors, which are refused with a sentence
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} was refused because loading it would run code{_wanted_code(file)}.") from None
    except Exception as error:  # for broken content torch raises anything from AssertionError to struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a checkpoint of torch.save ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint of I-JEPA.")
    return checkpoint


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
        if not isinstance(key, str):
            raise ValueError(f"{network!r} has the key {key!r}, which is no string.")
        problem = problem_of(value)
        if problem:
            raise ValueError(f"{network}.{key.removeprefix('module.')} is {problem}.")
    plain = {key.removeprefix("module."): value.detach().resolve_neg() for key, value in state_dict.items()}
    if len(plain) < len(state_dict):
        raise ValueError(f"{network!r} has keys both with and without 'module.'.")
    return plain


def check_finite(network: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Checks that no tensor holds NaN, infinity, or a number that is infinite in float32.

    Raises:
        ValueError: with the name of the first one that does.
    """
    for key, value in state_dict.items():
        bad = int((~value.float().isfinite()).sum())
        if bad:
            raise ValueError(f"{network}.{key} holds NaN or infinity in {bad:,} of its {value.numel():,} numbers.")
