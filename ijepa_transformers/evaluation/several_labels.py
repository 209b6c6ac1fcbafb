# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Probes of images that have several classes each: k-NN and logistic regression, measured by mean average precision.

Shapes: N images, D features, C classes. Labels are 0 or 1, (N, C).
"""

import numpy as np
import torch
import torch.nn.functional as F


_TEMPERATURE = 0.07  # of the weights of neighbours, as in `knn_accuracy`
_CHUNK_SIZE = 256


def knn_shares(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, k: int) -> torch.Tensor:
    """For each class the weighted share of the k nearest training images that have it, minus one half: (N, C).

    Neighbours and weights are those of `knn_accuracy`. `train` and `test` are features (N, D) on one device.
    """
    train, labels = F.normalize(train.float(), dim=1), labels.to(train.device, torch.float32)
    parts = []
    for chunk in test.split(_CHUNK_SIZE):
        similarities, nearest = (F.normalize(chunk.float(), dim=1) @ train.T).topk(k, dim=1)  # (chunk, k)
        weights = (similarities / _TEMPERATURE).softmax(dim=1)
        parts.append((weights[..., None] * labels[nearest]).sum(dim=1).cpu() - 0.5)
    return torch.cat(parts)


def logistic_scores(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Scores (N, C) of one logistic regression per class (scikit-learn, L2 with C = 1), above 0 where it is predicted.

    `train` and `test` are standardised features (N, D). A class that all training images have, or none, has one score
    for all images.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second

    features, others = train.cpu().numpy(), test.cpu().numpy()
    scores = np.zeros((len(others), labels.shape[1]))
    for column, truth in enumerate(labels.cpu().numpy().T > 0.5):
        if truth.all() or not truth.any():
            scores[:, column] = 1 if truth.all() else -1
        else:
            scores[:, column] = LogisticRegression(max_iter=1000).fit(features, truth).decision_function(others)
    return torch.from_numpy(scores)
