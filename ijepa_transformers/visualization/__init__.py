# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of masks, features, predictions and curves, and `ijepa visualize`.

The functions take tensors, so they work for any encoder. Each is imported when it is used for the first time.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .colors import PatchColors, pca_colors
    from .curves import plot_training_curves
    from .maps import draw_map, map_points
    from .predictions import (
        PredictionScores,
        draw_predictions,
        draw_scores,
        nearest_patches,
        score_predictions,
    )
    from .sheets import (
        attention_maps,
        draw_attention,
        draw_masks,
        draw_pca,
        draw_similarity,
        similarity_maps,
    )

__all__ = [
    "PatchColors",
    "PredictionScores",
    "attention_maps",
    "draw_attention",
    "draw_map",
    "draw_masks",
    "draw_pca",
    "draw_predictions",
    "draw_scores",
    "draw_similarity",
    "map_points",
    "nearest_patches",
    "pca_colors",
    "plot_training_curves",
    "score_predictions",
    "similarity_maps",
]

_HOMES = {
    "colors": {"PatchColors", "pca_colors"},
    "curves": {"plot_training_curves"},
    "maps": {"draw_map", "map_points"},
    "predictions": {
        *("PredictionScores", "draw_predictions", "draw_scores", "nearest_patches", "score_predictions"),
    },
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "sheets")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
