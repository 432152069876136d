"""SwiGLU of the valid rows of an expert batch, with quantization in the same pass or without.

L experts, M rows of an expert's buffer, I intermediate size, G = ceil(I / 128) groups.
"""

from __future__ import annotations

import torch

from moequant.kernels.quantization.quantize import launch_quantize

# exp keeps the arithmetic units busier than plain quantization does: more threads to a tile
TILE = {"block_m": 16, "block_g": 2, "num_warps": 4, "programs_per_sm": 4}


def silu_mul_quantize(
    x: torch.Tensor,
    num_tokens: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    max_value: float,
    eps: float,
    power_of_two: bool,
    reciprocal: bool,
) -> None:
    """Writes values and scales of the valid rows.

    x: (L, M, 2I) float, any strides, gate first. num_tokens: (L,) int32 or None. values: (L, M, I), any strides. scales: (L, M, G)
    float32, any strides. max_value, eps, power_of_two, reciprocal: the format's and the recipe's, see `moequant.formats`.
    """
    launch_quantize(
        x,
        num_tokens,
        values,
        scales,
        True,
        max_value=max_value,
        eps=eps,
        power_of_two=power_of_two,
        reciprocal=reciprocal,
        **TILE,
    )


def silu_mul(x: torch.Tensor, num_tokens: torch.Tensor | None, out: torch.Tensor) -> None:
    """As `moequant.reference.silu_mul`, any strides."""
    launch_quantize(x, num_tokens, out, None, True, **TILE)
