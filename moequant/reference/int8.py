"""int8 in blocks. Letters: M rows, N columns, K_dim contraction, G groups of 128 of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.batch import QuantizedTensor, ceil_div
from moequant.reference.gemm import product
from moequant.reference.quantization import dequantize, quantize_groups


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
