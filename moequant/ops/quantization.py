"""Quantization, and what is fused with it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant import reference
from moequant.activations import parsed
from moequant.formats import max_of, recipe_of
from moequant.ops.registration import registered, uses_kernels

if TYPE_CHECKING:
    from moequant.kernels.library.activations import Activation
    from moequant.kernels.library.arguments import QuantSpec

__all__ = [
    "add_bias",
    "dequantize_blocks",
    "fused_rms_quantize",
    "plain_rows",
    "quant_spec",
    "quantize_columnwise",
    "quantize_expert_batch",
    "quantize_weight",
    "silu_mul",
    "silu_mul_backward",
    "silu_mul_quantize",
]


@functools.lru_cache(256)
def quant_spec(dtype: torch.dtype, recipe: str, eps: float | None = None) -> QuantSpec:
    """A format and a recipe as the plain numbers that the kernels take. eps: instead of the recipe's."""
    from moequant.kernels.library.arguments import quant_spec as spec

    rule = recipe_of(recipe)
    return spec(max_of(dtype, recipe), rule.eps if eps is None else eps, rule.power_of_two, rule.reciprocal)


@functools.lru_cache(256)
def activation_spec(text: str) -> Activation:
    """An activation, by its text, as the kernels take it."""
    from moequant.kernels.library.activations import Activation as Spec

    kind = parsed(text)
    return Spec(*(getattr(kind, name) for name in Spec._fields))


@registered(mutates=("values", "scales"))
def quantize_expert_batch(
    x: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    group_size: int = 128,
    recipe: str = "default",
    eps: float | None = None,
) -> None:
    """`reference.quantize_expert_batch` into given outputs."""
    if not uses_kernels(x):
        reference.quantize_rows(x, num_tokens, expert_start, values, scales, group_size, recipe, eps)
        return
    from moequant.kernels.quantization.quantize import quantize_expert_batch as kernel

    kernel(x, num_tokens, expert_start, values, scales, quant_spec(values.dtype, recipe, eps), group_size=group_size)


@registered(mutates=("values", "scales"))
def silu_mul_quantize(
    x: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    recipe: str = "default",
    activation: str = "silu",
    bias: Tensor | None = None,
) -> None:
    """`reference.silu_mul_quantize` into given outputs. activation: `Activation.text`."""
    if not uses_kernels(x):
        valid, rows = reference.rows_activated(x, num_tokens, expert_start, parsed(activation), bias)
        reference.write_rows(reference.quantize_groups(rows, 128, values.dtype, recipe, None), valid, values, scales)
        return
    from moequant.kernels.quantization.silu_mul_quantize import silu_mul_quantize as kernel

    spec = quant_spec(values.dtype, recipe)
    kernel(x, num_tokens, expert_start, values, scales, spec, activation_spec(activation), bias)


@registered(mutates=("values", "scales", "across_values", "across_scales"))
def quantize_weight(
    w: Tensor,
    values: Tensor,
    scales: Tensor,
    recipe: str = "default",
    segments: int = 1,
    block_size: int = 128,
    across_values: Tensor | None = None,
    across_scales: Tensor | None = None,
) -> None:
    """`reference.quantize_weight` of w (E, N, K_dim) into given contiguous outputs, and of its transpose, in one segment, into
    across_values (E, K_dim, N) and across_scales, or None. Blocks that no kernel is made for take plain torch on any device."""
    if uses_kernels(w) and block_size in (32, 64, 128):
        from moequant.kernels.library import common
        from moequant.kernels.quantization.quantize_weight import quantize_weight as kernel

        spec = quant_spec(values.dtype, recipe)
        if common.runs_gluon(w.device):
            from moequant.kernels.quantization import quantize_weight_hopper as hopper

            if hopper.supports_quantize_weight(w, values, segments, block_size, across_values):
                across = None if across_values is None or across_scales is None else (across_values, across_scales)
                hopper.quantize_weight_hopper(w, values, scales, spec, across=across)
                return
        kernel(w, values, scales, spec, segments=segments, block_size=block_size)
    else:
        # one expert after the other: the float32 copies in between take several times a weight's memory
        for expert in range(w.shape[0]):
            q = reference.quantize_weight(w[expert], dtype=values.dtype, recipe=recipe, segments=segments, group_size=block_size)
            values[expert].copy_(q.values)
            scales[expert].copy_(q.scales)
    if across_values is not None and across_scales is not None:
        quantize_weight(w.mT, across_values, across_scales, recipe, 1, block_size)


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
        reference.quantize_rows(normed.unsqueeze(0), None, None, values.unsqueeze(0), scales.unsqueeze(0), group_size, recipe)
        if summed is not None:
            summed.copy_(total)
        return
    from moequant.kernels.dense.fused_rms_quantize import fused_rms_quantize as kernel

    spec = quant_spec(values.dtype, recipe)
    kernel(x, weight, residual, gate, (summed, values, scales), spec, norm_eps=norm_eps, group_size=group_size)


