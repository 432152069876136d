"""Gradients of experts' weights for Hopper (sm_90) in Gluon: products of two fp8 operands over each expert's tokens.

Letters: L experts, N and K_dim columns of the operands, B blocks of 128 tokens that there is room for, C = 128 * B.

    out[l, n, k] = sum over blocks t of expert l of (a[n, t] @ b[k, t].T) * a_scales[t, n] * b_scales[k // 128, t]

A block's tokens are all of one expert, whose blocks lie side by side: [block_ends[l - 1], block_ends[l]), at least one.

Ring, partitions and the stores of a tile are those of `kernels/gemm/grouped_gemm_hopper.py`, with these differences:

* What is summed over is as long as an expert has tokens: a tile's number of groups (blocks here) and its first one come with its first
  stage. All experts have as many tiles.
* A tile has two groups or more, the second of zeros where its expert has one block: a loop that may have no turn takes registers that
  newer compilers don't find.
* A tile always has 128 rows: past N they are zeros, and not stored.

Example: N = 300, K_dim = 512, block_ends [3, 4]: an expert's tiles are 3 row tiles by 2 column tiles. Tile 7 is expert 1's, row tile 1,
column tile 0: group 0 of its one is block 3, tokens 384..511 of a's rows 128..255 and b's rows 0..255; out's rows 300 + 128.. follow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from moequant.kernels.gemm.grouped_gemm_hopper import OUT_TYPES, Config, Output, choose_config, store_chunk
from moequant.kernels.library.common import multiprocessors, runs_gluon
from moequant.kernels.library.gluon import barrier, load_block, reinterpret
from moequant.kernels.library.hopper import REGISTERS, Address, counters, descriptor, matrix
from moequant.kernels.library.hopper_ring import (
    SCALAR,
    Ring,
    advance,
    in_band,
    product,
    put_back,
    read_scalar,
    release,
    write_scalar,
)
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div

# Scalars that a tile's first stage carries: row in out, valid rows from there on, column tile, first block, blocks (0: no more tiles).
TILE_WORDS = gl.constexpr(5)


@gluon.jit
def locate_tile(tile, block_ends, experts, blocks, N: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """The expert of a tile number, the row tile, the column tile, its first block and the number of them. Past the last tile the expert
    is too large."""
    TILES: gl.constexpr = (N + 127) // 128 * COLUMN_TILES
    expert = tile // TILES
    row_tile, column_tile = in_band(tile % TILES, N, COLUMN_TILES)
    known = gl.minimum(expert, experts - 1)
    first = gl.load(block_ends + gl.maximum(known - 1, 0))
    end = gl.load(block_ends + known)
    # whatever the numbers are, there is a block, and it is one that there is room for
    first = gl.minimum(gl.maximum(gl.where(known > 0, first, 0), 0), blocks - 1)
    return expert, row_tile, column_tile, first, gl.maximum(gl.minimum(end, blocks) - first, 1)


@gluon.jit
def load_tiles(descriptors, ring, counter, block_ends, experts, blocks, N: gl.constexpr, K_DIM: gl.constexpr):
    """The TMA warp: draws tiles and fills the ring with their groups."""
    a, b, a_scales = descriptors
    STAGES: gl.constexpr = ring.full.shape[0]
    HALVES: gl.constexpr = ring.b.shape[0] // STAGES
    COLUMN_TILES: gl.constexpr = (K_DIM + 128 * HALVES - 1) // (128 * HALVES)
    BYTES: gl.constexpr = 2 * (64 * 128 + 64 * 4) + HALVES * 128 * 128
    programs = gl.num_programs(0)
    drawn = gl.program_id(0)
    stage = 0
    phase = 1
    expert, row_tile, column_tile, first, groups = locate_tile(drawn, block_ends, experts, blocks, N, COLUMN_TILES)
    while expert < experts:
        row = row_tile * 128
        column = column_tile * (128 * HALVES)
        for k in range(gl.maximum(groups, 2)):
            mbarrier.wait(ring.empty.index(stage), phase)
            loaded = ring.full.index(stage)
            if k == 0:
                write_scalar(ring.tile.index(stage * TILE_WORDS), expert * N + row)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 1), N - row)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 2), column_tile)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 3), first)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 4), groups)
                barrier()
            # past the last one there are zeros
            block = gl.where(k < groups, first + k, blocks)
            mbarrier.expect(loaded, BYTES)
            load_block(b, [column, block * 128], loaded, ring.b.index(stage * HALVES))
            for half in gl.static_range(2):
                load_block(a, [row + half * 64, block * 128], loaded, ring.a.index(stage * 2 + half))
                load_block(a_scales, [block, row + half * 64], loaded, ring.a_scales.index(stage * 2 + half))
            if HALVES == 2:
                load_block(b, [column + 128, block * 128], loaded, ring.b.index(stage * HALVES + 1))
            stage, phase = advance(stage, phase, STAGES)
            # the ring is full by now, so that the answer is there before it is wanted
            if k == gl.maximum(groups, 2) // 2:
                drawn = programs + gl.atomic_add(counter, 1, sem="relaxed")
        expert, row_tile, column_tile, first, groups = locate_tile(drawn, block_ends, experts, blocks, N, COLUMN_TILES)
    mbarrier.wait(ring.empty.index(stage), phase)
    for word in gl.static_range(2, TILE_WORDS):
        write_scalar(ring.tile.index(stage * TILE_WORDS + word), 0)
    barrier()
    mbarrier.arrive(ring.full.index(stage), count=1)
    put_back(counter, programs)


@gluon.jit
def next_tile(ring, stage, phase):
    """What the TMA warp says of the tile whose first group is in a stage."""
    mbarrier.wait(ring.full.index(stage), phase)
    word = stage * TILE_WORDS
    row = read_scalar(ring.tile.index(word))
    rows_left = read_scalar(ring.tile.index(word + 1))
    column_tile = read_scalar(ring.tile.index(word + 2))
    first = read_scalar(ring.tile.index(word + 3))
    groups = read_scalar(ring.tile.index(word + 4))
    return row, rows_left, column_tile, first, groups


@gluon.jit
def scale_pointers(b_scales, zero, column_tile, first, blocks, HALVES: gl.constexpr, K_DIM: gl.constexpr):
    """Where a tile's scales of b begin, for the first and the second 128 columns, once for each row."""
    pointers = b_scales + (column_tile * HALVES * blocks + first) + zero
    # the second half of the last tile may lie past the last column, and past the last scale
    return pointers, pointers + gl.where((column_tile * HALVES + 1) * 128 < K_DIM, blocks * (HALVES - 1), 0)


