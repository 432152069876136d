"""Quantizers into given outputs, whose launches are repeated (`moequant/repeats.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moequant import quantization, quantize_expert_batch, silu_mul_quantize
from moequant.repeats import Repeats, members_of
from moequant.testing import assert_bit_equal


@pytest.mark.gpu
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_repeated_quantizers_have_the_bits_of_new_ones_and_hold_nothing(ragged):
    """The same launch again on other memory, other counts and other settings, against fresh outputs; recordings keep no tensor."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.tensor([[9, 0, 16], [16, 3, 1], [0, 0, 5]], dtype=torch.int32)
    before = len(quantization.REPEATS._steps)
    for number in range(12):
        shape = (48, 512) if ragged else (3, 16, 512)
        x = torch.randn(shape, generator=generator).bfloat16().cuda()
        n = counts[number % 3].cuda()
        start = (torch.tensor([0, 16, 32], dtype=torch.int32).cuda(),) if ragged else ()
        for function in (quantize_expert_batch, silu_mul_quantize):
            columns = 512 if function is quantize_expert_batch else 256
            settings: dict[str, Any] = {"dtype": torch.int8, "recipe": ("default", "ue8m0")[number % 2]}
            outputs = []
            for _ in range(2):
                values = torch.full((*shape[:-1], columns), 77, dtype=torch.int8, device="cuda")
                scales = torch.full((*shape[:-1], columns // 128), -1.0, device="cuda")
                outputs.append({"values": values, "scales": scales})
            again = function(x, n, *start, **settings, **outputs[0])
            assert again.values is outputs[0]["values"] and again.scales is outputs[0]["scales"] and again.layout == "row"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Repeats, "device", lambda self, x: None)
                function(x, n, *start, **settings, **outputs[1])
            assert_bit_equal(again.values, outputs[1]["values"])
            assert_bit_equal(again.scales, outputs[1]["scales"])
    kept = [*quantization.REPEATS._steps.values()][before:]
    assert any(step is not None for step in kept)
    for step in kept:
        for repeated in step[0] if step else ():
            assert not any(isinstance(part, Tensor) for part in members_of(tuple(repeated.launch.arguments.values())))
