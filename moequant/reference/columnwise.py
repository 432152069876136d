"""The specification of weight gradients from narrow numbers: operands that are quantized along the tokens, and their product.

L experts, M rows of an expert's buffer, R rows of all of them (ragged; padded: L * M), N and K_dim columns of the two operands.

A block is BLOCK tokens of one expert. An expert has as many as its rows fill, the last with zeros behind them; without rows it has one of
zeros. The blocks of all experts lie one behind the other. B = R // BLOCK + L have room, which is enough for rows that don't overlap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moequant.batch import ceil_div
from moequant.formats import RECIPES, recipe_of
from moequant.reference.gemm import product
from moequant.reference.quantization import dequantize_blocks, expert_places, quantize_groups, quantize_weight

__all__ = ["check_powers_of_two", "quantize_columnwise", "weight_gradient"]

BLOCK = 128


def check_powers_of_two(recipe: str) -> None:
    """Raises ValueError for a recipe whose scales are none: quantizing narrow numbers again would round each a second time."""
    if not recipe_of(recipe).power_of_two:
        fitting = ", ".join(f'"{name}"' for name, rule in RECIPES.items() if rule.power_of_two)
        raise ValueError(
            f'recipe must be one whose scales are powers of two, {fitting}, for operands that lie along the tokens, got "{recipe}"'
        )


def quantize_columnwise(
    x: Tensor,
    x_scales: Tensor | None,
    num_tokens: Tensor,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    block_ends: Tensor,
    recipe: str = "ue8m0",
    blocks: bool = False,
) -> None:
    """Quantizes the valid rows of x once more, along the tokens, and writes them transposed: number [n, BLOCK * block + i] of values is
    column n of a block's i-th token, and 0 behind the expert's last row. Blocks past the last one stay as they are.

    x: (L, M, N), with expert_start (R, N), narrow with x_scales, one column for 128 of x, or bfloat16 with None. num_tokens: (L,) int32,
    of which no more count than the buffer has room for. values: (N, BLOCK * B), narrow. scales: float32, (B, N), one for each block and
    column, or with `blocks` (ceil(N / 128), B), one for 128 columns of a block. block_ends: (L,) int32, the blocks of each expert and all
    before it, at most B. Raises ValueError for a recipe without powers of two.
    """
    check_powers_of_two(recipe)
    room, first = values.shape[1] // BLOCK, 0
    for expert, place in enumerate(expert_places(x, num_tokens, expert_start)):
        rows = x[place].float()
        if x_scales is not None:
            rows = rows * x_scales[place].repeat_interleave(128, -1)[:, : x.shape[-1]]
        end = min(first + max(1, ceil_div(rows.shape[0], BLOCK)), room)
        columns = F.pad(rows, (0, 0, 0, (end - first) * BLOCK - rows.shape[0])).T
        if blocks:
            made = quantize_weight(columns, dtype=values.dtype, recipe=recipe, group_size=BLOCK)
            new_values, scales[:, first:end] = made.values, made.scales
        else:
            new_values, new_scales = quantize_groups(columns, BLOCK, values.dtype, recipe, None)
            scales[first:end] = new_scales.T
        values[:, first * BLOCK : end * BLOCK] = new_values
        block_ends[expert] = first = end


def weight_gradient(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block_ends: Tensor, out: Tensor) -> None:
    """Writes the sum over each expert's tokens of a's column times b's, of operands that `quantize_columnwise` made: exact zeros for an
    expert without rows. Computed in float32, rounded once.

    a: (N, BLOCK * B), with scales (B, N). b: (K_dim, BLOCK * B), with scales (ceil(K_dim / 128), B). block_ends: (L,) int32. out: (L, N,
    K_dim) float.
    """
    first = 0
    for expert, end in enumerate(block_ends.tolist()):
        here, tokens = slice(first, end), slice(first * BLOCK, end * BLOCK)
        left = dequantize_blocks(a[:, tokens], a_scales[here].mT, 1, BLOCK, torch.float32)
        right = dequantize_blocks(b[:, tokens], b_scales[:, here], 128, BLOCK, torch.float32)
        out[expert] = product(left, right)
        first = end
