"""Steps of a training whose launches are made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.kernels.library import hopper
from moequant.repeats import Repeats, members_of
from moequant.testing import assert_bit_equal
from moequant.training.precision import REPEATS
from training_cases import ACTIVATIONS, LARGEST, run_layer


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("quant", LARGEST)
@pytest.mark.parametrize("name", ["silu", "gpt-oss"])
def test_training_steps_that_are_launched_again_have_the_bits_of_new_ones(layout, quant, name, monkeypatch):
    """Other tokens, routing and weights at other addresses each time, two numbers of tokens, two streams."""
    REPEATS._steps.clear()
    side = torch.cuda.Stream()
    for number in range(16):
        sizes, options = (256, 128, (100, 37)[number % 2]), {"kind": ACTIVATIONS[name], "biases": name != "silu", "seed": number}
        options["passes"] = 1
        stream = side if number % 4 >= 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            made = run_layer(0, 1, "cuda", {"quant": quant, "layout": layout}, sizes, options)
            with monkeypatch.context() as patch:
                patch.setattr(Repeats, "device", lambda self, x: None)
                expected = run_layer(0, 1, "cuda", {"quant": quant, "layout": layout}, sizes, options)
        for of, gradient in made.items():
            assert_bit_equal(gradient, expected[of])
    repeated = [step for step in REPEATS._steps.values() if step is not None]
    assert len(repeated) > 8 and len(repeated) == len(REPEATS._steps)
    counters = [id(pair) for pair in hopper.counters.of_stream.values()]
    for launches, _ in repeated:
        for launch, *_ in launches:
            held = [part for part in members_of(tuple(launch.arguments.values())) if isinstance(part, Tensor)]
            assert all(id(tensor) in counters for tensor in held)
