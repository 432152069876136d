"""RMSNorm with a residual before it and a gate behind it, quantized in groups in the same pass.

M rows, H columns, G groups of GROUP columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import num_sms, quantize_group, silu, storable
from moequant.kernels.library.launch import launchable

# numbers of a tile; a row is one tile at most
TILE = 8192


@triton.jit
def load_rows(ptr, first_row, in_tile, stride_m, mask):
    """A tile's numbers, in their own type."""
    return tl.load(ptr + first_row.to(tl.int64) * stride_m + in_tile, mask=mask, other=0.0)


@triton.jit
def load_tile(x_ptr, residual_ptr, gate_ptr, first_row, row, column, x_stride_m, residual_stride_m, gate_stride_m, mask):
    """The tile's numbers of all three; x stands for what isn't there."""
    row64 = row.to(tl.int64)[:, None, None]
    x = load_rows(x_ptr, first_row, row64 * x_stride_m + column, x_stride_m, mask)
    residual, gate = x, x
    if residual_ptr is not None:
        residual = load_rows(residual_ptr, first_row, row64 * residual_stride_m + column, residual_stride_m, mask)
    if gate_ptr is not None:
        gate = load_rows(gate_ptr, first_row, row64 * gate_stride_m + column, gate_stride_m, mask)
    return x, residual, gate


@triton.jit
def gated_product(y, inverse, inverse_low, weight, gate):
    """y * (inverse + inverse_low) * weight * gate, rounded once instead of four times: silu takes most of the 4 units in the last place
    that are allowed. What a product loses is carried along. Infinity and NaN become NaN, which is what the group becomes anyhow."""
    normed = y * inverse
    lost = tl.fma(y, inverse_low, tl.fma(y, inverse, normed * -1.0))
    weighted = normed * weight
    lost = tl.fma(lost, weight, tl.fma(normed, weight, weighted * -1.0))
    return tl.fma(weighted, gate, lost * gate)


@launchable
@triton.jit
def fused_rms_quantize_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    gate_ptr,
    sum_ptr,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    x_stride_m,
    residual_stride_m,
    gate_stride_m,
    s_stride_m,
    s_stride_g,
    norm_eps,
    eps,
    MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A tile is BLOCK_M whole rows; tiles are dealt to the programs in turn. A program loads its next tile before it works on the present
    one. Without residual_ptr and gate_ptr those steps are left out; sum_ptr takes x + residual.

    Example: M=5, BLOCK_M=2, two programs: program 0 has rows 0..1 and row 4, program 1 rows 2..3.
    """
    row = tl.arange(0, BLOCK_M)
    group = tl.arange(0, BLOCK_G)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    there = column < columns
    row64 = row.to(tl.int64)[:, None, None]
    weight = tl.load(weight_ptr + column, mask=there, other=0.0)

    first_row = tl.program_id(0) * BLOCK_M
    mask = (first_row + row < rows)[:, None, None] & there
    x, residual, gate = load_tile(
        x_ptr, residual_ptr, gate_ptr, first_row, row, column, x_stride_m, residual_stride_m, gate_stride_m, mask
    )
    while first_row < rows:
        next_row = first_row + tl.num_programs(0) * BLOCK_M
        mask = (next_row + row < rows)[:, None, None] & there
        next_x, next_residual, next_gate = load_tile(
            x_ptr, residual_ptr, gate_ptr, next_row, row, column, x_stride_m, residual_stride_m, gate_stride_m, mask
        )

        mask = (first_row + row < rows)[:, None, None] & there
        out = first_row.to(tl.int64) * columns + row64 * columns + column
        y = x.to(tl.float32)
        if residual_ptr is not None:
            y += residual.to(tl.float32)
            tl.store(sum_ptr + out, y.to(sum_ptr.dtype.element_ty), mask=mask)
        # once a row, so that exact operations cost nothing
        count = tl.zeros((BLOCK_M,), tl.float32) + columns
        mean = tl.div_rn(tl.sum(tl.sum(y * y, axis=2), axis=1), count)
        square = mean + norm_eps
        inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.sqrt_rn(square))
        w = weight.to(tl.float32)
        if gate_ptr is None:
            y = y * inverse[:, None, None] * w
        else:
            # what inverse lacks, by a step of Newton's method; of an infinite square the inverse is 0, and exact
            root = square * inverse
            root_low = tl.fma(square, inverse, root * -1.0)
            low = inverse * -0.5 * tl.fma(root_low, inverse, tl.fma(root, inverse, -1.0))
            low = tl.where(inverse > 0.0, low, 0.0)
            y = gated_product(y, inverse[:, None, None], low[:, None, None], w, silu(gate.to(tl.float32), True))
        values, scales = quantize_group(y, eps, 2, MAX, POWER_OF_TWO, RECIPROCAL, values_ptr.dtype.element_ty)
        tl.store(values_ptr + out, values, mask=mask)
        at = (first_row + row).to(tl.int64)[:, None] * s_stride_m + group.to(tl.int64)[None, :] * s_stride_g
        tl.store(scales_ptr + at, scales, mask=(first_row + row < rows)[:, None] & (group * GROUP < columns)[None, :])

        first_row, x, residual, gate = next_row, next_x, next_residual, next_gate


def fused_rms_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    summed: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    norm_eps: float,
    group_size: int,
    max_value: float,
    eps: float,
    power_of_two: bool,
    reciprocal: bool,
) -> None:
    """Writes values, scales and, with a residual, summed.

    x, residual, gate: (M, H) float, rows contiguous. weight: (H,) float contiguous. summed, values: (M, H) contiguous. scales: (M, G)
    float32, any strides. max_value, eps, power_of_two, reciprocal: the format's and the recipe's, see `moequant.formats`.
    """
    rows, columns = x.shape
    if values.numel() == 0:
        return
    block_g = triton.next_power_of_2(triton.cdiv(columns, group_size))
    block_m = max(1, TILE // (block_g * group_size))
    # two rows of numbers more to hold, half as many of each in a thread
    per_warp = 1024 if residual is None and gate is None else 512
    num_warps = min(16, max(4, block_m * block_g * group_size // per_warp))
    fused_rms_quantize_kernel[(min(triton.cdiv(rows, block_m), num_sms(x.device) * 16 // num_warps),)](
        x,
        weight,
        residual,
        gate,
        summed,
        storable(values),
        scales,
        rows,
        columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if gate is None else gate.stride(0),
        *scales.stride(),
        norm_eps,
        eps,
        MAX=max_value,
        POWER_OF_TWO=power_of_two,
        RECIPROCAL=reciprocal,
        GROUP=group_size,
        BLOCK_M=block_m,
        BLOCK_G=block_g,
        num_warps=num_warps,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
