"""The backward of SwiGLU, or another activation, between the two products of a layer: from the gradient of the second product's operand
to that of the first one's result, plain and quantized, to the second one's operand times the routing weights, and to their gradients.

L experts, M rows of an expert's buffer, R rows of all of them (ragged; padded: L * M), I intermediate size, G groups of 128 columns, W
ranks, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.activations import Activation
from moequant.kernels.library.arguments import QuantSpec, Shape, strided
from moequant.kernels.library.common import num_sms, quantize_group
from moequant.kernels.library.extents import extents_of, locate_extent, most_extents
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.slopes import activated_with_slopes
from moequant.sizes import next_power_of_2

GROUP, ROWS = 128, 8


class Placed(NamedTuple):
    """Which rows are there, as `Valid`, and where each comes from: `source_rank << 32 | token * top_k + k`, int64."""

    num_tokens: torch.Tensor
    expert_start: torch.Tensor | None
    sources: torch.Tensor


class Given(NamedTuple):
    """The gradient of the second product's operand before the routing weight (..., I), the first product's result (..., 2I), and its bias
    (L, 2I) or None."""

    d_inner: torch.Tensor
    x: torch.Tensor
    bias: torch.Tensor | None


class Entries(NamedTuple):
    """Numbers of all ranks' token entries, each rank's `room` apart, float32: routing weights, and their gradients or None. more: of each
    row (R,), added to its gradient, or None."""

    weights: torch.Tensor
    gradients: torch.Tensor | None
    room: int
    more: torch.Tensor | None


class Made(NamedTuple):
    """What is written: the gradient of x or None, the activation's value times the routing weight (..., I) or None, and what the gradient
    quantizes to (..., 2I) or None."""

    gradient: torch.Tensor | None
    inner: torch.Tensor | None
    narrow: torch.Tensor | None


class Tile(NamedTuple):
    """rows: of a tile, which has one group of columns. experts: rounded up to a power of two. even: groups divide the columns."""

    rows: int
    experts: int
    even: bool
    activation: Activation


@triton.jit
def store_half(rounded, made, base, in_tile, scale_at, valid, is_there, is_valid, spec):
    """Half of a gradient's tile, and the same numbers quantized, as far as they are asked for. Groups are the tile's rows."""
    if made.gradient is not None:
        tl.store(made.gradient + base + in_tile, rounded, mask=is_there)
    if made.narrow is not None:
        values, factors = quantize_group(rounded.to(tl.float32), spec, 1, made.narrow.dtype.element_ty)
        tl.store(made.narrow + base + in_tile, values, mask=is_valid)
        tl.store(scale_at, factors, mask=valid)


@launchable
@triton.jit
def silu_mul_backward_kernel(
    placed,
    given,
    entries,
    made,
    scales,
    shape,
    spec,
    TILE: tl.constexpr,
):
    """Blocks of BLOCK_M rows are dealt to the programs in turn, and a program goes through the groups of a block's columns. What it
    makes of a group it writes behind having read it, so that made may lie where x and d_inner do. Rows that belong to no expert and have
    to be zero are written and not read. All tensors of rows are contiguous but the scales.

    Row r is that of entry place(r) = (sources[r] >> 32) * room + (sources[r] & (2**32 - 1)) of all ranks' entries.

    Example: ragged, counts [9, 0, 3], starts [0, 16, 16], BLOCK_M=8, I=200: block 1 is rows 8..15 of expert 0, of which row 8 is valid
    and the others become zeros. It takes columns 0..127 and 128..199 of d_inner's rows (200 numbers apart), gates at the same columns of
    x's rows (400 apart) and ups 200 further on. With room=6, a source of (1 << 32) + 4 is entry 4 of rank 1, at place 10.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    EXPERTS: tl.constexpr = TILE.experts
    ACTIVATION: tl.constexpr = TILE.activation
    GATED: tl.constexpr = ACTIVATION.gated
    WIDTH: tl.constexpr = 2 if GATED else 1
    # the gradient has x's type
    ROUNDED: tl.constexpr = given.x.dtype.element_ty
    experts, rows, columns = shape
    firsts, counts, extents, ends = extents_of(placed.num_tokens, placed.expert_start, experts, rows, BLOCK_M, EXPERTS)
    blocks = tl.max(ends, axis=0)
    lane = tl.arange(0, BLOCK_M)
    in_group = tl.arange(0, 128)
    # the same for every block, so that a block adds one base to each
    in_narrow = lane[:, None] * columns + in_group[None, :]
    in_wide = lane[:, None] * (columns * WIDTH) + in_group[None, :]
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        expert, begin, count, extent = locate_extent(block, firsts, counts, extents, ends, BLOCK_M, EXPERTS)
        valid, there = lane < count, lane < extent
        first, e = begin.to(tl.int64), expert.to(tl.int64)
        source = tl.load(placed.sources + first + lane, mask=valid, other=0)
        place = (source >> 32) * entries.room + (source & 0xFFFFFFFF)
        # 0 where there is no row, as is what is loaded of it: so is all that is made of it
        weight = tl.load(entries.weights + place, mask=valid, other=0.0)[:, None]
        narrow_base, wide_base = first * columns, first * (columns * WIDTH)
        # without scales it is not looked at
        scale_at, to_up = lane, tl.cast(columns, tl.int64)
        if scales.pointer is not None:
            if placed.expert_start is None:
                # matrices may lie apart
                scale_at = scales.pointer + (e * scales.matrix + (first - e * rows) * scales.row) + lane.to(tl.int64) * scales.row
            else:
                scale_at = scales.pointer + first * scales.row + lane.to(tl.int64) * scales.row
            to_up = tl.cast(columns // 128, tl.int64) * scales.column
        total = tl.zeros((BLOCK_M, 128), tl.float32)
        for column in range(0, columns, 128):
            is_there, is_valid = there[:, None], valid[:, None]
            if not TILE.even:
                inside = (column + in_group < columns)[None, :]
                is_there, is_valid = is_there & inside, is_valid & inside
            d_inner = tl.load(given.d_inner + (narrow_base + column) + in_narrow, mask=is_valid, other=0.0).to(tl.float32)
            gate = tl.load(given.x + (wide_base + column) + in_wide, mask=is_valid, other=0.0).to(tl.float32)
            up = gate
            if GATED:
                up = tl.load(given.x + (wide_base + columns + column) + in_wide, mask=is_valid, other=0.0).to(tl.float32)
            if given.bias is not None:
                bias_at = given.bias + e * (columns * WIDTH) + column + in_group
                mask = column + in_group < columns
                gate += tl.load(bias_at, mask=mask, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    up += tl.load(bias_at + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
            inner, by_gate, by_up = activated_with_slopes(gate, up, ACTIVATION)
            total += d_inner * inner
            d_inner *= weight
            if made.inner is not None:
                weighted = (weight * inner).to(made.inner.dtype.element_ty)
                tl.store(made.inner + (narrow_base + column) + in_narrow, weighted, mask=is_there)
            of_gate = (d_inner * by_gate).to(ROUNDED)
            store_half(of_gate, made, wide_base + column, in_wide, scale_at, valid, is_there, is_valid, spec)
            if GATED:
                at = wide_base + columns + column
                of_up = (d_inner * by_up).to(ROUNDED)
                store_half(of_up, made, at, in_wide, scale_at + to_up, valid, is_there, is_valid, spec)
            if scales.pointer is not None:
                scale_at += scales.column
        if entries.gradients is not None:
            of_weight = tl.sum(total, axis=1)
            if entries.more is not None:
                of_weight += tl.load(entries.more + first + lane, mask=valid, other=0.0)
            tl.store(entries.gradients + place, of_weight, mask=valid)


def silu_mul_backward(
    given: Given,
    placed: Placed,
    entries: Entries,
    made: Made,
    scales: torch.Tensor | None,
    spec: QuantSpec | None,
    activation: Activation,
) -> None:
    """Writes made.gradient and made.inner, with zeros in rows that belong to no expert and that a product contracts: ragged those up to
    the next multiple of 16 rows, padded all; made.narrow and its scales, of valid rows; and the gradients of the routing weights, of
    entries that have a row here.

    All tensors are contiguous, but the scales (..., G) float32, of any strides. made.gradient and made.inner may be given.x and
    given.d_inner themselves. Gate and up lie apart, not interleaved; not gated there is I for 2I. Quantized, I is a multiple of 128 where
    there is a gate, so that no group has numbers of both.
    """
    columns, experts = given.d_inner.shape[-1], placed.num_tokens.shape[0]
    if given.d_inner.numel() == 0 or experts == 0:
        return
    shape = Shape(experts, given.d_inner.shape[-2], columns)
    worst = most_extents(experts, shape.rows, ROWS, placed.expert_start is not None)
    silu_mul_backward_kernel[(min(worst, num_sms(given.x.device) * 16),)](
        placed,
        given,
        entries,
        made,
        strided(scales),
        shape,
        spec,
        TILE=Tile(ROWS, next_power_of_2(experts), columns % GROUP == 0, activation),
        num_warps=4,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
