"""The way back from quantization in groups of columns or in square blocks.

L matrices, M rows, H columns, G = ceil(H / GROUP) groups of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.launch import launchable


@launchable
@triton.jit
def dequantize_blocks_kernel(
    values_ptr,
    scales_ptr,
    out_ptr,
    rows,
    columns,
    s_stride_l,
    s_stride_m,
    s_stride_g,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Each program has a tile of BLOCK_M rows of one matrix by BLOCK_G groups. One scale is for GROUP_ROWS rows and GROUP columns; values
    and out are contiguous. EVEN: BLOCK_G groups divide the columns.

    Example: 2 matrices of 5 rows and 3 groups, BLOCK_M=4, BLOCK_G=2, GROUP_ROWS=4: 2 row blocks by 2 group blocks are 4 tiles of each.
    Tile 6 is matrix 1, rows 4..7, of which row 4 is there and has the second row of scales, and groups 0..1.
    """
    group_blocks = tl.cdiv(tl.cdiv(columns, GROUP), BLOCK_G)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    matrix = (tile // (group_blocks * row_blocks)).to(tl.int64)
    row = tile // group_blocks % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tile % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    there = row < rows
    at = (matrix * rows + row)[:, None, None] * columns + column
    mask = there[:, None, None]
    if not EVEN:
        mask = mask & (column < columns)
    scale_at = (
        matrix * s_stride_l + (row // GROUP_ROWS).to(tl.int64)[:, None] * s_stride_m + group.to(tl.int64)[None, :] * s_stride_g
    )
    scales = tl.load(scales_ptr + scale_at, mask=there[:, None] & (group * GROUP < columns)[None, :], other=0.0)
    # the zero has the values' type
    values = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (values * scales[:, :, None]).to(out_ptr.dtype.element_ty), mask=mask)


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
    dequantize_blocks_kernel[(matrices * triton.cdiv(rows, block_m) * triton.cdiv(columns, group_size * block_g),)](
        values,
        scales,
        out,
        rows,
        columns,
        *scales.stride(),
        GROUP_ROWS=group_rows,
        GROUP=group_size,
        BLOCK_M=block_m,
        BLOCK_G=block_g,
        EVEN=columns % (group_size * block_g) == 0,
        num_warps=4,
    )
