"""Quantizes the valid rows of an expert batch in groups along the hidden dimension, as they are or after SwiGLU.

L experts, M rows of an expert's buffer, H columns, G groups of GROUP columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import locate_block, num_sms, quantize_group, row_blocks, silu_mul_product, storable
from moequant.kernels.library.launch import launchable


@triton.jit
def tile_mask(first_row, first_column, row, column, count, columns, EVEN: tl.constexpr):
    """Which of a tile's numbers are there. Made anew wherever it is needed: a mask kept from one tile to the next would be kept number by
    number."""
    mask = (first_row + row < count)[:, None, None]
    if not EVEN:
        mask = mask & (first_column + column < columns)
    return mask


@triton.jit
def load_tile(
    x_ptr, expert, first_row, first_column, x_stride_l, x_stride_m, x_stride_h, in_tile, mask, columns, GATED: tl.constexpr
):
    """The tile's numbers, in their own type, and for SwiGLU the ones that they gate, `columns` further on."""
    at = x_ptr + expert.to(tl.int64) * x_stride_l + first_row.to(tl.int64) * x_stride_m + first_column.to(tl.int64) * x_stride_h
    x = tl.load(at + in_tile, mask=mask, other=0.0)
    up = x
    if GATED:
        up = tl.load(at + tl.cast(columns, tl.int64) * x_stride_h + in_tile, mask=mask, other=0.0)
    return x, up


@triton.jit
def locate_rows(block, counts, ends, experts, rows, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, COUNTED: tl.constexpr):
    """As `locate_block`. Without counts block after block of rows, of all experts each: where these are the heads of a matrix's rows,
    what is written at one time lies side by side.

    Example: two experts of 20 rows, BLOCK=8: blocks 0..5 are rows 0 of experts 0 and 1, rows 8 of both, rows 16 of both.
    """
    if COUNTED:
        return locate_block(block, counts, ends, BLOCK, EXPERTS)
    else:
        return block % experts, block // experts * BLOCK, rows


