"""Quantization of matrices to float8 in groups of columns or in blocks, as it is and behind what comes before it in a model; and back.

Letters: M rows, H columns, G = ceil(H / group_size) groups, N rows and K_dim columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moequant import ops, reference
from moequant.batch import QuantizedTensor, ScaleLayout, ceil_div, empty_scales
from moequant.checks import (
    check_choice,
    check_eps,
    check_format,
    check_int,
    check_is,
    check_no_grad,
    check_number,
    check_tensor,
    with_rows,
)
from moequant.formats import FLOAT8_DTYPES, FLOAT_DTYPES, format_of, recipe_of

GROUP_SIZES = (32, 64, 128, 256)
MAX_NORM_COLUMNS = 32768
WIDE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def per_token_group_quant_fp8(
    x: Tensor,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
    eps: float | None = None,
    scale_layout: Literal["row", "transposed", "tma_aligned"] = "row",
    scale_dtype: Literal["fp32", "ue8m0_packed"] = "fp32",
) -> QuantizedTensor:
    """Quantizes every row in groups of group_size columns, one scale for each group.

    A group with an Inf or NaN gets a NaN scale and values 0.

    Args:
        x: (..., M, H) bfloat16, float16 or float32, any strides; M and H may be 0. If the leading dimensions can't be viewed as
            one, x is copied first.
        group_size: 32, 64, 128 or 256. A trailing partial group is a group of its own.
        dtype: float8_e4m3fn (max 448), float8_e4m3fnuz (240; 224 with recipe "fnuz_224") or float8_e5m2 (57344).
        recipe: see `moequant.formats.RECIPES`.
        eps: floor of a group's absolute maximum; None for the recipe's own. At least 1e-20.
        scale_layout: of the scales (..., M, G). "row": contiguous. "transposed": each matrix's rows of one group side by side, the
            bytes of a contiguous (..., G, M). "tma_aligned": the same with groups M rounded up to 4 rows apart, as TMA wants to
            read them.
        scale_dtype: "fp32", or, for recipe "ue8m0", "ue8m0_packed": exponents, four to an int32, (..., M, ceil(G / 4)), which are
            always aligned for TMA; leave scale_layout alone then. A bad group's is 0xFF, and past the last group they are 0.

    Returns:
        Contiguous values (..., M, H) and scales, of layout scale_layout or "ue8m0_packed".

    Raises:
        ValueError: a wrong shape, dtype or option.
        RuntimeError: x requires grad under grad mode.
    """
    check_choice("scale_layout", scale_layout, ("row", "transposed", "tma_aligned"))
    check_choice("scale_dtype", scale_dtype, ("fp32", "ue8m0_packed"))
    recipe_of(recipe)
    layout: ScaleLayout = scale_layout
    if scale_dtype == "ue8m0_packed":
        if recipe != "ue8m0":
            raise ValueError(f'scale_dtype "ue8m0_packed" holds powers of two: pass recipe="ue8m0", got {recipe!r}')
        if scale_layout == "transposed":
            raise ValueError('scale_dtype "ue8m0_packed" has a layout of its own, aligned for TMA: leave scale_layout out')
        layout = "ue8m0_packed"
    _check_input(x, group_size, dtype, recipe, eps)
    if x.dim() < 2:
        raise ValueError(f"x must be (..., M, H), got shape {tuple(x.shape)}; call .unsqueeze(0)")
    # scales in rows don't show where a matrix ends: all are one
    matrices = 1 if layout == "row" else math.prod(x.shape[:-2])
    rows, columns = math.prod(x.shape[:-1]) // max(1, matrices), x.shape[-1]
    size = (matrices, rows, columns)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = empty_scales(matrices, rows, ceil_div(columns, group_size), layout, x.device)
    ops.quantize_expert_batch(x.reshape(size), None, None, values.view(size), scales, group_size, recipe, eps)
    # one matrix keeps its strides, which a view of no rows forgets
    shaped = scales[0] if x.dim() == 2 else scales.view(*x.shape[:-1], scales.shape[-1])
    return QuantizedTensor(values, shaped, layout, recipe, group_size)


def per_block_quant_fp8(
    w: Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
) -> QuantizedTensor:
    """Quantizes a weight in square blocks, one float32 scale for each block; the last ones of a row or column may be partial.

    `quantize_weight` does the same in equal parts of the rows, and to int8.

    Args:
        w: (N, K_dim) or (..., N, K_dim) bfloat16, float16 or float32, any strides.
        block: (32, 32), (64, 64) or (128, 128).
        dtype: float8_e4m3fn, float8_e4m3fnuz or float8_e5m2.
        recipe: see `moequant.formats.RECIPES`.

    Returns:
        Layout "block", values and scales contiguous.

    Raises:
        ValueError: a wrong shape, dtype or option.
        RuntimeError: w requires grad under grad mode.
    """
    check_tensor("w", w, dtypes=FLOAT_DTYPES)
    if w.dim() < 2:
        raise ValueError(f"w must be (..., N, K_dim), got shape {tuple(w.shape)}")
    check_is("block", block, (tuple, list))
    for size in block:
        check_int("block", size, 1)
    check_choice("block", tuple(block), [(size, size) for size in (32, 64, 128)])
    _check_target(dtype, recipe, w.device)
    check_no_grad(w=w)
    return quantize_blocks(w, dtype, recipe, 1, block[0])


def fused_rms_fp8_group_quant(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    group_size: int = 128,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
    transpose_scale: bool = False,
) -> tuple[QuantizedTensor, Tensor | None]:
    """RMSNorm of the rows of x + residual, times silu(gate), quantized in groups of group_size columns.

    y / sqrt(mean(y * y) + eps) * weight * silu(gate) with y = x + residual, all in float32 and not rounded before quantization.
    Between devices scales are within 4 units in the last place and values at most one step apart.

    Args:
        x: (M, H) bfloat16, float16 or float32, of at most 32768 columns; copied first if the numbers of a row are not side by side.
        weight: (H,) of any of these types.
        eps: added to the mean square, at least 0.
        group_size: 32, 64, 128 or 256.
        residual: as x, or None to leave it out.
        gate: as x, or None to leave it out.
        dtype: float8_e4m3fn, float8_e4m3fnuz or float8_e5m2.
        recipe: see `moequant.formats.RECIPES`.
        transpose_scale: the scales keep their shape (M, G) and stay contiguous, but lie in the order of a contiguous (G, M), so
            that read as (M, G) they are scrambled: layout "transposed_flat" instead of "row". Values are the same bits.

    Returns:
        The quantized (M, H); and x + residual, rounded to x's type, which is the next residual, or None without a residual.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
        RuntimeError: an input requires grad under grad mode.
    """
    check_tensor("x", x, dims=2)
    _check_input(x, group_size, dtype, recipe)
    rows, columns = x.shape
    if columns > MAX_NORM_COLUMNS:
        raise ValueError(f"x must have at most {MAX_NORM_COLUMNS} columns, for a program to hold a row, got {columns}")
    check_choice("transpose_scale", transpose_scale, (False, True))
    check_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    check_tensor("weight", weight, shape=(columns,), dtypes=FLOAT_DTYPES, device=x.device)
    for name, tensor in (("residual", residual), ("gate", gate)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(rows, columns), dtypes=FLOAT_DTYPES, device=x.device)
    check_no_grad(weight=weight, residual=residual, gate=gate)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales, written = _scales(rows, ceil_div(columns, group_size), transpose_scale, x.device)
    residual, gate = (None if tensor is None else with_rows(tensor) for tensor in (residual, gate))
    ops.fused_rms_quantize(with_rows(x), weight.contiguous(), residual, gate, summed, values, written, eps, group_size, recipe)
    return QuantizedTensor(values, scales, _flat_layout(transpose_scale), recipe, group_size), summed


def fused_flatten_fp8_group_quant(
    x: Tensor,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    transpose_scale: bool = False,
    recipe: str = "default",
) -> QuantizedTensor:
    """Quantizes x (M, N1, N2) as the matrix (M, N1 * N2), in groups of group_size columns.

    Args:
        x: bfloat16, float16 or float32, any strides. It is copied first if its rows can't be viewed as flat and groups cross from
            one N2 to the next.
        group_size: 32, 64, 128 or 256.
        dtype: float8_e4m3fn, float8_e4m3fnuz or float8_e5m2.
        transpose_scale: as for `fused_rms_fp8_group_quant`.
        recipe: see `moequant.formats.RECIPES`.

    Returns:
        Contiguous values (M, N1 * N2) and scales (M, G), bit-equal on all devices.

    Raises:
        ValueError: a wrong shape, dtype or option.
        RuntimeError: x requires grad under grad mode.
    """
    check_tensor("x", x, dims=3)
    _check_input(x, group_size, dtype, recipe)
    check_choice("transpose_scale", transpose_scale, (False, True))
    rows, outer, inner = x.shape
    values = torch.empty(rows, outer * inner, dtype=dtype, device=x.device)
    scales, written = _scales(rows, ceil_div(outer * inner, group_size), transpose_scale, x.device)
    if inner % group_size == 0 and inner and x.stride(1) != inner * x.stride(2):
        # a batch of N1 matrices of which no group leaves its own, written where each belongs
        batch = x.transpose(0, 1), values.view(x.shape).transpose(0, 1), written.unflatten(1, (outer, -1)).transpose(0, 1)
    else:
        batch = x.reshape(1, *values.shape), values.unsqueeze(0), written.unsqueeze(0)
    ops.quantize_expert_batch(batch[0], None, None, *batch[1:], group_size, recipe, None)
    return QuantizedTensor(values, scales, _flat_layout(transpose_scale), recipe, group_size)


def _flat_layout(transpose_scale: bool) -> ScaleLayout:
    return "transposed_flat" if transpose_scale else "row"


def _scales(rows: int, groups: int, transpose_scale: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales (M, G), contiguous, and the view by which they are written."""
    scales = torch.empty(rows, groups, dtype=torch.float32, device=device)
    return scales, scales.view(groups, rows).transpose(0, 1) if transpose_scale else scales


