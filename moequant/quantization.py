"""Quantization and SwiGLU + quantization of expert batches, weights, and back.

Letters: L local experts, M rows of an expert's buffer, R rows of all experts together, H hidden size, I intermediate size, G groups
of 128 columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moequant import ops
from moequant.activations import Activation, activation_of
from moequant.batch import QuantizedTensor, ScaleLayout, ceil_div, empty_scales_of, scale_layout
from moequant.checks import (
    check_choice,
    check_contiguous,
    check_counts,
    check_eps,
    check_int,
    check_no_grad,
    check_output,
    check_tensor,
)
from moequant.dense.int8 import act_dequant, act_quant, int8_gelu, weight_dequant, weight_quant
from moequant.dense.per_tensor import (
    FP8Format,
    NumericalOverflowError,
    dequantize_fp8,
    quantize_fp8,
    quantize_fp8_with_overflow_handling,
)
from moequant.formats import FLOAT_DTYPES, format_of, recipe_of
from moequant.group_quant import (
    GROUP_SIZES,
    dequantize,
    fused_flatten_fp8_group_quant,
    fused_rms_fp8_group_quant,
    per_block_quant_fp8,
    per_token_group_quant_fp8,
    quantize_blocks,
)
from moequant.repeats import Repeats

__all__ = [
    "FP8Format",
    "NumericalOverflowError",
    "QuantizedTensor",
    "act_dequant",
    "act_quant",
    "dequantize",
    "dequantize_fp8",
    "fused_flatten_fp8_group_quant",
    "fused_rms_fp8_group_quant",
    "int8_gelu",
    "per_block_quant_fp8",
    "per_token_group_quant_fp8",
    "quantize_expert_batch",
    "quantize_fp8",
    "quantize_fp8_with_overflow_handling",
    "quantize_weight",
    "silu_mul",
    "silu_mul_quantize",
    "weight_dequant",
    "weight_quant",
]

# of `quantize_expert_batch` and `silu_mul_quantize`, whose tensors are all given, so that nothing is kept alive
REPEATS = Repeats()
SETTING_TYPES = {(torch.dtype, str, int, last) for last in (type(None), float, str, Activation)}


def quantize_expert_batch(
    x: Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
    eps: float | None = None,
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> QuantizedTensor:
    """Quantizes the valid rows of an expert batch in groups of group_size columns, one float32 scale for each group.

    The scale is amax / max, and values are x / scale rounded to nearest even. A group with an Inf or NaN gets a NaN scale and
    values 0.

    Args:
        x: (L, M, H) bfloat16, float16 or float32, any strides. With expert_start (R, H), and so are the results.
        num_tokens: (L,) int32, or None for all M: rows from num_tokens[l] on are neither read nor written.
        expert_start: (L,) int32, where the rows of all experts lie in one buffer, layout "ragged": expert l's are those from
            expert_start[l] on, num_tokens[l] of them, but none past R. Rows of no expert are neither read nor written. None: each
            expert has M.
        group_size: 32, 64, 128 or 256. A trailing partial group is a group of its own.
        dtype: float8_e4m3fn (max 448), float8_e4m3fnuz (240), float8_e5m2 (57344) or int8 (127).
        recipe: "default", "deepgemm", "ue8m0" or "fnuz_224": see `moequant.formats.RECIPES`.
        eps: floor of a group's absolute maximum; None for the recipe's own. At least 1e-20.
        values: (L, M, H) of dtype, any strides by which no two elements share memory, or None to allocate.
        scales: (L, M, G) float32, contiguous or with element strides (any, 1, any), or None to allocate strides (M*G, 1, M), of ragged
            rows (1, R).

    Returns:
        Values (L, M, H) and scales (L, M, G), or (R, H) and (R, G), of layout "transposed" unless contiguous scales were given
        ("row").

    Raises:
        ValueError: a wrong shape, dtype, device, recipe or eps.
        RuntimeError: x requires grad under grad mode.
    """

    def quantize(values: Tensor | None, scales: Tensor | None) -> QuantizedTensor:
        check_quantize_arguments(x, num_tokens, expert_start, recipe, eps)
        check_choice("group_size", group_size, GROUP_SIZES)
        check_no_grad(values=values, scales=scales)
        out = _outputs(x.shape, x.device, dtype, group_size, recipe, values, scales)
        ops.quantize_expert_batch(x, num_tokens, expert_start, out.values, out.scales, group_size, recipe, eps)
        return out

    return _repeated(quantize, (x, num_tokens, expert_start, values, scales), (dtype, recipe, group_size, eps))


def silu_mul_quantize(
    x: Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    activation: str | Activation = "silu",
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> QuantizedTensor:
    """SwiGLU of the valid rows, quantized in groups of 128 columns: silu(gate) * up with gate = x[..., :I], up = x[..., I:]; or another
    activation, as `Activation` says.

    The product is computed in float32 and not rounded before quantization. What is not said here is as for `quantize_expert_batch`.

    Args:
        x: (L, M, 2I) bfloat16, float16 or float32, any strides. With expert_start (R, 2I), and so are the results. Not gated: I for 2I.
        num_tokens: (L,) int32, or None for all M.
        expert_start: (L,) int32, each expert's first row, or None.
        activation: an `Activation`, or the name of its function.
        bias: (L, 2I) bfloat16, float16 or float32 contiguous, not gated (L, I): added to each expert's rows in float32 before the
            activation; or None.
        dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8.
        recipe: see `moequant.formats.RECIPES`.
        values: (L, M, I) of dtype, or None to allocate.
        scales: (L, M, ceil(I / 128)) float32, or None to allocate.

    Returns:
        Values (L, M, I) and scales (L, M, ceil(I / 128)), or (R, I) and (R, ceil(I / 128)), of layout "transposed" unless contiguous
        scales were given ("row").

    Raises:
        ValueError: a wrong shape, dtype, device, activation or recipe.
        RuntimeError: x or bias requires grad under grad mode.
    """

    def quantize(values: Tensor | None, scales: Tensor | None) -> QuantizedTensor:
        check_quantize_arguments(x, num_tokens, expert_start, recipe, None)
        check_no_grad(values=values, scales=scales)
        text, shape = _activation(x, expert_start, activation, bias)
        out = _outputs(shape, x.device, dtype, 128, recipe, values, scales)
        ops.silu_mul_quantize(x, num_tokens, expert_start, out.values, out.scales, recipe, text, bias)
        return out

    return _repeated(quantize, (x, num_tokens, expert_start, bias, values, scales), (dtype, recipe, 128, activation))


def silu_mul(
    x: Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    activation: str | Activation = "silu",
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SwiGLU of the valid rows without quantization: silu(gate) * up in float32, rounded once; or another activation.

    Args:
        x: (L, M, 2I) bfloat16, float16 or float32, any strides, gate first. With expert_start (R, 2I). Not gated: I for 2I.
        num_tokens: (L,) int32, or None for all M: rows from num_tokens[l] on are not written.
        expert_start: (L,) int32, each expert's first row, as for `quantize_expert_batch`, or None.
        activation: an `Activation`, or the name of its function.
        bias: (L, 2I), not gated (L, I), as for `silu_mul_quantize`, or None.
        out: (L, M, I), with expert_start (R, I), of any strides by which no two elements share memory, or None to allocate it in
            bfloat16.

    Returns:
        out.

    Raises:
        ValueError: a wrong shape, dtype, device or activation.
        RuntimeError: x or bias requires grad under grad mode.
    """
    check_quantize_arguments(x, num_tokens, expert_start, "default", None)
    check_no_grad(out=out)
    text, shape = _activation(x, expert_start, activation, bias)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    else:
        check_tensor("out", out, shape=tuple(shape), dtypes=FLOAT_DTYPES, device=x.device)
        check_output("out", out)
    ops.silu_mul(x, num_tokens, expert_start, out, text, bias)
    return out


