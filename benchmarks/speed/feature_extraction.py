# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Images per second of the encoder, ours against stock Transformers, with the same weights.

    python benchmarks/speed/feature_extraction.py [--device cuda] [--cases S/16:224:8 B/16:224:32]
        [--precisions fp32 bf16] [--allocator keep] [--output FILE]

`ours` is `IJepaModel` with the settings that the package chooses, as in run_feature_extraction.py; `stock` is
`transformers.IJepaModel`. Where the package sets another precision of float32 products than torch's own, ours without
the package's settings (sdpa, "highest") takes part too, and stock eager with our products. `compiled` means what
`ijepa extract --torch_compile true` does, for both: torch.compile, on CPUs with packed weights. It takes long to warm
up, so on CPUs it takes part only in the cases of `--compiled`. Contenders take turns of one batch each. Figures are
medians over the turns, by wall and by processor time (`cpu`).
Pixels lie on the device as float32, and every contender turns them into its own precision. Before anything is timed,
all outputs are held against those of stock eager in float32; a larger error than TOLERANCES ends the run.
`page_faults` are those of one more batch. On CUDA the way of the pixels from the host is timed apart. The last line of
the output is one JSON object, which is added to a file too.
"""

import argparse
import copy
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.ijepa import configuration_ijepa as stock_configuration
from transformers.models.ijepa import modeling_ijepa as stock


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.flops import embedding_flops, encoder_flops
from benchmarks.speed.timing import (
    Seconds,
    add_common_arguments,
    matmul_precision,
    prepare,
    quartiles,
    report,
    rounded,
    seconds_of,
    take_turns,
)
from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaModel
from ijepa_transformers.execution import compile_for_inference, configure, prepare_for_inference


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Largest error of the last hidden state, relative to stock eager in float32 (Frobenius norms). Rounding of bfloat16
# weights and activations through all layers is between .01 and .03 for every contender, stock eager included.
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}

SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant"}

CPU_CASES = ["S/16:224:1", "S/16:224:8", "S/16:224:32", "B/16:224:1", "B/16:224:8", "B/16:224:16", "S/16:448:4"]
CPU_COMPILED = ["S/16:224:8"]
CUDA_CASES = ["H/14:224:1", "H/14:224:16", "H/14:224:64", "H/14:224:256", "H/16:448:32", "B/16:224:256"]


class Case(NamedTuple):
    """Written as SIZE/PATCH:PIXELS:BATCH, for example S/16:224:8."""

    size: str
    patch_size: int
    image_size: int
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        try:
            name, image_size, batch_size = text.split(":")
            size, patch_size = name.split("/")
            return cls(SIZES[size], int(patch_size), int(image_size), int(batch_size))
        except (KeyError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not like S/16:224:8, with a size of {[*SIZES]}") from error

    @property
    def config(self) -> IJepaConfig:
        return IJepaConfig(**IJEPA_SIZES[self.size], patch_size=self.patch_size, image_size=self.image_size)

    def __str__(self) -> str:
        letter = next(letter for letter, size in SIZES.items() if size == self.size)
        return f"{letter}/{self.patch_size}:{self.image_size}:{self.batch_size}"


class Contender(NamedTuple):
    """A model, and what has to be set while it works."""

    model: nn.Module
    matmul_precision: str
    attention_backends: tuple[SDPBackend, ...] = ()  # PyTorch's own choice by default

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width) -> (B, N, D)."""
        with matmul_precision(self.matmul_precision):
            pixel_values = pixel_values.to(self.model.dtype)
            if not self.attention_backends:
                return self.model(pixel_values).last_hidden_state
            with sdpa_kernel([*self.attention_backends]):
                return self.model(pixel_values).last_hidden_state


def ours(
    source: IJepaModel,
    precision: str,
    device_type: str,
    configured: bool = True,
    pixel_values: torch.Tensor | None = None,
) -> Contender:
    """Compiled for `pixel_values`, if they are given."""
    config = copy.deepcopy(source.config)  # where the model keeps which attention it uses
    with torch.device("meta"):
        model = IJepaModel._from_config(config, attn_implementation="sdpa", dtype=DTYPES[precision])
    model = with_weights(model, source)
    with matmul_precision(torch.get_float32_matmul_precision()):
        if configured:
            configure(model, device_type, precision)
        if pixel_values is not None:
            prepare_for_inference(model, pixel_values.to(model.dtype), precision)
        return Contender(model, torch.get_float32_matmul_precision())


