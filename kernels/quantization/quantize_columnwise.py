"""Rows of an expert batch quantized once more along the tokens, and transposed, as products read them that contract tokens.

L experts, M rows of an expert's buffer, R rows of all of them (ragged; padded: L * M), N columns, B blocks of tokens for which there is
room.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import QuantSpec, Shape, Valid, strided
from moequant.kernels.library.common import num_sms, quantize_group, quantize_tile
from moequant.kernels.library.extents import filled_blocks, locate_extent
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2

BLOCK = 128


class Made(NamedTuple):
    """What is written, contiguous but for rows of scales that are scale_row numbers apart. room: B."""

    values_ptr: torch.Tensor
    scales_ptr: torch.Tensor
    scale_row: int
    block_ends_ptr: torch.Tensor
    room: int


class Tile(NamedTuple):
    """size: tokens and columns of a tile. experts: rounded up to a power of two. even: tiles divide the columns. blocks: a tile has one
    scale, instead of one for each column."""

    size: int
    experts: int
    even: bool
    blocks: bool


@launchable
@triton.jit
def quantize_columnwise_kernel(num_tokens_ptr, expert_start_ptr, x_ptr, x_scales, made, shape, spec, TILE: tl.constexpr):
    """Tiles of SIZE tokens by SIZE columns, blocks and then columns, are dealt to the programs in turn. x is contiguous. An expert
    without rows has a block of zeros; blocks past the room are left out, which are some where experts' rows overlap.

    Example: SIZE=4, ragged, R=24, N=6, counts [5, 0, 3], starts [0, 16, 16]: blocks are rows 0..3 and 4 of expert 0, none of expert 1,
    and 16..18 of expert 2; block_ends [2, 3, 4], room 24 // 4 + 3 = 9. Each has 2 tiles. Tile 3 is block 1 and columns 4..5, and becomes
    numbers 4..7 of rows 4..5 of values, of which number 4 is row 4's, and the others are zeros.
    """
    SIZE: tl.constexpr = TILE.size
    experts, rows, columns = shape
    room = made.room
    target: tl.constexpr = made.values_ptr.dtype.element_ty
    firsts, counts, extents, ends = filled_blocks(num_tokens_ptr, expert_start_ptr, experts, rows, SIZE, TILE.experts)
    if tl.program_id(0) == 0:
        lane = tl.arange(0, TILE.experts)
        tl.store(made.block_ends_ptr + lane, tl.minimum(ends, room), mask=lane < experts)
    column_blocks = tl.cdiv(columns, SIZE)
    token = tl.arange(0, SIZE)
    in_tile = token[:, None] * columns + tl.arange(0, SIZE)[None, :]
    out_in_tile = tl.arange(0, SIZE).to(tl.int64)[:, None] * (room * SIZE) + token[None, :]
    tiles = tl.minimum(tl.max(ends, axis=0), room) * column_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block, group = tile // column_blocks, tile % column_blocks
        expert, first, count, _ = locate_extent(block, firsts, counts, extents, ends, SIZE, TILE.experts)
        row = first.to(tl.int64)
        column = group * SIZE + tl.arange(0, SIZE)
        valid = token < count
        mask = valid[:, None]
        if not TILE.even:
            mask = mask & (column < columns)[None, :]
        x = tl.load(x_ptr + (row * columns + group * SIZE) + in_tile, mask=mask, other=0.0).to(tl.float32)
        if x_scales.pointer is not None:
            scale_row = (row + token) * x_scales.row
            if expert_start_ptr is None:
                e = expert.to(tl.int64)
                scale_row = e * x_scales.matrix + (row - e * rows + token) * x_scales.row
            at = x_scales.pointer + group.to(tl.int64) * x_scales.column
            # values are 0 in rows that were not read, and scales too
            x = x * tl.load(at + scale_row, mask=valid, other=0.0)[:, None]
        if TILE.blocks:
            narrow, scale = quantize_tile(x, spec, target)
            tl.store(made.scales_ptr + group.to(tl.int64) * made.scale_row + block + tl.zeros((1, 1), tl.int32), scale)
        else:
            narrow, scale = quantize_group(x, spec, 0, target)
            tl.store(made.scales_ptr + block.to(tl.int64) * made.scale_row + column, scale, mask=column < columns)
        out_at = made.values_ptr + (group * SIZE).to(tl.int64) * (room * SIZE) + block.to(tl.int64) * SIZE
        if TILE.even:
            tl.store(out_at + out_in_tile, tl.trans(narrow))
        else:
            tl.store(out_at + out_in_tile, tl.trans(narrow), mask=(column < columns)[:, None])


def quantize_columnwise(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    valid: Valid,
    values: torch.Tensor,
    scales: torch.Tensor,
    block_ends: torch.Tensor,
    spec: QuantSpec,
    *,
    blocks: bool,
) -> None:
    """Writes values and scales of the blocks that are there, and how many there are up to each expert. For NVIDIA GPUs.

    x: (L, M, N), ragged (R, N), contiguous: narrow, with x_scales (L, M, ceil(N / 128)), ragged (R, ceil(N / 128)), float32, any strides;
    or float, with None. values: (N, 128 * B) narrow, contiguous. scales: float32 with rows of any stride, (B, N), or with `blocks`
    (ceil(N / 128), B). block_ends: (L,) int32. spec: of powers of two.
    """
    num_tokens, expert_start = valid
    assert num_tokens is not None
    experts, columns = num_tokens.shape[0], x.shape[-1]
    if experts == 0:
        return
    room = values.shape[1] // BLOCK
    # one program at least says how many blocks there are
    programs = max(1, min(room * ceil_div(columns, BLOCK), num_sms(x.device) * 16))
    quantize_columnwise_kernel[(programs,)](
        num_tokens,
        expert_start,
        x,
        strided(x_scales),
        Made(values, scales, scales.stride(0), block_ends, room),
        Shape(experts, x.shape[-2], columns),
        spec,
        TILE=Tile(BLOCK, next_power_of_2(experts), columns % BLOCK == 0, blocks),
        num_warps=8,
        # two programs on a multiprocessor, one of which loads while the other computes; rows that are read number by number take more
        maxnreg=128 if columns % 16 == 0 else None,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