def quantize_weight(
    w: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, recipe: str = "default", segments: int = 1
) -> QuantizedTensor:
    """Quantizes a weight in blocks of 128x128, one float32 scale for each block.

    Args:
        w: (..., N, K_dim) bfloat16, float16 or float32, any strides.
        dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8.
        recipe: see `moequant.formats.RECIPES`.
        segments: the N rows are this many equal parts, blocked apart: 2 for w13, so that no block holds gate and up.

    Returns:
        Layout "block", with scales (..., segments * ceil(N / segments / 128), ceil(K_dim / 128)).

    Raises:
        ValueError: a wrong shape, dtype or recipe.
        RuntimeError: w requires grad under grad mode.
    """
    check_tensor("w", w, dtypes=FLOAT_DTYPES)
    if w.dim() < 2:
        raise ValueError(f"w must be (..., N, K_dim), got shape {tuple(w.shape)}")
    check_int("segments", segments)
    if segments < 1 or w.shape[-2] % segments:
        raise ValueError(f"segments must divide N = {w.shape[-2]}, got {segments}")
    format_of(dtype)
    recipe_of(recipe)
    check_no_grad(w=w)
    return quantize_blocks(w, dtype, recipe, segments, 128)


def check_quantize_arguments(
    x: Tensor, num_tokens: Tensor | None, expert_start: Tensor | None, recipe: str, eps: float | None
) -> None:
    """What `quantize_expert_batch` and `silu_mul_quantize` ask of their inputs.

    Args:
        x: (L, M, columns), with expert_start (R, columns).
        num_tokens: (L,) int32, or None.
        expert_start: (L,) int32, or None.
        recipe: its name.
        eps: floor of a group's absolute maximum, or None.

    Raises:
        ValueError: one of them is wrong.
        RuntimeError: x requires grad under grad mode.
    """
    check_tensor("x", x, dims=3 if expert_start is None else 2, dtypes=FLOAT_DTYPES)
    check_counts(num_tokens, expert_start, x.shape[0] if expert_start is None else None, x.device)
    check_no_grad(x=x)
    recipe_of(recipe)
    check_eps(eps)


