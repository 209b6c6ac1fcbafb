# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the package chooses or leaves out, beside the other way, on a CPU:

    python benchmarks/speed/choices.py [--parts "step fp32" "step bf16" "features fp32" "features bf16" threads cast
        packed few_shot search] [--seconds 30] [--size S/16] [--batch 16] [--photos 100000] [--allocator keep]
        [--output FILE]

    step fp32   a training step with eager and with fused attention (sdpa), and with both kinds of float32 products
                (`highest`, and `medium` where it does not round)
    step bf16   the same in bfloat16, and eager attention whose probabilities stay in bfloat16 for the backward pass
    features    the encoder without gradients, in float32 or with bfloat16 weights: the same attentions and products
    threads     a training step in float32 with one thread and with all; OMP_WAIT_POLICY=passive in the environment
                lets them wait as in the commands
    cast        the encoder under autocast without gradients: tokens cast once for three products, or for each
    packed      the encoder in float32: weights as they are, or packed for oneDNN by torch.utils.mkldnn
    few_shot    logistic regression on five digits of each class, as 1,024 pixels: as it is, or in the span of the
                labelled images
    search      `ijepa search`: a query among 100,000 photos with 1,280 features, and all pairs of 10,000

The first contender of a part is what the package does (search: the two are two jobs). They take turns of one call.
Figures are medians over the turns, by wall and by processor time. `times_first` is the processor time of a contender
over that of the first, turn by turn: above 1 the package's way is faster. `wall_times_first` is the same by wall time,
which counts for `threads`. The last line of the output is one JSON object, which is added to a file too.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.utils import mkldnn


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.peers import Ours
from benchmarks.speed.pretraining_step import Steps, build_config
from benchmarks.speed.timing import add_common_arguments, matmul_precision, prepare, report, rounded, take_turns
from ijepa_transformers import IJepaModel, execution, modeling_ijepa
from ijepa_transformers.data.notices import counted
from ijepa_transformers.evaluation.probes import few_shot_accuracy
from ijepa_transformers.execution import configure, medium_is_exact
from ijepa_transformers.retrieval.similarity import SimilaritySearch


CPU = torch.device("cpu")
Contenders = dict[str, Callable[[], object]]


# Steps


def step(size: str, batch_size: int, precision: str) -> Contenders:
    config = build_config(size)
    steps, first = Steps(config, batch_size, CPU), Ours(config, CPU, precision)
    chosen = (first.attention, first.matmul_precision)
    result = {name_of(*chosen, as_chosen=True): partial(take_step, first, steps)}
    for way in other_ways(chosen, precision):
        result[name_of(*way)] = partial(take_step, variant(first, *way), steps)
    if precision == "bf16":
        half = variant(first, "eager", first.matmul_precision)
        result["eager, probabilities in bfloat16"] = partial(take_half_step, half, steps)
    return result


def name_of(attention: str, products: str, as_chosen: bool = False) -> str:
    return f"{attention}, {products}{', as chosen' if as_chosen else ''}"


def other_ways(chosen: tuple[str, str], precision: str) -> list[tuple[str, str]]:
    """Pairs of attention and float32 products that the package could have chosen."""
    products = [chosen[1]] if precision == "bf16" else ["highest", *(["medium"] if medium_is_exact() else [])]
    return [way for way in itertools.product(("eager", "sdpa"), products) if way != chosen]


def variant(first: Ours, attention: str, products: str) -> Ours:
    """With the weights and the optimizer of the first one."""
    other = Ours(first.networks.config, CPU, first.precision, weights_of=first, matmul_precision=products)
    other.networks.set_attn_implementation(attention)
    return other


def take_step(contender: Ours, steps: Steps) -> None:
    with contender.settings():
        contender.step(steps.batch(contender.number))


def take_half_step(contender: Ours, steps: Steps) -> None:
    with mock.patch.object(modeling_ijepa, "eager_attention_forward", half_attention):
        take_step(contender, steps)


def threads(size: str, batch_size: int) -> Contenders:
    config, most = build_config(size), torch.get_num_threads()
    steps, first = Steps(config, batch_size, CPU), Ours(config, CPU, "fp32")
    num_values = batch_size * config.num_patches * config.hidden_size
    numbers = sorted({1, most}, key=lambda number: number != execution.threads_of_step("cpu", num_values))
    return {counted(number, "thread"): partial(take_step_with, number, first, steps) for number in numbers}


def take_step_with(number: int, contender: Ours, steps: Steps) -> None:
    with execution.threads(number):
        take_step(contender, steps)


