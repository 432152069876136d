"""Dense GEMM of quantized operands with what follows it: scales of groups or of whole rows and columns, bias, quantization of the result.

Letters: M rows, N columns, K_dim contraction, G = ceil(K_dim / 128) groups of it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moequant.kernels.gemm import grouped_gemm
from moequant.kernels.gemm.grouped_gemm import (
    GROUP_M,
    GROUP_SIZE,
    LARGE_TILES,
    SMALL_TILES,
    STREAMING,
    Config,
    descriptor,
    few_tiles,
    tma_readable,
)
from moequant.kernels.library.arguments import QuantSpec
from moequant.kernels.library.common import quantize_group
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div

# Half as wide, so that few tiles are on more multiprocessors.
NARROW_TILES = Config(64, 4, 6, 2, block_n=64)
# What benchmarks/bench_int8.py tries. There is one program for each tile, so that programs_per_sm means nothing here.
CANDIDATES = (
    SMALL_TILES,
    NARROW_TILES,
    STREAMING,
    Config(64, 4, 5, 2),
    Config(64, 8, 4, 2),
    LARGE_TILES,
    Config(128, 8, 3, 1),
    Config(128, 8, 5, 1),
)


class Scales(NamedTuple):
    """Of both operands, and the elements from one to the next."""

    a: Tensor
    b: Tensor
    a_row: int
    a_group: int
    b_column: int


class Requantize(NamedTuple):
    """How the result becomes int8: scales (M, ceil(N / group)) float32 contiguous, group a power of two up to 128."""

    scales: Tensor
    group: int
    spec: QuantSpec


class Out(NamedTuple):
    numbers: Tensor
    scales: Tensor | None
    spec: QuantSpec | None


class Tile(NamedTuple):
    """m, n, k: of a tile. band: row tiles of a band. grouped: scales are of groups. out_group: columns that share a scale of the
    result."""

    m: int
    n: int
    k: int
    band: int
    tma: bool
    stages: int
    grouped: bool
    out_group: int


@launchable
@triton.jit
def dense_gemm_kernel(
    a,
    b,
    scales,
    bias,
    out,
    M,
    N: tl.constexpr,
    K_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program computes a tile (BLOCK_M, BLOCK_N).

    a, b: descriptors of (M, K_DIM) and (N, K_DIM) if TMA, else pointers.
    TILE.grouped: scales.a (M, G) and scales.b (ceil(N / 128), G) contiguous: each BLOCK_K of K_DIM is scaled and added in float32. Else
    scales.a (M,) and scales.b (N,) scale the sum.
    out.scales: contiguous (M, ceil(N / TILE.out_group)), then the result leaves as int8; or None.

    Tiles are numbered by bands of GROUP_M row tiles, column by column, the rows of a band fastest. Example: 5 row tiles by 2 column
    tiles, GROUP_M=4: tiles 0..3 are rows 0..3 of column 0, tiles 4..7 those of column 1; tile 8 is row 4 of column 0, tile 9 of column 1.
    """
    BLOCK_M: tl.constexpr = TILE.m
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_K: tl.constexpr = TILE.k
    GROUP_M: tl.constexpr = TILE.band
    OUT_GROUP: tl.constexpr = TILE.out_group
    STEPS: tl.constexpr = (K_DIM + BLOCK_K - 1) // BLOCK_K
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    band = tile // (GROUP_M * COLUMN_TILES)
    inside = tile % (GROUP_M * COLUMN_TILES)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - band * GROUP_M, GROUP_M)
    first_row = (band * GROUP_M + inside % height) * BLOCK_M
    column_tile = inside // height
    first_column = column_tile * BLOCK_N

    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    valid_row = rows < M
    valid_column = columns < N
    rows64 = rows.to(tl.int64)
    a_scale_pointers = scales.a + rows64 * scales.a_row
    if not TILE.tma:
        a_pointers = a + rows64[:, None] * K_DIM + depth[None, :]
        b_pointers = b + columns.to(tl.int64)[:, None] * K_DIM + depth[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, STEPS, num_stages=TILE.stages):
        if TILE.tma:
            x = a.load([first_row, step * BLOCK_K])
            w = b.load([first_column, step * BLOCK_K])
        else:
            a_mask = valid_row[:, None]
            b_mask = valid_column[:, None]
            if K_DIM % BLOCK_K:
                in_k = (depth < K_DIM - step * BLOCK_K)[None, :]
                a_mask = a_mask & in_k
                b_mask = b_mask & in_k
            x = tl.load(a_pointers + step * BLOCK_K, mask=a_mask, other=0.0)
            w = tl.load(b_pointers + step * BLOCK_K, mask=b_mask, other=0.0)
        if TILE.grouped:
            a_scale = tl.load(a_scale_pointers + step * tl.cast(scales.a_group, tl.int64), mask=valid_row, other=0.0)
            scale = a_scale * tl.load(scales.b + first_column // 128 * STEPS + step)
            acc = tl.fma(tl.dot(x, w.T).to(tl.float32), tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_N)), acc)
        else:
            # Hopper's tensor cores add float8 products with about 14 bits: each block's sum is added in float32
            acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=BLOCK_K)
    if not TILE.grouped:
        a_scale = tl.load(a_scale_pointers, mask=valid_row, other=0.0)
        b_scale = tl.load(scales.b + columns.to(tl.int64) * scales.b_column, mask=valid_column, other=0.0)
        acc = acc * a_scale[:, None] * b_scale[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=valid_column, other=0.0).to(tl.float32)[None, :]

    pointers = out.numbers + rows64[:, None] * N + columns[None, :]
    mask = valid_row[:, None] & valid_column[None, :]
    if out.scales is None:
        tl.store(pointers, acc.to(out.numbers.dtype.element_ty), mask=mask)
    else:
        # columns past the last are zeros, and change no maximum
        grouped = tl.reshape(acc, (BLOCK_M, BLOCK_N // OUT_GROUP, OUT_GROUP))
        values, out_scales = quantize_group(grouped, out.spec, 2, tl.int8)
        tl.store(pointers, tl.reshape(values, (BLOCK_M, BLOCK_N)), mask=mask)
        OUT_GROUPS: tl.constexpr = (N + OUT_GROUP - 1) // OUT_GROUP
        groups = column_tile * (BLOCK_N // OUT_GROUP) + tl.arange(0, BLOCK_N // OUT_GROUP)
        scale_mask = valid_row[:, None] & (groups < OUT_GROUPS)[None, :]
        tl.store(out.scales + rows64[:, None] * OUT_GROUPS + groups[None, :], out_scales, mask=scale_mask)


def dense_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    requantize: Requantize | None = None,
    config: Config | None = None,
) -> None:
    """Writes a @ b.T, scaled, plus bias, into out, on arguments that the public functions have checked.

    a: (M, K_dim) contiguous float8 or int8. b: (N, K_dim) contiguous, a's dtype.
    a_scales, b_scales: float32. For groups (M, G) of any strides and (ceil(N / 128), G) contiguous; for rows and columns (M,) and (N,) of
        any strides, a stride of 0 too, float8 only.
    bias: (N,) float, or None.
    out: (M, N) contiguous, float; int8 with requantize.
    config: instead of the configuration that is chosen.
    """
    rows, depth = a.shape
    columns = b.shape[0]
    if out.numel() == 0:
        return
    grouped = a_scales.dim() == 2
    limits = grouped_gemm.device_limits(a.device)
    if config is None:
        few = few_tiles(1, rows, ceil_div(columns, GROUP_SIZE), limits.sms)
        config = NARROW_TILES if few and (requantize is None or requantize.group <= NARROW_TILES.block_n) else SMALL_TILES
    tma = config.tma and limits.tma and tma_readable(a) and tma_readable(b)
    dense_gemm_kernel[(ceil_div(rows, config.block_m) * ceil_div(columns, config.block_n),)](
        descriptor(a, config.block_m, GROUP_SIZE) if tma else a,
        descriptor(b, config.block_n, GROUP_SIZE) if tma else b,
        Scales(
            a_scales,
            b_scales,
            a_row=a_scales.stride(0),
            a_group=a_scales.stride(1) if grouped else 0,
            b_column=0 if grouped else b_scales.stride(0),
        ),
        bias,
        Out(out, None, None) if requantize is None else Out(out, requantize.scales, requantize.spec),
        M=rows,
        N=columns,
        K_DIM=depth,
        TILE=Tile(
            m=config.block_m,
            n=config.block_n,
            k=GROUP_SIZE,
            band=GROUP_M,
            tma=tma,
            stages=grouped_gemm.fitting_stages(config, limits, 0),
            grouped=grouped,
            out_group=GROUP_SIZE if requantize is None else requantize.group,
        ),
        num_warps=config.warps,
        # quantization rounds each step by itself; where a product and a sum are to be one, it says so
        enable_fp_fusion=False,
    )
