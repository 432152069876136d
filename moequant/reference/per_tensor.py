"""Quantization with one scale for a whole tensor, by which its numbers are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.reference.gemm import product
from moequant.reference.quantization import INF_BITS

E4M3_MAX = 448.0
# Below it 448 / amax would leave float32's range.
MIN_AMAX = 2.0**-118


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
