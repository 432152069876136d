"""Products of quantized operands. Letters as in `moequant.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.batch import QuantizedTensor
from moequant.reference.quantization import dequantize, expert_places

__all__ = [
    "grouped_gemm_blockscale",
    "operand_rows",
]


def grouped_gemm_blockscale(
    a: QuantizedTensor | Tensor,
    b: QuantizedTensor | Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    expected_rows: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """As `moequant.grouped_gemm_blockscale`: a float32 product of the dequantized operands, one expert after the other."""
    del expected_rows
    if out is None:
        out = torch.empty(*a.shape[:-1], b.shape[1], dtype=out_dtype, device=a.device)
    for expert, place in enumerate(expert_places(out, num_tokens, expert_start)):
        if out[place].numel():
            out[place] = product(operand_rows(a, place), operand_rows(b, (expert,)), batch_invariant).to(out.dtype)
    return out


def product(a: Tensor, b: Tensor, batch_invariant: bool = False) -> Tensor:
    """a (M, K_dim) times the transpose of b (N, K_dim), in their float32 under autocast too.

    batch_invariant: one row after the other, as libraries add in another order for another M. Each row is copied to a tensor of its own,
    since the order may depend on the address too.
    """
    with torch.autocast(a.device.type, enabled=False):
        if not batch_invariant:
            return a @ b.T
        b, out, one = b.contiguous(), a.new_empty(a.shape[0], b.shape[0]), a.new_empty(a.shape[1])
        for place, row in zip(out, a, strict=True):
            place.copy_(torch.mv(b, one.copy_(row)))
        return out


def operand_rows(x: QuantizedTensor | Tensor, place: tuple[int | slice, ...]) -> Tensor:
    """Rows of one expert's operand as float32 (rows, K_dim). place: with what to index it; of a weight all rows."""
    if not isinstance(x, QuantizedTensor):
        return x[place].float()
    layout = "block" if x.layout == "block" else "row"
    return dequantize(QuantizedTensor(x.values[place], x.scales[place].contiguous(), layout, x.recipe, x.group_size, x.segments))