def half_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`eager_attention_forward`, but the softmax gives, and the backward pass keeps, bfloat16."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    with torch.autocast("cpu", enabled=False):
        probabilities = scores.softmax(dim=-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


# Encoders


def encode(size: str, precision: str) -> Contenders:
    """As `ijepa extract` does: weights in the precision of the pixels."""
    config = build_config(size)
    model = IJepaModel(config).eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with matmul_precision(torch.get_float32_matmul_precision()):
        configure(model, "cpu", precision)
        chosen = (model.config._attn_implementation, torch.get_float32_matmul_precision())
    pixel_values = torch.randn(8, config.num_channels, *config.image_height_and_width, dtype=model.dtype)
    ways = [chosen, *other_ways(chosen, precision)]
    return {name_of(*way, as_chosen=way == chosen): partial(encode_so, model, pixel_values, *way) for way in ways}


@torch.no_grad()
def encode_so(model: IJepaModel, pixel_values: torch.Tensor, attention: str, products: str) -> torch.Tensor:
    model.set_attn_implementation(attention)
    with matmul_precision(products):
        return model(pixel_values).last_hidden_state


def encoder(size: str, precision: str) -> tuple[IJepaModel, torch.Tensor]:
    config = build_config(size)
    model = IJepaModel(config).eval()
    configure(model, "cpu", precision)
    return model, torch.randn(8, config.num_channels, *config.image_height_and_width)


@torch.no_grad()
def features(model: torch.nn.Module, pixel_values: torch.Tensor, precision: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(pixel_values).last_hidden_state


def cast(size: str) -> Contenders:
    model, pixel_values = encoder(size, "bf16")
    model.set_attn_implementation("eager")  # as the target encoder of a run

    def for_each_product():
        with mock.patch.object(modeling_ijepa, "cast_once", lambda tokens: tokens):
            return features(model, pixel_values, "bf16")

    return {"once": partial(features, model, pixel_values, "bf16"), "for each product": for_each_product}


def packed(size: str) -> Contenders:
    model, pixel_values = encoder(size, "fp32")
    other = IJepaModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation(model.config._attn_implementation)
    for module in list(other.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Packed(child))
    return {
        "as they are": partial(features, model, pixel_values, "fp32"),
        "packed": partial(features, other, pixel_values, "fp32"),
    }


class Packed(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.linear = mkldnn.to_mkldnn(linear)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


# Features


def few_shot() -> Contenders:
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().unflatten(1, (1, 8, 8))
    pixels = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear").flatten(1)
    train, test = (pixels[:1297], labels[:1297]), (pixels[1297:], labels[1297:])
    train, test = ((values, torch.from_numpy(numbers)) for values, numbers in (train, test))

    def in_span():
        mean, std = train[0].mean(0), train[0].std(0)
        standard, wanted = (((each - mean) / (std + 1e-6)).numpy() for each in (train[0], test[0]))
        numbers = train[1].numpy()
        chosen = np.concatenate([np.flatnonzero(numbers == label)[:5] for label in range(10)])
        _, sizes, directions = np.linalg.svd(standard[chosen], full_matrices=False)
        directions = directions[sizes > 1e-6 * sizes[0]]
        fitted = LogisticRegression(max_iter=1000).fit(standard[chosen] @ directions.T, numbers[chosen])
        return fitted.score(wanted @ directions.T, test[1].numpy())

    return {"as it is": lambda: few_shot_accuracy(*train, *test, shots=5, num_draws=1), "in the span": in_span}


def search(num_photos: int, num_compared: int) -> Contenders:
    generator = torch.Generator().manual_seed(0)
    many = SimilaritySearch(torch.randn(num_photos, 1280, generator=generator))
    few = SimilaritySearch(torch.randn(num_compared, 1280, generator=generator))
    query = torch.randn(1, 1280, generator=generator)
    return {
        f"a query among {num_photos:,}": lambda: many.query(query, 10),
        f"all pairs of {num_compared:,}": lambda: few.compare_all(0.999),
    }


PARTS = {
    "step fp32": lambda own: step(own.size, own.batch, "fp32"),
    "step bf16": lambda own: step(own.size, own.batch, "bf16"),
    "features fp32": lambda own: encode(own.size, "fp32"),
    "features bf16": lambda own: encode(own.size, "bf16"),
    "threads": lambda own: threads(own.size, own.batch),
    "cast": lambda own: cast(own.size),
    "packed": lambda own: packed(own.size),
    "few_shot": lambda own: few_shot(),
    "search": lambda own: search(own.photos, own.photos // 10),
}


def measure(contenders: Contenders, seconds: float) -> dict:
    for function in contenders.values():
        function()
    times = take_turns(contenders, seconds)
    first = next(iter(times.values()))
    figures = {
        name: {
            "seconds": rounded((each.wall for each in values), 4),
            "cpu_seconds": rounded((each.cpu for each in values), 4),
            "times_first": rounded((each.cpu / own.cpu for each, own in zip(values, first, strict=True)), 3),
            "wall_times_first": rounded((each.wall / own.wall for each, own in zip(values, first, strict=True)), 3),
        }
        for name, values in times.items()
    }
    return {"turns": len(first), "contenders": figures}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=30, help="least time of the turns of each part")
    parser.add_argument("--size", default="S/16", help="of the model, as in pretraining_step.py")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--photos", type=int, default=100_000, help="for a query; a tenth of them for all pairs")
    add_common_arguments(parser)
    own = parser.parse_args(words)
    prepare(own)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = {}
    for part in own.parts:
        torch.manual_seed(0)
        results[part] = measure(PARTS[part](own), own.seconds)
        print(f"{part}: {results[part]}", flush=True)
    report("choices", own, {"results": results})


if __name__ == "__main__":
    main()
