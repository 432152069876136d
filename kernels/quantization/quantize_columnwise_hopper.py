"""`kernels/quantization/quantize_columnwise.py` for Hopper in Gluon, to float8_e4m3fn: tiles are turned in registers.

L experts, M rows of an expert's buffer, R rows of all of them (ragged; padded: L * M), N columns, B blocks of tokens for which there is
room.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moequant.kernels.library.arguments import QuantSpec, Shape, Valid, strided
from moequant.kernels.library.common import MOST_EXPERTS, multiprocessors, runs_gluon
from moequant.kernels.library.hopper_ring import add
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.turning import PATCH, SIZE, Patch, owners, quantize_turned, warps_of
from moequant.kernels.quantization.quantize_columnwise import Made, Tile


@gluon.jit
def filled_blocks(num_tokens, expert_start, lane, experts, rows, SIZE: gl.constexpr):
    """`kernels/library/extents.py`'s, of experts that are `lane`: each expert's first row, its valid rows, and the blocks of this and all
    earlier experts."""
    there = lane < experts
    counts = gl.maximum(gl.load(num_tokens + lane, mask=there, other=0), 0)
    if expert_start is None:
        firsts = lane * rows
        counts = gl.minimum(counts, rows)
    else:
        firsts = gl.load(expert_start + lane, mask=there, other=0)
        counts = gl.minimum(counts, gl.maximum(rows - firsts, 0))
    blocks = gl.where(there, gl.maximum((counts + (SIZE - 1)) // SIZE, 1), 0)
    return firsts, counts, gl.associative_scan(blocks, 0, add)


@gluon.jit
def locate_block(block, lane, firsts, counts, ends, SIZE: gl.constexpr):
    """The expert of a block, the block's first row in the buffer, and how many rows are valid from there on."""
    passed = ends <= block
    expert = gl.sum(passed.to(gl.int32), 0)
    begin = (block - gl.max(gl.where(passed, ends, 0), 0)) * SIZE
    mine = lane == expert
    return expert, gl.sum(gl.where(mine, firsts, 0), 0) + begin, gl.sum(gl.where(mine, counts, 0), 0) - begin


@launchable
@gluon.jit
def quantize_columnwise_hopper_kernel(
    num_tokens_ptr, expert_start_ptr, x_ptr, x_scales, made, shape, spec, TILE: gl.constexpr, PATCH: gl.constexpr, WARPS: gl.constexpr
):
    """As `quantize_columnwise_kernel`, which has the example."""
    SIZE: gl.constexpr = TILE.size
    OWNERS: gl.constexpr = owners(PATCH, False)
    TURNED: gl.constexpr = owners(PATCH, True)
    # every warp has all experts
    EXPERTS: gl.constexpr = gl.BlockedLayout([max(TILE.experts // 32, 1)], [32], [WARPS], [0])
    experts, rows, columns = shape
    room = made.room
    lane = gl.arange(0, TILE.experts, EXPERTS)
    firsts, counts, ends = filled_blocks(num_tokens_ptr, expert_start_ptr, lane, experts, rows, SIZE)
    if gl.program_id(0) == 0:
        gl.store(made.block_ends_ptr + lane, gl.minimum(ends, room), mask=lane < experts)
    column_blocks = (columns + (SIZE - 1)) // SIZE
    token = gl.arange(0, SIZE, gl.SliceLayout(1, OWNERS))
    out_token = gl.arange(0, SIZE, gl.SliceLayout(0, TURNED))
    tiles = gl.minimum(gl.max(ends, 0), room) * column_blocks
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // column_blocks
        group = tile % column_blocks
        expert, first, count = locate_block(block, lane, firsts, counts, ends, SIZE)
        row = first.to(gl.int64) + token
        column = group * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, OWNERS))
        valid = token < count
        mask = valid[:, None]
        if not TILE.even:
            mask = mask & (column < columns)[None, :]
        x = gl.load(x_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(gl.float32)
        if x_scales.pointer is not None:
            scale_row = row * x_scales.row
            if expert_start_ptr is None:
                e = expert.to(gl.int64)
                scale_row = e * x_scales.matrix + (row - e * rows) * x_scales.row
            at = x_scales.pointer + group.to(gl.int64) * x_scales.column
            # values are 0 in rows that were not read, and scales too
            x = x * gl.load(at + scale_row, mask=valid, other=0.0)[:, None]
        values, scale = quantize_turned(x, spec, PATCH, TILE.blocks)
        out_row = group * SIZE + gl.arange(0, SIZE, gl.SliceLayout(1, TURNED))
        if TILE.blocks:
            gl.store(made.scales_ptr + group.to(gl.int64) * made.scale_row + block, scale)
        else:
            gl.store(made.scales_ptr + block.to(gl.int64) * made.scale_row + out_row, scale, mask=out_row < columns)
        out_at = made.values_ptr + out_row.to(gl.int64)[:, None] * (room * SIZE) + (block.to(gl.int64) * SIZE + out_token)[None, :]
        if TILE.even:
            gl.store(out_at, values)
        else:
            gl.store(out_at, values, mask=(out_row < columns)[:, None])


def quantize_columnwise_hopper(
    x: Tensor,
    x_scales: Tensor | None,
    valid: Valid,
    values: Tensor,
    scales: Tensor,
    block_ends: Tensor,
    spec: QuantSpec,
    *,
    blocks: bool,
    patch: Patch = PATCH,
    programs: int = 2,
) -> None:
    """`quantize_columnwise`, on arguments of which `supports_columnwise` is true.

    patch: of a thread. programs: on each multiprocessor.
    """
    num_tokens, expert_start = valid
    assert num_tokens is not None
    experts, columns = num_tokens.shape[0], x.shape[-1]
    room, warps = values.shape[1] // SIZE, warps_of(patch)
    # one program at least says how many blocks there are
    grid = max(1, min(room * triton.cdiv(columns, SIZE), multiprocessors(x.device) * programs))
    quantize_columnwise_hopper_kernel[(grid,)](
        num_tokens,
        expert_start,
        x,
        strided(x_scales),
        Made(values, scales, scales.stride(0), block_ends, room),
        Shape(experts, x.shape[-2], columns),
        spec,
        TILE=Tile(SIZE, triton.next_power_of_2(experts), columns % SIZE == 0, blocks),
        PATCH=patch,
        WARPS=warps,
        num_warps=warps,
        # two programs on a multiprocessor, one of which loads while the other computes
        maxnreg=65536 // (programs * 32 * warps) // 8 * 8,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )


def supports_columnwise(x: Tensor, num_tokens: Tensor, values: Tensor) -> bool:
    """Whether `quantize_columnwise_hopper` takes these arguments."""
    return runs_gluon(x.device) and takes_columnwise(x, num_tokens, values)


def takes_columnwise(x: Tensor, num_tokens: Tensor, values: Tensor) -> bool:
    """`supports_columnwise`, but for the device: types, and rows that are moved 16 numbers at a time."""
    return (
        0 < num_tokens.shape[0] <= MOST_EXPERTS
        and x.dtype in (torch.float8_e4m3fn, torch.bfloat16)
        and values.dtype == torch.float8_e4m3fn
        and x.shape[-1] % 16 == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, values))
    )
