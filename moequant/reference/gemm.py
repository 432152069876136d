"""Products of quantized operands. Letters as in `moequant.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.batch import QuantizedTensor
from moequant.reference.quantization import dequantize

__all__ = [
    "grouped_gemm_blockscale",
    "operand_rows",
]


def grouped_gemm_blockscale(
    a: QuantizedTensor | Tensor,
    b: QuantizedTensor | Tensor,
    num_tokens: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    expected_rows: int | None = None,
) -> Tensor:
    """As `moequant.grouped_gemm_blockscale`: a float32 product of the dequantized operands, one expert after the other."""
    del expected_rows
    experts, rows = a.shape[:2]
    if out is None:
        out = torch.empty(experts, rows, b.shape[1], dtype=out_dtype, device=a.device)
    for expert in range(experts):
        count = rows if num_tokens is None else min(max(0, int(num_tokens[expert])), rows)
        if not count:
            continue
        left, right = operand_rows(a, expert, count), operand_rows(b, expert, b.shape[1])
        out[expert, :count] = product(left, right).to(out.dtype)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K_dim) times the transpose of b (N, K_dim), in their float32 under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def operand_rows(x: QuantizedTensor | Tensor, expert: int, count: int) -> Tensor:
    """The first rows of one expert's operand as float32 (count, K_dim)."""
    if not isinstance(x, QuantizedTensor):
        return x[expert, :count].float()
    scales = x.scales[expert] if x.layout == "block" else x.scales[expert, :count].contiguous()
    layout = "block" if x.layout == "block" else "row"
    return dequantize(QuantizedTensor(x.values[expert, :count], scales, layout, x.recipe, x.group_size, x.segments))
