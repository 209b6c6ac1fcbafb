# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Chooses the attention and the float32 matrix multiplication for a device and a precision, and the threads of a step.

A choice is as exact as the default that it replaces. `benchmarks/speed/pretraining_step.py`,
`benchmarks/speed/feature_extraction.py` and `benchmarks/speed/choices.py` measure the speed.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .arguments import require
from .data.notices import counted
from .process import keeps_freed_memory


# Largest relative error of a matrix product that counts as float32. Sums of 512 terms in another order differ by about
# 1e-7, products of bfloat16 by 3e-3.
_FLOAT32_ERROR = 3e-6
# A training step is faster with one thread if a tensor of the encoder's activations has at most so many values: the
# threads would wait for each other longer than they compute.
_FEW_VALUES = 2**18
FLOAT32 = ("no", "fp32")  # the names of float32 in Accelerate, and in our own commands


def choose_attention(device_type: str, precision: str, training: bool = True) -> str:
    """The fastest attention, "sdpa" or "eager" as Transformers calls them.

    PyTorch's fused attention ("sdpa") is the fastest on all devices but CPUs. On CPUs two matrix products with a
    softmax between them ("eager") are as fast or faster, but in two cases: in float32 with PyTorch's own products
    (call `set_matmul_precision` first), and in bfloat16 or float16 without gradients, if the processor has AMX (see
    `medium_is_exact`) or freed memory is not kept: then eager attention asks the system for memory again and again.

    Args:
        device_type: such as "cuda" or "cpu".
        precision: of matrix products: "fp32" (Accelerate calls it "no"), "bf16" or "fp16".
        training: whether gradients are computed.
    """
    if device_type != "cpu":
        return "sdpa"
    if precision in FLOAT32:
        return "sdpa" if torch.get_float32_matmul_precision() == "highest" else "eager"
    return "eager" if training or (keeps_freed_memory() and medium_is_exact()) else "sdpa"


def set_matmul_precision(device_type: str, precision: str) -> str:
    """Sets how PyTorch multiplies float32 matrices in this process; returns the name of the setting.

    On CPUs "medium" uses oneDNN, which is often faster than the default. On CPUs with AMX it also rounds to bfloat16.
    So "medium" stays set only if a product is as exact as before. On GPUs nothing changes: TensorFloat-32 is the
    user's choice (call `torch.set_float32_matmul_precision("high")` before).

    Args:
        device_type, precision: as in `choose_attention`.
    """
    if device_type == "cpu" and precision in FLOAT32 and medium_is_exact():
        torch.set_float32_matmul_precision("medium")
    return torch.get_float32_matmul_precision()


def medium_is_exact() -> bool:
    """Whether "medium" products have the error of float32 here; processors with AMX round them to bfloat16."""
    if not torch.backends.mkldnn.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return _matmul_error() <= _FLOAT32_ERROR
    finally:
        torch.set_float32_matmul_precision(before)


def threads_of_step(device_type: str, num_values: int) -> int:
    """How many threads of this process should compute a training step: one if it is small and computed by the CPU,
    otherwise as many as PyTorch uses. What the user set in OMP_NUM_THREADS stays.

    Args:
        device_type: such as "cuda" or "cpu".
        num_values: images x patches x width of a forward pass of the encoder.
    """
    if device_type == "cpu" and num_values <= _FEW_VALUES and "OMP_NUM_THREADS" not in os.environ:
        return 1
    return torch.get_num_threads()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, this process computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def products_on_gpu(device_type: str, precision: str) -> str:
    """How a GPU multiplies float32 matrices and how to change that, in a sentence; empty where nothing is to say."""
    if device_type != "cuda" or precision not in FLOAT32:
        return ""
    if torch.get_float32_matmul_precision() == "highest":
        return (
            "float32 matrix products are exact; the environment variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 rounds"
            " them to TensorFloat-32, which is faster, and --mixed_precision bf16 is faster still"
        )
    return (
        "float32 matrix products are rounded to TensorFloat-32 (10 bits of 23). To make them exact and slower, take"
        " away TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or torch.set_float32_matmul_precision"
    )


