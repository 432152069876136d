"""How the Hopper kernels' TMA warp feeds their warpgroups: a ring of stages in shared memory, and tiles drawn from a counter.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together (ragged), N columns, K_dim contraction, G =
ceil(K_dim / 128) groups of it. `kernels/gemm/grouped_gemm_hopper.py` describes tiles and stages.

expert_start is None, or the first row of each expert among R rows; M is R then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from moequant.kernels.library.gluon import ARRIVE_WAITS, barrier, load_block

# Row tiles of one expert that run side by side over the same columns.
GROUP_M = gl.constexpr(16)
# Scalars that a tile's first stage carries: row in out, valid rows from there on, column tile, expert (-1: no more tiles).
TILE_WORDS = gl.constexpr(4)
SCALAR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


class Ring(NamedTuple):
    """The stages in shared memory. a, b: tiles of the operands, of a two a stage and of b one or two. a_scales: those of a's tiles. tile:
    what a stage says of the tile that begins in it, TILE_WORDS scalars. full, empty: barriers, of a stage that is loaded, and free."""

    a: Any
    b: Any
    a_scales: Any
    tile: Any
    full: Any
    empty: Any


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def write_scalar(shared, value):
    shared.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def read_scalar(shared):
    return gl.max(shared.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def count_tiles(num_tokens, expert_start, experts, M, EXPERTS: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Of each expert the valid rows, and the number of tiles of the experts up to it."""
    index = gl.arange(0, EXPERTS, gl.BlockedLayout([1], [32], [1], [0]))
    if num_tokens is None:
        counts = gl.where(index < experts, M, 0)
    else:
        counts = gl.load(num_tokens + index, mask=index < experts, other=0)
        counts = gl.minimum(gl.maximum(counts, 0), M)
        if expert_start is not None:
            counts = gl.minimum(counts, M - gl.load(expert_start + index, mask=index < experts, other=0))
    return counts, gl.associative_scan((counts + 127) // 128 * COLUMN_TILES, 0, add)


@gluon.jit
def first_row(expert_start, expert, experts, M):
    """Where an expert's rows begin. Past the last expert it is anything."""
    if expert_start is None:
        return expert * M
    else:
        return gl.load(expert_start + gl.minimum(expert, experts - 1))


@gluon.jit
def in_band(inside, rows, COLUMN_TILES: gl.constexpr):
    """Row tile and column tile of a tile number inside an expert of so many rows, in bands of GROUP_M row tiles."""
    band = inside // (GROUP_M * COLUMN_TILES)
    inside -= band * (GROUP_M * COLUMN_TILES)
    height = gl.maximum(gl.minimum((rows + 127) // 128 - band * GROUP_M, GROUP_M), 1)
    return band * GROUP_M + inside % height, inside // height


@gluon.jit
def locate_tile(tile, counts, ends, num_tokens, expert_start, experts, M, COLUMN_TILES: gl.constexpr):
    """The expert of a tile number, its first row, its valid rows, the row tile and the column tile. Past the last tile the expert is too
    large."""
    passed = ends <= tile
    expert = gl.sum(passed.to(gl.int32), 0)
    inside = tile - gl.max(gl.where(passed, ends, 0), 0)
    start = first_row(expert_start, expert, experts, M)
    if num_tokens is None:
        count = M
    elif counts.shape[0] <= 128:
        index = gl.arange(0, counts.shape[0], counts.type.layout)
        count = gl.sum(gl.where(index == expert, counts, 0), 0)
    else:
        # the TMA warp has few registers
        count = gl.minimum(gl.maximum(gl.load(num_tokens + gl.minimum(expert, experts - 1)), 0), M)
        if expert_start is not None:
            count = gl.minimum(count, M - start)
    row_tile, column_tile = in_band(inside, count, COLUMN_TILES)
    return expert, start, count, row_tile, column_tile


@gluon.jit
def load_tiles(
    descriptors,
    ring,
    counter,
    counts_of,
    sizes,
    N: gl.constexpr,
    G: gl.constexpr,
    EXPERTS: gl.constexpr,
    GATED: gl.constexpr = False,
):
    """The TMA warp: draws tiles and fills the ring with their groups.

    counts_of: num_tokens and expert_start. sizes: experts, M and scale_rows, the rows between two experts' groups of a_scales.
    GATED: of a tile's two halves of 128 columns the second lies N / 2 columns after the first, not beside it.
    """
    a, b, a_scales = descriptors
    num_tokens, expert_start = counts_of
    experts, M, scale_rows = sizes
    STAGES: gl.constexpr = ring.full.shape[0]
    HALVES: gl.constexpr = ring.b.shape[0] // STAGES
    COLUMN_TILES: gl.constexpr = (N + 128 * HALVES - 1) // (128 * HALVES)
    A_BYTES: gl.constexpr = 64 * 128 + 64 * 4
    B_BYTES: gl.constexpr = HALVES * 128 * 128
    TILE_COLUMNS: gl.constexpr = 128 if GATED else 128 * HALVES
    SECOND: gl.constexpr = N // 2 if GATED else 128
    programs = gl.num_programs(0)
    tile = gl.program_id(0)
    drawn = tile
    stage = 0
    phase = 1
    counts, ends = count_tiles(num_tokens, expert_start, experts, M, EXPERTS, COLUMN_TILES)
    expert, start, count, row_tile, column_tile = locate_tile(
        tile, counts, ends, num_tokens, expert_start, experts, M, COLUMN_TILES
    )
    while expert < experts:
        row = row_tile * 128
        column = column_tile * TILE_COLUMNS
        a_row = start + row
        b_row = expert * N + column
        if expert_start is None:
            scale_row = expert * scale_rows
            scale_column = row
        else:
            scale_row = 0
            scale_column = a_row
        both = count - row > 64
        for k in range(G):
            mbarrier.wait(ring.empty.index(stage), phase)
            loaded = ring.full.index(stage)
            if k == 0:
                write_scalar(ring.tile.index(stage * TILE_WORDS), a_row)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 1), count - row)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 2), column_tile)
                write_scalar(ring.tile.index(stage * TILE_WORDS + 3), expert)
                barrier()
            # only constants can be expected
            mbarrier.expect(loaded, 2 * A_BYTES + B_BYTES, pred=both)
            mbarrier.expect(loaded, A_BYTES + B_BYTES, pred=both == 0)
            load_block(b, [b_row, k * 128], loaded, ring.b.index(stage * HALVES))
            load_block(a, [a_row, k * 128], loaded, ring.a.index(stage * 2))
            load_block(a_scales, [scale_row + k, scale_column], loaded, ring.a_scales.index(stage * 2))
            if HALVES == 2:
                load_block(b, [b_row + SECOND, k * 128], loaded, ring.b.index(stage * HALVES + 1))
            load_block(a, [a_row + 64, k * 128], loaded, ring.a.index(stage * 2 + 1), pred=both)
            load_block(a_scales, [scale_row + k, scale_column + 64], loaded, ring.a_scales.index(stage * 2 + 1), pred=both)
            stage, phase = advance(stage, phase, STAGES)
            # the ring is full by now, so that the answer is there before it is wanted
            if k == G // 2:
                drawn = programs + gl.atomic_add(counter, 1, sem="relaxed")
        expert, start, count, row_tile, column_tile = locate_tile(
            drawn, counts, ends, num_tokens, expert_start, experts, M, COLUMN_TILES
        )
    mbarrier.wait(ring.empty.index(stage), phase)
    write_scalar(ring.tile.index(stage * TILE_WORDS + 2), 0)
    write_scalar(ring.tile.index(stage * TILE_WORDS + 3), -1)
    barrier()
    mbarrier.arrive(ring.full.index(stage), count=1)
    put_back(counter, programs)