def _activation(
    x: Tensor, expert_start: Tensor | None, activation: str | Activation, bias: Tensor | None
) -> tuple[str, torch.Size]:
    """The activation as operations take it, and the shape of its result. Raises for a wrong activation, bias, or number of columns."""
    kind = activation_of(activation)
    if x.shape[-1] % kind.width:
        raise ValueError(
            f"x must be (L, M, 2 * I), ragged (R, 2 * I), gate first then up: its last dimension must be even, got shape "
            f"{tuple(x.shape)}"
        )
    if bias is not None:
        experts = x.shape[0] if expert_start is None else expert_start.shape[0]
        check_tensor("bias", bias, shape=(experts, x.shape[-1]), dtypes=FLOAT_DTYPES, device=x.device)
        check_contiguous("bias", bias)
        check_no_grad(bias=bias)
    return kind.text, torch.Size((*x.shape[:-1], x.shape[-1] // kind.width))


def _repeated(
    quantize: Callable[[Tensor | None, Tensor | None], QuantizedTensor],
    tensors: tuple[Tensor | None, ...],
    settings: tuple[torch.dtype, str, int, float | str | Activation | None],
) -> QuantizedTensor:
    """What quantize(values, scales) returns: by itself, or, where outputs are given, by repeating its launch.

    Args:
        quantize: checks its arguments, launches, and returns its outputs.
        tensors: what it reads, and the outputs last, which are None where they are not given.
        settings: dtype, recipe, group size, and whatever else the result depends on.
    """
    given = tuple(tensor for tensor in tensors if tensor is not None)
    values, scales = tensors[-2:]
    # what is not as it should be is left to the checks, and so is what equals a setting and is none
    usual = all(type(tensor) is Tensor for tensor in given) and tuple(map(type, settings)) in SETTING_TYPES
    if values is None or scales is None or not usual:
        return quantize(values, scales)
    _, recipe, group_size, _ = settings
    key = *settings, *(tensor is None for tensor in tensors), torch.is_grad_enabled()
    # what is recorded holds no tensor
    layout: ScaleLayout = REPEATS.run(given[0], given, key, lambda: quantize(values, scales).layout)
    return QuantizedTensor.made_of(values, scales, layout, recipe, group_size)


def _outputs(
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int,
    recipe: str,
    values: Tensor | None,
    scales: Tensor | None,
) -> QuantizedTensor:
    """The outputs that the caller gave, checked, or new ones."""
    format_of(dtype)
    if values is not None:
        check_tensor("values", values, shape=tuple(shape), dtypes=(dtype,), device=device)
        check_output("values", values)
    if scales is not None:
        groups = ceil_div(shape[-1], group_size)
        check_tensor("scales", scales, shape=(*shape[:-1], groups), dtypes=(torch.float32,), device=device)
        check_output("scales", scales)
    values = torch.empty(shape, dtype=dtype, device=device) if values is None else values
    scales = empty_scales_of(shape, group_size, device) if scales is None else scales
    layout = scale_layout(scales)
    # strides that no layout has are left to the constructor's words
    made = QuantizedTensor if layout == "row" and not scales.is_contiguous() else QuantizedTensor.made_of
    return made(values, scales, layout, recipe, group_size)
