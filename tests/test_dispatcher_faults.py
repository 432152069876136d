"""What stays of a fault, of an error and of a dispatch that was given up, and when ranks have to wait before a combine. On one rank."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from moequant import ClosedError, MoEQuantDispatcher, OutOfStepError, PeerTimeoutError
from moequant.testing import assert_bit_equal, routing
from moequant.transport.agreement import attempt
from moequant.transport.base import Slot

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 72, "max_tokens_per_rank": 9, "quant": "none"}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(9, 72).bfloat16(), *routing(9, 2, 4)


def dispatcher(**changes: Any) -> MoEQuantDispatcher:
    return MoEQuantDispatcher(**SETTINGS | changes, device="cpu")


def test_an_error_inside_the_block_closes_and_is_not_hidden():
    layer = dispatcher(on_overflow="error")

    def work() -> None:
        with layer:
            # what is left to report gives way to the error under way
            layer._status[1] = 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    with pytest.raises(ClosedError):
        layer.check()
    assert layer._slots == []


def test_a_lost_rank_is_named_by_every_later_call(monkeypatch):
    with dispatcher() as layer:
        batch, handle = layer.dispatch(*inputs())
        with monkeypatch.context() as patched:
            patched.setattr(layer._transport, "fault", lambda: PeerTimeoutError("rank 3 did not come", 3))
            with pytest.raises(PeerTimeoutError, match="^rank 3 did not come") as first:
                layer.check()
        later = (lambda: layer.dispatch(*inputs()), lambda: layer.combine(batch.values, handle), layer.check, layer.output_buffer)
        for call in later:
            with pytest.raises(PeerTimeoutError, match="lost a rank earlier: rank 3 did not come") as raised:
                call()
            assert raised.value.rank == first.value.rank == 3


def test_the_first_check_that_waits_ends_the_first_calls(monkeypatch):
    with dispatcher() as layer:
        settled: list[bool] = []
        monkeypatch.setattr(layer._transport, "settle", lambda: settled.append(True))
        layer.dispatch(*inputs())
        layer.check(wait=False)
        assert settled == []
        layer.check()
        assert settled == [True]


def test_ranks_out_of_step_are_a_fault_that_stays():
    with dispatcher() as layer:
        layer.dispatch(*inputs())
        layer._status[2] += 1
        with pytest.raises(OutOfStepError, match="ranks of the group made different calls"):
            layer.check()
        layer._status[2] -= 1
        for call in (lambda: layer.dispatch(*inputs()), layer.check):
            with pytest.raises(OutOfStepError, match="ranks were out of step earlier: ranks of the group made"):
                call()


def test_a_new_dispatch_lets_go_of_one_that_was_given_up():
    with dispatcher() as layer:
        batch, handle = layer.dispatch(*inputs())
        output = batch.values.clone()
        given_up = weakref.ref(output)
        layer.combine_send(output, handle)
        del output
        assert given_up() is not None
        layer._slots[0].second = (*inputs(), 1)
        layer._slots[0].pushing = torch.float16
        batch, handle = layer.dispatch(*inputs())
        assert given_up() is None and layer._slots[0].second is None
        # rows that were to be pushed are not waited for any more
        assert layer.combine(batch.values, handle).shape == (9, 72)


def test_ranks_wait_before_each_combine_but_a_dispatchs_first(monkeypatch):
    with dispatcher(slots=2) as layer:
        waited: list[int] = []
        shipped = layer._transport.again

        def again(slot: Slot) -> None:
            waited.append(slot.number)
            shipped(slot)

        monkeypatch.setattr(layer._transport, "again", again)
        for slot in (0, 1, 0):
            batch, handle = layer.dispatch(*inputs(), slot=slot)
            output, waited[:] = batch.values.clone(), []
            first = layer.combine(output, handle)
            assert waited == []
            assert_bit_equal(layer.combine(output, handle), first)
            assert waited == [slot]
            layer.combine_send(output, handle)
            assert waited == [slot] * 2
            assert_bit_equal(layer.combine_recv(handle), first)
            assert waited == [slot] * 2


def test_an_error_in_the_settings_keeps_its_type_where_nobody_waits_for_them():
    error = MemoryError("no room")

    def settings() -> Any:
        raise error

    with pytest.raises(MemoryError) as raised:
        attempt(settings, alone=True)
    assert raised.value is error
    assert attempt(settings, alone=False) == "no room"
