"""The walk over the rows of an expert batch's experts, those behind that belong to none among it.

A sum over an expert's rows by products contracts them in whole steps, and so goes on behind the last one: over rows that have to hold
zeros. Ragged, those are the rows up to the next multiple of ALIGNMENT; padded, all of an expert's buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moequant.sizes import ceil_div

# of the first rows of experts in a ragged buffer: `moequant.config.ROW_ALIGNMENT`
ALIGNMENT = tl.constexpr(16)


@triton.jit
def extents_of(num_tokens_ptr, expert_start_ptr, experts, rows, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Of each expert: its first row, its valid rows, its rows with those that have to be zero, and the blocks of BLOCK rows of this and
    all earlier experts. Arguments are those of `row_blocks`.

    Example: ragged, R=48, BLOCK=8, counts [9, 0, 3], starts [0, 16, 16]: extents [16, 0, 16], ends [2, 2, 4]. Block 3 is rows 24..31, of
    expert 2, of which none is valid. Padded with 20 rows each: firsts [0, 20, 40], extents [20, 20, 20], ends [3, 6, 9].
    """
    lane = tl.arange(0, EXPERTS)
    there = lane < experts
    counts = tl.maximum(tl.load(num_tokens_ptr + lane, mask=there, other=0), 0)
    if expert_start_ptr is None:
        firsts = lane * rows
        counts = tl.minimum(counts, rows)
        extents = tl.where(there, rows, 0)
    else:
        firsts = tl.load(expert_start_ptr + lane, mask=there, other=0)
        room = tl.maximum(rows - firsts, 0)
        counts = tl.minimum(counts, room)
        extents = tl.minimum((counts + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT, room)
    return firsts, counts, extents, tl.cumsum((extents + (BLOCK - 1)) // BLOCK, axis=0)


@triton.jit
def filled_blocks(num_tokens_ptr, expert_start_ptr, experts, rows, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """`extents_of` without rows behind the valid ones, but for one of an expert that has none: each expert has a block.

    Example: BLOCK=8, counts [9, 0, 3]: extents [9, 1, 3], ends [2, 3, 4].
    """
    firsts, counts, _, _ = extents_of(num_tokens_ptr, expert_start_ptr, experts, rows, BLOCK, EXPERTS)
    extents = tl.where(tl.arange(0, EXPERTS) < experts, tl.maximum(counts, 1), 0)
    return firsts, counts, extents, tl.cumsum((extents + (BLOCK - 1)) // BLOCK, axis=0)


@triton.jit
def locate_extent(block, firsts, counts, extents, ends, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a block, the block's first row in the buffer, and from there on the valid rows and those with zeros; both may be more
    than a block, or none."""
    lane = tl.arange(0, EXPERTS)
    expert = tl.sum((ends <= block).to(tl.int32), axis=0)
    mine = lane == expert
    extent = tl.sum(tl.where(mine, extents, 0), axis=0)
    begin = (block - (tl.sum(tl.where(mine, ends, 0), axis=0) - (extent + (BLOCK - 1)) // BLOCK)) * BLOCK
    first = tl.sum(tl.where(mine, firsts, 0), axis=0) + begin
    return expert, first, tl.sum(tl.where(mine, counts, 0), axis=0) - begin, extent - begin


def most_extents(experts: int, rows: int, block: int, ragged: bool) -> int:
    """How many blocks there are at most. rows: M, or R of ragged rows. block: divides ALIGNMENT."""
    return rows // block + experts if ragged else experts * ceil_div(rows, block)
