# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains a learner on images in memory for some seconds or steps, and judges its encoders by frozen features."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.learning.images import Crops, LabelledImages, normalize, shrink
from benchmarks.learning.learners import Embedding, Learner, Settings
from ijepa_transformers.evaluation.collapse import effective_rank
from ijepa_transformers.evaluation.probes import (
    few_shot_accuracy,
    knn_accuracy,
    logistic_regression_accuracy,
    standardize,
)
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        stopped = self._now()
        yield
        self.began += self._now() - stopped

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


@dataclass
class Batches:
    """The images of each step, a pure function of (seed, step). Every epoch leaves out the last, smaller batch."""

    num_images: int
    size: int
    seed: int
    device: str
    epoch: int = -1
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.size = min(self.size, self.num_images)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.size

    def indices(self, step: int) -> torch.Tensor:
        """(B,)"""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch or self.order is None:
            generator = torch.Generator().manual_seed(self.seed * 2**32 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.num_images, generator=generator).to(self.device)
        return self.order[place * self.size : (place + 1) * self.size]


@dataclass
class Training:
    """A learner on its way: images, optimizer and clock. Everything that is random depends on (seed, step) only."""

    learner: Learner
    settings: Settings
    images: LabelledImages
    clock: Clock
    precision: str = "no"

    def __post_init__(self) -> None:
        settings, device = self.settings, self.clock.device
        self.optimizer = optimizer_of(self.learner, settings, device)
        self.batches = Batches(len(self.images), settings.batch_size, settings.seed, device)
        self.crops = Crops(settings.image_size, tuple(settings.crop_scale), flip=settings.flip)
        self.losses: deque[torch.Tensor] = deque(maxlen=LOSSES_KEPT)

    def take_step(self) -> None:
        step, done = self.clock.step, self.clock.done
        self._set_rates(done)
        chosen = self.batches.indices(step)
        views = self._views(chosen, step)
        with torch.autocast(self.clock.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.learner.loss_of(views, self.images.labels[chosen], step)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.step += 1
        self.learner.after_step(done, self.clock.expected_steps)
        self.losses.append(loss.detach())

    def _set_rates(self, done: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(done, self.settings)
            group["weight_decay"] = weight_decay_at(done, self.settings) if group["decayed"] else 0.0

    def _views(self, chosen: torch.Tensor, step: int) -> torch.Tensor:
        """Of the images with the indices `chosen` (B,): (B * views, channels, H, W)."""
        generator = torch.Generator(self.clock.device).manual_seed(self.settings.seed * 2**32 + step)
        pixels = self.images.pixels[chosen]
        return torch.cat([self.crops(pixels, generator) for _ in range(self.learner.views)])

    def run(self, watch: Callable[["Training"], object] | None = None) -> dict[str, float]:
        """Trains until the clock is full; returns steps, seconds and the mean of the last losses.

        Args:
            watch: called after each step. The time that it takes does not count.
        """
        self.clock.start()
        while self.clock.done < 1:
            self.take_step()
            if watch is not None:
                with self.clock.paused():
                    watch(self)
        return {"steps_taken": self.clock.step, "seconds_used": self.clock.used, "loss": self.mean_loss()}

    def mean_loss(self) -> float:
        return torch.stack(list(self.losses)).mean().item()

    def state(self) -> dict:
        """What a later process needs to go on."""
        return {
            "model": self.learner.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.clock.step,
        }

    def load(self, state: dict) -> None:
        self.learner.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clock.step = state["step"]


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
