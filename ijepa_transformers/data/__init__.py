# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finding images, decoding and cropping them, their order, and streams of shards.

The names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .datasets import prepare_image
    from .decoding import BadImageError, decode_image, jpeg_decoder
    from .sources import load_image_dataset
    from .transforms import build_image_processor

__all__ = [
    "BadImageError",
    "build_image_processor",
    "decode_image",
    "jpeg_decoder",
    "load_image_dataset",
    "prepare_image",
]

_HOMES = {"build_image_processor": "transforms", "load_image_dataset": "sources", "prepare_image": "datasets"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'decoding')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
