"""What serves no expert-parallel path: products of float8 and of int8 matrices, int8 in blocks, one scale for a whole tensor.

Letters: M rows, N columns, K_dim contraction, G groups of 128 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.batch import QuantizedTensor, ceil_div
from moequant.reference.gemm import product
from moequant.reference.quantization import INF_BITS, dequantize, quantize_groups

__all__ = [
    "dequantize_fp8",
    "fp8_gemm",
    "fp8_scale",
    "int8_addmm",
    "int8_gelu",
    "mm_fp8_blockscale",
    "quantize_fp8",
]

E4M3_MAX = 448.0
# Below it 448 / amax would leave float32's range.
MIN_AMAX = 2.0**-118


def mm_fp8_blockscale(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As `moequant.gemm.mm_fp8_blockscale` of bare tensors. a_scales: (M, G) of any strides, meant as it is indexed."""
    left = dequantize(QuantizedTensor(a, a_scales.contiguous(), "row"))
    return product(left, dequantize(QuantizedTensor(b, b_scales, "block"))).to(out_dtype)


def int8_addmm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `moequant.gemm.int8_addmm` of matrices, (M, N) float32.

    Sums inside a block of 128 are whole numbers below 2**24: float32 has them exactly.
    """
    acc = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for group in range(ceil_div(a.shape[1], 128)):
        part = slice(group * 128, (group + 1) * 128)
        b_scale = b_scales[:, group].repeat_interleave(128)[: b.shape[0]]
        acc += product(a[:, part].float(), b[:, part].float()) * (a_scales[:, group].unsqueeze(1) * b_scale)
    return acc if bias is None else acc + bias.float()


def int8_gelu(x: Tensor, x_scales: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """As `moequant.quantization.int8_gelu`. In float64 by erfc, because 1 + erf cancels for negative numbers."""
    wide = dequantize(QuantizedTensor(x, x_scales.contiguous(), "row", group_size=block_size)).double()
    gelu = 0.5 * wide * torch.special.erfc(wide * -(0.5**0.5))
    return quantize_groups(gelu.float(), block_size, torch.int8, "default", None)


def fp8_scale(amax: Tensor, max_value: float = E4M3_MAX) -> Tensor:
    """max_value / amax, 1 where amax is 0, NaN where it is Inf or NaN. amax: float32 of any shape, not negative."""
    # of a tensor: CUDA's division of a number is something else
    scale = torch.full_like(amax, max_value) / amax.clamp_min(MIN_AMAX)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.view(torch.int32) >= INF_BITS, torch.nan, scale)


def quantize_fp8(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `moequant.quantization.quantize_fp8`. dtype: float8_e4m3fn, or uint8 for the encoding "offset". scale: () float32, or None.

    A NaN in x, or a NaN scale that was given, comes back as NaN or code 128; under a computed scale that is NaN all values are 0.
    """
    x = x.float()
    given = scale is not None
    if scale is None:
        bits = x.contiguous().abs().view(torch.int32)
        amax = bits.amax() if x.numel() else torch.zeros((), dtype=torch.int32, device=x.device)
        scale = fp8_scale(amax.view(torch.float32))
    q = x * scale
    bounded = q.clamp(-E4M3_MAX, E4M3_MAX)
    if dtype == torch.uint8:
        steps = (bounded * 127.0 / torch.full_like(bounded, E4M3_MAX)).round()
        return (torch.where(q.isnan(), 0.0, steps) + 128).to(torch.uint8), scale
    # NaN has two signs
    return torch.where(q.isnan(), torch.nan if given else 0.0, bounded).to(dtype), scale


def dequantize_fp8(values: Tensor, scale: Tensor, output_dtype: torch.dtype = torch.float32) -> Tensor:
    """As `moequant.quantization.dequantize_fp8` of float8_e4m3fn values, or uint8 ones of the encoding "offset"."""
    x = (values.float() - 128.0) * (E4M3_MAX / 127.0) if values.dtype == torch.uint8 else values.float()
    return (x * (torch.ones_like(scale) / scale)).to(output_dtype)


def fp8_gemm(a: Tensor, a_factors: Tensor, b: Tensor, b_factors: Tensor, bias: Tensor | None = None) -> Tensor:
    """(M, N) float32: (a @ b.T) * a_factors[:, None] * b_factors + bias, of float8 a (M, K_dim), b (N, K_dim), factors (M,) and (N,)."""
    out = product(a.float(), b.float()) * a_factors.unsqueeze(1) * b_factors
    return out if bias is None else out + bias.float()
