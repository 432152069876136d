"""Quantization with one scale for a whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant import reference
from moequant.checks import check_format
from moequant.ops.registration import registered, uses_kernels
from moequant.reference.per_tensor import E4M3_MAX, MIN_AMAX


def check_device(values: Tensor) -> None:
    """Raises ValueError for float8 values on a GPU that has no float8; codes around 128 are for any."""
    if values.dtype == torch.float8_e4m3fn:
        check_format("fp8_e4m3fn", values.device)


@registered(mutates=("values", "scale"))
def quantize_fp8(x: Tensor, values: Tensor, scale: Tensor, computed: bool) -> None:
    """`reference.quantize_fp8` of x (count,) into given values (count,); scale () is written too if it is computed."""
    if uses_kernels(x):
        from moequant.kernels.quantize_tensor import quantize_tensor

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
        from moequant.kernels.dequantize_tensor import dequantize_tensor

        check_device(values)
        dequantize_tensor(values, scale, out, max_value=E4M3_MAX)
        return
    out.copy_(reference.dequantize_fp8(values, scale, out.dtype))


@registered(mutates=("out",))
def fp8_gemm(a: Tensor, a_factors: Tensor, b: Tensor, b_factors: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`reference.fp8_gemm` into a given output (M, N)."""
    if uses_kernels(a):
        from moequant.kernels.dense_gemm import dense_gemm

        check_device(a)
        dense_gemm(a, a_factors, b, b_factors, bias, out)
        return
    out.copy_(reference.fp8_gemm(a, a_factors, b, b_factors, bias))
