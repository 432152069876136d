"""int8 in blocks."""

from __future__ import annotations

from torch import Tensor

from moequant import reference
from moequant.formats import RECIPES
from moequant.ops.gemm import gemm_kernel, rows_side_by_side
from moequant.ops.registration import registered, uses_kernels

EPS = RECIPES["default"].eps


@registered(mutates=("out", "out_scales"))
def int8_addmm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    out_scales: Tensor | None = None,
    out_block_size: int = 128,
) -> None:
    """`reference.int8_addmm` into a given output (M, N), float, or int8 with out_scales (M, ceil(N / out_block_size))."""
    if uses_kernels(a):
        if bias is None and out_scales is None:
            left, left_scales, right, right_scales, result = (
                x.unsqueeze(0) for x in (a, rows_side_by_side(a_scales), b, b_scales, out)
            )
            kernel = gemm_kernel(left, left_scales, right, right_scales, result)
            kernel(left, left_scales, right, right_scales, None, result)
            return
        from moequant.kernels.dense_gemm import dense_gemm

        dense_gemm(a, a_scales, b, b_scales, bias, out, out_scales, out_group=out_block_size, eps=EPS)
        return
    wide = reference.int8_addmm(a, a_scales, b, b_scales, bias)
    if out_scales is None:
        out.copy_(wide)
        return
    values, scales = reference.quantize_groups(wide, out_block_size, out.dtype, "default", None)
    out.copy_(values)
    out_scales.copy_(scales)


@registered(mutates=("values", "scales"))
def int8_gelu(x: Tensor, x_scales: Tensor, values: Tensor, scales: Tensor, block_size: int = 128) -> None:
    """`reference.int8_gelu` into given outputs, all (M, N) and (M, ceil(N / block_size)) contiguous."""
    if uses_kernels(x):
        from moequant.kernels.int8_gelu import int8_gelu as kernel

        kernel(x, x_scales, values, scales, group_size=block_size, eps=EPS)
        return
    new_values, new_scales = reference.int8_gelu(x, x_scales, block_size)
    values.copy_(new_values)
    scales.copy_(new_scales)
