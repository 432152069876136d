"""What a dispatcher asks of its device and of the tensors that it is given, and what it makes of strided ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant import CapacityOverflowError, InvalidExpertIdError, MoEQuantDispatcher
from moequant.batch import ExpertBatch
from moequant.checks import check_counted, check_format
from moequant.config import DispatcherConfig
from moequant.testing import assert_bit_equal, routing

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 72, "max_tokens_per_rank": 9, "quant": "none"}
both_paths = pytest.mark.usefixtures("both_paths")


def inputs() -> list[torch.Tensor]:
    device = torch.empty(0).device
    ids, weights = (tensor.to(device) for tensor in routing(9, 2, 4))
    return [torch.randn(9, 72).bfloat16(), ids, weights]


def dispatcher(**changes: Any) -> MoEQuantDispatcher:
    return MoEQuantDispatcher(**SETTINGS | changes, device=torch.empty(0).device)


@both_paths
def test_expert_output_of_any_strides_gives_the_bits_of_its_copy():
    with dispatcher() as layer:
        batch, handle = layer.dispatch(*inputs())
        output = batch.values.clone()
        expected = layer.combine(output, handle)
        wide = torch.full((*output.shape[:2], 144), torch.nan, dtype=torch.bfloat16)
        wide[..., ::2] = output
        for strided in (wide[..., ::2], output.transpose(0, 1).contiguous().transpose(0, 1)):
            assert not strided.is_contiguous()
            assert_bit_equal(layer.combine(strided, handle), expected)


@both_paths
def test_a_given_output_without_contiguous_rows_is_refused():
    with dispatcher() as layer:
        batch, handle = layer.dispatch(*inputs())
        with pytest.raises(ValueError, match=r"out must have contiguous rows, got strides \(144, 2\)"):
            layer.combine(batch.values, handle, out=torch.empty(9, 144, dtype=torch.bfloat16)[:, ::2])


@both_paths
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_a_layer_writes_the_output_that_it_is_given_the_tokens_themselves_too(layout, reduce):
    with dispatcher(layout=layout, reduce=reduce) as layer:
        hidden, ids, weights = inputs()
        expected = layer(hidden, ids, weights, lambda batch: batch.values)
        wide = torch.full((9, 80), 7.0).bfloat16()
        assert layer(hidden, ids, weights, lambda batch: batch.values, out=wide[:, :72]).data_ptr() == wide.data_ptr()
        assert_bit_equal(wide[:, :72], expected)
        assert bool((wide[:, 72:] == 7).all())
        assert layer(hidden, ids, weights, lambda batch: batch.values, out=hidden) is hidden
        assert_bit_equal(hidden, expected)


@pytest.mark.parametrize(
    "out, message",
    [
        (torch.empty(8, 72).bfloat16(), r"out must have shape \(9, 72\), got \(8, 72\)"),
        (torch.empty(9, 72), "out must be torch.bfloat16, got torch.float32"),
        (torch.empty(9, 72, dtype=torch.bfloat16, device="meta"), "out must be on cpu, got meta"),
        (torch.empty(9, 144).bfloat16()[:, ::2], "out must have contiguous rows"),
        (torch.empty(1, 72).bfloat16().expand(9, 72), "elements of out must not overlap"),
        ([0.0], "out must be a tensor, got list"),
    ],
    ids=["shape", "dtype", "device", "rows", "overlap", "list"],
)
def test_a_layers_output_is_refused_before_anything_is_sent(out, message):
    hidden, ids, weights = inputs()
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as layer:
        with pytest.raises(ValueError, match=message):
            layer(hidden, ids, weights, lambda batch: batch.values, out=out)
        assert layer._slots[0].generation == 0


def test_a_layers_output_is_not_written_under_grad():
    hidden, ids, weights = inputs()
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as layer:
        with pytest.raises(RuntimeError, match="out is not written under grad: leave it out, or call under torch.no_grad"):
            layer(hidden.requires_grad_(), ids, weights, lambda batch: batch.values, out=torch.empty(9, 72).bfloat16())
        assert layer._slots[0].generation == 0


@both_paths
@pytest.mark.parametrize("step", ["call", "dispatch", "dispatch_send"])
def test_expected_tokens_say_how_many_rows_an_expert_gets_and_change_nothing_else(step):
    """4 experts, top-2: an expert gets half as many rows as there are tokens."""
    batches: list[ExpertBatch] = []

    def values(batch: ExpertBatch) -> torch.Tensor:
        batches.append(batch)
        return batch.values

    with dispatcher(capacity=20) as layer:

        def run(**expected: Any) -> torch.Tensor:
            if step == "call":
                return layer(given[0], given[1], given[2], values, **expected)
            if step == "dispatch":
                batch, handle = layer.dispatch(*given, **expected)
            else:
                handle = layer.dispatch_send(*given, **expected)
                batch = layer.dispatch_recv(handle)
            return layer.combine(values(batch), handle)

        given = inputs()
        outs = [run(), *(run(expected_tokens=tokens) for tokens in (0, 6, 7, 9, 1000)), run()]
        assert [batch.expected_rows for batch in batches] == [5, 1, 3, 4, 5, 32, 5]
        for out in outs:
            assert_bit_equal(out, outs[0])
        for wrong, message in ((-1, "at least 0, got -1"), (2.0, "an integer"), (True, "an integer")):
            with pytest.raises(ValueError, match=f"expected_tokens must be {message}"):
                run(expected_tokens=wrong)


def test_tokens_that_were_quantized_before_are_refused_and_what_to_give_is_said():
    hidden, ids, weights = inputs()
    message = (
        "hidden_states must be .*, got torch.float8_e4m3fn; .* if it is quantized, give what it was made of: dispatch quantizes"
    )
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as layer, pytest.raises(ValueError, match=message):
        layer.dispatch(hidden.to(torch.float8_e4m3fn), ids, weights)


@pytest.mark.parametrize("position, name", [(0, "hidden_states"), (1, "topk_ids"), (2, "topk_weights")])
def test_every_input_has_to_be_on_the_dispatchers_device(position, name):
    arguments = inputs()
    arguments[position] = arguments[position].to("meta")
    with dispatcher() as layer, pytest.raises(ValueError, match=f"{name} must be on cpu, got meta"):
        layer.dispatch(*arguments)


@pytest.mark.parametrize(
    "capability, quant, works",
    [
        ((8, 0), "fp8_e4m3fn", False),
        ((8, 6), "fp8_e5m2", False),
        ((8, 0), "fp8_e4m3fnuz", False),
        ((8, 9), "fp8_e4m3fn", True),
        ((9, 0), "fp8_e5m2", True),
        ((9, 0), "fp8_e4m3fnuz", False),
        ((8, 0), "int8", True),
        ((8, 0), "none", True),
    ],
)
def test_float8_is_for_nvidia_gpus_from_sm_89_on(monkeypatch, capability, quant, works):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    device = torch.device("cuda", 0)
    if works:
        check_format(quant, device)
    else:
        named = f"sm_{capability[0]}{capability[1]}"
        with pytest.raises(ValueError, match=rf'quant="{quant}" can\'t be computed on a GPU \({named}\); .*"int8" and "none" can'):
            check_format(quant, device)
    # whatever the GPU, a CPU computes all of them
    check_format(quant, torch.device("cpu"))


def test_invalid_ids_are_told_before_rows_without_room_and_with_them():
    errors, drops = (DispatcherConfig(**SETTINGS, capacity=3, on_overflow=action) for action in ("error", "drop"))
    for config in (errors, drops):
        check_counted(config, 0, 0, False)
        with pytest.raises(
            InvalidExpertIdError, match=r"2 entries of topk_ids were outside -1\.\.3 .* Besides, 5 rows had no room"
        ):
            check_counted(config, 2, 5, False)
        with pytest.raises(InvalidExpertIdError, match="num_experts$"):
            check_counted(config, 2, 0, False)
    check_counted(drops, 0, 5, False)
    with pytest.raises(CapacityOverflowError, match="^5 rows had no room in their expert's buffer of 16 rows"):
        check_counted(errors, 0, 5, False)


@pytest.mark.parametrize("slot", [True, False, -1, 2, 1.0, "1", None], ids=repr)
def test_a_slot_is_a_number_below_slots(slot):
    with dispatcher(slots=2) as layer:
        for call in (lambda: layer.dispatch(*inputs(), slot=slot), lambda: layer.output_buffer(slot)):
            with pytest.raises(ValueError, match=rf"slot must be in 0\.\.1, got {slot}"):
                call()


@pytest.mark.parametrize("step", ["dispatch", "dispatch_send"])
def test_transports_get_rows_side_by_side_and_contiguous_routing(step, monkeypatch):
    """Whatever the strides that a caller has."""
    with dispatcher() as layer:
        shipped, given = getattr(layer._transport, step), []

        def spy(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot: Any) -> Any:
            given[:] = [hidden, ids, weights]
            return shipped(hidden, ids, weights, slot)

        monkeypatch.setattr(layer._transport, step, spy)
        hidden, ids, weights = (x.t().contiguous().t() for x in inputs())
        assert not any(x.is_contiguous() for x in (hidden, ids, weights))
        getattr(layer, step)(hidden, ids, weights)
        for got, wanted in zip(given, (hidden, ids, weights), strict=True):
            assert got.is_contiguous()
            assert_bit_equal(got, wanted)
        # rows that are apart need no copy
        wide = torch.randn(9, 100).bfloat16()[:, :72]
        getattr(layer, step)(wide, ids, weights)
        assert given[0].data_ptr() == wide.data_ptr()


@both_paths
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_ids_beyond_the_range_are_absent_by_request(reduce):
    hidden, ids, weights = inputs()
    beyond = ids.masked_fill(ids == 2, 4).masked_fill(ids == 1, -7)
    absent = ids.masked_fill((ids == 2) | (ids == 1), -1)
    with dispatcher(on_invalid_id="absent", reduce=reduce) as layer:
        found, expected = (layer(hidden, which, weights, lambda batch: batch.values) for which in (beyond, absent))
        assert_bit_equal(found, expected)
        assert layer.check() == 0


@both_paths
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_float16_weights_are_taken_as_the_numbers_they_are(reduce):
    hidden, ids, weights = inputs()
    narrow = weights.half()
    with dispatcher(reduce=reduce) as layer:
        found, expected = (layer(hidden, ids, which, lambda batch: batch.values) for which in (narrow, narrow.float()))
        assert_bit_equal(found, expected)
