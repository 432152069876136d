"""GELU from int8 to int8: dequantizes, computes, and quantizes again, all in one pass.

M rows, N columns, G = ceil(N / GROUP) groups of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.activations import gelu_of_twice
from moequant.kernels.library.arguments import QuantSpec
from moequant.kernels.library.common import num_sms, quantize_group
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div


class Tile(NamedTuple):
    """rows, groups: of a program's tile. group: columns of one. even: the tiles divide the columns."""

    rows: int
    groups: int
    group: int
    even: bool


@launchable
@triton.jit
def int8_gelu_kernel(
    x_ptr,
    x_scales_ptr,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    spec,
    TILE: tl.constexpr,
):
    """Each program has a tile.

    Example: 20 rows of 5 groups, tiles of 8 rows by 4 groups: 3 row blocks by 2 group blocks; tile 3 is rows 8..15 and groups 4..7,
    of which 4 exists.
    """
    GROUP: tl.constexpr = TILE.group
    groups = tl.cdiv(columns, GROUP)
    group_blocks = tl.cdiv(groups, TILE.groups)
    tile = tl.program_id(0)
    row = tile // group_blocks * TILE.rows + tl.arange(0, TILE.rows)
    group = tile % group_blocks * TILE.groups + tl.arange(0, TILE.groups)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    row64 = row.to(tl.int64)
    at = row64[:, None, None] * columns + column
    mask = (row < rows)[:, None, None]
    if not TILE.even:
        mask = mask & (column < columns)
    scale_at = row64[:, None] * groups + group[None, :]
    scale_mask = (row < rows)[:, None] & (group < groups)[None, :]

    half_scales = tl.load(x_scales_ptr + scale_at, mask=scale_mask, other=0.0) * 0.5
    half = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32) * half_scales[:, :, None]
    values, scales = quantize_group(gelu_of_twice(half), spec, 2, tl.int8)
    tl.store(values_ptr + at, values, mask=mask)
    tl.store(scales_ptr + scale_at, scales, mask=scale_mask)


def int8_gelu(
    x: torch.Tensor, x_scales: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, spec: QuantSpec, *, group_size: int
) -> None:
    """Writes GELU of x * x_scales as values and scales.

    x, values: (M, N) int8 contiguous. x_scales, scales: (M, ceil(N / group_size)) float32 contiguous. group_size: a power of two, at most
    512. spec: of int8.
    """
    rows, columns = x.shape
    if x.numel() == 0:
        return
    block_g = 512 // group_size
    column_blocks = ceil_div(columns, group_size * block_g)
    # large tiles spread what is computed once for each; where they don't fill the device, small ones are done sooner
    large = ceil_div(rows, 8) * column_blocks >= 4 * num_sms(x.device)
    block_m = 8 if large else 1
    int8_gelu_kernel[(ceil_div(rows, block_m) * column_blocks,)](
        x,
        x_scales,
        values,
        scales,
        rows=rows,
        columns=columns,
        spec=spec,
        TILE=Tile(block_m, block_g, group_size, even=columns % (group_size * block_g) == 0),
        num_warps=4 if large else 1,
        # the roundings of gelu and of the quantization are each their own
        enable_fp_fusion=False,
    )
