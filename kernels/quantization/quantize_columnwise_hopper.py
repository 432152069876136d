"""`kernels/quantization/quantize_columnwise.py` for Hopper in Gluon, to float8_e4m3fn: tiles are turned in registers.

L experts, M rows of an expert's buffer, R rows of all of them (ragged; padded: L * M), N columns, B blocks of tokens for which there is
room.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moequant.kernels.library.arguments import QuantSpec, Shape, Valid, strided
from moequant.kernels.library.common import MOST_EXPERTS, multiprocessors, runs_gluon
from moequant.kernels.library.hopper_ring import add
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.turning import PATCH, SIZE, Patch, owners, quantize_turned, registers_of, warps_of, warps_of_patch
from moequant.kernels.quantization.quantize_columnwise import Made, Tile
from moequant.sizes import ceil_div, next_power_of_2


class Config(NamedTuple):
    """patch: of a thread. programs: of a multiprocessor, some of which load while another computes; None by the type of rows. num_sms:
    multiprocessors to use; None for all, 0 to compile and no more."""

    patch: Patch = PATCH
    programs: int | None = None
    num_sms: int | None = None


CONFIG = Config()


@gluon.jit
def rows_of(expert, num_tokens, expert_start, experts, rows):
    """The first row and the valid rows of an expert, or of each of several. Past the last expert there are none."""
    there = expert < experts
    count = gl.maximum(gl.load(num_tokens + expert, mask=there, other=0), 0)
    if expert_start is None:
        first = expert * rows
        return first, gl.minimum(count, rows)
    else:
        first = gl.load(expert_start + expert, mask=there, other=0)
        return first, gl.minimum(count, gl.maximum(rows - first, 0))


@launchable
@gluon.jit
def quantize_columnwise_hopper_kernel(
    num_tokens_ptr,
    expert_start_ptr,
    x_ptr,
    x_scales,
    made,
    shape,
    spec,
    TILE: gl.constexpr,
    PATCH: gl.constexpr,
):
    """As `quantize_columnwise_kernel`, which has the example."""
    OWNERS: gl.constexpr = owners(PATCH, False)
    TURNED: gl.constexpr = owners(PATCH, True)
    # every warp has all experts
    EXPERTS: gl.constexpr = gl.BlockedLayout([TILE.experts // 32], [32], [warps_of_patch(PATCH)], [0])
    experts, rows, columns = shape
    room = made.room
    lane = gl.arange(0, TILE.experts, EXPERTS)
    _, counts = rows_of(lane, num_tokens_ptr, expert_start_ptr, experts, rows)
    # an expert without rows has a block too
    ends = gl.associative_scan(gl.where(lane < experts, gl.maximum((counts + (SIZE - 1)) // SIZE, 1), 0), 0, add)
    if gl.program_id(0) == 0:
        gl.store(made.block_ends_ptr + lane, gl.minimum(ends, room), mask=lane < experts)
    column_blocks = (columns + (SIZE - 1)) // SIZE
    token = gl.arange(0, SIZE, gl.SliceLayout(1, OWNERS))
    column_in_tile = gl.arange(0, SIZE, gl.SliceLayout(0, OWNERS))
    # unsigned, so that each address is a number of 32 bits from where the tile begins
    in_tile = (token[:, None] * columns + column_in_tile[None, :]).to(gl.uint32)
    out_row = gl.arange(0, SIZE, gl.SliceLayout(1, TURNED))
    out_token = gl.arange(0, SIZE, gl.SliceLayout(0, TURNED))
    tiles = gl.minimum(gl.max(ends, 0), room) * column_blocks
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = tile // column_blocks
        group = tile % column_blocks
        passed = ends <= block
        expert = gl.sum(passed.to(gl.int32), 0)
        begin = (block - gl.max(gl.where(passed, ends, 0), 0)) * SIZE
        # read again, as few registers are left
        first, count = rows_of(expert, num_tokens_ptr, expert_start_ptr, experts, rows)
        row = (first + begin).to(gl.int64)
        valid = token < count - begin
        mask = valid[:, None]
        if not TILE.even:
            mask = mask & (column_in_tile < columns - group * SIZE)[None, :]
        x = gl.load(x_ptr + (row * columns + group * SIZE) + in_tile, mask=mask, other=0.0).to(gl.float32)
        if x_scales.pointer is not None:
            at = row * x_scales.row
            if expert_start_ptr is None:
                e = expert.to(gl.int64)
                at = e * x_scales.matrix + (row - e * rows) * x_scales.row
            at = x_scales.pointer + (group.to(gl.int64) * x_scales.column + at)
            # values are 0 in rows that were not read, and scales too
            x = x * gl.load(at + (token * x_scales.row).to(gl.uint32), mask=valid, other=0.0)[:, None]
        values, scale = quantize_turned(x, spec, PATCH, TILE.blocks)
        there = out_row < columns - group * SIZE
        if TILE.blocks:
            gl.store(made.scales_ptr + group.to(gl.int64) * made.scale_row + block, scale)
        else:
            gl.store(made.scales_ptr + (block.to(gl.int64) * made.scale_row + group * SIZE) + out_row, scale, mask=there)
        # from each row's beginning anew: what stays the same would stay in registers
        out_at = (
            made.values_ptr + (group * SIZE + out_row).to(gl.int64)[:, None] * (room * SIZE) + (block * SIZE + out_token)[None, :]
        )
        if TILE.even:
            gl.store(out_at, values)
        else:
            gl.store(out_at, values, mask=there[:, None])


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
    config: Config = CONFIG,
) -> None:
    """`quantize_columnwise`, on arguments of which `supports_columnwise` is true."""
    num_tokens, expert_start = valid
    assert num_tokens is not None
    experts, columns = num_tokens.shape[0], x.shape[-1]
    room = values.shape[1] // SIZE.value
    sms = multiprocessors(x.device) if config.num_sms is None else config.num_sms
    # bfloat16 takes more registers, and as many bytes are on their way
    programs = config.programs or (3 if x.itemsize == 1 else 2)
    # one program at least says how many blocks there are
    tiles = max(1, room * ceil_div(columns, SIZE.value))
    quantize_columnwise_hopper_kernel[(min(tiles, sms * programs),)](
        num_tokens,
        expert_start,
        x,
        strided(x_scales),
        Made(values, scales, scales.stride(0), block_ends, room),
        Shape(experts, x.shape[-2], columns),
        spec,
        TILE=Tile(SIZE.value, max(next_power_of_2(experts), 32), columns % SIZE.value == 0, blocks),
        PATCH=config.patch,
        num_warps=warps_of(config.patch),
        maxnreg=registers_of(config.patch, programs),
        enable_fp_fusion=False,
    )


def supports_columnwise(x: Tensor, x_scales: Tensor | None, num_tokens: Tensor, values: Tensor) -> bool:
    """Whether `quantize_columnwise_hopper` takes these arguments."""
    return runs_gluon(x.device) and takes_columnwise(x, x_scales, num_tokens, values)


def takes_columnwise(x: Tensor, x_scales: Tensor | None, num_tokens: Tensor, values: Tensor) -> bool:
    """`supports_columnwise`, but for the device: types, and rows that are moved 16 numbers at a time."""
    return (
        0 < num_tokens.shape[0] <= MOST_EXPERTS
        and x.dtype in (torch.float8_e4m3fn, torch.bfloat16)
        and values.dtype == torch.float8_e4m3fn
        and x.shape[-1] % 16 == 0
        # offsets inside a tile are numbers of 32 bits
        and max(x.shape[-1], values.shape[1], 0 if x_scales is None else x_scales.stride(-2)) < 2**24
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, values))
    )
