"""A layer inside a module that is compiled whole, and the numbers by which a graph names its dispatcher and experts."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moequant import GroupedExperts, MoEQuantDispatcher
from moequant.testing import assert_bit_equal
from moequant.traced import Numbered, numbered


class Layer(torch.nn.Module):
    """A router, a layer on a dispatcher, and something around it."""

    def __init__(self, device: str, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        w13, w2, gate = (torch.randn(s, generator=generator).bfloat16() / 8 for s in ((4, 64, 128), (4, 128, 32), (4, 128)))
        settings: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 128, "max_tokens_per_rank": 8, "quant": "int8"}
        self.dispatcher = MoEQuantDispatcher(**settings, device=device)
        self.experts = GroupedExperts.from_weights(w13.to(device), w2.to(device), quant="int8")
        self.gate = gate.to(device)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk((x @ self.gate.T).float().softmax(-1), 2)
        return self.dispatcher(x * 2, ids, weights, self.experts) + 1


def check_compiled(device: str, backend: str) -> None:
    torch._dynamo.reset()
    layers = torch.nn.Sequential(Layer(device), Layer(device, 1))
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 3, 8):
            x = torch.randn(tokens, 128).bfloat16().to(device)
            assert_bit_equal(compiled(x), layers(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_module_with_a_dispatcher_is_compiled_whole_with_the_same_bits(backend):
    check_compiled("cpu", backend)


@pytest.mark.gpu
def test_a_module_with_a_dispatcher_is_compiled_whole_on_a_gpu():
    check_compiled("cuda", "aot_eager")


def test_a_layer_in_a_graph_has_the_shape_and_the_type_of_its_tokens():
    module = Layer("cpu")
    numbers = [module.dispatcher._number, module.experts._number, 0, 1, 0]
    with FakeTensorMode():
        tokens = torch.empty(128, 5).bfloat16().T, torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 2)
        y = torch.ops.moequant.layer(*tokens, numbers, None, None)
    assert isinstance(y, FakeTensor) and y.shape == (5, 128) and y.dtype == torch.bfloat16 and y.is_contiguous()


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_is_not_exported_whose_numbers_another_process_does_not_know(strict):
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="a layer of moequant can't be exported") as error:
        torch.export.export(Layer("cpu"), (torch.zeros(5, 128).bfloat16(),), strict=strict)
    # strict: of the compiler's own type, which says what was raised
    assert strict or error.type is RuntimeError


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_writes_the_output_that_it_is_given(backend):
    torch._dynamo.reset()
    module, x = Layer("cpu"), torch.randn(5, 128).bfloat16()

    def into(x: Tensor, out: Tensor) -> Tensor:
        weights, ids = torch.topk((x @ module.gate.T).float().softmax(-1), 2)
        return module.dispatcher(x * 2, ids, weights, module.experts, out=out, expected_tokens=40) + 1

    out = torch.full_like(x, torch.nan)
    with torch.no_grad():
        assert_bit_equal(torch.compile(into, fullgraph=True, backend=backend)(x, out), module(x))
        assert_bit_equal(out + 1, module(x))


class Thing:
    pass


def test_an_object_keeps_its_number_and_no_other_gets_it():
    numbered, things = Numbered(), [Thing() for _ in range(3)]
    numbers = [numbered.number(thing) for thing in things]
    assert len(set(numbers)) == 3 and [numbered.number(thing) for thing in things] == numbers
    assert [numbered[number] for number in numbers] == things
    del things[1]
    gc.collect()
    assert numbered.number(Thing()) not in numbers
    with pytest.raises(RuntimeError, match="calls a dispatcher or experts that are gone; keep them as long as the graph"):
        numbered[numbers[1]]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))])
def test_a_copy_of_experts_is_not_the_original_in_a_graph(copied):
    experts = Layer("cpu").experts
    other = copied(experts)
    assert numbered[experts._number] is experts and numbered[other._number] is other
    assert other._owner is not experts._owner


def test_modules_of_one_class_are_not_taken_for_each_other():
    torch._dynamo.reset()
    layers = [Layer("cpu", seed) for seed in range(3)]
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="eager")
    x = torch.randn(5, 128).bfloat16()
    with torch.no_grad():
        for layer in layers + layers:
            assert_bit_equal(compiled(layer, x), layer(x))


def test_experts_of_one_s_own_are_compiled_too():
    torch._dynamo.reset()
    module = Layer("cpu")
    module.experts = module.experts.__call__  # type: ignore[assignment]
    own = module.experts
    module.experts = lambda batch: own(batch)  # type: ignore[assignment]
    x = torch.randn(5, 128).bfloat16()
    with torch.no_grad():
        assert_bit_equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))
