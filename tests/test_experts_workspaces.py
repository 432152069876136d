"""What `GroupedExperts` keeps for batches, whose it is, and what goes on to the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant import Activation, GroupedExperts, MoEQuantDispatcher, ops
from moequant.batch import ExpertBatch
from moequant.config import PLAIN_DTYPES
from moequant.testing import assert_bit_equal, routing
from moequant.weights import parts_of

SETTINGS: dict[str, Any] = {"num_experts": 3, "top_k": 2, "hidden_size": 40, "max_tokens_per_rank": 9, "quant": "none", "slots": 2}


def experts(quant: str = "none") -> GroupedExperts:
    return GroupedExperts.from_weights(torch.randn(3, 32, 40).bfloat16(), torch.randn(3, 40, 16).bfloat16(), quant=quant)


def batch_of(dispatcher: MoEQuantDispatcher, slot: int) -> ExpertBatch:
    return dispatcher.dispatch(torch.randn(9, 40).bfloat16(), *routing(9, 2, 3), slot=slot)[0]


def test_batches_of_two_slots_go_through_memory_of_their_own():
    layer = experts()
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        first, second = (batch_of(dispatcher, slot) for slot in range(2))
        steps = [(layer.gemm1(batch), layer(batch)) for batch in (first, second)]
        for one, other in zip(*steps, strict=True):
            assert one.data_ptr() != other.data_ptr()
        assert layer(first).data_ptr() == steps[0][1].data_ptr()


def test_layers_of_a_model_work_in_the_same_memory_and_keep_their_bits():
    layers = [experts() for _ in range(3)]
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch = batch_of(dispatcher, 0)
        outputs = [layer(batch) for layer in layers]
        assert len({output.data_ptr() for output in outputs}) == 1
        assert len({layer.gemm1(batch).data_ptr() for layer in layers}) == 1
        for layer in layers:
            got = layer(batch).clone()
            alone = layer(batch, out=torch.empty_like(got))
            for expert, count in enumerate(batch.num_tokens.tolist()):
                assert_bit_equal(got[expert, :count], alone[expert, :count])


def test_experts_of_other_sizes_have_workspaces_of_their_own():
    narrow = GroupedExperts.from_weights(torch.randn(3, 16, 40).bfloat16(), torch.randn(3, 40, 8).bfloat16(), quant="none")
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch = batch_of(dispatcher, 0)
        assert experts().gemm1(batch).shape == (3, 16, 32) and narrow.gemm1(batch).shape == (3, 16, 16)


def pushing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each product whose rows are pushed, which does nothing: there is one on GPUs alone."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ops, "grouped_gemm_push", lambda *arguments, **options: calls.append((*arguments, *options.values())))
    return calls


@pytest.mark.parametrize("num_sms", [None, 7])
def test_pushed_products_get_the_multiprocessors_that_they_are_given(monkeypatch, num_sms):
    layer, calls, plain = experts(), pushing(monkeypatch), []
    shipped = layer._product

    def product(*arguments: Any) -> torch.Tensor:
        plain.append(arguments[-1])
        return shipped(*arguments)

    monkeypatch.setattr(layer, "_product", product)
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch = batch_of(dispatcher, 0)
        monkeypatch.setattr(ops, "uses_kernels", lambda x: True)
        layer.push(batch, torch.zeros(3, 32, dtype=torch.int64)[:, :16], num_sms=num_sms)
    assert plain == [num_sms] and [call[-1] for call in calls] == [num_sms]
    destinations = next(x for x in calls[0] if isinstance(x, torch.Tensor) and x.dtype == torch.int64)
    assert destinations.shape == (3, 16) and destinations.is_contiguous()


BAD_DESTINATIONS = {
    "fewer rows": (torch.zeros(3, 15, dtype=torch.int64), r"destinations must have shape .*\b3, 16\b.*, got \(3, 15\)"),
    "fewer experts": (torch.zeros(2, 16, dtype=torch.int64), r"destinations must have shape .*\b3, 16\b.*, got \(2, 16\)"),
    "no addresses": (torch.zeros(3, 16, dtype=torch.int32), "destinations must be torch.int64, got torch.int32"),
    "another device": (torch.zeros(3, 16, dtype=torch.int64, device="meta"), "destinations must be on cpu, got meta"),
    "no tensor": ([0], "destinations must be a tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_DESTINATIONS)
def test_rows_are_pushed_to_one_address_each(monkeypatch, case):
    (destinations, message), calls = BAD_DESTINATIONS[case], pushing(monkeypatch)
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch = batch_of(dispatcher, 0)
        with pytest.raises(ValueError, match=message):
            experts().push(batch, destinations)
    assert calls == []


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("activation", [Activation(), Activation("relu2", gated=False)], ids=["gated", "not gated"])
@pytest.mark.parametrize("quant", ["none", "float16", "int8"])
def test_buffer_bytes_is_what_a_layer_allocates(quant, activation, layout):
    """On a CPU, where nothing is fused."""
    settings = SETTINGS | {"quant": quant, "layout": layout, "slots": 1}
    dtype = torch.float16 if quant == "float16" else torch.bfloat16
    w13, w2 = torch.randn(3, 24 * activation.width, 40).to(dtype), torch.randn(3, 40, 24).to(dtype)
    layer = GroupedExperts.from_weights(w13, w2, quant=quant, activation=activation)
    with MoEQuantDispatcher(**settings, device="cpu") as dispatcher:
        dispatcher(torch.randn(5, 40), torch.tensor([[0, 1]] * 5), torch.rand(5, 2), layer)
        [workspace] = dispatcher._transport.owner.workspaces.values()
        inner = [workspace.inner.values, workspace.inner.scales] if quant == "int8" else [workspace.inner]
        taken = sum(tensor.nbytes for tensor in (*inner, workspace.gate_up, workspace.output))
    said = [
        MoEQuantDispatcher.buffer_bytes(**settings, **more)
        for more in ({}, {"intermediate_size": 24, "fused": False, "gated": activation.gated})
    ]
    assert said[1] - said[0] == taken
    if not activation.gated:
        # they are never fused
        assert MoEQuantDispatcher.buffer_bytes(**settings, intermediate_size=24, gated=False) == said[1]


@pytest.mark.parametrize("quant", ["none", "float16", "int8"])
def test_weights_that_are_not_quantized_lie_where_they_were_given(quant):
    """docs/use.md says which; what is made contiguous or laid apart is a copy."""
    dtype = PLAIN_DTYPES.get(quant, torch.bfloat16)
    w13, w2, bias = (torch.randn(shape, dtype=dtype) for shape in ((2, 64, 24), (2, 24, 32), (2, 64)))
    experts = GroupedExperts.from_weights(w13, w2, quant=quant, bias13=bias)
    given = {x.data_ptr() for x in (w13, w2)}
    assert {parts_of(w)[0].data_ptr() in given for w in (experts.w13, experts.w2)} == {quant != "int8"}
    assert experts.bias13 is not None and experts.bias13.data_ptr() == bias.data_ptr()
    across = w2.mT.contiguous().mT
    assert parts_of(GroupedExperts.from_weights(w13, across, quant=quant).w2)[0].data_ptr() != across.data_ptr()
    interleaved = GroupedExperts.from_weights(w13, w2, quant=quant, activation=Activation(interleaved=True), bias13=bias)
    assert parts_of(interleaved.w13)[0].data_ptr() not in given
    assert interleaved.bias13 is not None and interleaved.bias13.data_ptr() != bias.data_ptr()
