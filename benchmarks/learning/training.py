# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains a learner on images in memory for a number of seconds or steps, and judges its encoders by frozen features."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.learning.images import Crops, LabelledImages, normalize, shrink
from benchmarks.learning.learners import Embedding, Learner, Settings
from ijepa_transformers.evaluation.collapse import effective_rank
from ijepa_transformers.evaluation.probes import few_shot_accuracy, knn_accuracy, logistic_regression_accuracy, standardize
from ijepa_transformers.optimization import build_optimizer


NEIGHBORS, SHOTS, DRAWS = 20, 5, 20
PIXELS_SIDE = 32  # of raw pixels, as in the pretraining command's table
LOSSES_KEPT = 50


@dataclass
class Clock:
    """How much of a run is done. The budget is `steps`, or `seconds` of processor time, or of wall time on a GPU."""

    steps: int | None = None
    seconds: float | None = None
    device: str = "cpu"
    step: int = 0
    began: float = 0.0

    def start(self) -> None:
        self.began = self._now()

    def _now(self) -> float:
        return time.perf_counter() if self.device == "cuda" else time.process_time()

    @property
    def used(self) -> float:
        """Seconds."""
        return self._now() - self.began

    @property
    def done(self) -> float:
        """Share of the run, from 0."""
        return self.step / self.steps if self.steps else self.used / self.seconds

    @property
    def expected_steps(self) -> float:
        """Of the whole run, by the speed so far."""
        return self.steps or max(self.step / max(self.done, 1e-6), 1)


def rate_at(done: float, settings: Settings) -> float:
    """Rises linearly, then falls along half a cosine."""
    if done < settings.warmup:
        return settings.rate * done / settings.warmup
    progress = min((done - settings.warmup) / (1 - settings.warmup), 1.0)
    return settings.rate * (settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_decay_at(done: float, settings: Settings) -> float:
    first, last = settings.weight_decay, settings.final_weight_decay
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_of(learner: Learner, settings: Settings, device: str) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases and norms."""
    groups = [
        {
            "params": [p for p in learner.model.parameters() if p.requires_grad and (p.ndim > 1) == decayed],
            "decayed": decayed,
            "weight_decay": 0.0,
        }
        for decayed in (True, False)
    ]
    return build_optimizer(
        groups, name="adamw", learning_rate=settings.rate, betas=learner.betas, epsilon=1e-8, device_type=device
    )


def batches_of(images: LabelledImages, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices (B,), pass after pass; every pass has another order and leaves out the last, smaller batch."""
    size = min(size, len(images))
    while True:
        order = torch.randperm(len(images), generator=generator, device=generator.device)
        yield from order[: len(images) // size * size].split(size)


def train(
    learner: Learner,
    settings: Settings,
    images: LabelledImages,
    clock: Clock,
    precision: str = "no",
    watch: Callable[[Clock], object] = lambda clock: None,
) -> dict[str, float]:
    """Trains until the clock is full; returns steps, seconds and the mean of the last losses.

    Args:
        watch: called after each step; what it takes is not counted.
    """
    device = clock.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    crops = Crops(settings.image_size, tuple(settings.crop_scale), flip=settings.flip)
    optimizer, losses = optimizer_of(learner, settings, device), []
    batches = batches_of(images, settings.batch_size, generator)
    clock.start()
    while clock.done < 1:
        done = clock.done
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, settings)
            group["weight_decay"] = weight_decay_at(done, settings) if group["decayed"] else 0.0
        chosen = next(batches)
        views = torch.cat([crops(images.pixels[chosen], generator) for _ in range(learner.views)])
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = learner.loss_of(views, images.labels[chosen], clock.step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step += 1
        learner.after_step(done, clock.expected_steps)
        losses = [*losses[-LOSSES_KEPT + 1 :], loss.detach()]
        paused = clock._now()
        watch(clock)
        clock.began += clock._now() - paused
    return {"steps": clock.step, "seconds": clock.used, "loss": torch.stack(losses).mean().item()}


# ------------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def features_of(embed: Embedding, images: LabelledImages, size: int, batch_size: int = 256) -> torch.Tensor:
    """(N, D) on the CPU, of the whole images."""
    return torch.cat([embed(normalize(shrink(p, size))).float().cpu() for p in images.pixels.split(batch_size)])


def pixel_features(pixel_values: torch.Tensor) -> torch.Tensor:
    return adaptive_avg_pool2d(pixel_values, min(pixel_values.shape[-1], PIXELS_SIDE)).flatten(1)


def judge(embed: Embedding, train_images: LabelledImages, test_images: LabelledImages, size: int) -> dict[str, float]:
    """Accuracies on the test images by 20-NN, 5-shot and logistic regression, and the effective rank."""
    train_features, test_features = (features_of(embed, part, size) for part in (train_images, test_images))
    rank = effective_rank(test_features)
    train_features, test_features = standardize(train_features, test_features)
    labelled = train_features, train_images.labels.cpu(), test_features, test_images.labels.cpu()
    return {
        "knn": knn_accuracy(*labelled, k=NEIGHBORS),
        "shot5": few_shot_accuracy(*labelled, shots=SHOTS, num_draws=DRAWS).mean,
        "linear": logistic_regression_accuracy(*labelled),
        "effective_rank": rank,
    }
