"""Activations of experts. Letters as in `moequant.reference`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moequant.activations import Activation, activation_of

__all__ = ["activated", "swiglu"]


def swiglu(x: Tensor) -> Tensor:
    """(..., 2I), gate first, to silu(gate) * up (..., I) in float32, not rounded in between."""
    gate, up = x.float().chunk(2, -1)
    return gate / (1.0 + torch.exp(-gate)) * up


def activated(x: Tensor, activation: str | Activation = "silu", bias: Tensor | None = None) -> Tensor:
    """(..., 2I), not gated (..., I), to (..., I) in float32, not rounded in between. bias: as x or to be broadcast to it, added first."""
    kind = activation_of(activation)
    wide = x.float() if bias is None else x.float() + bias.float()
    if not kind.gated:
        return function(wide, kind)
    gate, up = (wide[..., ::2], wide[..., 1::2]) if kind.interleaved else wide.chunk(2, -1)
    if kind.limit is not None:
        up = up.clamp(-kind.limit, kind.limit)
    if kind.up_softcap is not None:
        up = soft_capped(up, kind.up_softcap)
    return function(gate, kind) * (up + kind.offset if kind.offset else up)


def function(gate: Tensor, kind: Activation) -> Tensor:
    """f(gate) with its limit. gate: float32."""
    if kind.limit is not None and not kind.limit_after:
        gate = gate.clamp(max=kind.limit)
    if kind.function == "silu":
        factor = gate if kind.gate_softcap is None else soft_capped(gate, kind.gate_softcap)
        f = factor / (1.0 + torch.exp(-(gate if kind.alpha == 1 else gate * kind.alpha)))
    elif kind.function == "gelu":
        # 1 + erf cancels for negative numbers
        f = 0.5 * gate * torch.special.erfc(gate * -math.sqrt(0.5))
    elif kind.function == "gelu_tanh":
        # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)), which doesn't cancel
        f = gate / (1.0 + torch.exp(gate * (gate * gate * 0.044715 + 1.0) * -math.sqrt(8 / math.pi)))
    else:
        f = torch.where(gate <= 0, 0.0, gate)
        f = f * f if kind.function == "relu2" else f
    return f.clamp(max=kind.limit) if kind.limit is not None and kind.limit_after else f


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    # by a tensor: CUDA's division by a number is a product with its reciprocal
    return torch.tanh(x / torch.full_like(x, cap)) * cap
