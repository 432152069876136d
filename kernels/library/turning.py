"""Tiles that are quantized and transposed in registers, for Hopper in Gluon.

Each thread has a patch of a tile, some tokens by some columns. It loads its tokens one after the other, neighbouring columns together,
and stores its columns one after the other, neighbouring tokens together: turned, the same numbers are in the same registers of the same
thread, in another order, which costs nothing before they are rounded. Triton, which chooses layouts of its own, moves every byte through
shared memory for it.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan
from triton.runtime.jit import constexpr_function

from moequant.kernels.gemm.gemm1_swiglu_hopper import group_scale
from moequant.kernels.library.common import INF_BITS

# Tokens and columns of a tile.
SIZE = gl.constexpr(128)
NAN = gl.constexpr(PropagateNan.ALL)
# Four numbers of one group, rounded and kept or not together.
ROUND = gl.constexpr(
    """{
        .reg .b16 low, high;
        .reg .b32 all;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 all, {low, high};
        and.b32 $0, all, $5;
    }"""
)


class Patch(NamedTuple):
    """Of a thread, tokens by columns, and how many lanes of a warp lie side by side along the columns. Powers of two."""

    tokens: int
    columns: int
    lanes: int


# Loads of 32 bytes of fp8 and 64 of bfloat16 from each row, and stores of 128 to each. A warp has all tokens of its columns.
PATCH = Patch(16, 8, 4)


def warps_of(patch: Patch) -> int:
    """Warps that cover a tile."""
    tokens, columns, _ = patch
    return SIZE.value**2 // (32 * tokens * columns)


# for kernels; the host would pay microseconds for it
warps_of_patch = constexpr_function(warps_of)


def registers_of(patch: Patch, programs: int) -> int:
    """Of a thread at most, so that so many programs share a multiprocessor."""
    return 65536 // (programs * 32 * warps_of(patch)) // 8 * 8


@constexpr_function
def owners(patch, turned):
    """Which thread has which numbers of a tile of tokens by columns, or turned, of columns by tokens, and in which order."""
    tokens, columns, lanes = patch
    token, column = (1, 0) if turned else (0, 1)

    def along(dim, begin, end):
        """The powers of two from begin on up to end, as steps along a dimension."""
        steps = [1 << bit for bit in range(begin.bit_length() - 1, end.bit_length() - 1)]
        return [[step, 0] if dim == 0 else [0, step] for step in steps]

    mine = along(column, 1, columns), along(token, 1, tokens)
    of_warp = columns * lanes, tokens * 32 // lanes
    return gl.DistributedLinearLayout(
        reg_bases=mine[1] + mine[0] if turned else mine[0] + mine[1],
        lane_bases=along(column, columns, of_warp[0]) + along(token, tokens, of_warp[1]),
        warp_bases=along(column, of_warp[0], SIZE.value) + along(token, of_warp[1], SIZE.value),
        block_bases=[],
        shape=[SIZE.value, SIZE.value],
    )


@gluon.jit
def larger(x, y):
    """NaN if one of them is."""
    return gl.maximum(x, y, propagate_nan=NAN)


@gluon.jit
def scale_of(amax, spec):
    """Of groups or blocks of float32 numbers: the scale, its reciprocal, and a mask of the values' bits, with the bits of
    `kernels/library/common.py`."""
    bits = amax.to(gl.int32, bitcast=True)
    scale = group_scale(bits, spec.eps, spec.max_value, spec.power_of_two)
    # the values of a bad group are 0, whatever their quotients: its scale alone says NaN
    keep = gl.where(bits >= INF_BITS, 0, -1)
    if spec.power_of_two:
        r = (0x7F000000 - scale.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    else:
        r = gl.div_rn(1.0, scale)
    return scale, r, keep


@gluon.jit
def quotients(x, scale, r, spec):
    """Numbers over their scale, whose reciprocal is r, before they are rounded."""
    q = x * r
    if not (spec.reciprocal or spec.power_of_two):
        q = gl.fma(gl.fma(q, scale, x * -1.0), r * -1.0, q)
    return q


@gluon.jit
def rounded(q, keep):
    """Quotients as e4m3fn. Four at a time, which are neighbours in the tile's registers, have one mask."""
    return gl.inline_asm_elementwise(ROUND, "=r,f,f,f,f,r,r,r,r", [q, keep], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def turned(x, PATCH: gl.constexpr):
    """A tile of tokens by columns as one of columns by tokens."""
    return gl.convert_layout(x.permute((1, 0)), owners(PATCH, True))


@gluon.jit
def largest_of_all(x):
    """Of a tile, its largest magnitude."""
    return gl.reduce(gl.reshape(gl.abs(x), [SIZE * SIZE]), 0, larger)


@gluon.jit
def quantize_turned(x, spec, PATCH: gl.constexpr, BLOCKS: gl.constexpr):
    """Quantizes a float32 tile of tokens by columns. Returns values, columns by tokens, and the scale of each column, or with BLOCKS of
    all.
    """
    TURNED: gl.constexpr = owners(PATCH, True)
    if BLOCKS:
        scale, r, keep = scale_of(largest_of_all(x), spec)
        wide = scale
    else:
        scale, r, keep = scale_of(gl.convert_layout(gl.reduce(gl.abs(x), 0, larger), gl.SliceLayout(1, TURNED)), spec)
        wide, r, keep = gl.expand_dims(scale, 1), gl.expand_dims(r, 1), gl.expand_dims(keep, 1)
    return rounded(quotients(turned(x, PATCH), wide, r, spec), keep), scale
