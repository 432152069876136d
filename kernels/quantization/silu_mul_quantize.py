"""SwiGLU, or another activation, of the valid rows of an expert batch, with quantization in the same pass or without; and a bias alone.

L experts, M rows of an expert's buffer, R rows of all experts together (ragged), I intermediate size, G = ceil(I / 128) groups.
"""

from __future__ import annotations

import torch

from moequant.kernels.library.activations import SWIGLU, Activation
from moequant.kernels.library.arguments import QuantSpec, Valid
from moequant.kernels.quantization.quantize import Cut, launch_quantize

# exp keeps the arithmetic units busier than plain quantization does: more threads to a tile
CUT = Cut(16, 2, 4, 4)


def silu_mul_quantize(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    expert_start: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    activation: Activation = SWIGLU,
    bias: torch.Tensor | None = None,
) -> None:
    """Writes values and scales of the valid rows.

    x: (L, M, 2I), not gated (L, M, I), float, any strides. num_tokens: (L,) int32 or None. values: (L, M, I), any strides. scales:
    (L, M, G) float32, any strides. expert_start: (L,) int32, with x (R, 2I), values (R, I) and scales (R, G); or None. bias: float,
    contiguous, one row of x's for each expert; or None.
    """
    launch_quantize(x, Valid(num_tokens, expert_start), values, scales, spec, CUT, activation=activation, bias=bias)


def silu_mul(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    expert_start: torch.Tensor | None,
    out: torch.Tensor,
    activation: Activation = SWIGLU,
    bias: torch.Tensor | None = None,
) -> None:
    """As `moequant.reference.silu_mul`, any strides."""
    launch_quantize(x, Valid(num_tokens, expert_start), out, None, None, CUT, activation=activation, bias=bias)


def add_bias(x: torch.Tensor, num_tokens: torch.Tensor | None, expert_start: torch.Tensor | None, bias: torch.Tensor) -> None:
    """As `moequant.reference.add_bias`. A program writes a tile after it has loaded it, and no other's."""
    launch_quantize(x, Valid(num_tokens, expert_start), x, None, None, CUT, bias=bias)
