"""Quantizes the valid rows of an expert batch in groups along the hidden dimension.

L experts, M rows of an expert's buffer, H columns, G groups of GROUP columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.common import locate_block, num_sms, quantize_group, row_blocks, storable


@triton.jit
def quantize_kernel(
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
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Each tile is BLOCK_M rows of one expert by BLOCK_G groups; tiles cover valid rows only and are dealt to the programs in turn.

    Example: counts [9, 0, 3], BLOCK_M=8, G=3, BLOCK_G=2: 3 row blocks by 2 group blocks are 6 tiles; tile 3 is row block 1 (rows 8..15
    of expert 0, of which row 8 is valid) and groups 2..3 (of which 2 exists).
    """
    counts, ends = row_blocks(num_tokens_ptr, experts, rows, BLOCK_M, EXPERTS, COUNTED)
    group_blocks = tl.cdiv(tl.cdiv(columns, GROUP), BLOCK_G)
    tiles = tl.max(ends, axis=0) * group_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, first_row, count = locate_block(tile // group_blocks, counts, ends, BLOCK_M, EXPERTS)
        e = expert.to(tl.int64)
        row = first_row + tl.arange(0, BLOCK_M)
        group = tile % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        mask = (row < count)[:, None, None] & (column < columns)[None, :, :]
        m = row.to(tl.int64)[:, None, None]
        h = column.to(tl.int64)[None, :, :]
        x = tl.load(x_ptr + e * x_stride_l + m * x_stride_m + h * x_stride_h, mask=mask, other=0.0).to(tl.float32)
        values, scales = quantize_group(x, eps, 2, MAX, POWER_OF_TWO, RECIPROCAL, values_ptr.dtype.element_ty)
        tl.store(values_ptr + e * v_stride_l + m * v_stride_m + h * v_stride_h, values, mask=mask)
        scale_at = e * s_stride_l + row.to(tl.int64)[:, None] * s_stride_m + group.to(tl.int64)[None, :] * s_stride_g
        tl.store(scales_ptr + scale_at, scales, mask=(row < count)[:, None] & (group * GROUP < columns)[None, :])


def quantize_expert_batch(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_size: int,
    max_value: float,
    eps: float,
    power_of_two: bool,
    reciprocal: bool,
    block_m: int = 8,
    num_warps: int = 8,
    programs_per_sm: int = 4,
) -> None:
    """Writes values and scales of the valid rows.

    x: (L, M, H) float, any strides. num_tokens: (L,) int32 or None. values: (L, M, H), any strides. scales: (L, M, G) float32, any
    strides. max_value, eps, power_of_two, reciprocal: the format's and the recipe's, see `moequant.formats`.
    """
    experts, rows, columns = x.shape
    if x.numel() == 0:
        return
    block_g = max(1, 1024 // group_size)
    worst = experts * triton.cdiv(rows, block_m) * triton.cdiv(columns, group_size * block_g)
    quantize_kernel[(min(worst, num_sms(x.device) * programs_per_sm),)](
        x,
        num_tokens,
        storable(values),
        scales,
        experts,
        rows,
        columns,
        *x.stride(),
        *values.stride(),
        *scales.stride(),
        eps,
        MAX=max_value,
        POWER_OF_TWO=power_of_two,
        RECIPROCAL=reciprocal,
        COUNTED=num_tokens is not None,
        GROUP=group_size,
        BLOCK_M=block_m,
        BLOCK_G=block_g,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=num_warps,
    )
