"""RMSNorm with a residual before it and a gate behind it, quantized in groups in the same pass.

M rows, H columns, G groups of GROUP columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import QuantSpec
from moequant.kernels.library.common import num_sms, quantize_group, silu, storable
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2

# numbers of a tile; a row is one tile at most
TILE = 8192


class Inputs(NamedTuple):
    """And the elements from one row of each to the next."""

    x: torch.Tensor
    residual: torch.Tensor | None
    gate: torch.Tensor | None
    x_row: int
    residual_row: int
    gate_row: int


class Outputs(NamedTuple):
    """summed takes x + residual."""

    summed: torch.Tensor | None
    quantized: torch.Tensor
    scales: torch.Tensor
    scale_row: int
    scale_group: int


class Tile(NamedTuple):
    """rows, groups: of a tile, whole rows. group: columns of one."""

    rows: int
    groups: int
    group: int


@triton.jit
def load_rows(ptr, stride, first_row, row64, column, mask):
    """A tile's numbers, in their own type."""
    return tl.load(ptr + first_row.to(tl.int64) * stride + (row64 * stride + column), mask=mask, other=0.0)


@triton.jit
def load_tile(inputs, first_row, row, column, mask):
    """The tile's numbers of all three; x stands for what isn't there."""
    row64 = row.to(tl.int64)[:, None, None]
    x = load_rows(inputs.x, inputs.x_row, first_row, row64, column, mask)
    residual, gate = x, x
    if inputs.residual is not None:
        residual = load_rows(inputs.residual, inputs.residual_row, first_row, row64, column, mask)
    if inputs.gate is not None:
        gate = load_rows(inputs.gate, inputs.gate_row, first_row, row64, column, mask)
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
    inputs,
    weight_ptr,
    outputs,
    rows,
    columns,
    norm_eps,
    spec,
    TILE: tl.constexpr,
):
    """A tile is some whole rows; tiles are dealt to the programs in turn. A program loads its next tile before it works on the present
    one. Without residual and gate those steps are left out.

    Example: M=5, tiles of 2 rows, two programs: program 0 has rows 0..1 and row 4, program 1 rows 2..3.
    """
    GROUP: tl.constexpr = TILE.group
    BLOCK_M: tl.constexpr = TILE.rows
    row = tl.arange(0, BLOCK_M)
    group = tl.arange(0, TILE.groups)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    there = column < columns
    row64 = row.to(tl.int64)[:, None, None]
    weight = tl.load(weight_ptr + column, mask=there, other=0.0)

    first_row = tl.program_id(0) * BLOCK_M
    mask = (first_row + row < rows)[:, None, None] & there
    x, residual, gate = load_tile(inputs, first_row, row, column, mask)
    while first_row < rows:
        next_row = first_row + tl.num_programs(0) * BLOCK_M
        mask = (next_row + row < rows)[:, None, None] & there
        next_x, next_residual, next_gate = load_tile(inputs, next_row, row, column, mask)

        mask = (first_row + row < rows)[:, None, None] & there
        out = first_row.to(tl.int64) * columns + row64 * columns + column
        y = x.to(tl.float32)
        if inputs.residual is not None:
            y += residual.to(tl.float32)
            tl.store(outputs.summed + out, y.to(outputs.summed.dtype.element_ty), mask=mask)
        # once a row, so that exact operations cost nothing
        count = tl.zeros((BLOCK_M,), tl.float32) + columns
        mean = tl.div_rn(tl.sum(tl.sum(y * y, axis=2), axis=1), count)
        square = mean + norm_eps
        inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.sqrt_rn(square))
        w = weight.to(tl.float32)
        if inputs.gate is None:
            y = y * inverse[:, None, None] * w
        else:
            # what inverse lacks, by a step of Newton's method; of an infinite square the inverse is 0, and exact
            root = square * inverse
            root_low = tl.fma(square, inverse, root * -1.0)
            low = inverse * -0.5 * tl.fma(root_low, inverse, tl.fma(root, inverse, -1.0))
            low = tl.where(inverse > 0.0, low, 0.0)
            y = gated_product(y, inverse[:, None, None], low[:, None, None], w, silu(gate.to(tl.float32), True))
        values, scales = quantize_group(y, spec, 2, outputs.quantized.dtype.element_ty)
        tl.store(outputs.quantized + out, values, mask=mask)
        at = (first_row + row).to(tl.int64)[:, None] * outputs.scale_row + group.to(tl.int64)[None, :] * outputs.scale_group
        tl.store(outputs.scales + at, scales, mask=(first_row + row < rows)[:, None] & (group * GROUP < columns)[None, :])

        first_row, x, residual, gate = next_row, next_x, next_residual, next_gate


def fused_rms_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    outputs: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
    spec: QuantSpec,
    *,
    norm_eps: float,
    group_size: int = 128,
) -> None:
    """Writes outputs: summed, with a residual, otherwise None; values, scales.

    x, residual, gate: (M, H) float, rows contiguous. weight: (H,) float contiguous. summed, values: (M, H) contiguous. scales: (M, G)
    float32, any strides.
    """
    (rows, columns), (summed, values, scales) = x.shape, outputs
    if values.numel() == 0:
        return
    block_g = next_power_of_2(ceil_div(columns, group_size))
    block_m = max(1, TILE // (block_g * group_size))
    # two rows of numbers more to hold, half as many of each in a thread
    per_warp = 1024 if residual is None and gate is None else 512
    num_warps = min(16, max(4, block_m * block_g * group_size // per_warp))
    fused_rms_quantize_kernel[(min(ceil_div(rows, block_m), num_sms(x.device) * 16 // num_warps),)](
        Inputs(
            x,
            residual,
            gate,
            x_row=x.stride(0),
            residual_row=0 if residual is None else residual.stride(0),
            gate_row=0 if gate is None else gate.stride(0),
        ),
        weight,
        Outputs(summed, storable(values), scales, *scales.stride()),
        rows=rows,
        columns=columns,
        norm_eps=norm_eps,
        spec=spec,
        TILE=Tile(block_m, block_g, group_size),
        num_warps=num_warps,
        # a product that is rounded to an integer by an addition must be rounded by itself first
        enable_fp_fusion=False,
    )