def theirs(source: IJepaModel, precision: str, attention: str, pixel_values: torch.Tensor | None = None) -> Contender:
    config = stock_config(source.config, attention)
    with torch.device("meta"):
        model = stock.IJepaModel(config, add_pooling_layer=False).to(DTYPES[precision])
    model = with_weights(model, source)
    if pixel_values is not None:
        compile_for_inference(model, pixel_values.to(model.dtype))
    return Contender(model, torch.get_float32_matmul_precision())


def stock_config(config: IJepaConfig, attention: str) -> stock_configuration.IJepaConfig:
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    fields += ("layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias")
    values = {field: getattr(config, field) for field in fields}
    return stock_configuration.IJepaConfig(**values, attn_implementation=attention)


def with_weights(model: nn.Module, source: IJepaModel) -> nn.Module:
    """Gives a model without memory the weights of `source`, in evaluation mode. Both classes have the same names."""
    dtype = next(model.parameters()).dtype
    weights = {name: value.detach().to(dtype) for name, value in source.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def contenders(
    source: IJepaModel, precision: str, device_type: str, to_compile_for: torch.Tensor | None = None
) -> dict[str, Contender]:
    result = {
        "ours": ours(source, precision, device_type),
        "stock sdpa": theirs(source, precision, "sdpa"),
        "stock eager": theirs(source, precision, "eager"),
    }
    if result["ours"].matmul_precision != torch.get_float32_matmul_precision():
        result["ours, not configured"] = ours(source, precision, device_type, configured=False)
        products = result["ours"].matmul_precision
        result["stock eager, our products"] = result["stock eager"]._replace(matmul_precision=products)
    if to_compile_for is not None:
        result["ours compiled"] = ours(source, precision, device_type, pixel_values=to_compile_for)
        result["stock sdpa compiled"] = theirs(source, precision, "sdpa", to_compile_for)
    if device_type == "cuda" and precision == "bf16":
        cudnn = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
        result["ours, cuDNN's attention"] = result["ours"]._replace(attention_backends=cudnn)
    return result


def error_of(features: torch.Tensor, expected: torch.Tensor) -> float:
    return ((features.double() - expected).norm() / expected.norm()).item()


def check(models: dict[str, Contender], expected: torch.Tensor, pixel_values, precision: str) -> dict[str, dict]:
    """Errors and seconds of each contender's first batch.

    Raises:
        ValueError: if an error is larger than rounding can be.
    """
    first = {}
    for name, contender in models.items():
        start = time.perf_counter()
        error = error_of(contender.features(pixel_values)[: len(expected)], expected)
        first[name] = {"error": error, "first_batch_seconds": round(time.perf_counter() - start, 2)}
        if not error <= TOLERANCES[precision]:
            raise ValueError(f"{name} is off by {error:.1e} in {precision}, more than {TOLERANCES[precision]}")
    return first


def measure(case: Case, precision: str, device_type: str, with_compiled: bool, seconds: float) -> dict:
    torch.manual_seed(0)
    torch.compiler.reset()
    with torch.device(device_type):
        source = IJepaModel(case.config).eval()
        pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size)
    expected = theirs(source, "fp32", "eager").features(pixel_values[:2]).double()
    models = contenders(source, precision, device_type, pixel_values if with_compiled else None)
    first = check(models, expected, pixel_values, precision)
    work = {name: partial(contender.features, pixel_values) for name, contender in models.items()}
    times = take_turns(work, seconds, device_type=device_type)
    faults = {name: page_faults(work[name]) for name in models}
    flops = encoder_flops(case.config, case.config.num_patches) + embedding_flops(case.config)
    results = {name: figures(times[name], times["stock sdpa"], case.batch_size, flops) for name in models}
    return {
        "case": str(case),
        "precision": precision,
        "turns": len(times["ours"]),
        "attention": models["ours"].model.config._attn_implementation,
        "matmul_precision": models["ours"].matmul_precision,
        "contenders": {name: {**results[name], **first[name], "page_faults": faults[name]} for name in models},
    }


