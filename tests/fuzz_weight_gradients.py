"""Random weight gradients of fp8 operands for `fuzz_gpu.py`: between guards, against a product in float64.

L experts, N and K_dim columns of the two operands.
"""

from __future__ import annotations

import random

import torch

from fuzz_operations import Place, draw_columns, draw_counts
from guarded import Guarded
from moequant import ops
from moequant.kernels.library import common
from moequant.testing import assert_bit_equal
from tokenwise import Operands, assert_near_gradient, columnwise_operands, exact_gradient


class WeightGradients:
    """Weight gradients, of any columns and any number of tokens: what the operation takes for them, or on Hopper each configuration of
    the kernel, twice with the same bits."""

    name = family = "weight_gradient"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place = place
        self.columns, self.depth = draw_columns(rng, place, 1500), draw_columns(rng, place, 1500)
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.kernel = rng.choice(["operation", "wide", "narrow"])

    def check(self, rng: random.Random) -> None:
        device = self.place.device
        experts = rng.randint(1, 4 if self.place.tiny else 40)
        experts = min(experts, 2**26 // (self.columns * self.depth) + 1)
        most = rng.choice([20, 140] if self.place.tiny else [130, 400, 1500])
        counts = [min(max(count, 0), most) for count in draw_counts(rng, experts, most)]
        operands = columnwise_operands(counts, self.columns, self.depth, device, spare=rng.choice([0, 0, 700]))
        num_sms, outs = rng.choice([None, None, rng.randint(1, 64)]), []
        for _ in range(2):
            out = Guarded(experts, self.columns, self.depth, dtype=self.dtype, device=device)
            self._launch(operands, out.tensor, num_sms)
            out.assert_only(name="the gradient")
            outs.append(out.tensor)
        assert_bit_equal(outs[1], outs[0], "gradients, twice")
        exact = exact_gradient(*operands, experts)
        # what torch multiplies is bfloat16 at first
        assert_near_gradient(outs[0], exact, counts, None if self._is_hoppers() else torch.bfloat16)

    def _is_hoppers(self) -> bool:
        whole = self.depth * self.dtype.itemsize % 16 == 0
        return whole and (self.place.device == "cpu" or common.runs_gluon(torch.device(self.place.device)))

    def _launch(self, operands: Operands, out: torch.Tensor, num_sms: int | None) -> None:
        if self.kernel == "operation" or self.place.device == "cpu" or not self._is_hoppers():
            ops.weight_gradient(*operands, out)
            return
        from moequant.kernels.gemm.grouped_gemm_hopper import FLOAT32, NARROW, WIDE
        from moequant.kernels.gemm.weight_gradient_hopper import weight_gradient_hopper

        config = FLOAT32 if self.dtype == torch.float32 else WIDE if self.kernel == "wide" else NARROW
        weight_gradient_hopper(*operands, out, config=config, num_sms=num_sms)
