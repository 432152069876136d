"""Device functions that several kernels share: quantization arithmetic and the walk over the valid rows of an expert batch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

from moequant.kernels.library.triton_versions import why_no_gluon
from moequant.sizes import ceil_div

# The bits of float32 infinity: a magnitude at or above it is Inf or NaN.
INF_BITS = tl.constexpr(0x7F800000)

# The bits of a call's word that say its layer; 0 says none (`moequant.transport.calls`).
LAYERS = tl.constexpr((1 << 10) - 1)

# Experts of a launch of Hopper's kernels: the counts of all are read in one pass.
MOST_EXPERTS = 256

# What values are stored as where the device does not convert to their type: the bits of e4m3fnuz are made by hand.
POINTER_VIEW = {torch.float8_e4m3fnuz: torch.uint8}


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; few on a CPU, where the interpreter runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; without one, where kernels are only compiled, an H200's."""
    return num_sms(device) if device.type == "cuda" else 132


def runs_gluon(device: torch.device) -> bool:
    """Whether the Gluon kernels for Hopper run on a device."""
    return why_no_gluon(device) is None


@functools.lru_cache
def converts_fnuz(device: torch.device) -> bool:
    """Whether a GPU converts to float8_e4m3fnuz by itself: AMD's gfx942."""
    if device.type != "cuda" or torch.version.hip is None:
        return False
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def storable(values: torch.Tensor) -> torch.Tensor:
    """values as a tensor whose pointer type the device's kernels can store to."""
    return values if converts_fnuz(values.device) else values.view(POINTER_VIEW.get(values.dtype, values.dtype))


@constexpr_function
def takes_ptx():
    """Whether a kernel is compiled for an NVIDIA GPU. The interpreter, also on a machine with GPUs, runs no inline assembly."""
    target = current_target()
    return not knobs.runtime.interpret and target is not None and target.backend == "cuda"


@constexpr_function
def converts_e4m3():
    """Whether casts to float8_e4m3fn are there and saturate: on NVIDIA GPUs from sm_89 on, and in the interpreter."""
    target = current_target()
    return knobs.runtime.interpret or (target.backend == "cuda" and target.arch >= 89)


@triton.jit
def widened(x, out_type: tl.constexpr):
    """x as float32, on its way to out_type. LLVM makes a sum of two widened numbers that is rounded to a type with as many digits or
    more a sum in that type, and takes float16 for one that has all of bfloat16's numbers; so bfloat16 is widened by its bits.

    Example: 0 + -2**-30 is -2**-30, which float16 rounds to -0. As float16 it is 0 + -0 = 0; and 2**17 - 2**17 is infinity - infinity.
    """
    if x.dtype == tl.bfloat16 and out_type == tl.float16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def group_scale(bits, spec):
    """The scale of groups whose absolute maximum has these float32 bits: floor, divide, round up; NaN for Inf and NaN.

    amax / max_value by a product and its remainder: right for all 2**23 mantissas and each max_value, which a test runs through.
    """
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), spec.eps)
    MAX: tl.constexpr = spec.max_value
    RECIPROCAL_MAX: tl.constexpr = 1.0 / MAX
    q = amax * RECIPROCAL_MAX
    scale = tl.fma(tl.fma(q, tl.full(q.shape, -MAX, tl.float32), amax), tl.full(q.shape, RECIPROCAL_MAX, tl.float32), q)
    if spec.power_of_two:
        # a mantissa that is not zero carries into the exponent
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & INF_BITS).to(tl.float32, bitcast=True)
    return tl.where(bits >= INF_BITS, float("nan"), scale)


@triton.jit
def reciprocal_of(scale, spec):
    """The correctly rounded 1 / scale of what `group_scale` gives. A power of two's is exact, and its exponent the negative one."""
    if spec.power_of_two:
        exact = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        reciprocal = tl.where(scale == scale, exact, scale)
    else:
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return reciprocal


@triton.jit
def round_e4m3fnuz(q):
    """float32 to the bits of float8_e4m3fnuz (bias 8, one zero), to nearest even. |q| <= 240 up to float32 rounding."""
    bits = q.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # normal numbers: keep three bits of mantissa; the exponent's bias changes from 127 to 8
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 8) << 3)
    # below 2**-7 the step is 2**-10, the unit in the last place of 2**13: adding that rounds, and leaves the number of steps
    shifted = (magnitude.to(tl.float32, bitcast=True) + 8192.0).to(tl.int32, bitcast=True)
    subnormal = shifted - 0x46000000
    code = tl.where(magnitude < 0x3C000000, subnormal, normal)
    return tl.where(code == 0, 0, code | sign).to(tl.uint8)


