"""Layers that are trained over the symmetric transport: in Triton's interpreter, in processes that share memory."""

from __future__ import annotations

import pytest
from trials import install_interpreter

from moequant.testing import assert_bit_equal, run_ranks
from training_cases import run_layer


@pytest.mark.parametrize(("quant", "layout", "reduce"), [("fp8_e4m3fn", "ragged", "exact")])
def test_gradients_over_the_symmetric_transport_have_the_bits_of_the_collective_one(quant, layout, reduce, interpreted):
    sizes, settings = (72, 40, 5), {"quant": quant, "layout": layout, "reduce": reduce}
    symmetric, collective = (
        run_ranks(run_layer, 2, "cpu", settings | {"transport": transport}, sizes, {"passes": 1}, setup=install_interpreter)
        for transport in ("symmetric", "collective")
    )
    for rank, (mine, expected) in enumerate(zip(symmetric, collective, strict=True)):
        assert len(mine) == 5
        for name in expected:
            assert_bit_equal(mine[name], expected[name], f"rank {rank}: {name}")
