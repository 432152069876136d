"""Grouped blockscale GEMM of fp8 or int8 for Hopper (sm_90) in Gluon: `kernels/gemm/grouped_gemm.py` at the tensor cores' speed.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together (ragged), N columns, K_dim contraction, G =
ceil(K_dim / 128) groups of it.

    out[l, m, n] = sum over g of (a[l, m, g] @ b[l, n, g].T) * a_scales[l, m, g] * b_scales[l, n // 128, g]    for m < num_tokens[l]

One persistent program for each multiprocessor, of three partitions: a TMA warp and two warpgroups that multiply.

* The TMA warp fills a ring of stages. A stage is one group of a tile: 128 rows of a with their scales, and 256 (narrow: 128) rows of b.
* A tile has 128 rows and 256 columns. Warpgroup w owns the rows from 64 * w on, in both halves of the columns: two float32 accumulators
  of 64 x 128, and the tensor cores' result for one group, which is scaled and added to one of them while the other warpgroup's product
  runs. In a tile of at most 64 valid rows warpgroup w owns the columns of half w instead, so that both work.
* A stage is released right after its last product has read it, before that is scaled and added. In a tile's last group the first half
  of the columns is stored while the product of the second runs.
* Tiles are drawn from a counter by the TMA warp, in the middle of a tile, where the ring is full and nothing waits for the answer. What
  the warpgroups need to know of a tile comes with its first stage, in shared memory. The last program leaves the counter at zero.
* With destinations, each row is stored at an address of its own, in another GPU's memory as a rule. The addresses of a tile are asked for
  at its beginning, and are there at its end.
* Tiles are numbered expert by expert; within an expert by bands of row tiles, column by column, the rows of a band fastest: programs
  that run at the same time read the same weights.
* With expert_start, an expert's rows lie from there on among R rows of all. A tile that ends past them loads rows of the next expert,
  and doesn't store them.

Example: two experts of 130 and 20 rows, N = 768: row tiles 2 and 1, column tiles 3. Tiles 0..5 are expert 0's (row tile, column tile)
(0, 0) (1, 0) (0, 1) (1, 1) (0, 2) (1, 2), of which those of row tile 1 have 2 valid rows; tiles 6..8 are expert 1's, of 20 rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from moequant.kernels.library.common import most_row_tiles, multiprocessors
from moequant.kernels.library.gluon import barrier, reinterpret, store_block
from moequant.kernels.library.hopper import REGISTERS, counters, matrix, scale_matrix
from moequant.kernels.library.hopper_ring import (
    SCALAR,
    TILE_WORDS,
    Ring,
    advance,
    load_tiles,
    next_tile,
    product,
    release,
    scale_pointers,
)
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2


class Output(NamedTuple):
    """Where rows go. matrix: the descriptor of out. pointer: of its first number. destinations: instead of these an address for each row.
    shared: 64 rows and 256 columns on their way."""

    matrix: Any
    pointer: Any
    destinations: Any
    shared: Any


@gluon.jit
def prefetch_addresses(destinations, row, rows_left):
    """Brings the addresses of the 64 rows from `row` on, of which rows_left are valid, near, if there are any."""
    if destinations is not None:
        rows = gl.minimum(gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0])), gl.maximum(rows_left - 1, 0))
        asm: gl.constexpr = "{ prefetch.global.L1 [$1]; mov.u32 $0, 0; }"
        gl.inline_asm_elementwise(asm, "=r,l", [destinations + row + rows], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def store_rows(chunk_s, pointer, destinations, row, rows_left, column, N: gl.constexpr, TILE: gl.constexpr):
    """Writes the first rows_left rows of a chunk in shared memory, to their places below pointer or each to its own address. TILE: how
    many columns the chunk's tile has."""
    ROWS: gl.constexpr = chunk_s.shape[0]
    COLUMNS: gl.constexpr = chunk_s.shape[1]
    WIDTH: gl.constexpr = 128 // chunk_s.dtype.primitive_bitwidth
    LANES: gl.constexpr = COLUMNS // WIDTH if COLUMNS // WIDTH < 32 else 32
    COALESCED: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, COALESCED))
    if destinations is None:
        x = chunk_s.load(COALESCED)
        columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, COALESCED))
        pointers = pointer + (row + rows).to(gl.int64)[:, None] * N + columns[None, :]
        gl.store(pointers, x, mask=(rows < rows_left)[:, None] & (columns < N)[None, :])
    else:
        starts = gl.load(destinations + row + rows, mask=rows < rows_left, other=0).to(gl.pointer_type(chunk_s.dtype))
        x = chunk_s.load(COALESCED)
        columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, COALESCED))
        pointers = starts[:, None] + columns[None, :]
        if N % WIDTH == 0:
            # the compiler knows nothing of addresses in a table: rows begin at multiples of 16 bytes
            pointers = gl.max_contiguous(gl.multiple_of(pointers, (16, 16)), (1, WIDTH))
        inside = (rows < rows_left)[:, None]
        # the last tile's columns may end past N in any of its chunks, even before one begins
        if N % TILE:
            inside = inside & (columns < N)[None, :]
        gl.store(pointers, x, mask=inside)


