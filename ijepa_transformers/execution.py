# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""How to compute: which attention, and how float32 matrices are multiplied, for a device and a precision.

What is chosen is as exact as what it replaces. Measured by `benchmarks/speed/pretraining_step.py` and
`benchmarks/speed/feature_extraction.py`.
"""

import torch


# Largest relative error of a float32 product that counts as float32: two sums of 512 terms in another order differ
# by about 1e-7, products of bfloat16 by 3e-3.
FLOAT32_ERROR = 3e-6
FLOAT32 = ("no", "fp32")  # as Accelerate calls it, and as our own commands do


def choose_attention(device_type: str, precision: str, training: bool = True) -> str:
    """Sdpa or eager, as Transformers calls them.

    PyTorch's fused attention is the fastest but on CPUs. There two matrix products with a softmax between them are
    faster in float32 once `set_matmul_precision` has chosen oneDNN (call that first), and in training with bfloat16
    or float16, because the backward pass of the fused attention is slow.

    Args:
        device_type: such as "cuda" or "cpu".
        precision: of matrix products: "fp32" (or "no", as Accelerate calls it), "bf16" or "fp16".
        training: whether gradients are computed.
    """
    if device_type != "cpu":
        return "sdpa"
    if precision in FLOAT32:
        return "sdpa" if torch.get_float32_matmul_precision() == "highest" else "eager"
    return "eager" if training else "sdpa"


def set_matmul_precision(device_type: str, precision: str) -> str:
    """Sets how PyTorch multiplies float32 matrices, for the whole process; returns the setting's name.

    On CPUs "medium" hands the products to oneDNN, which is faster than the default on many of them, and on CPUs with
    AMX rounds to bfloat16 on the way. So it is taken only where a product is as exact as before. On GPUs nothing
    changes: TensorFloat-32 is the user's choice (`torch.set_float32_matmul_precision("high")` before).

    Args:
        device_type, precision: as in `choose_attention`.
    """
    before = torch.get_float32_matmul_precision()
    if device_type != "cpu" or precision not in FLOAT32 or not torch.backends.mkldnn.is_available():
        return before
    torch.set_float32_matmul_precision("medium")
    if _matmul_error() > FLOAT32_ERROR:
        torch.set_float32_matmul_precision(before)
    return torch.get_float32_matmul_precision()


def configure(model: torch.nn.Module, device_type: str, precision: str, training: bool = False) -> str:
    """Chooses both for a loaded model of Transformers, whichever it is; returns them in words.

    Only "sdpa" gives way, which is what Transformers itself chooses: a model that was loaded with another attention
    keeps it. Arguments are those of `choose_attention`.
    """
    set_matmul_precision(device_type, precision)
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(choose_attention(device_type, precision, training))
    return describe(model)


def describe(model: torch.nn.Module) -> str:
    """How this model computes in this process, in words for people."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return f"{attention or 'its own'} attention, float32 products {torch.get_float32_matmul_precision()}"


def _matmul_error() -> float:
    """Largest error of a product of random matrices, relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return ((left @ right - exact).abs().max() / exact.abs().max()).item()
