"""Copies the valid rows of an expert's output: to a buffer of this rank, or each to where its token came from.

L local experts, M rows of an expert's buffer, R rows of the rank's, if the layout is ragged, H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Shape
from moequant.kernels.library.common import first_row, locate_block, most_row_tiles, num_sms, row_blocks
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2


@launchable
@triton.jit
def push_rows_kernel(
    y_ptr,
    num_tokens_ptr,
    expert_start_ptr,
    out_ptr,
    destinations_ptr,
    shape,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Tiles of BLOCK valid rows and BLOCK_H columns are dealt to the programs in turn. destinations_ptr, or out_ptr, is None.

    Example: M=8, L=2, counts [3, 1]: row 0 of expert 1 is flat row 8, and goes to the address destinations[8].
    """
    columns = shape.columns
    counts, ends = row_blocks(num_tokens_ptr, shape.experts, shape.rows, BLOCK, EXPERTS, True, expert_start_ptr)
    column_blocks = tl.cdiv(columns, BLOCK_H)
    for tile in range(tl.program_id(0), tl.max(ends, axis=0) * column_blocks, tl.num_programs(0)):
        expert, first, count = locate_block(tile // column_blocks, counts, ends, BLOCK, EXPERTS)
        row = first + tl.arange(0, BLOCK)
        column = tile % column_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        there = row < count
        flat = first_row(expert_start_ptr, expert.to(tl.int64), shape.rows) + row
        inside = there[:, None] & (column < columns)[None, :]
        y = tl.load(y_ptr + flat[:, None] * columns + column[None, :], mask=inside)
        if destinations_ptr is None:
            tl.store(out_ptr + flat[:, None] * columns + column[None, :], y, mask=inside)
        else:
            address = tl.load(destinations_ptr + flat, mask=there, other=0)
            at = address.to(tl.pointer_type(y_ptr.dtype.element_ty))[:, None] + column[None, :]
            # the compiler knows nothing of addresses in a table: rows begin at multiples of 16 bytes where H allows
            if columns % 8 == 0:
                at = tl.max_contiguous(tl.multiple_of(at, (16, 16)), (1, 8))
            tl.store(at, y, mask=inside)


def push_rows(
    y: torch.Tensor,
    num_tokens: torch.Tensor,
    expert_start: torch.Tensor | None,
    out: torch.Tensor | None,
    destinations: torch.Tensor | None,
) -> None:
    """y: (L, M, H) of 2 bytes a number, contiguous, or (R, H) with expert_start. num_tokens, expert_start: (L,) int32. One of out, like
    y, and destinations (L, M) or (R,) int64, addresses, says where the valid rows go."""
    shape = Shape(num_tokens.shape[0], *y.shape[-2:])
    block, block_h = 8, 512
    worst = most_row_tiles(shape.experts, shape.rows, block, expert_start) * ceil_div(shape.columns, block_h)
    push_rows_kernel[(min(worst, 8 * num_sms(y.device)),)](
        y,
        num_tokens,
        expert_start,
        out,
        destinations,
        shape=shape,
        BLOCK=block,
        BLOCK_H=block_h,
        EXPERTS=next_power_of_2(shape.experts),
        num_warps=4,
    )
