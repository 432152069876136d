"""Quantizes a tensor to float8_e4m3fn, or to unsigned codes around 128, with one scale, by which its numbers are multiplied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.common import INF_BITS, num_sms


@triton.jit
def amax_kernel(x_ptr, amax_ptr, count, BLOCK: tl.constexpr):
    """The maximum over the bits of |x|, which no NaN can slip through. Programs take blocks of BLOCK numbers in turn.

    Example: 10 numbers, BLOCK=4, 2 programs: program 0 has numbers 0..3 and 8..9, program 1 has 4..7.
    """
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for block in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0), num_stages=4):
        at = tl.cast(block, tl.int64) * BLOCK + lane
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(amax_ptr, tl.max(largest, axis=0), sem="relaxed")


@triton.jit
def quantize_tensor_kernel(
    x_ptr, amax_ptr, scale_ptr, values_ptr, count, FLOOR: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr
):
    """values = x * scale, clamped and rounded. A program has BLOCK numbers.

    scale_ptr is read, or, with amax_ptr, written: MAX / amax, 1 for zeros, NaN for Inf and NaN.
    Example: 10 numbers, BLOCK=4: program 2 has numbers 8..9.
    """
    if amax_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        bits = tl.load(amax_ptr)
        amax = tl.maximum(bits.to(tl.float32, bitcast=True), FLOOR)
        scale = tl.where(bits == 0, 1.0, tl.div_rn(tl.full([], MAX, tl.float32), amax))
        scale = tl.where(bits >= INF_BITS, float("nan"), scale)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    q = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    number = q == q
    bounded = tl.minimum(tl.maximum(q, -MAX), MAX)
    if values_ptr.dtype.element_ty == tl.uint8:
        # bounded * 127 / MAX, correctly rounded: the quotient by a product and its remainder, as in common.group_scale
        y = bounded * 127.0
        RECIPROCAL: tl.constexpr = 1.0 / MAX
        q = y * RECIPROCAL
        q = tl.fma(tl.fma(q, tl.full(q.shape, -MAX, tl.float32), y), tl.full(q.shape, RECIPROCAL, tl.float32), q)
        # 1.5 * 2**23: the sum has no fraction bits, so the addition rounds to nearest even
        steps = ((tl.where(number, q, 0.0) + 12582912.0) - 12582912.0).to(tl.int32)
        tl.store(values_ptr + at, (steps + 128).to(tl.uint8), mask=mask)
    else:
        # of a bad tensor the scale alone says NaN; with a given scale each number speaks for itself
        q = tl.where(number, bounded, float("nan") if amax_ptr is None else 0.0)
        tl.store(values_ptr + at, q.to(values_ptr.dtype.element_ty), mask=mask)


def quantize_tensor(
    x: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, *, computed: bool, floor: float, max_value: float
) -> None:
    """Writes values, and the scale if it is to be computed.

    x: (count,) float contiguous. scale: () float32. values: (count,) float8_e4m3fn, or uint8 for codes around 128.
    computed: the scale is max_value over the absolute maximum, at least floor, of x; else scale is given.
    """
    count = x.numel()
    block = 4096
    if computed:
        amax = torch.zeros((), dtype=torch.int32, device=x.device)
        amax_kernel[(max(1, min(triton.cdiv(count, block), num_sms(x.device) * 8)),)](x, amax, count, BLOCK=block, num_warps=4)
    quantize_tensor_kernel[(max(1, triton.cdiv(count, block)),)](
        x,
        amax if computed else None,
        scale,
        values,
        count,
        FLOOR=floor,
        MAX=max_value,
        BLOCK=block,
        num_warps=4,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