def choice_on_cpu(precision: str, attention: str = "") -> str:
    """What was chosen for a CPU, in a few words for people to read; empty where nothing was.

    Args:
        precision: as in `choose_attention`.
        attention: the chosen one; empty if the user chose it.
    """
    products = {"highest": "PyTorch's own float32 products", "medium": "exact float32 products by oneDNN"}
    chosen = [f"{attention} attention"] if attention else []
    if precision in FLOAT32:
        chosen += filter(None, [products.get(torch.get_float32_matmul_precision())])
    return " and ".join(chosen)


def configure(model: torch.nn.Module, device_type: str, precision: str, training: bool = False) -> str:
    """Sets attention and matrix multiplication for a loaded model of Transformers; returns a description of both.

    Only "sdpa" is replaced, the default of Transformers. A model that was loaded with another attention keeps it.
    The arguments are those of `choose_attention`.
    """
    set_matmul_precision(device_type, precision)
    if isinstance(model, PreTrainedModel) and _attention(model) == "sdpa":
        model.set_attn_implementation(choose_attention(device_type, precision, training))
    return describe(model)


def prepare_for_inference(model: torch.nn.Module, pixel_values: torch.Tensor, precision: str) -> None:
    """Configures a model and compiles it in place for many batches like this one, which takes some ten seconds.

    On CPUs the weights are packed once for oneDNN, and a product adds its bias and computes GELU too. So the weights
    must not change afterwards. Call the model under `torch.no_grad()`, or it is compiled again.

    Args:
        model: on its device, in evaluation mode.
        pixel_values: (B, channels, height, width), on the device and in the precision of the model. Batches of other
            shapes work too, but the model is compiled again for them, without packing.
        precision: as in `choose_attention`.

    Raises:
        ValueError: if there is no compiler for the CPU, or if PyTorch cannot write its files.
    """
    require_compiler(pixel_values.device.type)
    configure(model, pixel_values.device.type, precision)
    try:
        compile_for_inference(model, pixel_values)
    except RuntimeError as error:
        cause = getattr(error, "inner_exception", None)  # of Inductor's error
        if not isinstance(cause, OSError):
            raise
        raise ValueError(
            f"torch.compile cannot write its files ({cause}). The environment variable TORCHINDUCTOR_CACHE_DIR names a"
            " directory for them."
        ) from error


@torch.no_grad()
def compile_for_inference(model: torch.nn.Module, pixel_values: torch.Tensor) -> None:
    """`prepare_for_inference` of a model that has its settings."""
    from torch._inductor import config as inductor  # takes a second

    model.compile()
    # Inductor calls it freezing. Dynamo reads this setting too, so it cannot be an option of this one model.
    with inductor.patch(freezing=pixel_values.device.type == "cpu"):
        model(pixel_values)


def require_compiler(device_type: str) -> None:
    """Raises ValueError if torch.compile cannot work for this device."""
    # PyTorch chooses so too, and asks for the version before it compiles.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    require(
        device_type != "cpu" or _tells_its_version(compiler),
        f"torch.compile needs a C++ compiler on CPUs, and {compiler!r} does not work as one. Install it, or set the"
        " environment variable CXX to another one.",
    )


def _tells_its_version(compiler: str) -> bool:
    """Whether this compiler can be called. It may have words in front or behind, such as "ccache g++"."""
    try:
        return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True).returncode == 0
    except (OSError, ValueError):
        return False


def describe(model: torch.nn.Module) -> str:
    """Attention and float32 products of a model in this process, for people to read."""
    return f"{_attention(model) or 'its own'} attention, float32 products {torch.get_float32_matmul_precision()}"


def computation_of(device_type: str, num_processes: int, precision: str, mode: str = "") -> str:
    """Where and how a command computes, for people to read. What is usual is left out: one process, and float32.

    Args:
        device_type, precision: as in `choose_attention`.
        num_processes: of all machines.
        mode: how the processes share the work.
    """
    parts = [*filter(None, [mode]), counted(num_processes, "process")] if num_processes > 1 else []
    return ", ".join([device_type, *parts, *([] if precision in FLOAT32 else [precision])])


def _attention(model: torch.nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _matmul_error() -> float:
    """Largest error of a product of random matrices, relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return ((left @ right - exact).abs().max() / exact.abs().max()).item()