def page_faults(function: Callable[[], object]) -> int:
    """Of a call: how often the system gave this process a page of memory. An allocator that gives freed memory back
    has many."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def figures(times: list[Seconds], baseline: list[Seconds], batch_size: int, flops: int) -> dict:
    """Seconds of batches -> images per second, TFLOP/s, and how many times as fast as the baseline, turn by turn."""
    pairs = list(zip(times, baseline, strict=True))
    speed = quartiles([batch_size / own.wall for own in times])
    return {
        "images_per_second": rounded((batch_size / own.wall for own in times), 2),
        "images_per_cpu_second": rounded((batch_size / own.cpu for own in times), 2),
        "tflops_per_second": round(speed["median"] * flops / 1e12, 3),
        "times_stock_sdpa": rounded((theirs.wall / own.wall for own, theirs in pairs), 3),
        "times_stock_sdpa_by_cpu": rounded((theirs.cpu / own.cpu for own, theirs in pairs), 3),
    }


# From the host to the device, on CUDA


def transfers(image_size: int, batch_size: int) -> dict[str, Callable[[], object]]:
    """Ways of a batch of pixels from the host: float32 as run_feature_extraction.py sends it, and bytes that are
    normalised on the device."""
    floats = torch.randn(batch_size, 3, image_size, image_size)
    pinned = floats.pin_memory()
    pixels = torch.randint(256, floats.shape, dtype=torch.uint8).pin_memory()
    scale, shift = (torch.randn(1, 3, 1, 1, device="cuda") for _ in range(2))

    def from_bytes():
        return torch.addcmul(shift, pixels.to("cuda", non_blocking=True), scale).bfloat16()

    return {
        "float32": lambda: floats.to("cuda").bfloat16(),
        "float32, pinned": lambda: pinned.to("cuda", non_blocking=True).bfloat16(),
        "uint8, pinned": from_bytes,
    }


def measure_transfers(image_size: int, batch_size: int) -> dict:
    ways = transfers(image_size, batch_size)
    for way in ways.values():
        seconds_of(way, "cuda")
    times = take_turns(ways, seconds=1, device_type="cuda")
    speeds = {
        name: round(batch_size / quartiles([each.wall for each in values])["median"]) for name, values in times.items()
    }
    return {"image_size": image_size, "batch": batch_size, "images_per_second": speeds}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", type=Case.parse, help="SIZE/PATCH:PIXELS:BATCH, such as S/16:224:8")
    parser.add_argument("--compiled", nargs="*", type=Case.parse, help="the cases in which compiled models take part")
    parser.add_argument("--precisions", nargs="+", choices=[*DTYPES], help="fp32, bf16; on CUDA bf16 by default")
    parser.add_argument("--seconds", type=float, default=6, help="least time of the turns of each case and precision")
    add_common_arguments(parser)
    arguments = parser.parse_args(words)
    on_cuda = arguments.device == "cuda"
    if arguments.cases is None:
        arguments.cases = [Case.parse(text) for text in (CUDA_CASES if on_cuda else CPU_CASES)]
    if arguments.compiled is None:
        arguments.compiled = arguments.cases if on_cuda else [Case.parse(text) for text in CPU_COMPILED]
    arguments.precisions = arguments.precisions or (["bf16"] if on_cuda else ["fp32", "bf16"])
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    prepare(arguments)
    results = []
    for case in arguments.cases:
        for precision in arguments.precisions:
            print(f"{case} in {precision} ...", flush=True)
            with_compiled = case in arguments.compiled
            results.append(measure(case, precision, arguments.device, with_compiled, arguments.seconds))
            for name, values in results[-1]["contenders"].items():
                print(f"  {name}: {values}", flush=True)
    result = {"results": results}
    if arguments.device == "cuda":
        result["from_host"] = [measure_transfers(224, 64), measure_transfers(224, 256)]
    report("feature_extraction", arguments, result, arguments.device)


if __name__ == "__main__":
    main()
