"""Grouped GEMM of quantized operands: one product for each expert, over its valid rows only.

Letters: L experts, M rows of an expert's buffer, R rows of all experts where they lie in one buffer (ragged), N columns, K_dim
contraction, G = ceil(K_dim / 128) groups of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moequant.kernels.gemm.reduce_split_k import reduce_split_k
from moequant.kernels.library.arguments import Valid
from moequant.kernels.library.common import most_row_tiles
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import launch_dependents, uses_pdl
from moequant.sizes import ceil_div, next_power_of_2

# The width of b's blocks and of the groups: a column tile of at most as many columns has one scale for each group.
GROUP_SIZE = 128


class Scales(NamedTuple):
    """Of both operands, or None, and the elements between a's experts, or its ragged rows, and its groups."""

    a: Tensor | None
    b: Tensor | None
    a_expert: int
    a_group: int


class Output(NamedTuple):
    rows: Tensor | None
    partials: Tensor | None


class Product(NamedTuple):
    """experts: rounded up to a power of two."""

    columns: int
    depth: int
    segments: int
    experts: int


class Tile(NamedTuple):
    """m, n, k: of a tile. band: row tiles of a band. parts: programs that share a tile.

    flatten: one loop over the steps of all tiles, so that the loads of a tile start while the one before is being finished.
    pdl: the next launch may begin while this one runs.
    float16: rows that go to addresses are; otherwise bfloat16.
    """

    m: int
    n: int
    k: int
    band: int
    tma: bool
    stages: int
    flatten: bool
    parts: int
    pdl: bool
    float16: bool


