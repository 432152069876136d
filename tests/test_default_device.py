"""Under a default device (`torch.device(..)` as a context, `torch.set_default_device`) everything lies where it lies without.

On a CPU the default device is "meta": a tensor that is made without naming its device has no numbers there, and what needs them fails.
"""

from __future__ import annotations

import ast
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _device

from interpreter import install
from moequant import GroupedExperts, MoEQuantDispatcher
from moequant.batch import ExpertBatch
from moequant.testing import assert_bit_equal, in_one_process, routing, run_ranks

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 136, "max_tokens_per_rank": 8}
FACTORIES = {function.__name__ for function in _device._device_constructors()} | {"from_file"}


def factories_without_a_device(text: str) -> list[int]:
    """The lines of calls of torch's factories that leave the device to whoever has set a default one."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in FACTORIES) == ("torch", True)
        and not {"device", "out"} & {keyword.arg for keyword in call.keywords}
    ]


def test_factories_without_a_device_are_found():
    text = "torch.full((1,), 0, pin_memory=True)\ntorch.zeros(2, device=d)\ntl.full((1,), 0)\nx = [torch.tensor(3)]\nx.zero_()"
    assert factories_without_a_device(text) == [1, 4]


@pytest.mark.parametrize("folder", ["moequant", "kernels", "examples"])
def test_every_factory_names_its_device(folder):
    paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if "moequant/kernels" not in str(path)]
    found = {path.name: lines for path in paths if (lines := factories_without_a_device(path.read_text()))}
    assert paths and found == {}


def layer(device: str, default: str | None, rank: int = 0, **settings: Any) -> torch.Tensor:
    """A dispatcher, its experts and one call of both, all under a default device, or none. Returns the sums, on the CPU."""
    quant = settings.setdefault("quant", "int8")
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 136), (4, 128, 136), (4, 136, 64)
    hidden, w13, w2 = (torch.randn(shape, generator=generator).bfloat16().to(device) / 12 for shape in shapes)
    with nullcontext() if default is None else torch.device(default):
        ids, weights = (x.to(device) for x in routing(8, 2, 4, "zipf:1", generator))
        with MoEQuantDispatcher(**SETTINGS, device=device, **settings) as dispatcher:
            local = dispatcher.config.num_local_experts
            mine = slice(rank * local, (rank + 1) * local)
            out = dispatcher(hidden, ids, weights, GroupedExperts.from_weights(w13[mine], w2[mine], quant=quant))
            assert dispatcher.check() == 0
    return out.cpu()


@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "fp8_e5m2", "int8", "none"])
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_a_layer_on_one_rank_has_the_same_bits(quant, reduce):
    settings = {"quant": quant, "reduce": reduce}
    assert_bit_equal(layer("cpu", "meta", **settings), layer("cpu", None, **settings))


@pytest.mark.gpu
@pytest.mark.parametrize("default", ["meta", "cuda", "cpu"])
def test_a_layer_on_a_gpu_has_the_same_bits(default):
    assert_bit_equal(layer("cuda", default), layer("cuda", None))


def run_layers(rank: int, ranks: int, device: str, defaults: list[str], transports: list[dict[str, str]]) -> None:
    del ranks
    device = device.format(rank=rank)
    for transport, reduce, default in itertools.product(transports, ("exact", "per_rank"), defaults):
        settings = {**transport, "reduce": reduce}
        out, expected = (layer(device, name, rank, **settings) for name in (default, None))
        assert_bit_equal(out, expected, f"{settings} under {default}")


COLLECTIVE = [{"transport": "collective", "exchange": exchange} for exchange in ("padded", "packed")]
SYMMETRIC = {"transport": "symmetric"}


def test_a_layer_of_the_collective_transport_has_the_same_bits():
    run_ranks(run_layers, 2, "cpu", ["meta"], COLLECTIVE)


def test_a_layer_of_the_interpreted_symmetric_transport_has_the_same_bits(interpreted):
    run_ranks(run_layers, 2, "cpu", ["meta"], [SYMMETRIC], setup=install)


@pytest.mark.multigpu
def test_a_layer_of_every_transport_on_gpus_has_the_same_bits():
    run_ranks(run_layers, 2, "cuda:{rank}", ["meta", "cuda", "cpu"], [*COLLECTIVE, SYMMETRIC], backend="cpu:gloo,cuda:nccl")


def expert(batch: ExpertBatch) -> torch.Tensor:
    assert batch.scales is not None
    return (batch.values.float() * batch.scales.repeat_interleave(128, 2)[..., : batch.values.shape[2]]).bfloat16()


def test_the_result_of_one_process_has_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(8, 136, generator=generator), *routing(8, 2, 4, generator=generator)] for _ in range(2)]
    expected = in_one_process(SETTINGS, inputs, expert)
    with torch.device("meta"):
        result = in_one_process(SETTINGS, inputs, expert)
    for out, wanted in zip(result[1], expected[1], strict=True):
        assert_bit_equal(out, wanted)
