"""Activations of experts and their derivatives, on the numbers of a tile: `moequant.training.slopes` for kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from moequant.kernels.library.activations import erfc_of_twice, soft_capped
from moequant.kernels.library.common import one_plus_exp, quotient


@triton.jit
def activated_with_slopes(gate, up, ACTIVATION: tl.constexpr):
    """What an activation makes of gates and ups in float32, and its derivatives by the gate and by the up; not gated, the up isn't looked
    at. Where a limit bites a derivative is 0, and at the limit itself it is not.
    """
    value, slope = function_with_slope(gate, ACTIVATION)
    if ACTIVATION.gated:
        factor, up_slope = up, tl.full(up.shape, 1.0, tl.float32)
        if ACTIVATION.limit is not None:
            factor = tl.where(up > ACTIVATION.limit, ACTIVATION.limit, tl.where(up < -ACTIVATION.limit, -ACTIVATION.limit, up))
            up_slope = tl.where(tl.abs(up) <= ACTIVATION.limit, 1.0, 0.0)
        if ACTIVATION.up_softcap is not None:
            factor, capped = soft_capped_with_slope(factor, ACTIVATION.up_softcap)
            up_slope = up_slope * capped
        if ACTIVATION.offset != 0.0:
            factor = factor + ACTIVATION.offset
        inner, by_gate, by_up = value * factor, factor * slope, value * up_slope
    else:
        inner, by_gate, by_up = value, slope, slope
    return inner, by_gate, by_up


@triton.jit
def function_with_slope(gate, ACTIVATION: tl.constexpr):
    """f(gate), with its limit before or after, and its derivative."""
    g = gate
    if ACTIVATION.limit is not None and not ACTIVATION.limit_after:
        g = tl.where(gate > ACTIVATION.limit, ACTIVATION.limit, gate)
    if ACTIVATION.function == "silu":
        s = sigmoid(g * ACTIVATION.alpha)
        if ACTIVATION.gate_softcap is None:
            f = g * s
            slope = s + f * ACTIVATION.alpha * (1.0 - s)
        else:
            factor, factor_slope = soft_capped_with_slope(g, ACTIVATION.gate_softcap)
            f = factor * s
            slope = factor_slope * s + f * ACTIVATION.alpha * (1.0 - s)
    elif ACTIVATION.function == "gelu":
        _, tail = erfc_of_twice(g * 0.5)
        share = tl.where(g > 0.0, 1.0 - tail * 0.5, tail * 0.5)
        f = g * share
        # exp(-g**2 / 2) / sqrt(2 * pi)
        slope = share + g * (tl.exp2(g * g * -0.7213475204444817) * 0.3989422804014327)
    elif ACTIVATION.function == "gelu_tanh":
        # 2 * sqrt(2 / pi)
        square = g * g
        s = sigmoid(g * (square * 0.044715 + 1.0) * 1.5957691216057308)
        f = g * s
        slope = s + f * (1.0 - s) * ((square * 0.134145 + 1.0) * 1.5957691216057308)
    else:
        f = tl.where(g <= 0.0, 0.0, g)
        slope = tl.where(g > 0.0, 1.0, 0.0)
        if ACTIVATION.function == "relu2":
            f, slope = f * f, f * 2.0
    if ACTIVATION.limit is not None:
        if ACTIVATION.limit_after:
            slope = tl.where(f <= ACTIVATION.limit, slope, 0.0)
            f = tl.where(f > ACTIVATION.limit, ACTIVATION.limit, f)
        else:
            slope = tl.where(gate <= ACTIVATION.limit, slope, 0.0)
    return f, slope


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32; anything between 0 and 1 for NaN."""
    return quotient(tl.full(x.shape, 1.0, tl.float32), one_plus_exp(x), False)


@triton.jit
def soft_capped_with_slope(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP), and its derivative."""
    capped = soft_capped(x, CAP)
    t = capped * (1.0 / CAP)
    return capped, 1.0 - t * t
