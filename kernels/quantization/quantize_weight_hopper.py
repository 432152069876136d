"""`kernels/quantization/quantize_weight.py` for Hopper in Gluon: a weight, its transpose, or both in one pass, as blocks are turned in
registers.

E experts, N rows and K_dim columns of a weight. A matrix as it lies in memory has its columns side by side: of a weight whose rows are,
it is the transpose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moequant.kernels.library.arguments import QuantSpec, strided
from moequant.kernels.library.common import runs_gluon
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.turning import (
    PATCH,
    SIZE,
    Patch,
    largest_of_all,
    owners,
    quotients,
    registers_of,
    rounded,
    scale_of,
    turned,
    warps_of,
)


class Config(NamedTuple):
    """patch: of a thread. programs: of a multiprocessor, some of which load while another computes."""

    patch: Patch
    programs: int


# Of a transpose alone, as measured on an H200, and of what is stored as it lies, 16 numbers of a row at a time, on an H100.
TRANSPOSE = Config(PATCH, 3)
AS_IT_LIES = Config(Patch(8, 16, 8), 2)


class Quantized(NamedTuple):
    """A matrix's values, and the scales of its blocks, both contiguous; None where it isn't wanted."""

    values_ptr: Any = None
    scales_ptr: Any = None


@gluon.jit
def write_block(made, values, scale, expert, row, column, rows, columns, EVEN: gl.constexpr):
    """Writes a block of a matrix (rows, columns) of each expert, and its scale."""
    LAYOUT: gl.constexpr = values.type.layout
    in_row = gl.arange(0, SIZE, gl.SliceLayout(1, LAYOUT))[:, None]
    in_column = gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))[None, :]
    # unsigned, so that each address is a number of 32 bits from where the block begins
    at = made.values_ptr + ((expert * rows + row) * columns + column) + (in_row * columns + in_column).to(gl.uint32)
    if EVEN:
        gl.store(at, values)
    else:
        gl.store(at, values, mask=(in_row < rows - row) & (in_column < columns - column))
    row_blocks = (rows + (SIZE - 1)) // SIZE
    column_blocks = (columns + (SIZE - 1)) // SIZE
    gl.store(made.scales_ptr + ((expert * row_blocks + row // SIZE) * column_blocks + column // SIZE), scale)


@launchable
@gluon.jit
def quantize_weight_hopper_kernel(
    w,
    plain,
    across,
    rows,
    columns,
    spec,
    EVEN: gl.constexpr,
    PATCH: gl.constexpr,
):
    """A program has one block of w, a matrix of rows and columns for each expert, whose columns lie side by side. plain: what w becomes.
    across: what its transpose does. EVEN: blocks divide rows and columns.

    Example: 144 rows, 384 columns: 2 row blocks by 3 column blocks, 6 blocks an expert. Program 11 has block 5 of expert 1, rows 128..143
    and columns 256..383. Of plain these are rows 128..143 too, and scale (1, 2); of across rows 256..383, columns 128..143, scale (2, 1).
    """
    OWNERS: gl.constexpr = owners(PATCH, False)
    row_blocks = (rows + (SIZE - 1)) // SIZE
    column_blocks = (columns + (SIZE - 1)) // SIZE
    block = gl.program_id(0)
    column = block % column_blocks * SIZE
    row = block // column_blocks % row_blocks * SIZE
    expert = (block // (column_blocks * row_blocks)).to(gl.int64)
    in_row = gl.arange(0, SIZE, gl.SliceLayout(1, OWNERS))[:, None]
    in_column = gl.arange(0, SIZE, gl.SliceLayout(0, OWNERS))[None, :]
    at = w.pointer + (expert * w.matrix + row.to(gl.int64) * w.row + column) + (in_row * w.row + in_column).to(gl.uint32)
    if EVEN:
        x = gl.load(at)
    else:
        x = gl.load(at, mask=(in_row < rows - row) & (in_column < columns - column), other=0.0)
    x = x.to(gl.float32)
    scale, r, keep = scale_of(largest_of_all(x), spec)
    q = quotients(x, scale, r, spec)
    if plain.values_ptr is not None:
        write_block(plain, rounded(q, keep), scale, expert, row, column, rows, columns, EVEN)
    if across.values_ptr is not None:
        write_block(across, rounded(turned(q, PATCH), keep), scale, expert, column, row, columns, rows, EVEN)


def quantize_weight_hopper(
    w: Tensor,
    values: Tensor,
    scales: Tensor,
    spec: QuantSpec,
    *,
    across: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`quantize_weight` in blocks of 128, on arguments of which `supports_quantize_weight` is true, and the same of w's transpose.

    across: values (E, K_dim, N) and scales (E, ceil(K_dim / 128), ceil(N / 128)) of that, contiguous, or None.
    """
    made = Quantized(values, scales), Quantized(*across or ())
    if w.stride(1) == 1:
        w, made = w.mT, made[::-1]
    rows, columns = w.shape[1:]
    config = TRANSPOSE if made[0].values_ptr is None else AS_IT_LIES
    quantize_weight_hopper_kernel[(scales.numel(),)](
        strided(w),
        *made,
        rows,
        columns,
        spec,
        EVEN=rows % SIZE.value == 0 and columns % SIZE.value == 0,
        PATCH=config.patch,
        num_warps=warps_of(config.patch),
        maxnreg=registers_of(*config),
        enable_fp_fusion=False,
    )


def supports_quantize_weight(w: Tensor, values: Tensor, segments: int, block_size: int, across: Tensor | None = None) -> bool:
    """Whether `quantize_weight_hopper` takes these arguments, of across the values."""
    return runs_gluon(w.device) and takes_quantize_weight(w, values, segments, block_size, across)


def takes_quantize_weight(w: Tensor, values: Tensor, segments: int, block_size: int, across: Tensor | None = None) -> bool:
    """`supports_quantize_weight`, but for the device: types, segments of whole blocks, and matrices whose rows, or columns, are moved 16
    numbers at a time."""
    matrix, *strides = w.stride()
    _, rows, columns = w.shape
    return (
        w.numel() > 0
        and block_size == SIZE.value
        and (segments == 1 or rows // segments % block_size == 0)
        and w.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and values.dtype == torch.float8_e4m3fn
        and min(strides) == 1
        and all(number % 16 == 0 for number in (matrix, max(strides), rows, columns))
        # offsets inside a block are numbers of 32 bits
        and max(*strides, rows, columns) < 2**24
        and all(tensor.data_ptr() % 16 == 0 for tensor in (w, values, across) if tensor is not None)
    )
