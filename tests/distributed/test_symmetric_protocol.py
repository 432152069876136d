"""The symmetric transport's protocol in four processes that share memory, with random delays at every step of the interpreted kernels."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from trials import stand_in

from moequant import MoEQuantDispatcher
from moequant.testing import assert_bit_equal, in_one_process, run_ranks
from moequant.transport.symmetric import SymmetricTransport

SETTINGS: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 8, "max_tokens_per_rank": 2}
FOUR_EXPERTS: dict[str, Any] = {**SETTINGS, "num_experts": 4}
ROUNDS = 60


def install_slow_interpreter() -> None:
    """Triton's interpreter, in which every atomic operation, barrier and launch may take its time."""
    from triton.runtime import interpreter as shipped

    import interpreter

    interpreter.install()
    draw = random.Random()

    def slow(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if draw.random() < 0.02:
                time.sleep(draw.random() * 1e-3)
            return function(*args, **kwargs)

        return wrapped

    for name in ("create_atomic_rmw", "create_atomic_cas", "create_barrier", "create_masked_store", "create_masked_load"):
        setattr(shipped.InterpreterBuilder, name, slow(getattr(shipped.InterpreterBuilder, name)))
    shipped.GridExecutor.__call__ = slow(shipped.GridExecutor.__call__)


def draw_rounds(rounds: int, ranks: int, settings: dict[str, Any]) -> list[tuple[int, bool, int, Any, Any, Any]]:
    """For each round: a slot, whether rows go in two waves, how often combine is called, all ranks' inputs, and the rows of each expert
    and the sums that they have to get."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(rounds):
        inputs = []
        for _ in range(ranks):
            tokens = draw.randrange(3)
            ids = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :2].contiguous()
            weights = torch.rand(tokens, 2, generator=generator)
            inputs.append([torch.randn(tokens, 8, generator=generator).bfloat16(), ids, weights])
        expected, outputs, _ = in_one_process(settings, inputs, stand_in)
        # plain pickle knows no float8
        batch = [expected.rows_of(expected.values, expert).view(torch.uint8).clone() for expert in range(8)]
        drawn.append((draw.randrange(2), draw.random() < 0.5, draw.choice((0, 1, 1, 2)), inputs, batch, outputs))
    return drawn


def run_rounds(rank: int, ranks: int, rounds: list[tuple[int, bool, int, Any, Any, Any]], settings: dict[str, Any]) -> None:
    """The drawn rounds, each compared with one process: two slots, one wave or two, rows that are sent and never received, combines left
    out and done twice, ranks without tokens."""
    del ranks
    with MoEQuantDispatcher(**settings, transport="symmetric", slots=2) as dispatcher:
        for number, (slot, waves, combines, inputs, rows, outputs) in enumerate(rounds):
            hidden, ids, weights = inputs[rank]
            if combines == 2:
                # other rows, which nobody receives
                dispatcher.dispatch_send(hidden, ids.flip(1), weights, slot=slot)
            if waves:
                # as the flags of a call in waves look 2**31 calls later
                dispatcher._slots[slot].buffers.flags[2].fill_(2**30)
                _, handle = dispatcher.dispatch_first(hidden, ids, weights, slot, 1)
                dispatcher.dispatch_second(handle)
                batch = dispatcher._transport.expert_batch(dispatcher._slots[slot], len(hidden))
            else:
                batch, handle = dispatcher.dispatch(hidden, ids, weights, slot=slot)
            for expert in range(2):
                got = batch.rows_of(batch.values, expert).view(torch.uint8)
                assert_bit_equal(got, rows[2 * rank + expert], f"round {number}")
            output = stand_in(batch, 2 * rank)
            for _ in range(combines):
                assert_bit_equal(dispatcher.combine(output, handle), outputs[rank], f"round {number}")


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_random_delays_change_no_bit(layout, interpreted):
    settings = {**SETTINGS, "layout": layout}
    rounds = draw_rounds(ROUNDS, 4, settings)
    run_ranks(run_rounds, 4, rounds, settings, setup=install_slow_interpreter)


def run_abandoned(rank: int, ranks: int) -> list[list[Any]]:
    """Of a dispatch behind each kind of other one, the rounds of flags before its counts go out."""
    del ranks
    found = []
    with MoEQuantDispatcher(**SETTINGS, transport="symmetric", slots=2) as dispatcher:
        transport, waits = dispatcher._transport, []
        assert isinstance(transport, SymmetricTransport)
        flag_round, exchange = transport._flag_round, transport._exchange

        def noted_round(slot: Any, phase: int, **how: Any) -> None:
            waits.append((slot.number, phase, how))
            flag_round(slot, phase, **how)

        def noted_exchange(topk_ids: Any, slot: Any) -> None:
            found.append([*waits])
            exchange(topk_ids, slot)

        vars(transport).update(_flag_round=noted_round, _exchange=noted_exchange)
        tokens = torch.randn(2, 8).bfloat16(), torch.tensor([[rank, 7 - rank]] * 2), torch.ones(2, 2)
        for slot in (0, 1, 0, 1):
            waits.clear()
            handle = dispatcher.dispatch_send(*tokens, slot=slot)
            if slot:
                dispatcher.dispatch_recv(handle)
    return found


def test_rows_that_are_given_up_are_waited_for_before_the_slots_next_counts_go_out(interpreted):
    """A rank has read all counts when its rows are there: until then nobody may store other counts."""
    for found in run_ranks(run_abandoned, 2):
        assert found == [[], [], [(0, 1, {"signal": False})], []]


def run_flag_rounds(rank: int, ranks: int, rounds: int) -> None:
    """Counts and flags alone: what every rank learns of the others' counts, and that no rank passes a round before all have come."""
    with MoEQuantDispatcher(**FOUR_EXPERTS, transport="symmetric") as dispatcher:
        transport, slot = dispatcher._transport, dispatcher._slots[0]
        assert isinstance(transport, SymmetricTransport)
        hidden, weights = torch.zeros(0, 8).bfloat16(), torch.zeros(0, 2)
        for number in range(1, rounds + 1):
            ids = torch.arange(4).repeat_interleave((torch.arange(4) + rank + number) % 4)
            transport._exchange(ids.view(3, 2), slot)
            assert slot.buffers.num_tokens.tolist() == [sum((rank + peer + number) % 4 for peer in range(ranks))]
            offsets = [sum((expert + peer + number) % 4 for peer in range(rank)) for expert in range(4)]
            assert slot.buffers.row_offsets.tolist() == offsets, number
            transport._flag_round(slot, 2)
            flags = slot.buffers.flags[1].tolist()
            assert all(number <= flag // 4 <= number + 1 for flag in flags), flags
            # the exchange's own guard: nobody sends counts again before all rows are in
            transport._push(hidden, torch.zeros(0, 2, dtype=torch.int64), weights, slot, wait=True)
        assert int(dispatcher._status[2]) == 0


def test_flags_keep_ranks_together_through_random_delays(interpreted):
    """Calls of three rounds each: counts, outputs, rows."""
    run_ranks(run_flag_rounds, 4, 300, setup=install_slow_interpreter)
