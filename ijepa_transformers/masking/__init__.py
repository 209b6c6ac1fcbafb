# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Masks: patch indices of contexts and targets. Knows no model.

A mask is a pure function of (settings, seed, step, image slot); the slot is the image's place in the global batch.
"""

from .building import MODES, Masking, build_masking
from .collator import MaskingCollator
from .complement import InverseBlockMasking, RandomMasking
from .multi_block import MultiBlockMasking


__all__ = [
    "MODES",
    "InverseBlockMasking",
    "Masking",
    "MaskingCollator",
    "MultiBlockMasking",
    "RandomMasking",
    "build_masking",
]
