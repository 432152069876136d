"""Activations of experts on the numbers of a tile."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moequant.kernels.library.common import one_plus_exp, quotient, silu, silu_mul_product


class Activation(NamedTuple):
    """As `moequant.activations.Activation`, which explains the members and their order. SwiGLU unless it says otherwise."""

    function: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    limit_after: bool = False
    offset: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None
    interleaved: bool = False


SWIGLU = Activation()


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """What an activation makes of gates and ups in float32; not gated, up isn't looked at. One function for the kernels that do it, so
    that they give the same bits on one device.

    Cut by `where`, in which a NaN stays.
    """
    PLAIN: tl.constexpr = (
        ACTIVATION.function == "silu"
        and ACTIVATION.gated
        and ACTIVATION.alpha == 1.0
        and ACTIVATION.limit is None
        and ACTIVATION.offset == 0.0
        and ACTIVATION.gate_softcap is None
        and ACTIVATION.up_softcap is None
    )
    if PLAIN:
        result = silu_mul_product(gate, up)
    else:
        result = limited_function(gate, ACTIVATION)
        if ACTIVATION.gated:
            if ACTIVATION.limit is not None:
                up = tl.where(up > ACTIVATION.limit, ACTIVATION.limit, tl.where(up < -ACTIVATION.limit, -ACTIVATION.limit, up))
            if ACTIVATION.up_softcap is not None:
                up = soft_capped(up, ACTIVATION.up_softcap)
            if ACTIVATION.offset != 0.0:
                up = up + ACTIVATION.offset
            result = result * up
    return result


@triton.jit
def limited_function(gate, ACTIVATION: tl.constexpr):
    """f(gate), with its limit before or after."""
    if ACTIVATION.limit is not None and not ACTIVATION.limit_after:
        gate = tl.where(gate > ACTIVATION.limit, ACTIVATION.limit, gate)
    if ACTIVATION.function == "silu":
        if ACTIVATION.alpha == 1.0 and ACTIVATION.gate_softcap is None:
            f = silu(gate)
        else:
            factor = gate if ACTIVATION.gate_softcap is None else soft_capped(gate, ACTIVATION.gate_softcap)
            f = quotient(factor, one_plus_exp(gate * ACTIVATION.alpha), False)
    elif ACTIVATION.function == "gelu":
        f = gelu_of_twice(gate * 0.5)
    elif ACTIVATION.function == "gelu_tanh":
        # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)), which doesn't cancel; 2 * sqrt(2 / pi)
        f = quotient(gate, one_plus_exp(gate * (gate * gate * 0.044715 + 1.0) * 1.5957691216057308), False)
    else:
        f = tl.where(gate <= 0.0, 0.0, gate)
        if ACTIVATION.function == "relu2":
            f = f * f
    if ACTIVATION.limit is not None and ACTIVATION.limit_after:
        f = tl.where(f > ACTIVATION.limit, ACTIVATION.limit, f)
    return f


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP), within a few units in the last place: near 0, where 1 - 2 / (1 + exp(2y)) cancels, by tanh's series, whose
    next term is below 5e-8 of the result there."""
    y = x * (1.0 / CAP)
    square = y * y
    series = y * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))))
    whole = 1.0 - 2.0 * quotient(tl.full(x.shape, 1.0, tl.float32), one_plus_exp(y * -2.0), False)
    tanh = tl.where(tl.abs(y) < 0.3, series, whole)
    # exp's argument is clamped, in which a NaN would be lost
    return tl.where(y == y, tanh, y) * CAP


@triton.jit
def gelu_of_twice(h):
    """GELU of x = 2h, x * (1 + erf(x / sqrt(2))) / 2, in float32, within a few units in the last place also below -1, where 1 + erf would
    cancel. Half of x is what the formula wants everywhere."""
    u, tail = erfc_of_twice(h)
    # max(x, 0) - u * tail on both sides of zero; h + |h| is NaN for -Inf, as the formula is
    return tl.fma(u * -1.0, tail, h + tl.abs(h))


@triton.jit
def erfc_of_twice(h):
    """|h|, at most 4.15, and 1 + erf(-2|h| / sqrt(2)) there.

    With u = |h| that is exp(-2 * u**2) * p(t), t = (u - 2) / (u + 2). p is the polynomial of degree 7 whose largest relative error down
    to x = -6.7 is the smallest, 6e-8, found by Lawson's iteration. Beyond, GELU is below the floor of any group, and its error a
    thousandth of that floor's step.
    """
    u = tl.minimum(tl.abs(h), 4.15)
    t = quotient(u - 2.0, u + 2.0, False)
    p = tl.full(h.shape, 0.001562363700941205, tl.float32)
    p = tl.fma(p, t, tl.full(h.shape, 0.00099001987837255, tl.float32))
    p = tl.fma(p, t, tl.full(h.shape, -0.01706968992948532, tl.float32))
    p = tl.fma(p, t, tl.full(h.shape, 0.061718374490737915, tl.float32))
    p = tl.fma(p, t, tl.full(h.shape, -0.14340807497501373, tl.float32))
    p = tl.fma(p, t, tl.full(h.shape, 0.24875926971435547, tl.float32))
    p = tl.fma(p, t, tl.full(h.shape, -0.3407956063747406, tl.float32))
    p = tl.fma(p, t, tl.full(h.shape, 0.18882127106189728, tl.float32))
    # exp(-2 * u**2) is 2**power; what the roundings of u**2 and of power lost is small: lost = u**2 + power * ln(2) / 2
    square = u * u
    power = square * -2.885390043258667
    half_ln_2 = tl.full(h.shape, 0.3465735912322998, tl.float32)
    lost = tl.fma(u, u, square * -1.0) + tl.fma(power, half_ln_2, square)
    e = tl.exp2(power)
    return u, p * tl.fma(e, lost * -2.0, e)
