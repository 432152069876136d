"""`kernels/quantization/quantize_weight.py` for Hopper in Gluon, of weights that lie transposed: blocks are turned in registers.

E experts, N rows and K_dim columns of a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moequant.kernels.library.arguments import QuantSpec, strided
from moequant.kernels.library.common import runs_gluon
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.turning import PATCH, SIZE, Patch, owners, quantize_turned, registers_of, warps_of


@launchable
@gluon.jit
def quantize_weight_hopper_kernel(
    w,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    spec,
    SEGMENTS: gl.constexpr,
    EVEN: gl.constexpr,
    PATCH: gl.constexpr,
):
    """As `quantize_weight_kernel`, which has the example. EVEN: blocks divide rows and columns."""
    OWNERS: gl.constexpr = owners(PATCH, False)
    TURNED: gl.constexpr = owners(PATCH, True)
    row_blocks = (rows + (SIZE - 1)) // SIZE
    column_blocks = (columns + (SIZE - 1)) // SIZE
    block = gl.program_id(0)
    column = block % column_blocks * SIZE
    row = block // column_blocks % row_blocks * SIZE
    segment = block // (column_blocks * row_blocks)
    expert = (segment // SEGMENTS).to(gl.int64)
    n = (segment % SEGMENTS * rows + row).to(gl.int64)
    # a row in memory is a column here. Unsigned, so that each address is a number of 32 bits from where the block begins
    k_in_block = gl.arange(0, SIZE, gl.SliceLayout(1, OWNERS))[:, None]
    n_in_block = gl.arange(0, SIZE, gl.SliceLayout(0, OWNERS))[None, :]
    at = w.pointer + (expert * w.matrix + n + column.to(gl.int64) * w.column)
    at += (k_in_block * w.column + n_in_block).to(gl.uint32)
    if EVEN:
        x = gl.load(at)
    else:
        x = gl.load(at, mask=(k_in_block < columns - column) & (n_in_block < rows - row), other=0.0)
    values, scale = quantize_turned(x.to(gl.float32), spec, PATCH, True)
    out_n = gl.arange(0, SIZE, gl.SliceLayout(1, TURNED))[:, None]
    out_k = gl.arange(0, SIZE, gl.SliceLayout(0, TURNED))[None, :]
    out_at = values_ptr + ((expert * (SEGMENTS * rows) + n) * columns + column) + (out_n * columns + out_k).to(gl.uint32)
    if EVEN:
        gl.store(out_at, values)
    else:
        gl.store(out_at, values, mask=(out_n < rows - row) & (out_k < columns - column))
    gl.store(scales_ptr + block, scale)


def quantize_weight_hopper(
    w: Tensor,
    values: Tensor,
    scales: Tensor,
    spec: QuantSpec,
    *,
    segments: int,
    block_size: int,
    patch: Patch = PATCH,
    programs: int = 3,
) -> None:
    """`quantize_weight`, on arguments of which `supports_quantize_weight` is true. patch: of a thread. programs: of a multiprocessor."""
    rows, columns = w.shape[1] // segments, w.shape[2]
    quantize_weight_hopper_kernel[(scales.numel(),)](
        strided(w),
        values,
        scales,
        rows,
        columns,
        spec,
        SEGMENTS=segments,
        EVEN=rows % block_size == 0 and columns % block_size == 0,
        PATCH=patch,
        num_warps=warps_of(patch),
        maxnreg=registers_of(patch, programs),
        enable_fp_fusion=False,
    )


def supports_quantize_weight(w: Tensor, values: Tensor, segments: int, block_size: int) -> bool:
    """Whether `quantize_weight_hopper` takes these arguments."""
    return runs_gluon(w.device) and takes_quantize_weight(w, values, segments, block_size)


def takes_quantize_weight(w: Tensor, values: Tensor, segments: int, block_size: int) -> bool:
    """`supports_quantize_weight`, but for the device: types, and transposed matrices whose rows are moved 16 numbers at a time."""
    matrix, row, column = w.stride()
    _, rows, columns = w.shape
    return (
        w.numel() > 0
        and block_size == SIZE.value
        and w.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and values.dtype == torch.float8_e4m3fn
        and row == 1
        and all(number % 16 == 0 for number in (matrix, column, rows // segments, columns))
        # offsets inside a block are numbers of 32 bits
        and max(column, columns) < 2**24
        and all(tensor.data_ptr() % 16 == 0 for tensor in (w, values))
    )
