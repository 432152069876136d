"""SwiGLU of the valid rows of an expert batch, with quantization in the same pass or without.

L experts, M rows of an expert's buffer, I intermediate size, G = ceil(I / 128) groups.
"""

from __future__ import annotations

import torch

from moequant.kernels.library.arguments import QuantSpec
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
) -> None:
    """Writes values and scales of the valid rows.

    x: (L, M, 2I) float, any strides, gate first. num_tokens: (L,) int32 or None. values: (L, M, I), any strides. scales: (L, M, G)
    float32, any strides. expert_start: (L,) int32, with x (R, 2I), values (R, I) and scales (R, G); or None.
    """
    launch_quantize(x, num_tokens, expert_start, values, scales, spec, CUT, gated=True)


def silu_mul(x: torch.Tensor, num_tokens: torch.Tensor | None, expert_start: torch.Tensor | None, out: torch.Tensor) -> None:
    """As `moequant.reference.silu_mul`, any strides."""
    launch_quantize(x, num_tokens, expert_start, out, None, None, CUT, gated=True)
