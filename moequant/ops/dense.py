"""What serves no expert-parallel path: int8 in blocks, and one scale for a whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant import reference
from moequant.checks import check_format
from moequant.ops.gemm import gemm_kernel, rows_side_by_side
from moequant.ops.quantization import quant_spec
from moequant.ops.registration import registered, uses_kernels
from moequant.reference.dense import E4M3_MAX, MIN_AMAX

__all__ = [
    "dequantize_fp8",
    "fp8_gemm",
    "int8_addmm",
    "int8_gelu",
    "quantize_fp8",
]


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
            kernel(left, left_scales, right, right_scales, None, None, result)
            return
        from moequant.kernels.dense.dense_gemm import Requantize, dense_gemm

        spec = quant_spec(torch.int8, "default")
        requantize = None if out_scales is None else Requantize(out_scales, out_block_size, spec)
        dense_gemm(a, a_scales, b, b_scales, bias, out, requantize)
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
        from moequant.kernels.dense.int8_gelu import int8_gelu as kernel

        kernel(x, x_scales, values, scales, quant_spec(torch.int8, "default"), group_size=block_size)
        return
    new_values, new_scales = reference.int8_gelu(x, x_scales, block_size)
    values.copy_(new_values)
    scales.copy_(new_scales)


def check_device(values: Tensor) -> None:
    """Raises ValueError for float8 values on a GPU that has no float8; codes around 128 are for any."""
    if values.dtype == torch.float8_e4m3fn:
        check_format("fp8_e4m3fn", values.device)


@registered(mutates=("values", "scale"))
def quantize_fp8(x: Tensor, values: Tensor, scale: Tensor, computed: bool) -> None:
    """`reference.quantize_fp8` of x (count,) into given values (count,); scale () is written too if it is computed."""
    if uses_kernels(x):
        from moequant.kernels.dense.quantize_tensor import quantize_tensor

        check_device(values)
        quantize_tensor(x, scale, values, computed=computed, floor=MIN_AMAX, max_value=E4M3_MAX)
        return
    new_values, new_scale = reference.quantize_fp8(x, None if computed else scale, values.dtype)
    values.copy_(new_values)
    if computed:
        scale.copy_(new_scale)


@registered(mutates=("out",))
def dequantize_fp8(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """`reference.dequantize_fp8` into a given output. values and out: (count,)."""
    if uses_kernels(values):
        from moequant.kernels.dense.dequantize_tensor import dequantize_tensor

        check_device(values)
        dequantize_tensor(values, scale, out, max_value=E4M3_MAX)
        return
    out.copy_(reference.dequantize_fp8(values, scale, out.dtype))


@registered(mutates=("out",))
def fp8_gemm(a: Tensor, a_factors: Tensor, b: Tensor, b_factors: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`reference.fp8_gemm` into a given output (M, N)."""
    if uses_kernels(a):
        from moequant.kernels.dense.dense_gemm import dense_gemm

        check_device(a)
        dense_gemm(a, a_factors, b, b_factors, bias, out)
        return
    out.copy_(reference.fp8_gemm(a, a_factors, b, b_factors, bias))