@registered(mutates=("out",))
def silu_mul(
    x: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    out: Tensor,
    activation: str = "silu",
    bias: Tensor | None = None,
) -> None:
    """`reference.silu_mul` into a given output. activation: `Activation.text`."""
    if not uses_kernels(x):
        reference.silu_mul(x, num_tokens, expert_start, activation=parsed(activation), bias=bias, out=out)
        return
    from moequant.kernels.quantization.silu_mul_quantize import silu_mul as kernel

    kernel(x, num_tokens, expert_start, out, activation_spec(activation), bias)


@registered(mutates=("x",))
def add_bias(x: Tensor, num_tokens: Tensor | None, expert_start: Tensor | None, bias: Tensor) -> None:
    """`reference.add_bias`. bias: contiguous."""
    if not uses_kernels(x):
        reference.add_bias(x, num_tokens, expert_start, bias)
        return
    from moequant.kernels.quantization.silu_mul_quantize import add_bias as kernel

    kernel(x, num_tokens, expert_start, bias)


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


@registered(mutates=("out",))
def plain_rows(
    out: Tensor, num_tokens: Tensor, expert_start: Tensor | None, values: Tensor | None = None, scales: Tensor | None = None
) -> None:
    """`reference.plain_rows`, of contiguous values and out. Formats that no kernel of the device reads take plain torch."""
    if not uses_kernels(out) or (values is not None and not reads(values.dtype, values.device)):
        reference.plain_rows(out, num_tokens, expert_start, values, scales)
        return
    from moequant.kernels.library.arguments import Valid
    from moequant.kernels.quantization.plain_rows import plain_rows as kernel

    kernel(out, Valid(num_tokens, expert_start), values, scales)


@registered(mutates=("values", "scales", "block_ends"))
def quantize_columnwise(
    x: Tensor,
    x_scales: Tensor | None,
    num_tokens: Tensor,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    block_ends: Tensor,
    recipe: str = "ue8m0",
    blocks: bool = False,
) -> None:
    """`reference.quantize_columnwise`, of contiguous x, and of outputs that `moequant.columnwise.empty_columnwise` makes. Formats that no
    kernel of the device reads take plain torch, and so do AMD's GPUs. Raises ValueError for a recipe without powers of two."""
    reference.check_powers_of_two(recipe)
    narrow = (values.dtype,) if x_scales is None else (values.dtype, x.dtype)
    if not uses_kernels(x) or torch.version.hip is not None or not all(reads(dtype, x.device) for dtype in narrow):
        reference.quantize_columnwise(x, x_scales, num_tokens, expert_start, values, scales, block_ends, recipe, blocks)
        return
    from moequant.kernels.library import common
    from moequant.kernels.library.arguments import Valid
    from moequant.kernels.quantization.quantize_columnwise import quantize_columnwise as kernel

    if common.runs_gluon(x.device):
        from moequant.kernels.quantization import quantize_columnwise_hopper as hopper

        if hopper.supports_columnwise(x, x_scales, num_tokens, values):
            kernel = hopper.quantize_columnwise_hopper
    spec = quant_spec(values.dtype, recipe)
    kernel(x, x_scales, Valid(num_tokens, expert_start), values, scales, block_ends, spec, blocks=blocks)


def silu_mul_backward(
    given: tuple[Tensor, Tensor, Tensor | None],
    placed: tuple[Tensor, Tensor | None, Tensor],
    entries: tuple[Tensor, Tensor | None, Tensor | None],
    gradient: Tensor | None = None,
    inner: Tensor | None = None,
    narrow: tuple[Tensor, Tensor] | None = None,
    recipe: str = "default",
    activation: str = "silu",
) -> None:
    """`reference.silu_mul_backward`, with contiguous tensors but the scales. activation: `Activation.text` of one that isn't
    interleaved. narrow: of I a multiple of 128, if it is gated.

    Not registered: no compiler sees a backward.
    """
    x = given[1]
    if not uses_kernels(x):
        reference.silu_mul_backward(given, placed, entries, gradient, inner, narrow, recipe, parsed(activation))
        return
    from moequant.kernels.quantization import silu_mul_backward as kernel

    weights, of_weights, more = entries
    values, scales = (None, None) if narrow is None else narrow
    with torch.cuda.device_of(x):
        kernel.silu_mul_backward(
            kernel.Given(*given),
            kernel.Placed(*placed),
            kernel.Entries(weights, of_weights, weights.shape[1], more),
            kernel.Made(gradient, inner, values),
            scales,
            None if values is None else quant_spec(values.dtype, recipe),
            activation_spec(activation),
        )
