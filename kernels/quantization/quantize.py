"""Quantizes the valid rows of an expert batch in groups along the hidden dimension, as they are or after an activation.

L experts, M rows of an expert's buffer, R rows of all experts together (ragged), H columns, G groups of GROUP columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.activations import Activation, activated
from moequant.kernels.library.arguments import QuantSpec, Shape, Strided, Valid, strided
from moequant.kernels.library.common import (
    locate_block,
    most_row_tiles,
    num_sms,
    quantize_group,
    row_blocks,
    storable,
)
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2


class Cut(NamedTuple):
    """How a launch cuts an expert batch: rows and groups of a tile, warps of a program, programs for each multiprocessor."""

    rows: int
    groups: int
    warps: int
    programs_per_sm: int


class Tile(NamedTuple):
    """rows, groups: of a tile. group: columns of one. experts: rounded up to a power of two. even: the tiles divide the columns.
    packed: scales are exponents. activation: or None."""

    rows: int
    groups: int
    group: int
    experts: int
    even: bool
    packed: bool
    activation: Activation | None


@triton.jit
def tile_mask(first_row, first_column, row, column, count, columns, EVEN: tl.constexpr):
    """Which of a tile's numbers are there. Made anew wherever it is needed: a mask kept from one tile to the next would be kept number by
    number."""
    mask = (first_row + row < count)[:, None, None]
    if not EVEN:
        mask = mask & (first_column + column < columns)
    return mask


@triton.jit
def load_tile(x, expert, first_row, first_column, in_tile, mask, columns, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The tile's numbers, in their own type, and the ones that they gate: `columns` further on, or, interleaved, half a step."""
    at = x.pointer + expert.to(tl.int64) * x.matrix + first_row.to(tl.int64) * x.row + first_column.to(tl.int64) * x.column
    gate = tl.load(at + in_tile, mask=mask, other=0.0)
    up = gate
    if GATED:
        away = x.column // 2 if INTERLEAVED else tl.cast(columns, tl.int64) * x.column
        up = tl.load(at + away + in_tile, mask=mask, other=0.0)
    return gate, up


