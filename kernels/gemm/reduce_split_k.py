"""Adds what the programs of a grouped GEMM made of the parts of K_dim.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together (ragged), N columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import pdl_option, wait_for_previous
from moequant.sizes import ceil_div, next_power_of_2

# Columns of a program.
BLOCK = tl.constexpr(512)


class Tile(NamedTuple):
    """How a launch is compiled.

    parts: to add. aligned: rows are multiples of 16 bytes. pdl: the launch before may still run. experts, lanes: how many there are with
    expert_start, as they are and rounded up to a power of two; 0 and 1 without. float16: rows that go to addresses are.
    """

    parts: int
    aligned: bool
    pdl: bool
    experts: int
    lanes: int
    float16: bool


@launchable
@triton.jit
def reduce_split_k_kernel(
    partials,
    out,
    destinations,
    num_tokens,
    expert_start,
    size,
    TILE: tl.constexpr,
):
    """Program (i, j) adds columns j * BLOCK.. of row i of all experts' rows, part after part. size: M, N, and the elements from one part
    to the next. With expert_start the rows are R, and M is R.

    Example: M=2, N=600, three parts, counts [1, 2]: program (3, 1) adds columns 512..599 of the second expert's row 1;
    program (1, 0) has nothing to do, as the first expert has one row.
    """
    PARTS: tl.constexpr = TILE.parts
    M, N, part_stride = size
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    if expert_start is not None:
        index = tl.arange(0, TILE.lanes)
        starts = tl.load(expert_start + index, mask=index < TILE.experts, other=0)
        counts = tl.minimum(tl.load(num_tokens + index, mask=index < TILE.experts, other=0), M)
        mask = mask & (tl.sum(((starts <= row) & (row < starts + counts)).to(tl.int32), 0) > 0)
    elif num_tokens is not None:
        # before the parts are there: the launch before doesn't write the counts, and began when they were there
        mask = mask & (row % M < tl.load(num_tokens + row // M))
    at = row.to(tl.int64) * N + columns
    wait_for_previous(TILE.pdl)
    total = tl.load(partials + at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partials + part * tl.cast(part_stride, tl.int64) + at, mask=mask, other=0.0)
    if destinations is None:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
    else:
        ROW: tl.constexpr = tl.float16 if TILE.float16 else tl.bfloat16
        start = tl.load(destinations + row).to(tl.pointer_type(ROW))
        if TILE.aligned:
            # the compiler knows nothing of addresses in a table
            start = tl.multiple_of(start, 16)
        tl.store(start + columns, total.to(ROW), mask=mask)


def reduce_split_k(
    partials: Tensor,
    out: Tensor | None,
    destinations: Tensor | None,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    pdl: bool,
    float16: bool = False,
) -> None:
    """The sums over the parts, part after part in float32, rounded once.

    partials: (SPLIT_K, L, M, N) float32 contiguous. num_tokens: (L,) int32, of each expert that many rows are read and written;
    None: all. expert_start: (L,) int32, with partials (SPLIT_K, R, N), out (R, N) and destinations (R,); or None.
    out: (L, M, N) contiguous float, or None with destinations: (L, M) int64, the address for each row of N bfloat16 numbers, a multiple
    of 16 if N is one of 8.
    pdl: this launch may begin while the one before it, the grouped GEMM, still runs. float16: rows that go to addresses are float16, not
    bfloat16.
    """
    parts, *there, rows, columns = partials.shape
    all_rows = math.prod(there) * rows
    experts = 0 if expert_start is None else expert_start.shape[0]
    reduce_split_k_kernel[(all_rows, ceil_div(columns, BLOCK.value))](
        partials,
        out,
        destinations,
        num_tokens,
        expert_start,
        size=(rows, columns, all_rows * columns),
        TILE=Tile(parts, columns % 8 == 0, pdl, experts, next_power_of_2(experts), float16),
        # 8 columns a thread
        num_warps=2,
        **pdl_option(pdl),
    )
