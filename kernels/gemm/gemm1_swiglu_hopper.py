"""GEMM 1 of the experts for Hopper (sm_90) in Gluon, with SwiGLU and quantization inside: gate and up never reach memory.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together (ragged), H hidden size, G = ceil(H / 128)
groups of it, I intermediate size, N = 2I.

    gate, up = the halves of bfloat16(grouped_gemm_blockscale(a, w13)); values, scales = quantize(silu(gate) * up) in groups of 128

Tiles, ring and partitions are those of `kernels/gemm/grouped_gemm_hopper.py`, with these differences:

* The two halves of a tile's columns are 128 columns of gate and the same 128 columns of up: the TMA warp takes them from their places in
  w13, which needs no rearranging. A warpgroup's two accumulators hold gate and up of the same numbers in the same registers, and a
  tile's columns are one group of the output.
* A tile of at most 64 valid rows belongs to one warpgroup, the next such tile to the other: one's SwiGLU runs beside the other's
  products. The loads are the limit there, with time to spare for one warpgroup's products.

The bits are those of `grouped_gemm_hopper` followed by `silu_mul_quantize`, whose arithmetic (`kernels/library/common.py`) stands here
once more, since Gluon can't call it: the fp8 tensor cores' sums, one fused multiply-add for each group, bfloat16, SwiGLU, quantization.

Example: I = 384, so that w13 has 768 rows. Tile 1 of an expert's first row tile multiplies a's rows 0..127 with w13's rows 128..255
(gate) and 512..639 (up), and writes columns 128..255 of values and group 1 of scales.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from moequant.kernels.library.common import INF_BITS, most_row_tiles, multiprocessors, runs_gluon
from moequant.kernels.library.gluon import barrier, reinterpret, store_block
from moequant.kernels.library.hopper import REGISTERS, counters, matrix, scale_matrix, takes
from moequant.kernels.library.hopper_ring import SCALAR, TILE_WORDS, Ring, advance, load_tiles, next_tile, product, release
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2

STAGES = 4


class Output(NamedTuple):
    """Where a tile's numbers go. matrix: the descriptor of values. pointer: of the first of them. shared: 64 rows for each warpgroup, on
    their way. scales: the first of them, which lie stride_l from one expert to the next, and stride_g from one group to the next."""

    matrix: Any
    pointer: Any
    shared: Any
    scales: Any
    stride_l: Any
    stride_g: Any


@gluon.jit
def silu(gate):
    """`kernels/library/common.py`'s silu_mul_product, without the product."""
    x = gl.minimum(gl.maximum(gate, -88.72283935546875), 88.72283935546875)
    t = x * -1.4426950216293335
    lost = gl.fma(t, 1.904654323148236e-09, gl.fma(t, -0.6931471824645996, x * -1.0))
    e = gl.exp2(t)
    y = 1.0 + gl.fma(e, lost, e)
    r = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=gl.float32, is_pure=True, pack=1)
    return gate * r


@gluon.jit
def group_scale(bits, eps, MAX: gl.constexpr, POWER_OF_TWO: gl.constexpr):
    """As in `kernels/library/common.py`."""
    amax = gl.maximum(bits.to(gl.float32, bitcast=True), eps)
    RECIPROCAL_MAX: gl.constexpr = 1.0 / MAX
    q = amax * RECIPROCAL_MAX
    scale = gl.fma(gl.fma(q, -MAX, amax), RECIPROCAL_MAX, q)
    if POWER_OF_TWO:
        scale = ((scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & INF_BITS).to(gl.float32, bitcast=True)
    return gl.where(bits >= INF_BITS, float("nan"), scale)


@gluon.jit
def largest(x):
    """The bits of each row's largest magnitude."""
    return gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@gluon.jit
def quantize_rows(x, bits, eps, MAX: gl.constexpr, POWER_OF_TWO: gl.constexpr, RECIPROCAL: gl.constexpr):
    """`kernels/library/common.py`'s quantize_group to e4m3fn, of rows whose largest magnitudes are known."""
    scale = group_scale(bits, eps, MAX, POWER_OF_TWO)
    reciprocal = gl.div_rn(1.0, scale)
    # the values of a bad row are 0: its scale alone says NaN
    bad = gl.expand_dims(bits, 1) >= INF_BITS
    q = x * gl.expand_dims(reciprocal, 1)
    if not RECIPROCAL:
        q = gl.fma(gl.fma(q, gl.expand_dims(scale, 1), x * -1.0), gl.expand_dims(reciprocal * -1.0, 1), q)
    return gl.where(bad, 0.0, q).to(gl.float8e4nv), scale


@gluon.jit
def rounded(acc):
    """acc rounded to bfloat16, as the unfused pair has it in memory between its kernels."""
    # two at a time: the conversion of single numbers takes as long as exp2 does
    asm: gl.constexpr = """{
        .reg .b32 both;
        cvt.rn.bf16x2.f32 both, $3, $2;
        shl.b32 $0, both, 16;
        and.b32 $1, both, 0xffff0000;
    }"""
    return gl.inline_asm_elementwise(asm, "=r,=r,r,r", [acc], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def store_values(pointer, values_s, row, rows_left, column, I: gl.constexpr):  # noqa: E741
    """Writes the first rows_left of 64 rows from shared memory."""
    COLUMNS: gl.constexpr = values_s.shape[1]
    LANES: gl.constexpr = COLUMNS // 16
    COALESCED: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [4, 1], [1, 0])
    x = values_s.load(COALESCED)
    rows = gl.arange(0, 64, gl.SliceLayout(1, COALESCED))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, COALESCED))
    # 32 bits for what differs from row to row: 64 would be kept in registers that the products need
    at = pointer + row.to(gl.int64) * I + column
    gl.store(at + (rows[:, None] * I + columns[None, :]), x, mask=(rows < rows_left)[:, None])
    barrier()