# `convert_e4m3fnuz` of four numbers, on the four bytes of a register: in Triton the compiler takes them apart.
CONVERT_E4M3FNUZ = tl.constexpr(
    """{
        .reg .pred p;
        .reg .b16 low, high;
        .reg .f32 x, a, b, c, d;
        abs.f32 x, $1; setp.gt.f32 p, x, 0f3A800000; selp.f32 a, $1, 0f00000000, p;
        abs.f32 x, $2; setp.gt.f32 p, x, 0f3A800000; selp.f32 b, $2, 0f00000000, p;
        abs.f32 x, $3; setp.gt.f32 p, x, 0f3A800000; selp.f32 c, $3, 0f00000000, p;
        abs.f32 x, $4; setp.gt.f32 p, x, 0f3A800000; selp.f32 d, $4, 0f00000000, p;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a;
        cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        abs.f32 x, $1; setp.gt.f32 p, x, 0f43E80000; @p add.u32 $0, $0, 0x1;
        abs.f32 x, $2; setp.gt.f32 p, x, 0f43E80000; @p add.u32 $0, $0, 0x100;
        abs.f32 x, $3; setp.gt.f32 p, x, 0f43E80000; @p add.u32 $0, $0, 0x10000;
        abs.f32 x, $4; setp.gt.f32 p, x, 0f43E80000; @p add.u32 $0, $0, 0x1000000;
    }"""
)


