# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the Python functions `pretrain`, `finetune`, `probe` and `extract_features` share.

They do what the commands of the same names do, in a process that goes on afterwards: errors are exceptions, and the
state of the process is what it was before.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True)
class Result:
    """What a run has left.

    Attributes:
        directory: where its files are.
        metrics: the last ones: a row of metrics.jsonl, the evaluation, accuracies by row and column, or the manifest.
        table: the accuracies as a table for people; None if there is none.
        verdict: of `pretrain`: the content of verdict.json, which says in sentences whether anything was learned.
    """

    directory: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    table: str | None = None
    verdict: dict[str, Any] | None = None


@contextmanager
def process_as_before() -> Iterator[None]:
    """Restores what a run changes in its process: random states, the precision of products, progress bars, the
    environment, and Accelerate's state, which is kept if the caller had one."""
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    precision, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    accelerate_is_mine = not PartialState._shared_state
    try:
        yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        torch.set_float32_matmul_precision(precision)
        _restore_environment(environment)
        (transformers_logging.enable_progress_bar if bars[0] else transformers_logging.disable_progress_bar)()
        (datasets.disable_progress_bars if bars[1] else datasets.enable_progress_bars)()
        if accelerate_is_mine:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()


def _restore_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
