"""What activations give, and their derivatives, in plain torch. Letters as in `moequant.reference`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moequant.activations import Activation


def activated_with_slopes(x: Tensor, kind: Activation, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The activation's value, and from the gradient of the value that of x.

    The formulas are those of `Activation`, with sigmoids instead of quotients by 1 + exp(-x), whose derivative is NaN where exp
    overflows. Where a limit bites the gradient is 0, and at the limit itself it is not.

    Args:
        x: (..., 2I), not gated (..., I), biases added, float32 or float64.
        kind: the activation.
        grad: (..., I) of x's type.

    Returns:
        The value (..., I) and the gradient of x.
    """
    if not kind.gated:
        value, slope = function_with_slope(x, kind)
        return value, grad * slope
    gate, up = (x[..., ::2], x[..., 1::2]) if kind.interleaved else x.chunk(2, -1)
    value, slope = function_with_slope(gate, kind)
    factor, up_slope = up, None
    if kind.limit is not None:
        factor, up_slope = up.clamp(-kind.limit, kind.limit), (up.abs() <= kind.limit).to(up.dtype)
    if kind.up_softcap is not None:
        factor, capped = soft_capped_with_slope(factor, kind.up_softcap)
        up_slope = capped if up_slope is None else up_slope * capped
    if kind.offset:
        factor = factor + kind.offset
    of_gate, of_up = grad * factor * slope, grad * value
    of_up = of_up if up_slope is None else of_up * up_slope
    joined = torch.stack((of_gate, of_up), -1).flatten(-2) if kind.interleaved else torch.cat((of_gate, of_up), -1)
    return value * factor, joined


def function_with_slope(gate: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """f(gate) with its limit, and its derivative.

    Args:
        gate: of any shape, float32 or float64.
        kind: the activation.

    Returns:
        The two.
    """
    before = kind.limit is not None and not kind.limit_after
    g = gate.clamp(max=kind.limit) if before else gate
    if kind.function == "silu":
        s = torch.sigmoid(kind.alpha * g)
        factor, factor_slope = (g, 1.0) if kind.gate_softcap is None else soft_capped_with_slope(g, kind.gate_softcap)
        f, slope = factor * s, factor_slope * s + kind.alpha * factor * s * (1 - s)
    elif kind.function == "gelu":
        share = 0.5 * torch.special.erfc(g * -math.sqrt(0.5))
        f, slope = g * share, share + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    elif kind.function == "gelu_tanh":
        twice = math.sqrt(8 / math.pi)
        s = torch.sigmoid(twice * g * (1 + 0.044715 * g * g))
        f, slope = g * s, s + g * s * (1 - s) * twice * (1 + 3 * 0.044715 * g * g)
    else:
        f = g.clamp(min=0)
        slope = (g > 0).to(g.dtype)
        f, slope = (f * f, 2 * f) if kind.function == "relu2" else (f, slope)
    if kind.limit is None:
        return f, slope
    inside = gate <= kind.limit if before else f <= kind.limit
    return f if before else f.clamp(max=kind.limit), torch.where(inside, slope, 0.0)


def soft_capped_with_slope(x: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """cap * tanh(x / cap), and its derivative.

    Args:
        x: of any shape.
        cap: above 0.

    Returns:
        The two.
    """
    t = torch.tanh(x / cap)
    return cap * t, 1 - t * t
