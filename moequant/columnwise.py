"""Operands of weight gradients, quantized along the tokens and transposed: `moequant.reference.quantize_columnwise` says how they lie.

L local experts, R rows of a rank's experts (padded: L * M), N columns, B blocks of 128 tokens for which there is room.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moequant.batch import ceil_div
from moequant.config import round_up

BLOCK = 128
# TMA reads rows that are multiples of 16 bytes apart
SCALE_ALIGNMENT = 4


class Columnwise(NamedTuple):
    """An operand.

    Attributes:
        values: (N, 128 * B), narrow, contiguous.
        scales: float32: (B, N) with strides (round_up(N, 4), 1), one for each block and column; or (ceil(N / 128), B) contiguous, one for
            128 columns of a block.
        block_ends: (L,) int32, the blocks of each expert and all before it.
    """

    values: Tensor
    scales: Tensor
    block_ends: Tensor


def most_blocks(rows: int, experts: int) -> int:
    """B: how many blocks experts' rows have at most, one at least for each expert.

    Args:
        rows: R.
        experts: L.

    Returns:
        That number.
    """
    return rows // BLOCK + experts


def empty_columnwise(
    columns: int,
    rows: int,
    experts: int,
    *,
    blocks: bool,
    device: torch.device | str,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Columnwise:
    """Uninitialised memory of an operand, for `moequant.ops.quantize_columnwise`.

    Args:
        columns: N.
        rows: R.
        experts: L.
        blocks: one scale for 128 columns of a block, instead of one for each column.
        device: where.
        dtype: of the values.

    Returns:
        The operand.
    """
    room = most_blocks(rows, experts)
    values = torch.empty(columns, room * BLOCK, dtype=dtype, device=device)
    shape = (ceil_div(columns, BLOCK), room) if blocks else (room, round_up(columns, SCALE_ALIGNMENT))
    scales = torch.empty(shape, dtype=torch.float32, device=device)
    block_ends = torch.empty(experts, dtype=torch.int32, device=device)
    return Columnwise(values, scales if blocks else scales[:, :columns], block_ends)
