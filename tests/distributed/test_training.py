"""Layers that are trained over the symmetric transport: in Triton's interpreter, in processes that share memory."""

from __future__ import annotations

import pytest
from trials import install_interpreter

from moequant.testing import run_ranks
from training_cases import LARGEST, check_layer, run_layer


@pytest.mark.parametrize(("quant", "layout", "reduce"), [("none", "ragged", "exact"), ("fp8_e4m3fn", "padded", "per_rank")])
def test_gradients_over_the_symmetric_transport_are_those_of_autograd(quant, layout, reduce, interpreted):
    sizes, settings = (136, 72, 9), {"transport": "symmetric", "quant": quant, "layout": layout, "reduce": reduce}
    results = run_ranks(run_layer, 2, "cpu", settings, sizes, {}, setup=install_interpreter)
    check_layer(results, sizes, {}, LARGEST[quant])
