"""Quantization, and what is fused with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moequant import reference
from moequant.formats import max_of, recipe_of
from moequant.ops.registration import registered, uses_kernels

__all__ = [
    "dequantize_blocks",
    "fused_rms_quantize",
    "quantize_expert_batch",
    "quantize_settings",
    "quantize_weight",
    "silu_mul",
    "silu_mul_quantize",
]


def quantize_settings(values: Tensor, recipe: str, eps: float | None) -> dict[str, Any]:
    """A format and a recipe as the plain numbers that the kernels take."""
    rule = recipe_of(recipe)
    return {
        "max_value": max_of(values.dtype, recipe),
        "eps": rule.eps if eps is None else eps,
        "power_of_two": rule.power_of_two,
        "reciprocal": rule.reciprocal,
    }


@registered(mutates=("values", "scales"))
def quantize_expert_batch(
    x: Tensor,
    num_tokens: Tensor | None,
    values: Tensor,
    scales: Tensor,
    group_size: int = 128,
    recipe: str = "default",
    eps: float | None = None,
) -> None:
    """`reference.quantize_expert_batch` into given outputs."""
    if not uses_kernels(x):
        reference.quantize_rows(x, num_tokens, values, scales, group_size, recipe, eps)
        return
    from moequant.kernels.quantization.quantize import quantize_expert_batch as kernel

    kernel(x, num_tokens, values, scales, group_size=group_size, **quantize_settings(values, recipe, eps))


@registered(mutates=("values", "scales"))
def silu_mul_quantize(
    x: Tensor,
    num_tokens: Tensor | None,
    values: Tensor,
    scales: Tensor,
    recipe: str = "default",
    eps: float | None = None,
) -> None:
    """`reference.silu_mul_quantize` into given outputs."""
    if not uses_kernels(x):
        reference.silu_mul_quantize(x, num_tokens, dtype=values.dtype, recipe=recipe, eps=eps, values=values, scales=scales)
        return
    from moequant.kernels.quantization.silu_mul_quantize import silu_mul_quantize as kernel

    kernel(x, num_tokens, values, scales, **quantize_settings(values, recipe, eps))


@registered(mutates=("values", "scales"))
def quantize_weight(
    w: Tensor, values: Tensor, scales: Tensor, recipe: str = "default", segments: int = 1, block_size: int = 128
) -> None:
    """`reference.quantize_weight` of w (E, N, K_dim) into given contiguous outputs. Blocks that no kernel is made for take plain torch on
    any device."""
    if uses_kernels(w) and block_size in (32, 64, 128):
        from moequant.kernels.quantization.quantize_weight import quantize_weight as kernel

        kernel(w, values, scales, segments=segments, block_size=block_size, **quantize_settings(values, recipe, None))
        return
    # one expert after the other: the float32 copies in between take several times a weight's memory
    for expert in range(w.shape[0]):
        q = reference.quantize_weight(w[expert], dtype=values.dtype, recipe=recipe, segments=segments, group_size=block_size)
        values[expert].copy_(q.values)
        scales[expert].copy_(q.scales)


@registered(mutates=("summed", "values", "scales"))
def fused_rms_quantize(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    summed: Tensor | None,
    values: Tensor,
    scales: Tensor,
    norm_eps: float = 1e-6,
    group_size: int = 128,
    recipe: str = "default",
) -> None:
    """`reference.rms_norm` of x (M, H), quantized into given outputs; with a residual the sum goes to summed."""
    if not uses_kernels(x):
        normed, total = reference.rms_norm(x, weight, norm_eps, residual, gate)
        reference.quantize_rows(normed.unsqueeze(0), None, values.unsqueeze(0), scales.unsqueeze(0), group_size, recipe)
        if summed is not None:
            summed.copy_(total)
        return
    from moequant.kernels.dense.fused_rms_quantize import fused_rms_quantize as kernel

    settings = quantize_settings(values, recipe, None)
    kernel(x, weight, residual, gate, summed, values, scales, norm_eps=norm_eps, group_size=group_size, **settings)


@registered(mutates=("out",))
def silu_mul(x: Tensor, num_tokens: Tensor | None, out: Tensor) -> None:
    """`reference.silu_mul` into a given output."""
    if not uses_kernels(x):
        reference.silu_mul(x, num_tokens, out=out)
        return
    from moequant.kernels.quantization.silu_mul_quantize import silu_mul as kernel

    kernel(x, num_tokens, out)


def reads(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device's kernels read a format: int8 everywhere, float8_e4m3fn and float8_e5m2 on NVIDIA GPUs from sm_89 on."""
    if dtype == torch.float8_e4m3fnuz:
        return False
    if dtype == torch.int8 or device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@registered(mutates=("out",))
def dequantize_blocks(values: Tensor, scales: Tensor, out: Tensor, group_rows: int = 1, group_size: int = 128) -> None:
    """`reference.dequantize_blocks` into a given output. values, out: (L, M, H) contiguous. Groups that no kernel is made for, and
    formats that no kernel of the device reads, take plain torch."""
    if uses_kernels(values) and group_size in (32, 64, 128, 256) and reads(values.dtype, values.device):
        from moequant.kernels.quantization.dequantize_blocks import dequantize_blocks as kernel

        kernel(values, scales, out, group_rows=group_rows, group_size=group_size)
        return
    out.copy_(reference.dequantize_blocks(values, scales, group_rows, group_size, out.dtype))