@launchable
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
    GATED: tl.constexpr,
    MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    PACKED: tl.constexpr,
    COUNTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EVEN: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Each tile is BLOCK_M rows of one expert by BLOCK_G groups of the output's columns; tiles cover valid rows only and are dealt to
    the programs in turn. A program loads its next tile before it works on the present one.

    GATED: column i of the output is silu(x[i]) * x[columns + i]. Without scales_ptr the product is stored as it is.
    PACKED: scales_ptr takes exponents, a byte each; four groups lie side by side, s_stride_g bytes from the next four. BLOCK_G is then a
    multiple of 4.
    EVEN: BLOCK_G groups divide the columns.

    Example: counts [9, 0, 3], BLOCK_M=8, G=3, BLOCK_G=2: 3 row blocks by 2 group blocks are 6 tiles; tile 3 is row block 1 (rows 8..15
    of expert 0, of which row 8 is valid) and groups 2..3 (of which 2 exists).
    """
    counts, ends = row_blocks(num_tokens_ptr, experts, rows, BLOCK_M, EXPERTS, COUNTED)
    groups = tl.cdiv(columns, GROUP)
    group_blocks = tl.cdiv(groups, BLOCK_G)
    tiles = tl.max(ends, axis=0) * group_blocks

    # the same for every tile, so that a tile adds one base to each
    row = tl.arange(0, BLOCK_M)
    group = tl.arange(0, BLOCK_G)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    row64 = row.to(tl.int64)[:, None, None]
    in_tile = row64 * x_stride_m + column.to(tl.int64) * x_stride_h
    out_in_tile = row64 * v_stride_m + column.to(tl.int64) * v_stride_h
    scale_in_group = group // 4 * tl.cast(s_stride_g, tl.int64) + group % 4 if PACKED else group.to(tl.int64) * s_stride_g
    scale_in_tile = row.to(tl.int64)[:, None] * s_stride_m + scale_in_group[None, :]

    tile = tl.program_id(0)
    expert, first_row, count = locate_rows(tile // group_blocks, counts, ends, experts, rows, BLOCK_M, EXPERTS, COUNTED)
    first_group = tile % group_blocks * BLOCK_G
    mask = tile_mask(first_row, first_group * GROUP, row, column, count, columns, EVEN)
    x, up = load_tile(
        x_ptr, expert, first_row, first_group * GROUP, x_stride_l, x_stride_m, x_stride_h, in_tile, mask, columns, GATED
    )
    while tile < tiles:
        next_tile = tile + tl.num_programs(0)
        # past the last tile there is no valid row
        next_block = next_tile // group_blocks
        next_expert, next_row, next_count = locate_rows(next_block, counts, ends, experts, rows, BLOCK_M, EXPERTS, COUNTED)
        next_group = next_tile % group_blocks * BLOCK_G
        mask = tile_mask(next_row, next_group * GROUP, row, column, next_count, columns, EVEN)
        next_x, next_up = load_tile(
            x_ptr, next_expert, next_row, next_group * GROUP, x_stride_l, x_stride_m, x_stride_h, in_tile, mask, columns, GATED
        )

        e = expert.to(tl.int64)
        m = first_row.to(tl.int64)
        g = first_group.to(tl.int64)
        mask = tile_mask(first_row, first_group * GROUP, row, column, count, columns, EVEN)
        numbers = silu_mul_product(x.to(tl.float32), up.to(tl.float32)) if GATED else x.to(tl.float32)
        values_at = values_ptr + e * v_stride_l + m * v_stride_m + g * GROUP * v_stride_h
        if scales_ptr is None:
            tl.store(values_at + out_in_tile, numbers.to(values_ptr.dtype.element_ty), mask=mask)
        else:
            values, scales = quantize_group(numbers, eps, 2, MAX, POWER_OF_TWO, RECIPROCAL, values_ptr.dtype.element_ty)
            tl.store(values_at + out_in_tile, values, mask=mask)
            valid = (first_row + row < count)[:, None]
            in_group = (first_group + group)[None, :]
            if PACKED:
                scales_at = scales_ptr + e * s_stride_l + m * s_stride_m + g // 4 * s_stride_g
                exponents = tl.where(in_group < groups, scales.to(tl.int32, bitcast=True) >> 23, 0).to(tl.uint8)
                tl.store(scales_at + scale_in_tile, exponents, mask=valid & (in_group < tl.cdiv(groups, 4) * 4))
            else:
                scales_at = scales_ptr + e * s_stride_l + m * s_stride_m + g * s_stride_g
                tl.store(scales_at + scale_in_tile, scales, mask=valid & (in_group < groups))

        tile, expert, first_row, first_group, count = next_tile, next_expert, next_row, next_group, next_count
        x, up = next_x, next_up


def launch_quantize(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    gated: bool,
    *,
    group_size: int = 128,
    max_value: float = 0.0,
    eps: float = 0.0,
    power_of_two: bool = False,
    reciprocal: bool = False,
    block_m: int,
    block_g: int,
    num_warps: int,
    programs_per_sm: int,
) -> None:
    """Launches the kernel on the valid rows of values (L, M, columns)."""
    experts, rows, columns = values.shape
    if values.numel() == 0:
        return
    worst = experts * triton.cdiv(rows, block_m) * triton.cdiv(columns, group_size * block_g)
    packed = scales is not None and scales.dtype == torch.int32
    strides = (0, 0, 0) if scales is None else scales.stride()
    if packed:
        # bytes, of which the first row's are what the kernel has to be told
        scales, strides = scales.transpose(1, 2).view(torch.uint8), tuple(4 * stride for stride in strides)
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
        *strides,
        eps,
        GATED=gated,
        MAX=max_value,
        POWER_OF_TWO=power_of_two,
        RECIPROCAL=reciprocal,
        PACKED=packed,
        COUNTED=num_tokens is not None,
        GROUP=group_size,
        BLOCK_M=block_m,
        BLOCK_G=block_g,
        EVEN=columns % (group_size * block_g) == 0,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=num_warps,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )


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
) -> None:
    """Writes values and scales of the valid rows.

    x: (L, M, H) float, any strides. num_tokens: (L,) int32 or None. values: (L, M, H), any strides. scales: (L, M, G) float32, any
    strides; or (L, M, ceil(G / 4)) int32 of strides (any, 1, any), for exponents of powers of two, four in each.
    max_value, eps, power_of_two, reciprocal: the format's and the recipe's, see `moequant.formats`.
    """
    groups_there = triton.next_power_of_2(triton.cdiv(x.shape[2], group_size))
    # no tile is wider than the rows
    block_g = max(min(512 // group_size, groups_there), 4 if scales.dtype == torch.int32 else 1)
    # tiles of 4096 numbers, or of 1024, which are done sooner, where those don't fill the device
    block_m = 4096 // (group_size * block_g)
    tiles = values.shape[0] * triton.cdiv(values.shape[1], block_m) * triton.cdiv(groups_there, block_g)
    small = tiles < 6 * num_sms(x.device)
    launch_quantize(
        x,
        num_tokens,
        values,
        scales,
        False,
        group_size=group_size,
        max_value=max_value,
        eps=eps,
        power_of_two=power_of_two,
        reciprocal=reciprocal,
        block_m=block_m // 4 if small else block_m,
        block_g=block_g,
        num_warps=2,
        programs_per_sm=24 if small else 6,
    )
