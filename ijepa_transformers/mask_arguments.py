# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of masks, and what recipes of earlier versions had beside them. Pretraining and pictures need both.

Like `arguments`, this module imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .arguments import argument, does_nothing, require, require_interval, require_numbers


_MULTI_BLOCK = (
    *("num_targets", "target_scale", "target_aspect_ratio", "num_contexts", "context_scale", "min_patches"),
    *("allow_overlap", "num_context_tokens", "num_target_tokens"),
)
# Settings of each mode of masks. The others do nothing in it.
MASK_SETTINGS = {
    "unbiased": _MULTI_BLOCK,
    "meta": _MULTI_BLOCK,
    "random": ("visible_share", "num_contexts"),
    "inverse_block": ("visible_share", "visible_aspect_ratio", "num_contexts"),
}


def unused_mask_settings(mode: str | None) -> set[str]:
    """The settings of masks that do nothing in a mode; none if the mode is unknown."""
    every = {name for names in MASK_SETTINGS.values() for name in names}
    return every - set(MASK_SETTINGS[mode]) if mode in MASK_SETTINGS else set()


@dataclass
class MaskArguments:
    """What the model sees, and what it predicts from it (`ijepa_transformers/masking/`)."""

    argument_group = "masks"

    mask_mode: str = argument(
        "unbiased",
        "unbiased: several target blocks, and a context block without them; meta: the same, exactly as in Meta's code;"
        " random: the context is a random share of the patches; inverse_block: the context is one block. In random and"
        " inverse_block every other patch is a target. auto: random on grids of fewer than"
        " 49 patches, and on grids of up to 100 patches if max_steps is at most 10,000; otherwise unbiased",
        (*MASK_SETTINGS, "auto"),
    )
    visible_share: float = argument(0.3, "share of the patches in the context (random and inverse_block only)")
    visible_aspect_ratio: list[float] = argument(
        [0.66, 1.5], "height over width of the context block (inverse_block only): least, most"
    )
    num_targets: int = argument(4, "target blocks per image (this and what follows: unbiased and meta only)")
    target_scale: list[float] = argument([0.15, 0.2], "area of a target block as a share of the image: least, most")
    target_aspect_ratio: list[float] = argument([0.75, 1.5], "height over width of a target block: least, most")
    num_contexts: int = argument(1, "contexts per image (all modes)")
    context_scale: list[float] = argument(
        [0.85, 1.0], "area of the context block as a share of the image, before targets are taken out: least, most"
    )
    min_patches: int = argument(10, "least number of patches in the context")
    allow_overlap: bool = argument(False, "do not take the target patches out of the context")
    num_context_tokens: int | None = argument(
        None, "fixed number of patches in the context (default: that of the smallest context of a pass)"
    )
    num_target_tokens: int | None = argument(
        None, "fixed number of patches in a target block (default: the whole block)"
    )

    @staticmethod
    def unused_settings(values: Mapping[str, Any]) -> dict[str, str]:
        """The settings that do nothing in the mode of `values`, each with the mode in words."""
        mode = values.get("mask_mode")
        return dict.fromkeys(unused_mask_settings(mode), f"mask_mode {mode}")

    def mask_fields(self) -> dict:
        """Arguments of `build_masking` but the grid."""
        fields = {name: getattr(self, name) for name in MASK_SETTINGS.get(self.mask_mode, ())}
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return {"mode": self.mask_mode, **fields}

    def check_masks(self):
        """What does not depend on the grid, of which `build_masking` speaks."""
        self._check_unused_mask_settings()
        require_numbers(self, "visible_share", above=0, below=1)
        require_interval(self, "visible_aspect_ratio")
        require_interval(self, "target_scale", "context_scale", most=1)
        require_interval(self, "target_aspect_ratio")
        require_numbers(self, "num_targets", "num_contexts", "min_patches", least=1)
        require_numbers(self, "num_context_tokens", "num_target_tokens", least=1)

    def _check_unused_mask_settings(self):
        """A setting that does nothing in this mode must have its default."""
        defaults = MaskArguments()
        for name, reason in sorted(self.unused_settings(vars(self)).items()):
            if getattr(self, name) != getattr(defaults, name):
                raise does_nothing(name, getattr(self, name), reason)


# Keys of recipes that earlier versions wrote, with the values that mean what is done today.
REMOVED_KEYS = {
    "keep_all_context": (False,),
    "normalize_targets": (None, True),
    "predictor_attention": (None, "full"),
    "token_multiple": (1,),
}


def without_removed_keys(values: dict, source: str) -> dict:
    """`values`, which an earlier version may have written, without the keys of `REMOVED_KEYS`.

    Raises:
        ValueError: such a key has a value that this version does not support; `source` names the file in the message.
    """
    for name in REMOVED_KEYS.keys() & values.keys():
        supported = values[name] in REMOVED_KEYS[name]
        require(supported, f"{source} has {name} {values[name]!r}, which this version no longer supports.")
    return {name: value for name, value in values.items() if name not in REMOVED_KEYS}
