"""Transports of one rank, in this process: what holds before the first call, what is kept from call to call, and what never goes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moequant import CallOrderError, MoEQuantDispatcher, reference
from moequant.config import DispatcherConfig
from moequant.formats import RECIPES
from moequant.testing import assert_bit_equal, routing
from moequant.transport import symmetric as symmetric_module
from moequant.transport.base import STEPS, Slot, Stage
from moequant.transport.buffers import Buffers
from moequant.transport.packed import PackedTransport
from moequant.transport.padded import PaddedTransport
from moequant.transport.symmetric import SymmetricTransport

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 144, "max_tokens_per_rank": 9}
CPU = torch.device("cpu")


def inputs(tokens: int = 9, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, 144).to(dtype), *routing(tokens, 2, 4)


def dispatcher(**changes: Any) -> MoEQuantDispatcher:
    return MoEQuantDispatcher(**SETTINGS | changes, device="cpu")


def config(**changes: Any) -> DispatcherConfig:
    return DispatcherConfig(**SETTINGS | changes)


def status() -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_rank_quantizes_by_the_recipe(recipe):
    hidden, ids, weights = inputs()
    with dispatcher(recipe=recipe, transport="local") as layer:
        batch, _ = layer.dispatch(hidden, ids, weights)
    values, scales = reference.quantize_groups(hidden, 128, layer.config.dtype, recipe, None)
    assert batch.recipe == recipe and batch.scales is not None
    for expert, count in enumerate(batch.num_tokens.tolist()):
        tokens = batch.sources[expert, :count] // 2
        assert_bit_equal(batch.values[expert, :count], values[tokens])
        assert_bit_equal(batch.scales[expert, :count], scales[tokens])


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (1, 1), (8, 4), (9, 5), (32, 16), (40, 16)])
def test_the_guess_of_an_experts_rows_is_the_mean_within_what_there_is(tokens, rows):
    with dispatcher(max_tokens_per_rank=40, capacity=16, on_overflow="drop") as layer:
        batch, _ = layer.dispatch(*inputs(tokens))
        assert batch.expected_rows == rows


def test_each_slot_keeps_its_output_buffer():
    with dispatcher(slots=2) as layer:
        first, second = layer.output_buffer(0), layer.output_buffer(1)
        assert layer.output_buffer().data_ptr() == first.data_ptr() != second.data_ptr()
        assert layer.output_buffer(1).data_ptr() == second.data_ptr()
        assert first.shape == (4, 16, 144) and first.dtype == torch.bfloat16


def test_the_padded_exchange_keeps_its_float32_buffer(one_rank):
    """A graph may hold it."""
    with dispatcher(transport="collective", exchange="padded") as layer:
        for _ in range(2):
            layer.dispatch(*inputs())
            assert layer._slots[0].buffers.routed_float32 is None
        kept = []
        for _ in range(3):
            layer.dispatch(*inputs(dtype=torch.float32))
            kept.append(layer._slots[0].buffers.routed_float32)
        assert kept[0] is kept[1] is kept[2]


def test_a_padded_dispatch_of_fewer_tokens_forgets_the_entries_of_earlier_ones(one_rank):
    with dispatcher(transport="collective", exchange="padded", reduce="per_rank") as layer:
        for tokens in (9, 4, 0):
            batch, _ = layer.dispatch(*inputs(tokens))
            received = layer._slots[0].buffers.received_rows[0]
            assert bool((received[:tokens] >= 0).all()) and bool((received[tokens:] == -1).all())
            assert int(batch.num_tokens.sum()) == 2 * tokens


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("kind", [PackedTransport, PaddedTransport])
@pytest.mark.parametrize("bad", [2**32 + 1, -(2**32) + 2, 2**31], ids=hex)
def test_an_id_out_of_range_is_counted_and_goes_nowhere(one_rank, kind, bad, layout):
    """As on a GPU, where ids are not looked at before they are used. The lower half of these is an expert's id, or none."""
    hidden, ids, weights = inputs()
    ids = ids.long()
    ids[2, 1], batches = -1, []
    for replaced in (-1, bad):
        ids[2, 1], counted = replaced, status()
        transport = kind(config(layout=layout), 0, CPU, counted, one_rank)
        batch, _ = transport.dispatch(hidden, ids, weights, transport.allocate())
        assert counted.tolist() == [int(replaced == bad), 0, 0]
        batches.append(batch)
    assert batches[0].num_tokens.tolist() == batches[1].num_tokens.tolist()
    for expert in range(4):
        for name in ("values", "sources"):
            before, after = (batch.rows_of(getattr(batch, name), expert) for batch in batches)
            assert_bit_equal(after, before)


def test_a_packed_rank_sends_back_only_rows_that_found_a_place(one_rank):
    transport = PackedTransport(config(max_tokens_per_rank=20, capacity=16), 0, CPU, status(), one_rank)
    hidden, ids, weights = inputs(20)
    ids[:] = torch.tensor([0, 3])
    slot = transport.allocate()
    batch, state = transport.dispatch(hidden, ids, weights, slot)
    assert batch.num_tokens.tolist() == [16, 0, 0, 16] and transport.status.tolist() == [0, 8, 0]
    assert state.sent == state.returned == [32]
    transport = PackedTransport(config(max_tokens_per_rank=20, layout="ragged", rank_capacity=48), 0, CPU, status(), one_rank)
    batch, state = transport.dispatch(hidden, ids, weights, transport.allocate())
    assert batch.num_tokens.tolist() == [20, 0, 0, 16] and transport.status.tolist() == [0, 4, 0]
    assert state.sent == state.returned == [36]