@triton.jit
def load_bias(bias_ptr, expert, column, columns, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """An expert's biases of some of the output's columns, for what `load_tile` loads, in float32."""
    wide: tl.constexpr = 2 if GATED else 1
    step: tl.constexpr = 2 if INTERLEAVED else 1
    at = bias_ptr + expert.to(tl.int64) * (columns * wide) + column * step
    gate = tl.load(at, mask=column < columns, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(at + (1 if INTERLEAVED else columns), mask=column < columns, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def locate_rows(
    block, counts, ends, expert_start_ptr, experts, rows, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, COUNTED: tl.constexpr
):
    """As `locate_block`, with the expert's first row, where there is a table of them, in its place.

    Without counts block after block of rows, of all experts each: where these are the heads of a matrix's rows,
    what is written at one time lies side by side.

    Example: two experts of 20 rows, BLOCK=8: blocks 0..5 are rows 0 of experts 0 and 1, rows 8 of both, rows 16 of both.
    """
    if COUNTED:
        expert, first, count = locate_block(block, counts, ends, BLOCK, EXPERTS)
        if expert_start_ptr is not None:
            # there are blocks past the last one
            expert = tl.load(expert_start_ptr + expert, mask=expert < experts, other=0)
        return expert, first, count
    else:
        return block % experts, block // experts * BLOCK, rows


@launchable
@triton.jit
def quantize_kernel(
    num_tokens_ptr,
    expert_start_ptr,
    x,
    bias_ptr,
    values,
    scales,
    shape,
    spec,
    TILE: tl.constexpr,
):
    """Each tile is BLOCK_M rows of one expert by BLOCK_G groups of the output's columns; tiles cover valid rows only and are dealt to
    the programs in turn. A program loads its next tile before it works on the present one.

    TILE.activation: None, or column i of the output is made of x[i] and x[columns + i], interleaved of x[i] and the column behind it:
    columns of x are two apart then. bias_ptr: one row for each expert, in the order of x's columns, added in float32 to begin with.
    Without scales the numbers are stored as they are.
    expert_start_ptr: None, or each expert's first row; tensors have two dimensions then, and rows as `Strided` says.
    TILE.packed: scales are exponents, a byte each; four groups lie side by side, scales.column bytes from the next four. BLOCK_G is
    then a multiple of 4.

    Example: counts [9, 0, 3], BLOCK_M=8, G=3, BLOCK_G=2: 3 row blocks by 2 group blocks are 6 tiles; tile 3 is row block 1 (rows 8..15
    of expert 0, of which row 8 is valid) and groups 2..3 (of which 2 exists).
    """
    COUNTED: tl.constexpr = num_tokens_ptr is not None
    GROUP: tl.constexpr = TILE.group
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_G: tl.constexpr = TILE.groups
    EXPERTS: tl.constexpr = TILE.experts
    EVEN: tl.constexpr = TILE.even
    ACTIVATION: tl.constexpr = TILE.activation
    GATED: tl.constexpr = ACTIVATION is not None and ACTIVATION.gated
    INTERLEAVED: tl.constexpr = GATED and ACTIVATION.interleaved
    PACKED: tl.constexpr = TILE.packed
    experts, rows, columns = shape
    counts, ends = row_blocks(num_tokens_ptr, experts, rows, BLOCK_M, EXPERTS, COUNTED, expert_start_ptr)
    groups = tl.cdiv(columns, GROUP)
    group_blocks = tl.cdiv(groups, BLOCK_G)
    tiles = tl.max(ends, axis=0) * group_blocks

    # the same for every tile, so that a tile adds one base to each
    row = tl.arange(0, BLOCK_M)
    group = tl.arange(0, BLOCK_G)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    row64 = row.to(tl.int64)[:, None, None]
    in_tile = row64 * x.row + column.to(tl.int64) * x.column
    out_in_tile = row64 * values.row + column.to(tl.int64) * values.column
    scale_in_group = group // 4 * tl.cast(scales.column, tl.int64) + group % 4 if PACKED else group.to(tl.int64) * scales.column
    scale_in_tile = row.to(tl.int64)[:, None] * scales.row + scale_in_group[None, :]

    tile = tl.program_id(0)
    block = tile // group_blocks
    expert, first_row, count = locate_rows(block, counts, ends, expert_start_ptr, experts, rows, BLOCK_M, EXPERTS, COUNTED)
    first_group = tile % group_blocks * BLOCK_G
    mask = tile_mask(first_row, first_group * GROUP, row, column, count, columns, EVEN)
    gate, up = load_tile(x, expert, first_row, first_group * GROUP, in_tile, mask, columns, GATED, INTERLEAVED)
    while tile < tiles:
        next_tile = tile + tl.num_programs(0)
        # past the last tile there is no valid row
        next_block = next_tile // group_blocks
        next_expert, next_row, next_count = locate_rows(
            next_block, counts, ends, expert_start_ptr, experts, rows, BLOCK_M, EXPERTS, COUNTED
        )
        next_group = next_tile % group_blocks * BLOCK_G
        mask = tile_mask(next_row, next_group * GROUP, row, column, next_count, columns, EVEN)
        next_gate, next_up = load_tile(x, next_expert, next_row, next_group * GROUP, in_tile, mask, columns, GATED, INTERLEAVED)

        e = expert.to(tl.int64)
        m = first_row.to(tl.int64)
        g = first_group.to(tl.int64)
        mask = tile_mask(first_row, first_group * GROUP, row, column, count, columns, EVEN)
        numbers, gated = gate.to(tl.float32), up.to(tl.float32)
        if bias_ptr is not None:
            # asked anew: with expert_start `expert` is a row
            number, _, _ = locate_rows(tile // group_blocks, counts, ends, None, experts, rows, BLOCK_M, EXPERTS, COUNTED)
            gate_bias, up_bias = load_bias(bias_ptr, number, first_group * GROUP + column, columns, GATED, INTERLEAVED)
            numbers, gated = numbers + gate_bias, gated + up_bias
        if ACTIVATION is not None:
            numbers = activated(numbers, gated, ACTIVATION)
        values_at = values.pointer + e * values.matrix + m * values.row + g * GROUP * values.column
        if scales.pointer is None:
            tl.store(values_at + out_in_tile, numbers.to(values.pointer.dtype.element_ty), mask=mask)
        else:
            narrow, factors = quantize_group(numbers, spec, 2, values.pointer.dtype.element_ty)
            tl.store(values_at + out_in_tile, narrow, mask=mask)
            valid = (first_row + row < count)[:, None]
            in_group = (first_group + group)[None, :]
            if PACKED:
                scales_at = scales.pointer + e * scales.matrix + m * scales.row + g // 4 * scales.column
                exponents = tl.where(in_group < groups, factors.to(tl.int32, bitcast=True) >> 23, 0).to(tl.uint8)
                tl.store(scales_at + scale_in_tile, exponents, mask=valid & (in_group < tl.cdiv(groups, 4) * 4))
            else:
                scales_at = scales.pointer + e * scales.matrix + m * scales.row + g * scales.column
                tl.store(scales_at + scale_in_tile, factors, mask=valid & (in_group < groups))

        tile, expert, first_row, first_group, count = next_tile, next_expert, next_row, next_group, next_count
        gate, up = next_gate, next_up


def launch_quantize(
    x: torch.Tensor,
    valid: Valid,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    spec: QuantSpec | None,
    cut: Cut,
    *,
    activation: Activation | None = None,
    bias: torch.Tensor | None = None,
    group_size: int = 128,
) -> None:
    """Launches the kernel on the valid rows of values (L, M, columns), or (R, columns) if ragged. spec: None without scales.
    bias: (L, x's columns) contiguous."""
    num_tokens, expert_start = valid
    shape = Shape(*values.shape) if expert_start is None else Shape(expert_start.shape[0], *values.shape)
    if values.numel() == 0 or shape.experts == 0:
        return
    row_tiles = most_row_tiles(shape.experts, shape.rows, cut.rows, expert_start)
    worst = row_tiles * ceil_div(shape.columns, group_size * cut.groups)
    packed = scales is not None and scales.dtype == torch.int32
    interleaved = activation is not None and activation.interleaved
    quantize_kernel[(min(worst, num_sms(x.device) * cut.programs_per_sm),)](
        num_tokens,
        expert_start,
        strided(x[..., ::2] if interleaved else x),
        bias,
        strided(storable(values)),
        packed_bytes(scales) if packed else strided(scales),
        shape,
        spec,
        TILE=Tile(
            rows=cut.rows,
            groups=cut.groups,
            group=group_size,
            experts=next_power_of_2(shape.experts),
            even=shape.columns % (group_size * cut.groups) == 0,
            packed=packed,
            activation=activation,
        ),
        num_warps=cut.warps,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )


def packed_bytes(scales: torch.Tensor) -> Strided:
    """Packed scales as bytes, of which the first row's are what the kernel has to be told."""
    return Strided(scales.transpose(1, 2).view(torch.uint8), *(4 * stride for stride in scales.stride()))


def quantize_expert_batch(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    expert_start: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    *,
    group_size: int = 128,
) -> None:
    """Writes values and scales of the valid rows.

    x: (L, M, H) float, any strides. num_tokens: (L,) int32 or None. values: (L, M, H), any strides. scales: (L, M, G) float32, any
    strides; or (L, M, ceil(G / 4)) int32 of strides (any, 1, any), for exponents of powers of two, four in each.
    expert_start: (L,) int32, with x and values (R, H) and float32 scales (R, G); or None.
    """
    groups_there = next_power_of_2(ceil_div(x.shape[-1], group_size))
    # no tile is wider than the rows
    block_g = max(min(512 // group_size, groups_there), 4 if scales.dtype == torch.int32 else 1)
    # tiles of 4096 numbers, or of 1024, which are done sooner, where those don't fill the device
    block_m = 4096 // (group_size * block_g)
    experts = values.shape[0] if expert_start is None else expert_start.shape[0]
    tiles = most_row_tiles(experts, values.shape[-2], block_m, expert_start) * ceil_div(groups_there, block_g)
    small = tiles < 6 * num_sms(x.device)
    cut = Cut(block_m // 4, block_g, 2, 24) if small else Cut(block_m, block_g, 2, 6)
    launch_quantize(x, Valid(num_tokens, expert_start), values, scales, spec, cut, group_size=group_size)
