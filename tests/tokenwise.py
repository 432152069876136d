"""Operands that lie along the tokens, for tests of weight gradients: made by the reference, with NaN in everything that is unused."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.config import round_up
from moequant.reference.columnwise import BLOCK, quantize_columnwise
from moequant.reference.quantization import dequantize_blocks
from moequant.testing import relative_error

FP8 = torch.float8_e4m3fn
# a, a_scales, b, b_scales, block_ends
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# of many numbers: rounding to bfloat16 is 1.66e-3, fp8 tensor cores add with about 14 bits
TOLERANCES = {torch.bfloat16: 1.75e-3, torch.float16: 6e-4, torch.float32: 6e-4}


def columnwise_operands(counts: list[int], columns: int, depth: int, device: str = "cpu", spare: int = 0) -> Operands:
    """a (N, C), a_scales (B, N), b (K_dim, C), b_scales (ceil(K_dim / 128), B) and block_ends of experts with so many tokens, whose
    neighbouring blocks and columns have scales far apart. spare: tokens that there is room for besides.

    Numbers past the last block, and their scales, are NaN; so are what lies between two rows of a_scales.
    """
    rows = max(*counts, 1, -(-spare // len(counts)))
    num_tokens = torch.tensor(counts, dtype=torch.int32, device=device)
    room = len(counts) * rows // BLOCK + len(counts)
    block_ends = torch.full((len(counts),), -1, dtype=torch.int32, device=device)
    operands = []
    for width, blocks in ((columns, False), (depth, True)):
        x = torch.randn(len(counts), rows, width, device=device)
        # small enough for float16's sums
        columns_by = torch.arange(width, device=device) // 32 % 3 * 2 - 4
        x *= torch.exp2(columns_by + torch.arange(rows, device=device)[:, None] // 64 % 3)
        values = torch.full((width, BLOCK * room), 0x7F, dtype=torch.uint8, device=device).view(FP8)
        shape = (-(-width // BLOCK), room) if blocks else (room, round_up(width, 4))
        scales = torch.full(shape, torch.nan, device=device)
        scales = scales if blocks else scales[:, :width]
        quantize_columnwise(x.bfloat16(), None, num_tokens, None, values, scales, block_ends, blocks=blocks)
        operands += [values, scales]
    a, a_scales, b, b_scales = operands
    return a, a_scales, b, b_scales, block_ends


def exact_gradient(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block_ends: Tensor, experts: int) -> Tensor:
    """The weight gradient (L, N, K_dim) of operands in float64."""
    made, first = [], 0
    for end in block_ends[:experts].tolist():
        tokens = slice(first * BLOCK, end * BLOCK)
        left = dequantize_blocks(a[:, tokens], a_scales[first:end].mT, 1, BLOCK, torch.float32).double()
        made.append(left @ dequantize_blocks(b[:, tokens], b_scales[:, first:end], 128, BLOCK, torch.float32).double().T)
        first = end
    return torch.stack(made)


def assert_near_gradient(out: Tensor, exact: Tensor, counts: list[int], rounded_to: torch.dtype | None = None) -> None:
    """A gradient (L, N, K_dim) against its float64 product: all of it together, each row by far not wrong, and exact zeros for an expert
    without tokens. rounded_to: what it was rounded to first; None: its own type alone."""
    assert not out.isnan().any(), "not all was written, or what is unused was read"
    for expert, count in enumerate(counts):
        assert count or not out[expert].any(), f"expert {expert} has no tokens, and a gradient"
    if not any(counts):
        return
    dtype = rounded_to or out.dtype
    # the rounding error of few numbers scatters, up to half a step each
    few = max(2 * TOLERANCES[dtype], 2.0**-8 + TOLERANCES[torch.float32]) if exact.numel() < 4096 else 2 * TOLERANCES[dtype]
    error = relative_error(out, exact)
    assert error <= (TOLERANCES[dtype] if exact.numel() >= 2**16 else few), f"relative error {error:.2e}"
    rows = (out.double() - exact).norm(dim=2) / exact.norm(dim=2).clamp_min(1e-20)
    # few columns may cancel
    assert bool((rows <= (0.02 if out.shape[2] >= 64 else 0.2)).all()), f"a row is off by {float(rows.max()):.2e}"