@gluon.jit
def store_scales(output, scale, expert, row, rows_left, column_tile, M, RAGGED: gl.constexpr):
    """Writes the first rows_left of 64 scales. row: of values."""
    rows = gl.arange(0, 64, scale.type.layout)
    if RAGGED:
        at = output.scales + column_tile.to(gl.int64) * output.stride_g + row
    else:
        at = output.scales + expert.to(gl.int64) * output.stride_l + column_tile.to(gl.int64) * output.stride_g + (row - expert * M)
    gl.store(at + rows, scale, mask=rows < rows_left)


@gluon.jit
def scale_pointers(b_scales, zero, expert, column_tile, N: gl.constexpr, G: gl.constexpr):
    """Where a tile's scales of gate and of up begin, once for each row."""
    first = b_scales + (gl.maximum(expert, 0) * (N // 128) + column_tile) * G + zero
    return first, first + (N // 256) * G


@gluon.jit
def release_part(empty, both):
    """`release`, for the other warpgroup as well."""
    release(empty)
    mbarrier.arrive(empty, count=1, pred=both)


@gluon.jit
def multiply_tiles(
    WARPGROUP: gl.constexpr,
    ring,
    output,
    go,
    b_scales,
    M,
    eps,
    N: gl.constexpr,
    G: gl.constexpr,
    ARITHMETIC: gl.constexpr,
    RAGGED: gl.constexpr,
):
    """One warpgroup: multiplies, scales and adds the groups of its tiles, and stores SwiGLU of its part of them."""
    STAGES: gl.constexpr = ring.full.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    values_s = output.shared.index(WARPGROUP)
    # zeros that the compiler can't see through: they keep b's scales out of the uniform registers, which the products would wait for
    zero = (gl.program_id(0) + gl.arange(0, 64, ROWS)) >> 28
    stage = 0
    phase = 0
    # whose turn the next short tile is
    turn = 0
    go_phase = 0
    row, rows_left, column_tile, expert = next_tile(ring, stage, phase)
    scales0, scales1 = scale_pointers(b_scales, zero, expert, column_tile, N, G)
    s0 = gl.load(scales0)
    s1 = gl.load(scales1)
    while expert >= 0:
        short = rows_left <= 64
        mine = turn == WARPGROUP
        turn ^= short.to(gl.int32)
        if short and not mine:
            # what its first stage says of the tile has been read; the other warpgroup releases the rest
            release(ring.empty.index(stage))
            passed = stage + G
            stage = passed % STAGES
            phase ^= (passed // STAGES) & 1
            # until then a barrier's phase could be taken for the one before the last
            mbarrier.wait(go.index(WARPGROUP), go_phase)
            go_phase ^= 1
            row, rows_left, column_tile, expert = next_tile(ring, stage, phase)
            scales0, scales1 = scale_pointers(b_scales, zero, expert, column_tile, N, G)
            s0 = gl.load(scales0)
            s1 = gl.load(scales1)
        else:
            half = WARPGROUP * (1 - short.to(gl.int32))
            t = gl.zeros((64, 128), gl.float32, LAYOUT)
            acc0 = gl.zeros((64, 128), gl.float32, LAYOUT)
            acc1 = gl.zeros((64, 128), gl.float32, LAYOUT)
            for k in range(G - 1):
                mbarrier.wait(ring.full.index(stage), phase)
                t = product(ring.a.index(stage * 2 + half), ring.b.index(stage * 2), t)
                s = ring.a_scales.index(stage * 2 + half).load(ROWS)
                scale0 = s * s0
                scale1 = s * s1
                s0 = gl.load(scales0 + k + 1)
                s1 = gl.load(scales1 + k + 1)
                t = warpgroup_mma_wait(0, deps=(t,))
                acc0 = gl.fma(t, gl.expand_dims(scale0, 1), acc0)
                t = product(ring.a.index(stage * 2 + half), ring.b.index(stage * 2 + 1), t)
                t = warpgroup_mma_wait(0, deps=(t,))
                release_part(ring.empty.index(stage), short & (k > 0))
                acc1 = gl.fma(t, gl.expand_dims(scale1, 1), acc1)
                stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(ring.full.index(stage), phase)
            t = product(ring.a.index(stage * 2 + half), ring.b.index(stage * 2), t)
            s = ring.a_scales.index(stage * 2 + half).load(ROWS)
            scale0 = s * s0
            scale1 = s * s1
            t = warpgroup_mma_wait(0, deps=(t,))
            acc0 = gl.fma(t, gl.expand_dims(scale0, 1), acc0)
            t = product(ring.a.index(stage * 2 + half), ring.b.index(stage * 2 + 1), t)
            t = warpgroup_mma_wait(0, deps=(t,))
            release_part(ring.empty.index(stage), short & (G > 1))
            mbarrier.arrive(go.index(1 - WARPGROUP), count=1, pred=short)
            acc1 = gl.fma(t, gl.expand_dims(scale1, 1), acc1)
            x = silu(rounded(acc0)) * rounded(acc1)
            fp8, scale = quantize_rows(x, largest(x), eps, ARITHMETIC[0], ARITHMETIC[1], ARITHMETIC[2])
            my_row = row + half * 64
            my_rows_left = rows_left - half * 64
            my_expert = expert
            my_column_tile = column_tile
            stage, phase = advance(stage, phase, STAGES)
            row, rows_left, column_tile, expert = next_tile(ring, stage, phase)
            scales0, scales1 = scale_pointers(b_scales, zero, expert, column_tile, N, G)
            s0 = gl.load(scales0)
            s1 = gl.load(scales1)
            tma.store_wait(pendings=0)
            values_s.store(fp8)
            if my_rows_left >= 64:
                fence_async_shared()
                store_block(output.matrix, [my_row, my_column_tile * 128], values_s)
            else:
                store_values(output.pointer, values_s, my_row, my_rows_left, my_column_tile * 128, N // 2)
            store_scales(output, scale, my_expert, my_row, my_rows_left, my_column_tile, M, RAGGED)
    tma.store_wait(pendings=0)


@launchable
@gluon.jit
def gemm1_swiglu_hopper_kernel(
    a,
    b,
    a_scales,
    values,
    values_pointer,
    scales,
    b_scales,
    num_tokens,
    expert_start,
    counter,
    experts,
    M,
    scale_rows,
    scales_stride_l,
    scales_stride_g,
    eps,
    N: gl.constexpr,
    G: gl.constexpr,
    EXPERTS: gl.constexpr,
    ARITHMETIC: gl.constexpr,
    STAGES: gl.constexpr,
):
    """a, b, a_scales, values: descriptors of (L*M, H) in blocks (64, 128), (L*N, H) in (128, 128), (.., M) in (1, 64), where an expert's
    groups are scale_rows apart, and (L*M, I) in (64, 128). expert_start: None, or (L,) int32: L*M is R then, M too, and scale_rows and
    scales_stride_l nothing. counter: two zeros. EXPERTS: L, rounded up to a power of two."""
    a_s = gl.allocate_shared_memory(a.dtype, [STAGES * 2, 64, 128], a.layout)
    b_s = gl.allocate_shared_memory(b.dtype, [STAGES * 2, 128, 128], b.layout)
    scales_block = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1, 64], a_scales.layout)
    a_scales_s = reinterpret(scales_block, gl.float32, [STAGES * 2, 64], SCALAR)
    values_s = gl.allocate_shared_memory(values.dtype, [2, 64, 128], values.layout)
    tile_s = gl.allocate_shared_memory(gl.int32, [STAGES * TILE_WORDS, 1], SCALAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for w in gl.static_range(2):
        mbarrier.init(go.index(w), count=1)
    fence_async_shared()
    ring = Ring(a_s, b_s, a_scales_s, tile_s, full, empty)
    load_ring = Ring(a_s, b_s, scales_block, tile_s, full, empty)
    output = Output(values, values_pointer, values_s, scales, scales_stride_l, scales_stride_g)
    RAGGED: gl.constexpr = expert_start is not None
    gl.warp_specialize(
        [
            (multiply_tiles, (0, ring, output, go, b_scales, M, eps, N, G, ARITHMETIC, RAGGED)),
            (multiply_tiles, (1, ring, output, go, b_scales, M, eps, N, G, ARITHMETIC, RAGGED)),
            (
                load_tiles,
                ((a, b, a_scales), load_ring, counter, (num_tokens, expert_start), (experts, M, scale_rows), N, G, EXPERTS, True),
            ),
        ],
        [4, 1],
        [232, 32],
    )


def gemm1_swiglu_hopper(
    a: Tensor,
    a_scales: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    *,
    max_value: float,
    eps: float,
    power_of_two: bool,
    reciprocal: bool,
    num_sms: int | None = None,
) -> None:
    """Writes values and scales of the valid rows, on arguments of which `supports_gemm1_swiglu` is true.

    a: (L, M, H) contiguous float8_e4m3fn. a_scales: (L, M, G) float32, strides (any, 1, any).
    w13: (L, 2I, H) contiguous float8_e4m3fn, gate first. w13_scales: (L, 2 * I / 128, G) float32 contiguous.
    num_tokens: (L,) int32, at most M of each expert counts; None for all M.
    expert_start: (L,) int32, with a (R, H), a_scales (R, G), values (R, I) and scales (R, I / 128), both strides (1, any); or None.
    values: (L, M, I) contiguous float8_e4m3fn. scales: (L, M, I / 128) float32, strides (any, 1, any).
    max_value, eps, power_of_two, reciprocal: the format's and the recipe's, see `moequant.formats`. num_sms: multiprocessors to use;
    None for all, 0 to compile and no more.
    """
    experts, columns, hidden = w13.shape
    rows = a.shape[-2]
    groups = ceil_div(hidden, 128)
    scales_matrix, scale_rows = scale_matrix(a_scales)
    tiles = most_row_tiles(experts, rows, 128, expert_start) * (columns // 256)
    sms = multiprocessors(a.device) if num_sms is None else num_sms
    gemm1_swiglu_hopper_kernel[(min(sms, tiles),)](
        matrix(a, 64, 128),
        matrix(w13, 128, 128),
        scales_matrix,
        matrix(values, 64, 128),
        values,
        scales,
        w13_scales,
        num_tokens,
        expert_start,
        counters.get(a.device),
        experts,
        rows,
        scale_rows,
        scales.stride(0),
        scales.stride(-1),
        eps,
        N=columns,
        G=groups,
        EXPERTS=max(32, next_power_of_2(experts)),
        ARITHMETIC=(max_value, power_of_two, reciprocal),
        STAGES=STAGES,
        num_warps=4,
        maxnreg=REGISTERS,
        # as silu_mul_quantize
        enable_fp_fusion=False,
    )


def faster_apart(experts: int, inner: int, expected_rows: int, device: torch.device) -> bool:
    """Whether the two kernels that this one replaces are faster: with few rows, and so few tiles that many multiprocessors have none in
    the last round. `grouped_gemm_hopper`'s narrow tiles spread better. Measured on an H200 at 1.45 and 3.9 tiles for each."""
    rounds = experts * (inner // 128) / multiprocessors(device)
    return expected_rows <= 32 and math.ceil(rounds) > 1.3 * rounds


def supports_gemm1_swiglu(a: Tensor, a_scales: Tensor, w13: Tensor, w13_scales: Tensor, values: Tensor, scales: Tensor) -> bool:
    """Whether `gemm1_swiglu_hopper` takes these arguments. What it refuses is for the two kernels that it replaces."""
    return runs_gluon(a.device) and takes_gemm1_swiglu(a, a_scales, w13, w13_scales, values, scales)


def takes_gemm1_swiglu(
    a: Tensor, a_scales: Tensor | None, w13: Tensor, w13_scales: Tensor | None, values: Tensor, scales: Tensor
) -> bool:
    """`supports_gemm1_swiglu`, but for the device."""
    return (
        takes(a, a_scales, w13, w13_scales, values, segments=2)
        and w13.shape[1] % 256 == 0
        and values.dtype == torch.float8_e4m3fn
        and values.is_contiguous()
        and scales.dtype == torch.float32
        and scales.stride(-2) == 1
    )
