"""The product of two float8 matrices. Letters: M rows, N columns, K_dim contraction, G groups of 128 of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.batch import QuantizedTensor
from moequant.reference.gemm import product
from moequant.reference.quantization import dequantize


def mm_fp8_blockscale(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As `moequant.gemm.mm_fp8_blockscale` of bare tensors. a_scales: (M, G) of any strides, meant as it is indexed."""
    left = dequantize(QuantizedTensor(a, a_scales.contiguous(), "row"))
    return product(left, dequantize(QuantizedTensor(b, b_scales, "block"))).to(out_dtype)
