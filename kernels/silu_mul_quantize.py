"""SwiGLU of the valid rows of an expert batch, with quantization in the same pass or without.

L experts, M rows of an expert's buffer, I intermediate size, G = ceil(I / 128) groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.common import locate_block, num_sms, quantize_group, row_blocks, silu_mul_product, storable


@triton.jit
def silu_mul_quantize_kernel(
    x_ptr,
    num_tokens_ptr,
    values_ptr,
    scales_ptr,
    experts,
    rows,
    columns,
    x_stride_l,
    x_stride_m,
    x_stride_h,
    v_stride_l,
    v_stride_m,
    v_stride_h,
    s_stride_l,
    s_stride_m,
    s_stride_g,
    eps,
    MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Without scales_ptr the product is stored as it is. Each tile is BLOCK_M rows of one expert by BLOCK_G groups of its I output columns; column i of the output comes from columns i
    (gate) and I + i (up) of the input. Tiles cover valid rows only and are dealt to the programs in turn.

    Example: counts [9, 0, 3], BLOCK_M=8, I=384, BLOCK_G=2: 3 row blocks by 2 group blocks are 6 tiles; tile 5 is row block 2 (rows 0..2
    of expert 2) and group 2, columns 256..383.
    """
    counts, ends = row_blocks(num_tokens_ptr, experts, rows, BLOCK_M, EXPERTS, COUNTED)
    group_blocks = tl.cdiv(tl.cdiv(columns, 128), BLOCK_G)
    tiles = tl.max(ends, axis=0) * group_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, first_row, count = locate_block(tile // group_blocks, counts, ends, BLOCK_M, EXPERTS)
        e = expert.to(tl.int64)
        row = first_row + tl.arange(0, BLOCK_M)
        group = tile % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
        column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        mask = (row < count)[:, None, None] & (column < columns)[None, :, :]
        m = row.to(tl.int64)[:, None, None]
        h = column.to(tl.int64)[None, :, :]
        gate_ptr = x_ptr + e * x_stride_l + m * x_stride_m + h * x_stride_h
        gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + columns.to(tl.int64) * x_stride_h, mask=mask, other=0.0).to(tl.float32)
        product = silu_mul_product(gate, up)
        values_at = e * v_stride_l + m * v_stride_m + h * v_stride_h
        if scales_ptr is None:
            tl.store(values_ptr + values_at, product.to(values_ptr.dtype.element_ty), mask=mask)
        else:
            values, scales = quantize_group(product, eps, 2, MAX, POWER_OF_TWO, RECIPROCAL, values_ptr.dtype.element_ty)
            tl.store(values_ptr + values_at, values, mask=mask)
            scale_at = e * s_stride_l + row.to(tl.int64)[:, None] * s_stride_m + group.to(tl.int64)[None, :] * s_stride_g
            tl.store(scales_ptr + scale_at, scales, mask=(row < count)[:, None] & (group * 128 < columns)[None, :])


def silu_mul_quantize(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    *,
    max_value: float = 0.0,
    eps: float = 0.0,
    power_of_two: bool = False,
    reciprocal: bool = False,
    block_m: int = 8,
    block_g: int = 4,
    num_warps: int = 8,
    programs_per_sm: int = 4,
) -> None:
    """Writes values and scales of the valid rows, or, without scales, the product alone.

    x: (L, M, 2I) float, any strides, gate first. num_tokens: (L,) int32 or None. values: (L, M, I), any strides. scales: (L, M, G)
    float32, any strides, or None. max_value, eps, power_of_two, reciprocal: the format's and the recipe's, see `moequant.formats`.
    """
    experts, rows, columns = values.shape
    if values.numel() == 0:
        return
    worst = experts * triton.cdiv(rows, block_m) * triton.cdiv(columns, 128 * block_g)
    silu_mul_quantize_kernel[(min(worst, num_sms(x.device) * programs_per_sm),)](
        x,
        num_tokens,
        storable(values),
        scales,
        experts,
        rows,
        columns,
        *x.stride(),
        *values.stride(),
        *((0, 0, 0) if scales is None else scales.stride()),
        eps,
        MAX=max_value,
        POWER_OF_TWO=power_of_two,
        RECIPROCAL=reciprocal,
        COUNTED=num_tokens is not None,
        BLOCK_M=block_m,
        BLOCK_G=block_g,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=num_warps,
    )


def silu_mul(x: torch.Tensor, num_tokens: torch.Tensor | None, out: torch.Tensor) -> None:
    """As `moequant.reference.silu_mul`, any strides."""
    silu_mul_quantize(x, num_tokens, out, None)