@triton.jit
def locate_tile(tile, ends, counts, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """The expert, its valid rows, the row tile and the column tile of a tile number: see `grouped_gemm_kernel`.

    ends: (EXPERTS,) for each expert the number of tiles of the experts up to it. counts: (EXPERTS,) valid rows.
    """
    experts = tl.arange(0, ends.shape[0])
    passed = ends <= tile
    expert = tl.sum(passed.to(tl.int32), 0)
    start = tl.max(tl.where(passed, ends, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    row_tiles = tl.cdiv(count, BLOCK_M)
    band = (tile - start) // (GROUP_M * COLUMN_TILES)
    inside = (tile - start) % (GROUP_M * COLUMN_TILES)
    height = tl.minimum(row_tiles - band * GROUP_M, GROUP_M)
    return expert, count, band * GROUP_M + inside % height, inside // height


@launchable
@triton.jit
def grouped_gemm_kernel(
    a,
    b,
    out,
    destinations,
    scales,
    valid,
    size,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program computes every num_programs-th tile (BLOCK_M, BLOCK_N) of the valid output. Only counts are read to find them.

    a, b: descriptors of (L*M, K_DIM) and (L*N, K_DIM) if TILE.tma, else pointers. size: L and M.
    valid.expert_start: None, or the first row of each expert, among R rows of all; a has (R, K_DIM) then, and M is R. A tile that ends
    past its expert's rows loads rows of the next one, and doesn't store them.
    destinations: the address for each row, or None: then out.rows holds them.
    out.partials: None, or (SPLIT_K, L, M, N) float32, ragged (SPLIT_K, R, N): SPLIT_K programs share a tile, each sums a part of the
    steps, and `reduce_split_k` does the rest.
    Tiles are numbered expert by expert; within an expert by bands of GROUP_M row tiles, column by column, the rows of a band
    fastest: CTAs that run at the same time then read the same weights, and in a tall expert not more than GROUP_M different tiles
    of activations. A column tile never crosses from one segment to the next, nor from one block of 128 columns to the next: it has
    one row of b_scales.

    Example: BLOCK_M=64, BLOCK_N=128, GROUP_M=2, SEGMENTS=2, N=400 (segments of 200 columns: 128 + 72), so 4 column tiles, which start at
    columns 0, 128, 200, 328. Counts [70, 0, 130] need 2, 0, 3 row tiles, 8 + 0 + 12 tiles in all, ends [8, 8, 20]:

        tile                 0  1  2  3  4  5  6  7   8  9 10 11 12 13 14 15  16 17 18 19
        expert               0  0  0  0  0  0  0  0   2  2  2  2  2  2  2  2   2  2  2  2
        row tile             0  1  0  1  0  1  0  1   0  1  0  1  0  1  0  1   2  2  2  2
        column tile          0  0  1  1  2  2  3  3   0  0  1  1  2  2  3  3   0  1  2  3
    """
    N: tl.constexpr = SHAPE.columns
    K_DIM: tl.constexpr = SHAPE.depth
    SEGMENTS: tl.constexpr = SHAPE.segments
    BLOCK_M: tl.constexpr = TILE.m
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_K: tl.constexpr = TILE.k
    SPLIT_K: tl.constexpr = TILE.parts
    SEGMENT_N: tl.constexpr = N // SEGMENTS
    SEGMENT_TILES: tl.constexpr = (SEGMENT_N + BLOCK_N - 1) // BLOCK_N
    SEGMENT_BLOCKS: tl.constexpr = (SEGMENT_N + 127) // 128
    COLUMN_TILES: tl.constexpr = SEGMENTS * SEGMENT_TILES
    STEPS: tl.constexpr = (K_DIM + BLOCK_K - 1) // BLOCK_K

    experts, M = size
    index = tl.arange(0, SHAPE.experts)
    if valid.num_tokens is None:
        counts = tl.where(index < experts, M, 0)
    else:
        counts = tl.load(valid.num_tokens + index, mask=index < experts, other=0)
        counts = tl.minimum(tl.maximum(counts, 0), M)
        if valid.expert_start is not None:
            counts = tl.minimum(counts, M - tl.load(valid.expert_start + index, mask=index < experts, other=0))
    ends = tl.cumsum(tl.cdiv(counts, BLOCK_M) * COLUMN_TILES, 0)
    tiles = tl.max(ends, 0)
    group_stride = tl.cast(scales.a_group, tl.int64)

    launch_dependents(TILE.pdl)
    for unit in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0), flatten=TILE.flatten):
        tile = unit // SPLIT_K
        expert, count, row_tile, column_tile = locate_tile(tile, ends, counts, BLOCK_M, TILE.band, COLUMN_TILES)
        # the expert's rows begin at the start-th buffer of so many
        start, buffer = expert, M
        if valid.expert_start is not None:
            start, buffer = tl.load(valid.expert_start + expert), 1
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        first_column = column_tile // SEGMENT_TILES * SEGMENT_N + column_tile % SEGMENT_TILES * BLOCK_N
        columns_left = SEGMENT_N - column_tile % SEGMENT_TILES * BLOCK_N
        in_tile = tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        valid_row = rows < count
        valid_column = in_tile < columns_left

        a_row = start * buffer + row_tile * BLOCK_M
        b_row = expert * N + first_column
        # rows and columns that are not stored may hold anything: no product mixes them with the others
        if not TILE.tma:
            a_pointers = a + (a_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None] * K_DIM + depth[None, :]
            b_pointers = b + (b_row.to(tl.int64) + in_tile)[:, None] * K_DIM + depth[None, :]
        if scales.a is not None:
            a_scale_pointers = scales.a + start.to(tl.int64) * scales.a_expert + rows
            block = column_tile // SEGMENT_TILES * SEGMENT_BLOCKS + column_tile % SEGMENT_TILES * BLOCK_N // 128
            b_scale_pointer = scales.b + (expert * (SEGMENTS * SEGMENT_BLOCKS) + block) * STEPS

        first_step, last_step = 0, STEPS
        if SPLIT_K > 1:
            first_step = unit % SPLIT_K * STEPS // SPLIT_K
            last_step = (unit % SPLIT_K + 1) * STEPS // SPLIT_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(first_step, last_step, num_stages=TILE.stages):
            if TILE.tma:
                x = a.load([a_row, step * BLOCK_K])
                w = b.load([b_row, step * BLOCK_K])
            else:
                a_mask = valid_row[:, None]
                b_mask = valid_column[:, None]
                if K_DIM % BLOCK_K:
                    in_k = (depth < K_DIM - step * BLOCK_K)[None, :]
                    a_mask = a_mask & in_k
                    b_mask = b_mask & in_k
                x = tl.load(a_pointers + step * BLOCK_K, mask=a_mask, other=0.0)
                w = tl.load(b_pointers + step * BLOCK_K, mask=b_mask, other=0.0)
            if scales.a is None:
                acc = tl.dot(x, w.T, acc)
            else:
                a_scale = tl.load(a_scale_pointers + step * group_stride, mask=valid_row, other=0.0)
                scale = a_scale * tl.load(b_scale_pointer + step)
                acc = tl.fma(tl.dot(x, w.T).to(tl.float32), tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_N)), acc)

        mask = valid_row[:, None] & valid_column[None, :]
        if destinations is None or SPLIT_K > 1:
            output = out.rows
            if SPLIT_K > 1:
                output = out.partials + tl.cast(unit % SPLIT_K, tl.int64) * (experts if valid.expert_start is None else 1) * M * N
            output_rows = output + (start.to(tl.int64) * buffer + rows)[:, None] * N
            tl.store(output_rows + first_column + in_tile[None, :], acc.to(output.dtype.element_ty), mask=mask)
        else:
            # not loaded before: the products have no registers to spare
            addresses = tl.load(destinations + start.to(tl.int64) * buffer + rows, mask=valid_row, other=0)
            ROW: tl.constexpr = tl.float16 if TILE.float16 else tl.bfloat16
            at = addresses.to(tl.pointer_type(ROW))[:, None] + first_column + in_tile[None, :]
            if SEGMENT_N % 8 == 0:
                # the compiler knows nothing of addresses in a table: rows begin at multiples of 16 bytes
                at = tl.max_contiguous(tl.multiple_of(at, (16, 16)), (1, 8))
            tl.store(at, acc.to(ROW), mask=mask)


class Config(NamedTuple):
    """How `grouped_gemm_kernel` is cut and compiled.

    stages: blocks of K_dim in flight; fewer where the device's shared memory asks for it.
    programs_per_sm: how many programs are launched for each multiprocessor, as many as can be resident at once.
    tma: use TMA where device and alignment allow it.
    block_n: columns of a tile, a power of two from 16 to 128.
    parts: programs that share a tile, each with a part of K_dim. They leave float32 numbers, which a second kernel adds in order.
    """

    block_m: int
    warps: int
    stages: int
    programs_per_sm: int
    flatten: bool = False
    tma: bool = True
    block_n: int = 128
    parts: int = 1


# Three programs on a multiprocessor: one's scaling and storing hides under the others' products.
SMALL_TILES = Config(64, 4, 3, 3)
# Two with a deeper ring each: for weights that are read once, where there are several tiles for each program anyway, or only one.
STREAMING = Config(64, 4, 4, 2)
# Short sums: the next tile's loads start under the end of this one.
SHORT = Config(64, 4, 4, 2, flatten=True)
LARGE_TILES = Config(128, 8, 4, 1)
# What benchmarks/bench_grouped_gemm.py tries. 128 rows with four warps spill registers.
CANDIDATES = (
    SMALL_TILES,
    STREAMING,
    SHORT,
    Config(64, 4, 5, 2),
    Config(64, 8, 4, 2),
    LARGE_TILES,
    Config(128, 8, 5, 1, flatten=True),
    Config(64, 4, 6, 2, block_n=64),
    SMALL_TILES._replace(parts=3),
)
GROUP_M = 16


class Limits(NamedTuple):
    """What a device offers: multiprocessors, bytes of shared memory for one program, and whether it has TMA."""

    sms: int
    shared_memory: int
    tma: bool


@functools.lru_cache
def device_limits(device: torch.device) -> Limits:
    """Of a GPU, or, on a CPU, of the interpreter, which runs programs one after the other and understands descriptors."""
    if device.type != "cuda":
        return Limits(2, 2**20, True)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Limits(properties.multi_processor_count, shared_memory, torch.version.hip is None and properties.major >= 9)


def few_tiles(experts: int, rows: int, column_tiles: int, sms: int) -> bool:
    """Whether there are fewer tiles than SMs, even if all rows are valid: then several programs share a tile (split-K)."""
    return experts * ceil_div(rows, STREAMING.block_m) * column_tiles <= sms


def choose_config(expected_rows: int, experts: int, rows: int, column_tiles: int, steps: int, sms: int) -> Config:
    """The configuration for a mean number of valid rows, by what was measured on an H200 (benchmarks/results).

    expected_rows: below 0 for any: then it is always the same one. column_tiles, steps: tiles of 128 columns, and blocks of K_dim, of one
    expert.
    """
    if expected_rows < 0:
        return SMALL_TILES
    if few_tiles(experts, rows, column_tiles, sms):
        tiles = experts * ceil_div(rows, STREAMING.block_m) * column_tiles
        # one program for each multiprocessor, or two if their sums are long: the second kernel takes as long as about ten steps
        return STREAMING._replace(parts=max(1, min(sms // tiles, steps // 4), min(2 * sms // tiles, steps // 24)))
    if steps <= 12 and expected_rows <= 128:
        return SHORT
    if expected_rows <= 16 and experts * column_tiles > sms * SMALL_TILES.programs_per_sm:
        return STREAMING
    return SMALL_TILES


def fitting_stages(config: Config, limits: Limits, out_bytes: int) -> int:
    """The configuration's stages, or as many as fit: each holds 128 bytes of every row of both tiles, and the row tile's scales."""
    stage = (config.block_m + config.block_n) * 128 + (config.block_m + 32) * 4
    # a flattened loop has its loads in flight while the output tile passes through shared memory
    reserved = config.block_m * config.block_n * out_bytes if config.flatten else 0
    # devices without TMA multiply from registers: the stage being multiplied takes no shared memory
    in_registers = 0 if limits.tma else 1
    return max(1, min(config.stages, (limits.shared_memory - reserved) // stage + in_registers))


def tma_readable(x: Tensor) -> bool:
    """Whether TMA can read the rows of a contiguous tensor."""
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor for (rows, columns) blocks of all experts' rows, one below the other; past the last row and column are zeros."""
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])


def grouped_gemm_blockscale(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
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
    """`moequant.reference.grouped_gemm_blockscale` into out, on arguments that `moequant.grouped_gemm_blockscale` has checked.

    a: (L, M, K_dim) contiguous float8, int8 or, without scales, bfloat16 or float16. a_scales: (L, M, G) float32, strides (any, 1, any),
    or None.
    b: (L, N, K_dim) contiguous, a's dtype. b_scales: (L, segments * ceil(N / segments / 128), G) float32 contiguous, or None.
    num_tokens: (L,) int32, at most M of each expert counts; None for all M.
    expert_start: (L,) int32, with a (R, K_dim), a_scales (R, G), strides (1, any), out (R, N) and destinations (R,); or None.
    out: (L, M, N) contiguous bfloat16, float16 or float32; rows past num_tokens are not written. None with destinations.
    destinations: (L, M) int64 contiguous, the address for each row of N bfloat16 numbers, float16 if a is, a multiple of 16 if N
    is one of 8.
    expected_rows: a guess of the mean of num_tokens, which chooses the configuration; None takes M, ragged R / L; below 0: any. config:
    instead of that choice. num_sms: multiprocessors to use; None for all.
    """
    assert (out is None) != (destinations is None)
    experts, columns, depth = b.shape
    rows = a.shape[-2]
    if experts * rows * columns == 0:
        return
    mean = rows if expert_start is None else ceil_div(rows, experts)
    limits = device_limits(a.device)
    sms = limits.sms if num_sms is None else num_sms
    block_k = GROUP_SIZE // a.element_size()
    if config is None:
        expected_rows = mean if expected_rows is None else expected_rows
        blocks = segments * ceil_div(columns // segments, GROUP_SIZE)
        config = choose_config(expected_rows, experts, mean, blocks, ceil_div(depth, block_k), limits.sms)
    tma = config.tma and limits.tma and tma_readable(a) and tma_readable(b)
    column_tiles = segments * ceil_div(columns // segments, config.block_n)
    partials, pdl = None, False
    if config.parts > 1:
        partials = torch.empty(config.parts, *a.shape[:-1], columns, dtype=torch.float32, device=a.device)
        pdl = uses_pdl(a.device)
    tiles = most_row_tiles(experts, rows, config.block_m, expert_start) * column_tiles
    programs = min(sms * config.programs_per_sm, tiles * config.parts)
    grouped_gemm_kernel[(programs,)](
        descriptor(a, config.block_m, block_k) if tma else a,
        descriptor(b, config.block_n, block_k) if tma else b,
        Output(out, partials),
        destinations,
        Scales(None, None, 0, 0) if a_scales is None else Scales(a_scales, b_scales, a_scales.stride(0), a_scales.stride(-1)),
        Valid(num_tokens, expert_start),
        size=(experts, rows),
        SHAPE=Product(columns, depth, segments, next_power_of_2(experts)),
        TILE=Tile(
            m=config.block_m,
            n=config.block_n,
            k=block_k,
            band=GROUP_M,
            tma=tma,
            stages=fitting_stages(config, limits, 2 if out is None else out.element_size()),
            flatten=config.flatten and depth > 0,
            parts=config.parts,
            pdl=pdl,
            float16=a.dtype == torch.float16,
        ),
        num_warps=config.warps,
        # as the Hopper kernels
        enable_fp_fusion=True,
    )
    if partials is not None:
        reduce_split_k(partials, out, destinations, num_tokens, expert_start, pdl, a.dtype == torch.float16)