@gluon.jit
def multiply_tiles(WARPGROUP: gl.constexpr, ring, output, b_scales, blocks, K_DIM: gl.constexpr):
    """One warpgroup: multiplies, scales and adds the groups of its 64 rows of each tile, and stores them."""
    STAGES: gl.constexpr = ring.full.shape[0]
    HALVES: gl.constexpr = ring.b.shape[0] // STAGES
    TILE: gl.constexpr = 128 * HALVES
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    # zeros that the compiler can't see through: they keep b's scales out of the uniform registers, which the products would wait for
    zero = (gl.program_id(0) + gl.arange(0, 64, ROWS)) >> 28
    stage = 0
    phase = 0
    row, rows_left, column_tile, first, groups = next_tile(ring, stage, phase)
    scales0, scales1 = scale_pointers(b_scales, zero, column_tile, first, blocks, HALVES, K_DIM)
    s0 = gl.load(scales0)
    s1 = gl.load(scales1)
    while groups > 0:
        my_row = row + WARPGROUP * 64
        my_rows_left = rows_left - WARPGROUP * 64
        column = column_tile * TILE
        t = gl.zeros((64, 128), gl.float32, LAYOUT)
        acc0 = gl.zeros((64, 128), gl.float32, LAYOUT)
        acc1 = gl.zeros((64, 128), gl.float32, LAYOUT)
        for k in range(gl.maximum(groups, 2) - 1):
            mbarrier.wait(ring.full.index(stage), phase)
            t = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES), t)
            s = ring.a_scales.index(stage * 2 + WARPGROUP).load(ROWS)
            scale0 = s * s0
            scale1 = s * s1
            following = gl.minimum(k + 1, groups - 1)
            s0 = gl.load(scales0 + following)
            if HALVES == 2:
                s1 = gl.load(scales1 + following)
            t = warpgroup_mma_wait(0, deps=(t,))
            if HALVES == 2:
                acc0 = gl.fma(t, gl.expand_dims(scale0, 1), acc0)
                t = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES + 1), t)
                t = warpgroup_mma_wait(0, deps=(t,))
                release(ring.empty.index(stage))
                acc1 = gl.fma(t, gl.expand_dims(scale1, 1), acc1)
            else:
                release(ring.empty.index(stage))
                acc0 = gl.fma(t, gl.expand_dims(scale0, 1), acc0)
            stage, phase = advance(stage, phase, STAGES)
        mbarrier.wait(ring.full.index(stage), phase)
        t = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES), t)
        s = ring.a_scales.index(stage * 2 + WARPGROUP).load(ROWS)
        scale0 = s * s0
        scale1 = s * s1
        t = warpgroup_mma_wait(0, deps=(t,))
        if HALVES == 2:
            acc0 = gl.fma(t, gl.expand_dims(scale0, 1), acc0)
            started = product(ring.a.index(stage * 2 + WARPGROUP), ring.b.index(stage * HALVES + 1), t)
            store_chunk(WARPGROUP, output, acc0, my_row, my_rows_left, column, K_DIM, TILE)
            t = warpgroup_mma_wait(0, deps=(started,))
        release(ring.empty.index(stage))
        stage, phase = advance(stage, phase, STAGES)
        row, rows_left, column_tile, first, groups = next_tile(ring, stage, phase)
        scales0, scales1 = scale_pointers(b_scales, zero, column_tile, first, blocks, HALVES, K_DIM)
        s0 = gl.load(scales0)
        s1 = gl.load(scales1)
        if HALVES == 2:
            acc1 = gl.fma(t, gl.expand_dims(scale1, 1), acc1)
            store_chunk(WARPGROUP, output, acc1, my_row, my_rows_left, column + 128, K_DIM, TILE)
        else:
            acc0 = gl.fma(t, gl.expand_dims(scale0, 1), acc0)
            store_chunk(WARPGROUP, output, acc0, my_row, my_rows_left, column, K_DIM, TILE)
    tma.store_wait(pendings=0)


