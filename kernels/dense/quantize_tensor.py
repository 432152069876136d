"""Quantizes a tensor to float8_e4m3fn, or to unsigned codes around 128, with one scale, by which its numbers are multiplied."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import INF_BITS, num_sms
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import launch_dependents, pdl_option, uses_pdl, wait_for_previous
from moequant.sizes import ceil_div, next_power_of_2

# numbers of a program's block
BLOCK = 4096
# up to so many numbers every program finds the maximum of all of them by itself: no launch before it
SCANNED = 2**16


class Largest(NamedTuple):
    """What `amax_kernel` has found: one number of each of so many parts. lanes: parts, rounded up to a power of two, a constant."""

    pointer: torch.Tensor | None
    parts: int
    lanes: tl.constexpr


class Range(NamedTuple):
    """floor: of the absolute maximum. most: what it becomes."""

    floor: float
    most: float


@triton.jit
def largest_bits(x_ptr, block, step, count, BLOCK: tl.constexpr):
    """The maximum over the bits of |x|, which no NaN can slip through, of the blocks of BLOCK numbers from `block` on in steps.

    Example: 10 numbers, BLOCK=4, step=2: from block 0 on these are numbers 0..3 and 8..9, from block 1 on numbers 4..7.
    """
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(block, tl.cdiv(count, BLOCK), step, num_stages=4):
        at = tl.cast(i, tl.int64) * BLOCK + lane
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(largest, axis=0)


@launchable
@triton.jit
def amax_kernel(x_ptr, largest_ptr, count, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """Each program has the blocks that are its turn, and one number in largest_ptr, their `largest_bits`."""
    launch_dependents(PDL)
    tl.store(largest_ptr + tl.program_id(0), largest_bits(x_ptr, tl.program_id(0), tl.num_programs(0), count, BLOCK))


@launchable
@triton.jit
def quantize_tensor_kernel(
    x_ptr,
    largest,
    scale_ptr,
    values_ptr,
    count,
    RANGE: tl.constexpr,
    COMPUTED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values = x * scale, clamped and rounded. A program has BLOCK numbers.

    scale_ptr is read, or, if COMPUTED, written: MAX / amax, 1 for zeros, NaN for Inf and NaN. amax: of the numbers in largest, or without
    them of x.
    Example: 10 numbers, BLOCK=4: program 2 has numbers 8..9.
    """
    MAX: tl.constexpr = RANGE.most
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    # before the kernel that finds the maximum has ended: it writes no x, and began when x was there
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if COMPUTED:
        if largest.pointer is None:
            bits = largest_bits(x_ptr, 0, 1, count, BLOCK)
        else:
            wait_for_previous(PDL)
            lane = tl.arange(0, largest.lanes)
            bits = tl.max(tl.load(largest.pointer + lane, mask=lane < largest.parts, other=0), axis=0)
        amax = tl.maximum(bits.to(tl.float32, bitcast=True), RANGE.floor)
        scale = tl.where(bits == 0, 1.0, tl.div_rn(tl.full([], MAX, tl.float32), amax))
        scale = tl.where(bits >= INF_BITS, float("nan"), scale)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
    else:
        scale = tl.load(scale_ptr)
    q = x * scale
    number = q == q
    bounded = tl.minimum(tl.maximum(q, -MAX), MAX)
    if values_ptr.dtype.element_ty == tl.uint8:
        # bounded * 127 / MAX, correctly rounded: the quotient by a product and its remainder, as in common.group_scale
        y = bounded * 127.0
        RECIPROCAL: tl.constexpr = 1.0 / MAX
        q = y * RECIPROCAL
        q = tl.fma(tl.fma(q, tl.full(q.shape, -MAX, tl.float32), y), tl.full(q.shape, RECIPROCAL, tl.float32), q)
        # 1.5 * 2**23: the sum has no fraction bits, so the addition rounds to nearest even, and its low byte is the number
        steps = (tl.where(number, q, 0.0) + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(values_ptr + at, (steps + 128).to(tl.uint8), mask=mask)
    else:
        # of a bad tensor the scale alone says NaN; with a given scale each number speaks for itself
        q = tl.where(number, bounded, 0.0 if COMPUTED else float("nan"))
        tl.store(values_ptr + at, q.to(values_ptr.dtype.element_ty), mask=mask)


def quantize_tensor(
    x: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, *, computed: bool, floor: float, max_value: float
) -> None:
    """Writes values, and the scale if it is to be computed.

    x: (count,) float contiguous. scale: () float32. values: (count,) float8_e4m3fn, or uint8 for codes around 128.
    computed: the scale is max_value over the absolute maximum, at least floor, of x; else scale is given.
    """
    count = x.numel()
    blocks = max(1, ceil_div(count, BLOCK))
    largest, parts = None, 1
    pdl = computed and count > SCANNED and uses_pdl(x.device)
    if computed and count > SCANNED:
        parts = min(blocks, num_sms(x.device) * 4)
        largest = torch.empty(parts, dtype=torch.int32, device=x.device)
        amax_kernel[(parts,)](x, largest, count, PDL=pdl, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    quantize_tensor_kernel[(blocks,)](
        x,
        Largest(largest, parts, tl.constexpr(next_power_of_2(parts))),
        scale,
        values,
        count,
        RANGE=Range(floor, max_value),
        COMPUTED=computed,
        PDL=pdl,
        BLOCK=BLOCK,
        num_warps=4,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
        **pdl_option(pdl),
    )
