# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""ViT-S/16 on Imagenette on one GPU: ours, the published settings, or MAE. At most ten minutes a call.

    python benchmarks/learning/imagenette_gpu.py --data PATH_OR_HUB_NAME --method ours --image_size 128 --output_dir O

Images lie on the GPU as bytes, and crops are cut there. Matrix products are in bfloat16. Every 20 epochs the run
writes a checkpoint, and judges the frozen features of the validation images by 20-NN and by a linear probe; each
such row goes to `O/rows.jsonl`. The same call goes on from the checkpoint, so a run may take several calls: it stops
by itself after `--minutes`. Nothing is chosen by the rows: report the last one.

`--selection` trains on nine tenths of the training images and judges by the other tenth. Choose settings so.
Any key of `Settings` (learners.py) can be laid over a method: `--set rate=1e-3 batch_size=128`.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.modeling_layers import GradientCheckpointingLayer


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.learning.images import LabelledImages, load_parts
from benchmarks.learning.learners import Embedding, Settings, build_learner
from benchmarks.learning.training import Clock, Training, features_of
from benchmarks.speed.timing import environment
from ijepa_transformers.evaluation.collapse import effective_rank
from ijepa_transformers.evaluation.probes import knn_accuracy, standardize
from ijepa_transformers.masking import build_masking
from ijepa_transformers.pretraining.defaults import mask_mode_for


VIT_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 16,
    "predictor_hidden_size": 192,
    "predictor_num_hidden_layers": 4,
    "predictor_num_attention_heads": 6,
    "batch_size": 256,
    "crop_scale": (0.3, 1.0),
    "flip": True,
}
METHODS = {
    # Chosen on small encoders on a CPU (docs/development/small_data_lab_log.md), not at this size.
    "ours": {
        "initializer_range": 0.05,
        "target_image_mean": 0.5,
        "rate": 1e-3,
        "final_rate": 0.001,
        "half_life": 0.01,
    },
    # The released settings; the rate is scaled from 1e-3 at 2,048 images to the batch by the square root.
    "published": {
        "patch_embedding_init": "published",
        "target_normalization": "layer",
        "rate": 3.5e-4,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        "momentum": 0.996,
    },
    # As published (arXiv 2111.06377): rate 1.5e-4 x batch / 256, decoder of 8 layers.
    "mae": {"method": "mae", "rate": 6e-4, "predictor_num_hidden_layers": 8, "final_rate": 0.001},
}
EPOCHS_PER_ROW = 20


def settings_of(own: argparse.Namespace) -> Settings:
    changes = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in own.set)}
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(changes.keys() - known):
        raise SystemExit(f"imagenette_gpu.py: error: --set knows no {unknown}; it knows {sorted(known)}")
    sizes = {"image_size": own.image_size, "stored_size": own.stored_size or own.image_size}
    chosen = {"data": own.data, **VIT_SMALL, **METHODS[own.method], **sizes, "seed": own.seed, **changes}
    grid = Settings(**chosen).grid_size
    masks = {"ours": our_masks, "published": published_masks}
    return Settings(**{"masks": masks[own.method](grid), **chosen} if own.method in masks else chosen)


def our_masks(grid_size: tuple[int, int]) -> dict[str, Any]:
    """What `ijepa pretrain` takes with `mask_mode` auto in a long run: blocks, but on tiny grids random masks."""
    mode, _ = mask_mode_for(grid_size, max_steps=None)
    return {"mode": mode, "visible_share": 0.3, "num_contexts": 2} if mode == "random" else {"mode": mode}


def published_masks(grid_size: tuple[int, int]) -> dict[str, Any]:
    """The released sampler. On small grids it cannot give targets of more than 10 patches; then the most it can."""
    for least in range(10, 0, -1):
        with contextlib.suppress(ValueError):
            build_masking(grid_size, "meta", min_patches=least)
            return {"mode": "meta", "min_patches": least}
    raise SystemExit(f"imagenette_gpu.py: error: the released sampler cannot work on a grid of {grid_size}.")


def linear_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, steps: int = 300
) -> float:
    """Of a linear classifier on standardised features, trained on all of them at once with a little weight decay."""
    classifier = torch.nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device)
    torch.nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(train), train_labels).backward()
        optimizer.step()
    with torch.no_grad():
        return (classifier(test).argmax(dim=1) == test_labels).double().mean().item()


