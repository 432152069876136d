"""The way back from quantization in groups of columns or in square blocks.

L matrices, M rows, H columns, G = ceil(H / GROUP) groups of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import strided
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div


class Tile(NamedTuple):
    """rows, groups: of a program's tile. One scale is for group_rows rows and `group` columns. even: the tiles divide the columns."""

    rows: int
    groups: int
    group_rows: int
    group: int
    even: bool


@launchable
@triton.jit
def dequantize_blocks_kernel(
    values_ptr,
    scales,
    out_ptr,
    rows,
    columns,
    TILE: tl.constexpr,
):
    """Each program has a tile of one matrix. values and out are contiguous.

    Example: 2 matrices of 5 rows and 3 groups, tiles of 4 rows by 2 groups, group_rows=4: 2 row blocks by 2 group blocks are 4 tiles
    of each. Tile 6 is matrix 1, rows 4..7, of which row 4 is there and has the second row of scales, and groups 0..1.
    """
    GROUP: tl.constexpr = TILE.group
    group_blocks = tl.cdiv(tl.cdiv(columns, GROUP), TILE.groups)
    row_blocks = tl.cdiv(rows, TILE.rows)
    tile = tl.program_id(0)
    matrix = (tile // (group_blocks * row_blocks)).to(tl.int64)
    row = tile // group_blocks % row_blocks * TILE.rows + tl.arange(0, TILE.rows)
    group = tile % group_blocks * TILE.groups + tl.arange(0, TILE.groups)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    there = row < rows
    at = (matrix * rows + row)[:, None, None] * columns + column
    mask = there[:, None, None]
    if not TILE.even:
        mask = mask & (column < columns)
    scale_at = (
        matrix * scales.matrix
        + (row // TILE.group_rows).to(tl.int64)[:, None] * scales.row
        + group.to(tl.int64)[None, :] * scales.column
    )
    factors = tl.load(scales.pointer + scale_at, mask=there[:, None] & (group * GROUP < columns)[None, :], other=0.0)
    # the zero has the values' type
    values = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (values * factors[:, :, None]).to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, *, group_rows: int, group_size: int) -> None:
    """Writes values * scales, computed in float32 and rounded once.

    values: (L, M, H) int8 or float8, contiguous. scales: (L, ceil(M / group_rows), ceil(H / group_size)) float32, any strides.
    out: (L, M, H) float, contiguous. group_size: a power of two, at most 512.
    """
    matrices, rows, columns = values.shape
    if values.numel() == 0:
        return
    # 16 numbers a thread
    block_g = 512 // group_size
    block_m = 4
    dequantize_blocks_kernel[(matrices * ceil_div(rows, block_m) * ceil_div(columns, group_size * block_g),)](
        values,
        strided(scales),
        out,
        rows=rows,
        columns=columns,
        TILE=Tile(block_m, block_g, group_rows, group_size, even=columns % (group_size * block_g) == 0),
        num_warps=4,
    )