def symmetric(group: dist.ProcessGroup, kind: type[SymmetricTransport] = SymmetricTransport, **changes: Any) -> SymmetricTransport:
    return kind(config(slots=2, **changes), 0, CPU, status(), group)


def test_addresses_of_a_new_slot_may_be_stored_to(one_rank):
    """Whatever happens in its first dispatch."""
    transport = symmetric(one_rank)
    for number in range(2):
        slot = transport.allocate(number)
        assert slot.buffers.destinations is not None
        assert slot.buffers.destinations.unique().tolist() == [slot.buffers.returns.data_ptr()]
    assert symmetric(one_rank, reduce="per_rank").allocate().buffers.destinations is None


def test_ranks_wait_for_each_other_when_abort_words_and_flags_are_set(one_rank, monkeypatch):
    seen: list[tuple[list[int], int]] = []
    alive: list[SymmetricTransport] = []

    class Watched(SymmetricTransport):
        def _barrier(self, seconds: float) -> None:
            alive[:] = [self]
            super()._barrier(seconds)
            alive.clear()

    def barrier(group: Any, *_: Any) -> None:
        assert group is one_rank
        for transport in alive:
            word = transport.memory.local[transport.abort_offset :][:4].view(torch.int32).tolist()
            seen.append(([*word, int(transport.record)], transport.wait_limit))

    monkeypatch.setattr(symmetric_module, "exchange", barrier)
    transport = symmetric(one_rank, Watched, timeout=30.0)
    ready = [transport.no_fault, transport.no_fault]
    assert [words for words, _ in seen] == [ready]
    transport.start()
    assert [words for words, _ in seen] == [ready, ready]
    # kernels that are compiled have the user's time limit
    assert seen[1][1] == transport._units(30.0) < seen[0][1]


def test_first_calls_have_a_limit_of_their_own_until_the_first_check(one_rank):
    transport = symmetric(one_rank, timeout=30.0, first_timeout=900.0)
    units = transport._units
    slot = transport.allocate()
    assert transport.wait_limit == transport._peers(slot, 1).wait_limit == units(900.0)
    transport.start()
    assert transport.wait_limit == transport._peers(slot, 2).wait_limit == units(900.0)
    transport.settle()
    assert transport.wait_limit == transport._peers(slot, 1).wait_limit == units(30.0)
    wire = (collective := PackedTransport(config(timeout=30.0, first_timeout=900.0), 0, CPU, status(), one_rank)).wire
    options = wire.gather_options, wire.exchange_options
    assert [wire.timeout, *(x.timeout.total_seconds() for x in options)] == [900.0] * 3
    collective.settle()
    assert [wire.timeout, *(x.timeout.total_seconds() for x in options)] == [30.0] * 3


def test_a_dispatch_in_waves_sets_the_second_waves_flags_before_anybody_can_raise_them(one_rank, monkeypatch):
    """Flags of 2**31 calls ago seem to be ahead."""
    transport = symmetric(one_rank)
    slot, seen = transport.allocate(), []
    slot.buffers.epochs[0] = 41
    slot.buffers.flags[2].fill_(-(2**31) + 7)
    monkeypatch.setattr(transport, "_exchange", lambda ids, slot: seen.append(slot.buffers.flags[2].tolist()))
    monkeypatch.setattr(transport, "_push", lambda *arguments, **options: None)
    monkeypatch.setattr(transport, "_land", lambda *arguments: None)
    transport.dispatch_first(*inputs(), slot, 2)
    assert seen == [[41]]


def test_a_combine_that_comes_again_is_a_round_of_output_flags(one_rank, monkeypatch):
    transport, rounds = symmetric(one_rank), []
    monkeypatch.setattr(transport, "_flag_round", lambda slot, phase, **options: rounds.append((slot.number, phase, options)))
    transport.again(transport.allocate(1))
    # signals and waits
    assert rounds == [(1, 2, {})]


ANEW = {"begin_push", "combine", "combine_send"}
# of steps after a dispatch: those that may follow
FOLLOWING: list[tuple[Stage, list[str], set[str]]] = [
    (Stage.SENT, [], {"dispatch_recv"}),
    (Stage.SENT, ["dispatch_recv"], ANEW),
    (Stage.FIRST, [], {"dispatch_second", "begin_push"}),
    (Stage.FIRST, ["dispatch_second"], ANEW),
    (Stage.FIRST, ["begin_push"], {"dispatch_second"}),
    (Stage.FIRST, ["begin_push", "dispatch_second"], {"combine_pushed"}),
    (Stage.LANDED, [], ANEW),
    (Stage.LANDED, ["combine"], ANEW),
    (Stage.LANDED, ["begin_push"], {"combine_pushed"}),
    (Stage.LANDED, ["begin_push", "combine_pushed"], ANEW),
    (Stage.LANDED, ["combine_send"], {"combine_recv"}),
    (Stage.LANDED, ["combine_send", "combine_recv"], ANEW),
]


@pytest.mark.parametrize(
    ("stage", "before", "allowed"), FOLLOWING, ids=lambda x: x.name if isinstance(x, Stage) else ",".join(sorted(x)) or "nothing"
)
def test_each_step_follows_those_that_it_needs_and_comes_once(stage, before, allowed):
    empty = torch.empty(0)
    slot = Slot(1, Buffers(values=empty, num_tokens=empty, sources=empty, rows_in_expert=empty, rows=empty, counts=empty))
    slot.stage = stage
    for step in before:
        slot.check_step(step)
        if step == "begin_push":
            slot.pushing = torch.bfloat16
        slot.done(step)
    for step in STEPS:
        if step in allowed:
            slot.check_step(step)
        else:
            with pytest.raises(CallOrderError, match=rf"{step} came without .* Of slot 1's last dispatch: {slot.stage.value}"):
                slot.check_step(step)