@triton.jit
def convert_e4m3fnuz(doubled):
    """Half of float32 `doubled` to the bits of float8_e4m3fnuz, to nearest even; NaN to 0. |doubled| <= 480 up to float32 rounding.

    float8_e4m3fn has twice the number at the same bits, and the device converts to it. But the bits of its -0 are NaN here, and its
    numbers end at 448, 0x7E, to which the conversion saturates; here 240, 0x7F, follows.
    """
    if takes_ptx():
        code = tl.inline_asm_elementwise(CONVERT_E4M3FNUZ, "=&r,f,f,f,f", [doubled], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        # 2**-10 is half of the smallest number: a tie, which goes to 0
        number = tl.where(tl.abs(doubled) > 0.0009765625, doubled, 0.0)
        # so is 464, between 448 and 480
        code = number.to(tl.float8e4nv).to(tl.uint8, bitcast=True) + (tl.abs(doubled) > 464.0).to(tl.uint8)
    return code


@triton.jit
def quantize_group(x, spec, AXIS: tl.constexpr, target: tl.constexpr):
    """Quantizes float32 x in groups that are AXIS. Returns values of the element type target, and scales without AXIS.

    x / scale is correctly rounded at the cost of a product: with r the correctly rounded 1 / scale, q = x * r is off by at most a few
    units in the last place, the fma gives its remainder exactly, and the second fma corrects it (Markstein, IBM J. R&D 34-1, 1990).
    The clamp of the recipes needs no instruction: |x| <= amax, so the quotient exceeds max_value by rounding alone, and rounds to it.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)
    scale = group_scale(bits, spec)
    reciprocal = reciprocal_of(scale, spec)
    bits, wide_scale, reciprocal = tl.expand_dims(bits, AXIS), tl.expand_dims(scale, AXIS), tl.expand_dims(reciprocal, AXIS)
    return divide_and_round(x, bits, wide_scale, reciprocal, spec, target), scale


@triton.jit
def quantize_tile(x, spec, target: tl.constexpr):
    """`quantize_group` of a whole float32 matrix. Returns values and the scale, (1, 1)."""
    bits = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True), axis=0, keep_dims=True)
    scale = group_scale(bits, spec)
    return divide_and_round(x, bits, scale, reciprocal_of(scale, spec), spec, target), scale


@triton.jit
def divide_and_round(x, bits, scale, r, spec, target: tl.constexpr):
    """float32 x over the scale of its group, as target. bits: of the group's absolute maximum. r: the correctly rounded 1 / scale. All
    three are broadcast against x."""
    FNUZ: tl.constexpr = target == tl.uint8 and converts_e4m3()
    if FNUZ:
        # q is twice the quotient: powers of two change none of the roundings
        scale, r = scale * 0.5, r * 2.0
    q = x * r
    # by a power of two a product is the quotient
    if not (spec.reciprocal or spec.power_of_two):
        # with the signs this way round -0.0 stays -0.0; x * -1 is a sign flip, which costs nothing, where -x would be 0 - x
        q = tl.fma(tl.fma(q, scale, x * -1.0), r * -1.0, q)
    # the values of a bad group are 0: its scale alone says NaN
    if FNUZ:
        # all are NaN, which comes out as 0
        values = convert_e4m3fnuz(q)
    else:
        q = tl.where(bits >= INF_BITS, 0.0, q)
        if target == tl.uint8:
            values = round_e4m3fnuz(q)
        elif target == tl.int8:
            # 1.5 * 2**23: the sum has no fraction bits, so the addition rounds to nearest even, and its low byte is the number
            values = (q + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            values = q.to(target)
    return values


def most_row_tiles(experts: int, rows: int, block_m: int, expert_start: torch.Tensor | None) -> int:
    """How many row tiles there are at most. rows: M, or R where expert_start says where each expert's begin."""
    return experts * ceil_div(rows, block_m) if expert_start is None else rows // block_m + experts


@triton.jit
def unlike(mine, theirs):
    """Whether words of two calls are of calls that don't belong together, as `moequant.transport.calls.unlike` says."""
    differ = mine ^ theirs
    layers = (differ & LAYERS != 0) & (mine & LAYERS != 0) & (theirs & LAYERS != 0)
    return (differ & ~LAYERS != 0) | layers


@triton.jit
def row_blocks(num_tokens_ptr, experts, rows, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, COUNTED: tl.constexpr, starts_ptr=None):
    """How the valid rows of a batch fall into blocks of BLOCK rows. Returns (counts, ends), each (EXPERTS,).

    counts: valid rows of each expert. ends: blocks of this and all earlier experts. starts_ptr: each expert's first row, where the rows
    of all of them, `rows`, lie in one buffer; None: each has a buffer of `rows`.
    Example: BLOCK=8, counts [9, 0, 3]: ends [2, 2, 3]. Block 1 is expert 0's rows 8.., block 2 is expert 2's rows 0...
    """
    lane = tl.arange(0, EXPERTS)
    if COUNTED:
        counts = tl.load(num_tokens_ptr + lane, mask=lane < experts, other=0)
        if starts_ptr is None:
            counts = tl.minimum(tl.maximum(counts, 0), rows)
        else:
            room = rows - tl.load(starts_ptr + lane, mask=lane < experts, other=0)
            counts = tl.minimum(tl.maximum(counts, 0), tl.maximum(room, 0))
    else:
        counts = tl.where(lane < experts, rows, 0)
    blocks = (counts + BLOCK - 1) // BLOCK
    return counts, tl.cumsum(blocks, axis=0)


@triton.jit
def locate_block(block, counts, ends, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a block, its first row, and the expert's valid rows."""
    lane = tl.arange(0, EXPERTS)
    expert = tl.sum((ends <= block).to(tl.int32), axis=0)
    count = tl.sum(tl.where(lane == expert, counts, 0), axis=0)
    end = tl.sum(tl.where(lane == expert, ends, 0), axis=0)
    first = block - (end - (count + BLOCK - 1) // BLOCK)
    return expert, first * BLOCK, count


@triton.jit
def first_row(starts_ptr, expert, rows):
    """Where an expert's rows begin in the batch, in expert's type. Arguments are those of `row_blocks`."""
    if starts_ptr is None:
        first = expert * rows
    else:
        first = tl.load(starts_ptr + expert).to(expert.dtype)
    return first


@triton.jit
def quotient(x, y, REFINED: tl.constexpr):
    """x / y for finite x and normal y, within 2 units in the last place, REFINED within 0.51. On NVIDIA GPUs it is 0 for |y| > 2**126,
    and takes two instructions, REFINED six, where `/` takes eight."""
    if takes_ptx():
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
        q = x * r
        if REFINED:
            # by what is left of x; the product of 0 and infinity isn't a number
            q = tl.where(tl.abs(y) <= 8.507059173023462e37, tl.fma(tl.fma(q, y * -1.0, x), r, q), q)
    else:
        q = x / y
    return q


@triton.jit
def one_plus_exp(x):
    """1 + exp(-x) in float32.

    The hardware's 2**t alone is not enough: rounding t = -x * log2(e) to float32 costs as many bits as its integer part has. What the
    rounding lost, -x - t * ln(2), is small, and exp(-x) = 2**t * (1 + lost).
    """
    # one instruction, because the bounds are symmetric; at the lower one, and only there, t is 128, 2**t infinite and lost above 0
    x = tl.clamp(x, -88.72283935546875, 88.72283935546875)
    t = x * -1.4426950216293335
    # ln(2) is high - low
    high = tl.full(x.shape, -0.6931471824645996, tl.float32)
    low = tl.full(x.shape, 1.904654323148236e-09, tl.float32)
    lost = tl.fma(t, low, tl.fma(t, high, x * -1.0))
    e = tl.exp2(t)
    return 1.0 + tl.fma(e, lost, e)


@triton.jit
def silu(gate, REFINED: tl.constexpr = False):
    """gate / (1 + exp(-gate)) in float32. REFINED: as `quotient`. Below -87.3 the quotient may be 0: silu is nearer to 0 there than
    1.1e-36."""
    return quotient(gate, one_plus_exp(gate), REFINED)


@triton.jit
def silu_mul_product(gate, up):
    """silu(gate) * up in float32. One function for the kernels that do it, so that they give the same bits on one device."""
    return silu(gate) * up
