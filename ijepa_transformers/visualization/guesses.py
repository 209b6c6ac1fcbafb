# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The guesses of a predictor for hidden blocks of images, beside the truth."""

import dataclasses
from dataclasses import dataclass

import torch

from ..modeling_ijepa import IJepaForPretraining
from .cells import cut_patches
from .decoder import first_blocks
from .predictions import PredictionScores, nearest_patches, score_predictions
from .study import Study, fitting_masking


@dataclass
class Guesses:
    """Predictions for blocks of images, and the real patches that they are compared with."""

    images: torch.Tensor  # (B,), the numbers of the images in the bank
    contexts: torch.Tensor  # (B, N_ctx)
    blocks: torch.Tensor  # (B, M, T)
    predictions: torch.Tensor  # (B, M, T, D)
    truths: torch.Tensor  # (B, M, T, D)
    bank: torch.Tensor  # (K', N, D), normalised like the predictor's targets
    bank_patches: torch.Tensor  # (K' * N, channels, patch height, patch width)

    def block(self, image: int, block: int) -> "Guesses":
        """One block of one image."""
        one, chosen = slice(image, image + 1), slice(block, block + 1)
        parts = {name: getattr(self, name)[one, chosen] for name in ("blocks", "predictions", "truths")}
        return dataclasses.replace(self, images=self.images[one], contexts=self.contexts[one], **parts)

    @property
    def query_images(self) -> torch.Tensor:
        """The number of the image of each predicted patch, (B * M * T,)."""
        return self.images.repeat_interleave(self.blocks[0].numel())

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest real patches of other images to features (B, M, T, D), (B * M * T, channels, height, width)."""
        found = nearest_patches(features.flatten(0, 2), self.query_images, self.bank, torch.arange(len(self.bank)))
        return self.bank_patches[found]

    def scores(self) -> PredictionScores:
        predictions, truths = self.predictions.flatten(0, 2), self.truths.flatten(0, 2)
        bank_images = torch.arange(len(self.bank))
        return score_predictions(predictions, truths, self.query_images, self.blocks.flatten(), self.bank, bank_images)


@torch.no_grad()
def guess(study: Study, model: IJepaForPretraining, images: list[int] | None = None) -> Guesses:
    """Predicts the target blocks of images of the pool from the first context.

    Args:
        images: their numbers; by default those that are shown. Features of their patches must be kept.
    """
    images = list(range(len(study.images))) if images is None else images
    masking = fitting_masking(study.grid_size, study.masks, study.masks.mask_mode)
    contexts, targets = masking.sample(len(images), study.arguments.seed)
    blocks = first_blocks(targets)
    size, predictions = study.arguments.batch_size, []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        pixel_values = study.pool.pixel_values(images[part])
        inputs = (each.to(model.device) for each in (pixel_values, contexts[part], targets[part]))
        predictions.append(model(*inputs).predictions[:, 0].cpu())
    features = model.normalize_targets(study.target_features.patches)  # also of images that are not shown
    bank = features[: study.arguments.bank_size]
    return Guesses(
        images=torch.as_tensor(images),
        contexts=contexts[:, 0],
        blocks=blocks,
        predictions=torch.cat(predictions),
        truths=features[torch.as_tensor(images)[:, None, None], blocks],
        bank=bank,
        bank_patches=cut_patches(study.whole_patches(len(bank)), study.patch_size).flatten(0, 1),
    )
