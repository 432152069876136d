"""GELU from int8 to int8: dequantizes, computes, and quantizes again, all in one pass.

M rows, N columns, G = ceil(N / GROUP) groups of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.common import quantize_group


@triton.jit
def gelu(x):
    """x * (1 + erf(x / sqrt(2))) / 2 in float32, within 4 units in the last place down to x = -9: 1 + erf would cancel below -1.

    With u = |x|, (1 + erf(-u / sqrt(2))) / 2 = exp(-u**2 / 2) * p(t) / (u + K), t = (u - K) / (u + K). p is the interpolation of degree 9
    at Chebyshev's points for u in 0..9, off by 3e-8. Beyond, the result is below the floor of any group.
    """
    K: tl.constexpr = 2.828125
    u = tl.minimum(tl.abs(x), 9.0)
    r = 1.0 / (u + K)
    t = (u - K) * r
    p = tl.full(x.shape, -8.451625762972981e-05, tl.float32)
    p = tl.fma(p, t, tl.full(x.shape, -0.00047437328612431884, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, -0.0005312320427037776, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, 0.0022118897177278996, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, 0.004567185416817665, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, -0.015222103334963322, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, -0.025731872767210007, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, 0.1975586712360382, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, -0.48585253953933716, tl.float32))
    p = tl.fma(p, t, tl.full(x.shape, 0.7223554253578186, tl.float32))
    # exp(-u**2 / 2) by the hardware's 2**power; what the roundings of u**2 and of power lost is small, and multiplies by 1 + lost * ln 2
    square = u * u
    square_lost = tl.fma(u, u, square * -1.0)
    # -log2(e) / 2 is high + low
    high = tl.full(x.shape, -0.7213475108146667, tl.float32)
    low = tl.full(x.shape, -9.629815167500055e-09, tl.float32)
    power = square * high
    lost = tl.fma(square_lost, high, tl.fma(square, low, tl.fma(square, high, power * -1.0)))
    e = tl.exp2(power)
    tail = p * r * tl.fma(e, lost * 0.6931471805599453, e)
    # max(x, 0) - u * tail on both sides of zero; x * 0 is NaN for -Inf, as in the formula
    return tl.fma(u * -1.0, tail, tl.where(x > 0.0, x, x * 0.0))


@triton.jit
def int8_gelu_kernel(
    x_ptr,
    x_scales_ptr,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    eps,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Each program has a tile of BLOCK_M rows by BLOCK_G groups. EVEN: BLOCK_G groups divide the columns.

    Example: 20 rows of 5 groups, BLOCK_M=8, BLOCK_G=4: 3 row blocks by 2 group blocks; tile 3 is rows 8..15 and groups 4..7, of which 4
    exists.
    """
    groups = tl.cdiv(columns, GROUP)
    group_blocks = tl.cdiv(groups, BLOCK_G)
    tile = tl.program_id(0)
    row = tile // group_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tile % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    row64 = row.to(tl.int64)
    at = row64[:, None, None] * columns + column
    mask = (row < rows)[:, None, None]
    if not EVEN:
        mask = mask & (column < columns)
    scale_at = row64[:, None] * groups + group[None, :]
    scale_mask = (row < rows)[:, None] & (group < groups)[None, :]

    x_scales = tl.load(x_scales_ptr + scale_at, mask=scale_mask, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32) * x_scales[:, :, None]
    values, scales = quantize_group(gelu(x), eps, 2, 127.0, False, False, tl.int8)
    tl.store(values_ptr + at, values, mask=mask)
    tl.store(scales_ptr + scale_at, scales, mask=scale_mask)


def int8_gelu(
    x: torch.Tensor, x_scales: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *, group_size: int, eps: float
) -> None:
    """Writes GELU of x * x_scales as values and scales.

    x, values: (M, N) int8 contiguous. x_scales, scales: (M, ceil(N / group_size)) float32 contiguous. group_size: a power of two, at most
    512. eps: floor of a group's absolute maximum.
    """
    rows, columns = x.shape
    if x.numel() == 0:
        return
    block_m, block_g = 8, 512 // group_size
    int8_gelu_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(columns, group_size * block_g),)](
        x,
        x_scales,
        values,
        scales,
        rows,
        columns,
        eps,
        GROUP=group_size,
        BLOCK_M=block_m,
        BLOCK_G=block_g,
        EVEN=columns % (group_size * block_g) == 0,
        num_warps=4,
        # the roundings of gelu and of the quantization are each their own
        enable_fp_fusion=False,
    )