@gluon.jit
def store_chunk(WARPGROUP: gl.constexpr, output, acc, row, rows_left, column, N: gl.constexpr, TILE: gl.constexpr):
    """Writes the first rows_left rows of a chunk of 64 rows, 64 or 128 columns: all of it by TMA, which cuts columns past N off, fewer
    rows, or rows that go to addresses of their own, by masked stores."""
    out_s = output.shared
    COLUMNS: gl.constexpr = acc.shape[1]
    PIECES: gl.constexpr = COLUMNS // 64
    tma.store_wait(pendings=0)
    # the warpgroup's half of out_s, as one block and as the 64 columns that TMA moves at a time
    whole = reinterpret(out_s, out_s.dtype, [256 // COLUMNS, 64, COLUMNS], out_s.layout).index(WARPGROUP * 128 // COLUMNS)
    whole.store(acc.to(out_s.dtype))
    if output.destinations is not None:
        # half of them at a time: the products have no registers to spare
        for half in gl.static_range(2):
            part = whole.slice(half * 32, 32, 0)
            store_rows(part, None, output.destinations, row + half * 32, rows_left - half * 32, column, N, TILE)
        barrier()
    elif rows_left >= 64:
        fence_async_shared()
        for piece in gl.static_range(PIECES):
            store_block(output.matrix, [row, column + piece * 64], out_s.index(WARPGROUP * 2 + piece))
    else:
        store_rows(whole, output.pointer, None, row, rows_left, column, N, TILE)
        barrier()


@gluon.jit
def multiply_tiles(WARPGROUP: gl.constexpr, ring, output, b_scales, N: gl.constexpr, G: gl.constexpr):
    """One warpgroup: multiplies, scales and adds the groups of each tile, and stores its part of it."""
    STAGES: gl.constexpr = ring.full.shape[0]
    HALVES: gl.constexpr = ring.b.shape[0] // STAGES
    SHORT: gl.constexpr = 64 * HALVES
    TILE: gl.constexpr = 128 * HALVES
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    SHORT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SHORT, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    SHORT_ROWS: gl.constexpr = gl.SliceLayout(1, SHORT_LAYOUT)
    # what the tensor cores add in: int8 exactly
    SUM: gl.constexpr = gl.int32 if ring.a.dtype == gl.int8 else gl.float32
    # in a short tile of narrow ones each warpgroup has 64 columns
    b_short_s = reinterpret(ring.b, ring.b.dtype, [STAGES * 2, SHORT, 128], ring.b.layout)
    # zeros that the compiler can't see through: they keep b's scales out of the uniform registers, which the products would wait for
    zero = (gl.program_id(0) + gl.arange(0, 64, ROWS)) >> 28
    stage = 0
    phase = 0
    row, rows_left, column_tile, expert = next_tile(ring, stage, phase)
    scales0, scales1 = scale_pointers(b_scales, zero, expert, column_tile, HALVES, N, G)
    s0 = gl.load(scales0)
    s1 = gl.load(scales1)
    while expert >= 0:
        column = column_tile * TILE
        my_row = row + WARPGROUP * 64
        my_rows_left = rows_left - WARPGROUP * 64
        if rows_left > 64:
            prefetch_addresses(output.destinations, my_row, my_rows_left)
            t = gl.zeros((64, 128), SUM, LAYOUT)
            acc0 = gl.zeros((64, 128), gl.float32, LAYOUT)
            acc1 = gl.zeros((64, 128), gl.float32, LAYOUT)
            for k in range(G - 1):
                mbarrier.wait(ring.full.index(stage), phase)
                t = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES), t)
                s = ring.a_scales.index(stage * 2 + WARPGROUP).load(ROWS)
                scale0 = s * s0
                scale1 = s * s1
                s0 = gl.load(scales0 + k + 1)
                if HALVES == 2:
                    s1 = gl.load(scales1 + k + 1)
                t = warpgroup_mma_wait(0, deps=(t,))
                if HALVES == 2:
                    acc0 += t.to(gl.float32) * gl.expand_dims(scale0, 1)
                    t = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES + 1), t)
                    t = warpgroup_mma_wait(0, deps=(t,))
                    release(ring.empty.index(stage))
                    acc1 += t.to(gl.float32) * gl.expand_dims(scale1, 1)
                else:
                    release(ring.empty.index(stage))
                    acc0 += t.to(gl.float32) * gl.expand_dims(scale0, 1)
                stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(ring.full.index(stage), phase)
            t = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES), t)
            s = ring.a_scales.index(stage * 2 + WARPGROUP).load(ROWS)
            scale0 = s * s0
            scale1 = s * s1
            t = warpgroup_mma_wait(0, deps=(t,))
            if HALVES == 2:
                acc0 += t.to(gl.float32) * gl.expand_dims(scale0, 1)
                started = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES + 1), t)
                store_chunk(WARPGROUP, output, acc0, my_row, my_rows_left, column, N, TILE)
                t = warpgroup_mma_wait(0, deps=(started,))
            release(ring.empty.index(stage))
            stage, phase = advance(stage, phase, STAGES)
            row, rows_left, column_tile, expert = next_tile(ring, stage, phase)
            scales0, scales1 = scale_pointers(b_scales, zero, expert, column_tile, HALVES, N, G)
            s0 = gl.load(scales0)
            s1 = gl.load(scales1)
            if HALVES == 2:
                acc1 += t.to(gl.float32) * gl.expand_dims(scale1, 1)
                store_chunk(WARPGROUP, output, acc1, my_row, my_rows_left, column + 128, N, TILE)
            else:
                acc0 += t.to(gl.float32) * gl.expand_dims(scale0, 1)
                store_chunk(WARPGROUP, output, acc0, my_row, my_rows_left, column, N, TILE)
        else:
            prefetch_addresses(output.destinations, row, rows_left)
            u = gl.zeros((64, SHORT), SUM, SHORT_LAYOUT)
            acc = gl.zeros((64, SHORT), gl.float32, SHORT_LAYOUT)
            my_scales = scales1 if WARPGROUP * HALVES == 2 else scales0
            b_scale = s1 if WARPGROUP * HALVES == 2 else s0
            for k in range(G):
                mbarrier.wait(ring.full.index(stage), phase)
                u = product(ring.a.index(stage * 2), b_short_s.index(stage * 2 + WARPGROUP), u)
                scale = ring.a_scales.index(stage * 2).load(SHORT_ROWS) * gl.convert_layout(b_scale, SHORT_ROWS)
                b_scale = gl.load(my_scales + gl.minimum(k + 1, G - 1))
                u = warpgroup_mma_wait(0, deps=(u,))
                release(ring.empty.index(stage))
                acc += u.to(gl.float32) * gl.expand_dims(scale, 1)
                stage, phase = advance(stage, phase, STAGES)
            past_row = row
            past_rows_left = rows_left
            row, rows_left, column_tile, expert = next_tile(ring, stage, phase)
            scales0, scales1 = scale_pointers(b_scales, zero, expert, column_tile, HALVES, N, G)
            s0 = gl.load(scales0)
            s1 = gl.load(scales1)
            store_chunk(WARPGROUP, output, acc, past_row, past_rows_left, column + WARPGROUP * SHORT, N, TILE)
    tma.store_wait(pendings=0)