def quantize_blocks(w: Tensor, dtype: torch.dtype, recipe: str, segments: int, block_size: int) -> QuantizedTensor:
    """A weight in blocks; its arguments are checked by the caller.

    Args:
        w: (..., N, K_dim), any strides.
        dtype: the narrow type.
        recipe: see `moequant.formats.RECIPES`.
        segments: the rows are this many equal parts, blocked apart.
        block_size: rows and columns of a block.

    Returns:
        Layout "block", values and scales contiguous.
    """
    leading = w.shape[:-2]
    made = empty_blocks((math.prod(leading), *w.shape[-2:]), dtype, recipe, segments, block_size, w.device)
    ops.quantize_weight(w.reshape(made.shape), made.values, made.scales, recipe, segments, block_size)
    shaped = made.values.view(w.shape), made.scales.view(*leading, *made.scales.shape[1:])
    return QuantizedTensor.made_of(*shaped, "block", recipe, block_size, segments)


def empty_blocks(
    shape: Sequence[int], dtype: torch.dtype, recipe: str, segments: int, block_size: int, device: torch.device
) -> QuantizedTensor:
    """Uninitialised memory of a weight in blocks.

    Args:
        shape: (L, N, K_dim).
        dtype: the narrow type.
        recipe: see `moequant.formats.RECIPES`.
        segments: as for `quantize_blocks`.
        block_size: as for `quantize_blocks`.
        device: where.

    Returns:
        As `quantize_blocks`.
    """
    experts, rows, columns = shape
    row_blocks = segments * ceil_div(rows // segments, block_size)
    values = torch.empty(shape, dtype=dtype, device=device)
    scales = torch.empty(experts, row_blocks, ceil_div(columns, block_size), dtype=torch.float32, device=device)
    return QuantizedTensor.made_of(values, scales, "block", recipe, block_size, segments)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """values * scales in float32, rounded once to dtype.

    Args:
        q: of any layout.
        dtype: bfloat16, float16, float32 or float64.

    Returns:
        A contiguous tensor of the shape of q.values.

    Raises:
        ValueError: another dtype, or q is no QuantizedTensor.
        RuntimeError: its tensors require grad under grad mode.
    """
    check_is("q", q, QuantizedTensor, "quantizers return one, and QuantizedTensor(values, scales, layout) makes one")
    check_choice("dtype", dtype, WIDE_DTYPES)
    check_no_grad(values=q.values, scales=q.scales)
    values, scales, group_rows = reference.blocks_of(q)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    ops.dequantize_blocks(values.contiguous(), scales, out, group_rows, q.group_size)
    return out.view(q.shape)


def _check_input(x: Tensor, group_size: int, dtype: torch.dtype, recipe: str, eps: float | None = None) -> None:
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    check_no_grad(x=x)
    check_choice("group_size", group_size, GROUP_SIZES)
    _check_target(dtype, recipe, x.device)
    check_eps(eps)


def _check_target(dtype: torch.dtype, recipe: str, device: torch.device) -> None:
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    recipe_of(recipe)
    # e4m3fnuz can be rounded in integers, which any GPU can do
    if dtype != torch.float8_e4m3fnuz and not torch.compiler.is_compiling():
        check_format(format_of(dtype).name, device)
