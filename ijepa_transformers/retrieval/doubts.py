# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Whether a model is known to have learned little. Similarities alone do not show it."""

from contextlib import suppress
from pathlib import Path

import torch

from ..verdict import read_verdict
from .random_pairs import RandomPairs


def doubt_about(source: str, encoder: str, model: torch.nn.Module) -> str | None:
    """Why similarities of this model tell little, for a user; None if nothing is known against it.

    Args:
        source: directory or Hub name of the model. The directory of a pretraining run holds its verdict.
        encoder: "target" or "context". Verdicts are on target encoders.
        model: the encoder of `source`.
    """
    if is_untrained(model):
        return (
            f"The weights of {source!r} are random: nothing has trained them. So similarities tell little, except that"
            " 1 means the same picture. Train it, or take another model."
        )
    verdict = None
    with suppress(OSError, ValueError):  # a damaged verdict says nothing
        verdict = read_verdict(Path(source))
    doubt = verdict and (verdict.short_run if encoder == "context" else verdict.doubt)
    if not doubt:
        return None
    return (
        f"The run that made {source!r} said at its end: {doubt} So similarities tell little. Train longer, or take"
        " another model."
    )


def about_similarities(pairs: RandomPairs | None, doubt: str | None) -> list[str]:
    """What to compare similarities with, and why they tell little if that is known, in one warning."""
    doubt = doubt or (pairs.warning if pairs else None)
    return [*([pairs.sentence] if pairs else []), *([f"WARNING: {doubt}"] if doubt else [])]


def is_untrained(model: torch.nn.Module) -> bool:
    """Whether all biases are 0 and all scales of normalisation are 1. So a new model begins; training changes both."""
    vectors = {name: value for name, value in model.named_parameters() if value.ndim == 1}
    scales = [value for name, value in vectors.items() if name.endswith(".weight")]
    biases = [value for name, value in vectors.items() if name.endswith(".bias")]
    return bool(scales) and all(bool((value == 1).all()) for value in scales) and not any(map(torch.any, biases))