@launchable
@gluon.jit
def grouped_gemm_hopper_kernel(
    a,
    b,
    a_scales,
    out,
    out_pointer,
    destinations,
    b_scales,
    num_tokens,
    expert_start,
    counter,
    experts,
    M,
    scale_rows,
    N: gl.constexpr,
    G: gl.constexpr,
    EXPERTS: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    OUT: gl.constexpr,
):
    """a, b, a_scales, out: descriptors of (L*M, K_dim) in blocks (64, 128), (L*N, K_dim) in (128, 128), (.., M) in (1, 64), where an
    expert's groups are scale_rows apart, and (L*M, N) in (64, 64). destinations: (L*M,) int64, with which out and out_pointer are None.
    expert_start: None, or (L,) int32: L*M is R then, M too, and scale_rows nothing. counter: two zeros. EXPERTS: L, rounded up to a
    power of two. OUT: the type of the rows."""
    a_s = gl.allocate_shared_memory(a.dtype, [STAGES * 2, 64, 128], a.layout)
    b_s = gl.allocate_shared_memory(b.dtype, [STAGES * HALVES, 128, 128], b.layout)
    scales_block = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1, 64], a_scales.layout)
    a_scales_s = reinterpret(scales_block, gl.float32, [STAGES * 2, 64], SCALAR)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=OUT.primitive_bitwidth, rank=2)
    out_s = gl.allocate_shared_memory(OUT, [4, 64, 64], OUT_LAYOUT)
    tile_s = gl.allocate_shared_memory(gl.int32, [STAGES * TILE_WORDS, 1], SCALAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    ring = Ring(a_s, b_s, a_scales_s, tile_s, full, empty)
    load_ring = Ring(a_s, b_s, scales_block, tile_s, full, empty)
    output = Output(out, out_pointer, destinations, out_s)
    gl.warp_specialize(
        [
            (multiply_tiles, (0, ring, output, b_scales, N, G)),
            (multiply_tiles, (1, ring, output, b_scales, N, G)),
            (
                load_tiles,
                ((a, b, a_scales), load_ring, counter, (num_tokens, expert_start), (experts, M, scale_rows), N, G, EXPERTS),
            ),
        ],
        [4, 1],
        [232, 32],
    )


class Config(NamedTuple):
    """How `grouped_gemm_hopper_kernel` is cut. halves: column tiles of 256 (2) or 128 (1). stages: groups in flight."""

    halves: int
    stages: int


WIDE = Config(2, 4)
NARROW = Config(1, 5)
# float32 chunks take twice the shared memory, and wide ones more registers than there are
FLOAT32 = Config(1, 4)
CANDIDATES = (WIDE, NARROW)


OUT_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def cost(halves: int, experts: int, columns: int, expected_rows: int, sms: int) -> float:
    """The time of a problem by a rough model, in narrow tiles. Narrow tiles load a tenth more, wide ones end less evenly."""
    waves = experts * ceil_div(columns, 128 * halves) * max(1.0, expected_rows / 128 + 0.25) / sms
    if expected_rows <= 64:
        # memory is the limit, and all tiles last equally long
        return math.ceil(waves) * halves * (1.08 if halves == 1 else 1.0)
    return waves * halves * (1.12 if halves == 1 else 1.0) + halves / 2


@functools.lru_cache
def choose_config(experts: int, columns: int, expected_rows: int, out_bytes: int, sms: int) -> Config:
    """The configuration for a problem, by its size alone; for any number of rows (expected_rows below 0) by the type of its output."""
    if out_bytes == 4:
        return FLOAT32
    if expected_rows < 0:
        return WIDE
    return min((WIDE, NARROW), key=lambda config: cost(config.halves, experts, columns, expected_rows, sms))


def grouped_gemm_blockscale_hopper(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    out: Tensor | None,
    *,
    destinations: Tensor | None = None,
    segments: int = 1,
    expected_rows: int | None = None,
    num_sms: int | None = None,
    config: Config | None = None,
) -> None:
    """`moequant.reference.grouped_gemm_blockscale` into out, on arguments of which `supports` is true.

    a: (L, M, K_dim) contiguous float8_e4m3fn or int8. a_scales: (L, M, G) float32, strides (any, 1, any).
    b: (L, N, K_dim) contiguous, a's dtype. b_scales: (L, ceil(N / 128), G) float32 contiguous: segments are whole blocks.
    num_tokens: (L,) int32, at most M of each expert counts; None for all M.
    expert_start: (L,) int32, with a (R, K_dim), a_scales (R, G), strides (1, any), out (R, N) and destinations (R,); or None.
    out: (L, M, N) contiguous bfloat16, float16 or float32; rows past num_tokens are not written. None with destinations.
    destinations: (L, M) int64 contiguous, the address for each row of N bfloat16 numbers, a multiple of 16 if N is one of 8.
    expected_rows: a guess of the mean of num_tokens, which chooses the configuration; None takes M, ragged R / L; below 0: any. config:
    instead of that choice. num_sms: multiprocessors to use; None for all, 0 to compile and no more.
    """
    assert (out is None) != (destinations is None)
    experts, columns, depth = b.shape
    rows = a.shape[-2]
    dtype = torch.bfloat16 if out is None else out.dtype
    sms = multiprocessors(a.device) if num_sms is None else num_sms
    if config is None:
        mean = rows if expert_start is None else ceil_div(rows, experts)
        expected = mean if expected_rows is None else min(expected_rows or 1, rows)
        config = choose_config(experts, columns, expected, dtype.itemsize, multiprocessors(a.device))
    groups = ceil_div(depth, 128)
    scales_matrix, scale_rows = scale_matrix(a_scales)
    tiles = most_row_tiles(experts, rows, 128, expert_start) * ceil_div(columns, 128 * config.halves)
    grouped_gemm_hopper_kernel[(min(sms, tiles),)](
        matrix(a, 64, 128),
        matrix(b, 128, 128),
        scales_matrix,
        None if out is None else matrix(out, 64, 64),
        out,
        destinations,
        b_scales,
        num_tokens,
        expert_start,
        counters.get(a.device),
        experts,
        rows,
        scale_rows,
        N=columns,
        G=groups,
        EXPERTS=max(32, next_power_of_2(experts)),
        HALVES=config.halves,
        STAGES=config.stages,
        OUT=OUT_TYPES[dtype],
        num_warps=4,
        maxnreg=REGISTERS,
        # a group's sums are scaled and added in one operation, which `gemm1_swiglu_hopper` does by name
        enable_fp_fusion=True,
    )
