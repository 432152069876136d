"""Quantizes weights in square blocks, one scale a block.

E experts, N rows and K_dim columns of a weight, B numbers along a block's side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import divide_and_round, group_scale, storable
from moequant.kernels.library.launch import launchable


@launchable
@triton.jit
def quantize_weight_kernel(
    w_ptr,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    row_blocks,
    column_blocks,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    eps,
    MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    B: tl.constexpr,
):
    """A program has one block. rows: of one of a weight's SEGMENTS parts, which has row_blocks of them; values and scales are contiguous.

    Example: B=4, N=12 in 2 segments of 6 rows, K_dim=5: 2 row blocks a segment by 2 column blocks, 8 blocks an expert. Block 11 is block
    3 of expert 1: segment 0, row block 1 and column block 1, which is rows 4..5 and column 4.
    """
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

    x = tl.load(w_ptr + expert * w_stride_e + n * w_stride_n + k.to(tl.int64) * w_stride_k, mask=mask, other=0.0).to(tl.float32)
    bits = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True), axis=0, keep_dims=True)
    scale = group_scale(bits, eps, MAX, POWER_OF_TWO)
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    values = divide_and_round(x, bits, scale, reciprocal, RECIPROCAL, values_ptr.dtype.element_ty)
    tl.store(values_ptr + (expert * (SEGMENTS * rows) + n) * columns + k, values, mask=mask)
    tl.store(scales_ptr + block + tl.zeros((1, 1), tl.int32), scale)


def quantize_weight(
    w: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    segments: int,
    block_size: int,
    max_value: float,
    eps: float,
    power_of_two: bool,
    reciprocal: bool,
) -> None:
    """Writes values and scales.

    w: (E, N, K_dim) float, any strides. values: (E, N, K_dim) contiguous. scales: (E, segments * ceil(N / segments / block_size),
    ceil(K_dim / block_size)) float32 contiguous. block_size: 32, 64 or 128. max_value, eps, power_of_two, reciprocal: the format's and
    the recipe's, see `moequant.formats`.
    """
    if scales.numel() == 0:
        return
    quantize_weight_kernel[(scales.numel(),)](
        w,
        storable(values),
        scales,
        w.shape[1] // segments,
        w.shape[2],
        scales.shape[1] // segments,
        scales.shape[2],
        *w.stride(),
        eps,
        MAX=max_value,
        POWER_OF_TWO=power_of_two,
        RECIPROCAL=reciprocal,
        SEGMENTS=segments,
        B=block_size,
        num_warps=max(1, block_size * block_size // 2048),
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
