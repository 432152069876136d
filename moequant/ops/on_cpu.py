"""The grouped GEMM on a CPU: `moequant.reference`'s bits in a fraction of its time.

A decoding batch has a few rows an expert, so that most of the time would go into the weights' float32. Experts without rows are passed
over. The others' weights are widened one after the other into one buffer, which stays in the cache, by steps that a CPU does for many
numbers at once. Nothing is kept from call to call: a float32 copy of float8 weights would take four times their memory, would have to
notice every change of them, and is hardly faster to read than they are to widen. Letters as in `moequant.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant import reference
from moequant.reference.gemm import product

BLOCK = 128
# times a power of two of `widen` a smaller scale is no infinity
LARGEST = 2.0**118
FEW = 4096


def grouped_gemm_blockscale(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    out: Tensor,
    segments: int,
    batch_invariant: bool = False,
) -> None:
    """`reference.grouped_gemm_blockscale`, to the bit: each product has the operands and the shape that it has there, on which the bits
    of a CPU's product depend.

    a: (L, M, K_dim), with scales (L, M, G) or None. b: (L, N, K_dim), with scales (L, segments * ceil(N / segments / 128), G) or None.
    num_tokens: (L,) int32, or None for all M. expert_start: (L,) int32, with a (R, K_dim), its scales (R, G) and out (R, N); or None.
    out: (L, M, N), of which the valid rows are written.
    """
    columns = a.shape[-1]
    if out.numel() == 0:
        return
    right, bits = (torch.empty(b.shape[1:], dtype=dtype, device=b.device) for dtype in (torch.float32, torch.int16))
    # the pieces of a weight that have one row of scales: side by side, if all are whole
    whole = right.shape[0] % (segments * BLOCK) == 0
    blocks = [block for segment in right.unflatten(0, (segments, -1)) for block in segment.split(BLOCK)]
    # written so that a NaN is none
    small = b_scales is not None and b_scales.numel() > 0 and bool(b_scales.abs().max() < LARGEST)
    b_scales = None if b_scales is None else spread(b_scales, columns)
    # float32 under autocast too
    with torch.autocast("cpu", enabled=False):
        for expert, place in enumerate(reference.expert_places(out, num_tokens, expert_start)):
            rows = a[place]
            if not len(rows):
                continue
            left = torch.empty(rows.shape, dtype=torch.float32, device=a.device)
            power = widen(rows, torch.empty_like(left, dtype=torch.int16), left)
            if power != 1.0:
                left *= power
            if a_scales is not None:
                left *= spread(a_scales[place], columns)
            power = widen(b[expert], bits, right)
            if not small and power != 1.0:
                right *= power
            if b_scales is not None:
                # a power of two rounds nothing, wherever it is multiplied
                scales = b_scales[expert] * power if small else b_scales[expert]
                if whole:
                    right.unflatten(0, (len(scales), BLOCK)).mul_(scales.unsqueeze(1))
                else:
                    for block, of_block in zip(blocks, scales, strict=True):
                        block *= of_block
            out[place] = product(left, right, batch_invariant)


def spread(scales: Tensor, columns: int) -> Tensor:
    """Scales (..., G), each as often as its group has columns: (..., columns)."""
    return scales.repeat_interleave(min(BLOCK, columns), -1)[..., :columns]


def widen(x: Tensor, bits: Tensor, out: Tensor) -> float:
    """x to float32, over the power of two that it returns: several times as fast as a copy for the two common float8 types by way of
    float16, whose numbers include theirs. bits: int16 of x's shape, overwritten."""
    if x.numel() < FEW:
        # where calls take longer than numbers
        out.copy_(x)
    elif x.dtype == torch.float8_e5m2:
        # float16 without its lower byte
        bits.copy_(x.view(torch.int8)).mul_(1 << 8)
        out.copy_(bits.view(torch.float16))
    elif x.dtype == torch.float8_e4m3fn and x.view(torch.int8).max().item() < 0x7F and x.view(torch.uint8).max().item() < 0xFF:
        # no NaN: the seven bits of magnitude become float16's lower exponent and upper mantissa; its exponents count from 15, not 7. The
        # sign, which int16 extends, is in bits 15 and 14
        bits.copy_(x.view(torch.int8)).mul_(1 << 7).bitwise_and_(~0x4000)
        out.copy_(bits.view(torch.float16))
        return 2.0 ** (15 - 7)
    else:
        out.copy_(x)
    return 1.0
