"""Activations that tests go through, by what they are, and what each is in float64, written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moequant.activations import Activation


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


silu, relu = torch.nn.functional.silu, torch.relu
# an activation, its formula of gate and up, and whether float32 rounds it alike everywhere
CASES: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor], bool]] = {
    "SwiGLU": (Activation(), lambda g, u: silu(g) * u, False),
    "DeepSeek-V4": (Activation(limit=2.5), lambda g, u: silu(g.clamp(max=2.5)) * u.clamp(-2.5, 2.5), False),
    "gpt-oss": (Activation(limit=7.0, alpha=1.702, offset=1.0, interleaved=True), gpt_oss, False),
    "MiniMax-M3": (Activation(limit=7.0, alpha=1.702, offset=1.0), gpt_oss, False),
    "Step-3.7": (
        Activation(limit=1.5, limit_after=True),
        lambda g, u: silu(g).clamp(max=1.5) * u.clamp(-1.5, 1.5),
        False,
    ),
    "Gemma-4": (Activation("gelu_tanh"), lambda g, u: gelu_tanh(g) * u, False),
    "gelu by erf": (Activation("gelu"), lambda g, u: gelu(g) * u, False),
    "Inkling-2": (
        Activation(gate_softcap=3.0, up_softcap=2.0),
        lambda g, u: soft_cap(g, 3.0) * torch.sigmoid(g) * soft_cap(u, 2.0),
        False,
    ),
    "Nemotron-H": (Activation("relu2", gated=False), lambda g, u: relu(g) ** 2, True),
    "silu without a gate": (Activation(gated=False), lambda g, u: silu(g), False),
    "relu, all around it": (
        Activation("relu", limit=3.0, offset=0.7, interleaved=True),
        lambda g, u: relu(g.clamp(max=3.0)) * (u.clamp(-3.0, 3.0) + 0.7),
        True,
    ),
    "relu2, limited after": (
        Activation("relu2", limit=4.0, limit_after=True),
        lambda g, u: (relu(g) ** 2).clamp(max=4.0) * u.clamp(-4.0, 4.0),
        True,
    ),
}


def formula(name: str, x: Tensor) -> Tensor:
    """The activation of x (..., columns) in float64."""
    activation, function, _ = CASES[name]
    wide = x.double()
    if not activation.gated:
        return function(wide, wide)
    return function(wide[..., ::2], wide[..., 1::2]) if activation.interleaved else function(*wide.chunk(2, -1))
