# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What each of the exact savings gives: a pretraining step as it is, and with one saving after the other undone.

    python benchmarks/savings.py [--sizes tiny] [--precisions no bf16] [--batch 4] [--seconds 60]

All contenders have the same weights and images, and in every step the same masks, and take turns. A figure is what the
step takes longer without the saving, in percent of the step as it is: lower quartile, median and upper quartile over
the turns. On a machine with neighbours a turn is good to several percent only; a large model on a CPU would need hours
to show one percent. The last line is one JSON object.
"""

import argparse
import json
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from benchmarks.timing import environment, matmul_precision, quartiles, take_turns
from ijepa import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa.execution import choose_attention, set_matmul_precision
from ijepa.masking import MultiBlockMasking
from ijepa.modeling_ijepa import IJepaEmbeddings, IJepaPredictor, gather_patches
from ijepa.optimization import build_optimizer, parameter_groups


PRODUCTS = "float32 products by oneDNN, with eager attention"
SETTINGS = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "epsilon": 1e-8}


def embed_whole_grid(self, pixel_values, patch_indices=None, interpolate_pos_encoding=False):
    """The patches are chosen after the patch embedding, as published."""
    embeddings = self.patch_embeddings(pixel_values) + self.position_embeddings
    return embeddings if patch_indices is None else gather_patches(embeddings, patch_indices)


def predict_all_tokens(self, context, targets, context_mask, **kwargs):
    """The last layer computes the context too, as published."""
    num_blocks = targets.shape[0] // (context.shape[0] * context.shape[1])
    context = context.unsqueeze(2).expand(-1, -1, num_blocks, -1, -1).flatten(0, 2)
    hidden_states = torch.cat([context, targets], dim=1)
    for layer in self.layers:
        hidden_states = layer(hidden_states)
    return hidden_states[:, context.shape[1] :]


@torch.no_grad()
def average_one_by_one(self, momentum):
    for target, context in zip(self.ijepa.parameters(), self.context_encoder.parameters(), strict=True):
        target.mul_(momentum).add_((1 - momentum) * context)


UNDONE = {
    "patch embedding of kept patches only": (IJepaEmbeddings, "forward", embed_whole_grid),
    "last predictor layer for mask tokens only": (IJepaPredictor, "_predict_jointly", predict_all_tokens),
    "moving average in one call": (IJepaForPretraining, "update_target_encoder", average_one_by_one),
}


class Contender:
    """A model of its own, with a saving undone by name, or with all of them."""

    def __init__(self, config, batch_size, device, precision, undone=None):
        torch.manual_seed(0)
        if undone != PRODUCTS:
            set_matmul_precision(device, precision)  # on which the choice of attention depends
        attention, self.products = choose_attention(device, precision), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        if undone == "attention that suits the precision":
            attention = "sdpa" if attention == "eager" else "eager"
        self.model = IJepaForPretraining._from_config(config, attn_implementation=attention).to(device).train()
        groups = parameter_groups(self.model)
        if undone == "fused AdamW":
            self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), foreach=True)
        else:
            self.optimizer = build_optimizer(groups, name="adamw", device_type=device, **SETTINGS)
        self.device, self.precision, self.undone = device, precision, undone
        self.masks = MultiBlockMasking(config.grid_size, mode="meta").sample(batch_size, seed=0, step=0)
        self.pixels = torch.randn(batch_size, 3, *config.image_height_and_width, device=device)

    @contextmanager
    def way(self):
        """The saving is undone while this contender works."""
        with ExitStack() as stack:
            if self.undone in UNDONE:
                stack.enter_context(patch.object(*UNDONE[self.undone]))
            stack.enter_context(matmul_precision(self.products))
            yield

    def __call__(self):
        with self.way():
            masks = [indices.to(self.device) for indices in self.masks]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.model(self.pixels, *masks).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.update_target_encoder(0.99)
            return loss.item()


def names_of_savings(device, precision):
    names = [*UNDONE, "fused AdamW", "attention that suits the precision"]
    return [*names, PRODUCTS] if (device, precision) == ("cpu", "no") else names


def measure(size, batch_size, device, precision, seconds):
    config = IJepaConfig(**IJEPA_SIZES[size])
    names = names_of_savings(device, precision)
    build = partial(Contender, config, batch_size, device, precision)
    contenders = {"ours": build(), **{name: build(name) for name in names}}
    losses = {name: contender() for name, contender in contenders.items()}  # and a step to warm up
    for name, loss in losses.items():
        if abs(loss - losses["ours"]) > (1e-5 if precision == "no" else 1e-2):
            raise RuntimeError(f"{name}: the loss is {loss}, but with all savings {losses['ours']}")
    taken = take_turns(contenders, seconds, device_type=device)
    longer = {name: in_percent(taken[name], taken["ours"]) for name in names}
    figures = {"turns": len(taken["ours"]), "seconds": quartiles(taken["ours"]), "longer_in_percent": longer}
    return {"size": size, "precision": precision, "batch": batch_size, **figures}


def in_percent(times, others):
    shares = quartiles([100 * (time / other - 1) for time, other in zip(times, others, strict=True)])
    return [round(share, 1) for share in shares.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", choices=IJEPA_SIZES, default=["tiny"])
    parser.add_argument("--precisions", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60, help="of timing per size and precision")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    results = []
    for size in arguments.sizes:
        for precision in arguments.precisions:
            results.append(measure(size, arguments.batch, arguments.device, precision, arguments.seconds))
            print(size, precision, results[-1]["longer_in_percent"], flush=True)
    print(json.dumps({"benchmark": "savings", **environment(arguments.device), "results": results}))


if __name__ == "__main__":
    main()