@gluon.jit
def put_back(counter, programs):
    """A program has drawn its last tile: the last one to say so leaves the counter at zero."""
    if gl.atomic_add(counter + 1, 1, sem="acq_rel") == programs - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def next_tile(ring, stage, phase):
    """What the TMA warp says of the tile whose first group is in a stage."""
    mbarrier.wait(ring.full.index(stage), phase)
    word = stage * TILE_WORDS
    row = read_scalar(ring.tile.index(word))
    rows_left = read_scalar(ring.tile.index(word + 1))
    column_tile = read_scalar(ring.tile.index(word + 2))
    expert = read_scalar(ring.tile.index(word + 3))
    return row, rows_left, column_tile, expert


@gluon.jit
def scale_pointers(b_scales, zero, expert, column_tile, HALVES: gl.constexpr, N: gl.constexpr, G: gl.constexpr):
    """Where a tile's scales of b begin, for the first and the second 128 columns, once for each row."""
    block = gl.maximum(expert, 0) * ((N + 127) // 128) + column_tile * HALVES
    first = b_scales + block * G + zero
    if N % (128 * HALVES) == 0:
        return first, first + G * (HALVES - 1)
    else:
        # the second half of the last tile may lie past the last column, and past the last scale
        return first, first + gl.where((column_tile * HALVES + 1) * 128 < N, G, 0)


@gluon.jit
def release(empty):
    """Gives a stage back to the TMA warp. One thread arrives, so all must be done with it."""
    if not ARRIVE_WAITS:
        barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def product(a_s, b_s, t):
    """Starts a @ b.T of one group, into t."""
    return warpgroup_mma(a_s, b_s.permute((1, 0)), t, use_acc=False, is_async=True)
