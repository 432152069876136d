"""Quantizes weights in square blocks, one scale a block.

E experts, N rows and K_dim columns of a weight, B numbers along a block's side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import QuantSpec, strided
from moequant.kernels.library.common import quantize_tile, storable
from moequant.kernels.library.launch import launchable


@launchable
@triton.jit
def quantize_weight_kernel(
    w,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    blocks,
    spec,
    SEGMENTS: tl.constexpr,
    B: tl.constexpr,
):
    """A program has one block. rows: of one of a weight's SEGMENTS parts. blocks: of such a part, along its columns and along its rows.
    values and scales are contiguous.

    Example: B=4, N=12 in 2 segments of 6 rows, K_dim=5: 2 row blocks a segment by 2 column blocks, 8 blocks an expert. Block 11 is block
    3 of expert 1: segment 0, row block 1 and column block 1, which is rows 4..5 and column 4.
    """
    row_blocks, column_blocks = blocks
    block = tl.program_id(0)
    column_block = block % column_blocks
    row_block = block // column_blocks % row_blocks
    segment = block // (column_blocks * row_blocks)
    expert, segment = (segment // SEGMENTS).to(tl.int64), segment % SEGMENTS
    row = row_block * B + tl.arange(0, B)
    column = column_block * B + tl.arange(0, B)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    n = (segment * rows + row).to(tl.int64)[:, None]
    k = column[None, :]

    x = tl.load(w.pointer + expert * w.matrix + n * w.row + k.to(tl.int64) * w.column, mask=mask, other=0.0).to(tl.float32)
    values, scale = quantize_tile(x, spec, values_ptr.dtype.element_ty)
    tl.store(values_ptr + (expert * (SEGMENTS * rows) + n) * columns + k, values, mask=mask)
    tl.store(scales_ptr + block + tl.zeros((1, 1), tl.int32), scale)


def quantize_weight(
    w: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    *,
    segments: int,
    block_size: int,
) -> None:
    """Writes values and scales.

    w: (E, N, K_dim) float, any strides. values: (E, N, K_dim) contiguous. scales: (E, segments * ceil(N / segments / block_size),
    ceil(K_dim / block_size)) float32 contiguous. block_size: 32, 64 or 128.
    """
    if scales.numel() == 0:
        return
    quantize_weight_kernel[(scales.numel(),)](
        strided(w),
        storable(values),
        scales,
        rows=w.shape[1] // segments,
        columns=w.shape[2],
        blocks=(scales.shape[1] // segments, scales.shape[2]),
        spec=spec,
        SEGMENTS=segments,
        B=block_size,
        num_warps=max(1, block_size * block_size // 2048),
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
