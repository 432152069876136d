"""Layers of experts with activations, biases and float16 on a GPU: captured, with launches that are repeated, and on two streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from activation_cases import CASES
from moequant import GroupedExperts, MoEQuantDispatcher
from moequant.config import PLAIN_DTYPES
from moequant.testing import assert_bit_equal, relative_error
from test_experts import TOLERANCES

pytestmark = pytest.mark.gpu

EXPERTS, HIDDEN, INNER, TOKENS = 8, 512, 384, 96
SETTINGS: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 3, "hidden_size": HIDDEN, "max_tokens_per_rank": TOKENS}
NAMES = pytest.mark.parametrize("name", ["SwiGLU", "gpt-oss", "Inkling-2", "Nemotron-H"])
QUANTS = pytest.mark.parametrize("quant", ["none", "float16", "int8", "fp8_e4m3fn"])
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])


def drawn(name: str, quant: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """w13, w2, and settings with biases, on the CPU."""
    activation, dtype = CASES[name][0], PLAIN_DTYPES.get(quant, torch.bfloat16)
    columns = INNER * activation.width
    weights = [torch.randn(EXPERTS, columns, HIDDEN) / HIDDEN**0.5, torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5]
    biases = {"bias13": torch.randn(EXPERTS, columns), "bias2": torch.randn(EXPERTS, HIDDEN).bfloat16()}
    return [w.to(dtype) for w in weights], {"quant": quant, "activation": activation, **biases}


def experts_of(weights: list[torch.Tensor], settings: dict[str, Any], device: str = "cuda") -> GroupedExperts:
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    return GroupedExperts.from_weights(*(w.to(device) for w in weights), **moved)


def tokens_of(seed: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :3].contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).half()
    return hidden.to(device), ids.to(device), torch.rand(ids.shape, generator=generator).to(device)


def alone(experts: GroupedExperts, seed: int, **settings: Any) -> torch.Tensor:
    """A layer in a dispatcher of its own, of which nothing can be repeated."""
    with MoEQuantDispatcher(**SETTINGS, **settings) as dispatcher:
        return dispatcher(*tokens_of(seed), experts)


@LAYOUTS
@QUANTS
@NAMES
def test_a_captured_layer_has_the_bits_of_an_eager_one_and_is_near_the_references(name, quant, layout):
    weights, settings = drawn(name, quant)
    experts = experts_of(weights, settings)
    with MoEQuantDispatcher(**SETTINGS, quant=quant, layout=layout) as dispatcher:
        static = tokens_of(0)
        eager = dispatcher(*static, experts).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dispatcher(*static, experts)
        for seed in (1, 2, 0):
            for target, source in zip(static, tokens_of(seed), strict=True):
                target.copy_(source)
            graph.replay()
            assert_bit_equal(out, alone(experts, seed, quant=quant, layout=layout), f"replay of {seed}")
        assert_bit_equal(out, eager, "the first inputs again")
    with MoEQuantDispatcher(**SETTINGS, quant=quant, layout=layout, device="cpu") as dispatcher:
        expected = dispatcher(*tokens_of(0, "cpu"), experts_of(weights, settings, "cpu"))
    # other roundings of products move quantized numbers by a step
    assert relative_error(eager.cpu(), expected) < min(TOLERANCES[quant], 0.02)


@LAYOUTS
@QUANTS
@NAMES
def test_a_layer_that_comes_again_has_the_bits_of_its_first_call(name, quant, layout):
    """The second call is recorded, later ones repeat its launches; another bias is no such call."""
    weights, settings = drawn(name, quant)
    experts = experts_of(weights, settings)
    with MoEQuantDispatcher(**SETTINGS, quant=quant, layout=layout) as dispatcher:
        for seed in (0, 1, 2, 3, 0):
            assert_bit_equal(dispatcher(*tokens_of(seed), experts), alone(experts, seed, quant=quant, layout=layout), f"{seed}")
        assert experts.bias13 is not None
        for part, bias in (("bias2", None), ("bias13", 2 * experts.bias13)):
            setattr(experts, part, bias)
            biases: dict[str, Any] = {"bias13": experts.bias13, "bias2": experts.bias2}
            fresh = GroupedExperts(experts.w13, experts.w2, activation=experts.kind, **biases)
            expected = alone(fresh, 0, quant=quant, layout=layout)
            for _ in range(3):
                assert_bit_equal(dispatcher(*tokens_of(0), experts), expected, f"another {part}")


@LAYOUTS
@QUANTS
@NAMES
def test_two_streams_with_a_slot_each_change_no_bit(name, quant, layout):
    weights, settings = drawn(name, quant)
    experts = experts_of(weights, settings)
    expected = [alone(experts, seed, quant=quant, layout=layout) for seed in range(2)]
    with MoEQuantDispatcher(**SETTINGS, quant=quant, layout=layout, slots=2) as dispatcher:
        inputs, outs = [tokens_of(seed) for seed in range(2)], [[], []]
        for slot in range(2):
            # what is made once is made before
            dispatcher(*inputs[slot], experts, slot=slot)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for _ in range(12):
            for slot, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    outs[slot].append(dispatcher(*inputs[slot], experts, slot=slot))
        torch.cuda.synchronize()
    for slot in range(2):
        for turn, out in enumerate(outs[slot]):
            assert_bit_equal(out, expected[slot], f"slot {slot}, call {turn}")