@launchable
@gluon.jit
def weight_gradient_hopper_kernel(
    a,
    b,
    a_scales,
    out,
    out_pointer,
    b_scales,
    block_ends,
    counter,
    experts,
    blocks,
    N: gl.constexpr,
    K_DIM: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    OUT: gl.constexpr,
):
    """a, b, a_scales, out: descriptors of (N, C) in blocks (64, 128), (K_dim, C) in (128, 128), (B, N) in (1, 64), and (L*N, K_dim) in
    (64, 64). blocks: B. counter: two zeros. OUT: the type of out."""
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
    output = Output(out, out_pointer, None, out_s)
    gl.warp_specialize(
        [
            (multiply_tiles, (0, ring, output, b_scales, blocks, K_DIM)),
            (multiply_tiles, (1, ring, output, b_scales, blocks, K_DIM)),
            (load_tiles, ((a, b, a_scales), load_ring, counter, block_ends, experts, blocks, N, K_DIM)),
        ],
        [4, 1],
        [232, 32],
    )


def weight_gradient_hopper(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    block_ends: Tensor,
    out: Tensor,
    *,
    num_sms: int | None = None,
    config: Config | None = None,
) -> None:
    """`moequant.reference.weight_gradient` into out, on arguments of which `supports_weight_gradient` is true.

    a: (N, C) contiguous float8_e4m3fn. a_scales: (B, N) float32, strides (any multiple of 4, 1).
    b: (K_dim, C) contiguous float8_e4m3fn. b_scales: (ceil(K_dim / 128), B) float32 contiguous.
    block_ends: (L,) int32, the blocks of the experts up to and with each, of which every one has one or more.
    out: (L, N, K_dim) contiguous bfloat16, float16 or float32, all of which is written.
    config: instead of the choice by size. num_sms: multiprocessors to use; None for all, 0 to compile and no more.
    """
    experts, rows, columns = out.shape
    blocks = a_scales.shape[0]
    sms = multiprocessors(a.device) if num_sms is None else num_sms
    if config is None:
        config = choose_config(experts, columns, rows, out.itemsize, multiprocessors(a.device))
    tiles = experts * ceil_div(rows, 128) * ceil_div(columns, 128 * config.halves)
    scales = descriptor(Address(a_scales.data_ptr(), torch.float32), (blocks, rows), a_scales.stride(0), (1, 64))
    weight_gradient_hopper_kernel[(min(sms, tiles),)](
        matrix(a, 64, 128),
        matrix(b, 128, 128),
        scales,
        matrix(out, 64, 64),
        out,
        b_scales,
        block_ends,
        counters.get(a.device),
        experts,
        blocks,
        N=rows,
        K_DIM=columns,
        HALVES=config.halves,
        STAGES=config.stages,
        OUT=OUT_TYPES[out.dtype],
        num_warps=4,
        maxnreg=REGISTERS,
    )


def supports_weight_gradient(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block_ends: Tensor, out: Tensor) -> bool:
    """Whether `weight_gradient_hopper` takes these arguments."""
    return runs_gluon(a.device) and takes_weight_gradient(a, a_scales, b, b_scales, block_ends, out)


def takes_weight_gradient(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block_ends: Tensor, out: Tensor) -> bool:
    """`supports_weight_gradient`, but for the device: types, and what TMA can address."""
    experts, rows, columns = out.shape
    # int32 coordinates
    small = out.numel() > 0 and max(experts * rows, a.shape[1] + 128, a_scales.stride(0)) < 2**31
    return (
        small
        and a.dtype == b.dtype == torch.float8_e4m3fn
        and out.dtype in OUT_TYPES
        and columns * out.itemsize % 16 == 0
        and a_scales.stride(1) == 1
        and a_scales.stride(0) % 4 == 0
        and a_scales.stride(0) >= rows
        and all(x.is_contiguous() for x in (a, b, b_scales, block_ends, out))
        and all(x.data_ptr() % 16 == 0 for x in (a, b, a_scales, out))
    )
