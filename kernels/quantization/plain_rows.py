"""The rows of an expert batch as products take them that contract them: in bfloat16, with zeros where they go on behind an expert's rows.

L experts, M rows of an expert's buffer, R rows of all of them (ragged; padded: L * M), H columns, G = ceil(H / 128) groups of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Shape, Valid, strided
from moequant.kernels.library.common import num_sms
from moequant.kernels.library.extents import extents_of, locate_extent, most_extents
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2

GROUP = 128


class Tile(NamedTuple):
    """rows, groups: of a tile. experts: rounded up to a power of two. even: the tiles divide the columns."""

    rows: int
    groups: int
    experts: int
    even: bool


@launchable
@triton.jit
def plain_rows_kernel(num_tokens_ptr, expert_start_ptr, values_ptr, scales, out_ptr, shape, TILE: tl.constexpr):
    """Tiles of BLOCK_M rows by BLOCK_G groups are dealt to the programs in turn. Without values, out has the valid rows, and only
    zeros are written. values and out are contiguous.

    Example: ragged, counts [9, 0, 3], starts [0, 16, 16], BLOCK_M=8, G=3, BLOCK_G=2: 4 blocks of rows by 2 of groups are 8 tiles. Tile 3
    is rows 8..15, of which 8 is valid and the others become zeros, and groups 2..3, of which 2 exists. Tile 6 is rows 24..31, all zeros.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_G: tl.constexpr = TILE.groups
    EXPERTS: tl.constexpr = TILE.experts
    experts, rows, columns = shape
    firsts, counts, extents, ends = extents_of(num_tokens_ptr, expert_start_ptr, experts, rows, BLOCK_M, EXPERTS)
    group_blocks = tl.cdiv(tl.cdiv(columns, 128), BLOCK_G)
    lane = tl.arange(0, BLOCK_M)
    group = tl.arange(0, BLOCK_G)
    in_tile = group[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    for tile in range(tl.program_id(0), tl.max(ends, axis=0) * group_blocks, tl.num_programs(0)):
        expert, first, count, extent = locate_extent(tile // group_blocks, firsts, counts, extents, ends, BLOCK_M, EXPERTS)
        first_group = tile % group_blocks * BLOCK_G
        column = first_group * 128 + in_tile
        row = first.to(tl.int64) + lane
        at = row[:, None, None] * columns + column
        valid = lane < count
        mask = (lane < extent)[:, None, None]
        if not TILE.even:
            mask = mask & (column < columns)
        if values_ptr is None:
            # a block of nothing but valid rows stores nothing
            tl.store(out_ptr + at, tl.zeros(at.shape, out_ptr.dtype.element_ty), mask=mask & (lane >= count)[:, None, None])
        else:
            e = expert.to(tl.int64)
            scale_row = row * scales.row
            if expert_start_ptr is None:
                scale_row = e * scales.matrix + (row - e * rows) * scales.row
            groups = (first_group + group).to(tl.int64)
            scale_mask = valid[:, None] & (groups * 128 < columns)[None, :]
            factors = tl.load(scales.pointer + scale_row[:, None] + groups[None, :] * scales.column, mask=scale_mask, other=0.0)
            numbers = tl.load(values_ptr + at, mask=mask & valid[:, None, None], other=0.0).to(tl.float32)
            # values are 0 in rows that were not read, and scales too
            tl.store(out_ptr + at, (numbers * factors[:, :, None]).to(out_ptr.dtype.element_ty), mask=mask)


def plain_rows(out: torch.Tensor, valid: Valid, values: torch.Tensor | None, scales: torch.Tensor | None) -> None:
    """Writes values * scales of the valid rows, computed in float32 and rounded once, and zeros into the rows that belong to no expert
    and that a product contracts: ragged those up to the next multiple of 16 rows, padded all.

    values: (L, M, H), ragged (R, H), int8 or float8, contiguous, with scales (L, M, G), (R, G) float32, any strides. None: out has its
    valid rows already. out: of values' shape, float, contiguous.
    """
    num_tokens, expert_start = valid
    assert num_tokens is not None
    experts, columns = num_tokens.shape[0], out.shape[-1]
    if out.numel() == 0 or experts == 0:
        return
    shape = Shape(experts, out.shape[-2], columns)
    tile = Tile(8, 4, next_power_of_2(experts), columns % (4 * GROUP) == 0)
    worst = most_extents(experts, shape.rows, tile.rows, expert_start is not None) * ceil_div(columns, tile.groups * GROUP)
    plain_rows_kernel[(min(worst, num_sms(out.device) * 16),)](
        num_tokens, expert_start, values, strided(scales), out, shape, TILE=tile, num_warps=4
    )