def judge(embed: Embedding, train: LabelledImages, test: LabelledImages, size: int) -> dict[str, float]:
    features = [features_of(embed, part, size).to(train.labels.device) for part in (train, test)]
    rank = effective_rank(features[1])
    first, second = standardize(*features)
    labelled = first, train.labels, second, test.labels
    return {"knn": knn_accuracy(*labelled, k=20), "linear": linear_accuracy(*labelled), "effective_rank": rank}


def compile_layers(model: torch.nn.Module) -> None:
    """Layer by layer in place: quicker than the whole model, and masks of changing lengths work."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


class Run:
    """A run that writes rows and checkpoints, and can be gone on with."""

    def __init__(self, own: argparse.Namespace, settings: Settings) -> None:
        self.own, self.settings = own, settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.part = "selection" if own.selection else "final"
        cache = own.output_dir.parent / "decoded_images"
        parts = load_parts(settings.data, self.part, settings.stored_size, settings.num_channels, cache)
        self.train, self.test = (images.to(self.device) for images in parts)
        torch.manual_seed(settings.seed)
        learner = build_learner(settings, int(self.train.labels.max()) + 1, self.device, own.precision)
        if own.compile:
            compile_layers(learner.model)
        self.epoch_steps = len(self.train) // min(settings.batch_size, len(self.train))
        clock = Clock(steps=own.max_steps or own.epochs * self.epoch_steps, device=self.device)
        self.training = Training(learner, settings, self.train, clock, own.precision)
        self.checkpoint, self.rows = own.output_dir / "checkpoint.pt", own.output_dir / "rows.jsonl"
        self.began = time.perf_counter()
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if any(state.get(key) != value for key, value in self._identity().items()):
            raise SystemExit(
                f"imagenette_gpu.py: error: {self.checkpoint} is of other settings, other images or another length."
            )
        self.training.load(state)
        is_done = state["step"] == self.training.clock.steps
        print("has all its steps" if is_done else f"goes on after step {state['step']}", flush=True)

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the checkpoint that it goes on from."""
        own = {"part": self.part, "precision": self.own.precision, "steps": self.training.clock.steps}
        return {**own, "settings": dataclasses.asdict(self.settings)}

    def go(self) -> None:
        clock, began = self.training.clock, time.perf_counter()
        first = clock.step
        while clock.step < clock.steps and time.perf_counter() - self.began < 60 * self.own.minutes:
            self.training.take_step()
            if clock.step % (EPOCHS_PER_ROW * self.epoch_steps) == 0 or clock.step == clock.steps:
                images = (clock.step - first) * self.settings.batch_size
                self._row(images / (time.perf_counter() - began))
        if clock.step < clock.steps:
            self._save()
            print(f"stopped after {self.own.minutes} minutes at step {clock.step} of {clock.steps}: call it again")

    def _row(self, images_per_second: float) -> None:
        clock = self.training.clock
        row = {
            "method": self.own.method,
            "step": clock.step,
            "epoch": round(clock.step / self.epoch_steps, 2),
            "loss": self.training.mean_loss(),
            "images_per_second": round(images_per_second, 1),
        }
        for name, encoder in self.training.learner.encoders.items():
            found = judge(encoder(), self.train, self.test, self.settings.image_size)
            row |= {f"{name} {key}": value for key, value in found.items()}
        self.training.learner.model.train()
        row |= {"settings": dataclasses.asdict(self.settings), "machine": environment(self.device)}
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("settings", "machine")}, flush=True)
        self._save()

    def _save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({**self.training.state(), **self._identity()}, partial)
        partial.rename(self.checkpoint)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="as in `ijepa pretrain`")
    parser.add_argument("--method", choices=METHODS, default="ours")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--stored_size", type=int, help="side of the images on the GPU; the image size by default")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--max_steps", type=int, help="instead of epochs, for a try")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which the call stops by itself")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--selection", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    own = parser.parse_args(words)
    for name in ("image_size", "epochs", "minutes"):
        if getattr(own, name) <= 0:
            parser.error(f"--{name} must be above 0, got {getattr(own, name)}.")
    return own


def main(words: list[str] | None = None) -> None:
    own = parse(words)
    try:
        settings = settings_of(own)
    except ValueError as error:
        raise SystemExit(f"imagenette_gpu.py: error: {error}") from None
    own.output_dir.mkdir(parents=True, exist_ok=True)
    Run(own, settings).go()


if __name__ == "__main__":
    main()
