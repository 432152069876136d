"""Ranks that make unlike calls hear of it, before a wrong sum is taken for a right one; ranks in step never do.

On a CPU: `collective` over gloo, where every call is compared before anything else is sent, and `symmetric` in Triton's interpreter,
where the device counts what differs and the next call, or `check()`, tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trials import install_interpreter, stand_in

from moequant import GroupedExperts, MoEQuantDispatcher, OutOfStepError, PeerTimeoutError
from moequant.testing import assert_bit_equal, run_ranks

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 16, "max_tokens_per_rank": 3, "timeout": 60.0}
EXCHANGES = ("padded", "packed")
Build = Callable[..., MoEQuantDispatcher]


class Experts(torch.nn.Module):
    """A layer's experts: an elementwise stand-in, other than the next layer's."""

    def __init__(self, factor: float, first_expert: int) -> None:
        super().__init__()
        self.factor, self.first_expert = factor, first_expert

    def forward(self, batch: Any) -> torch.Tensor:
        return stand_in(batch, self.first_expert) * self.factor


def builders(transport: str) -> list[Build]:
    """Constructors of dispatchers: of each exchange, where there are two."""

    def build(exchange: str, **settings: Any) -> MoEQuantDispatcher:
        return MoEQuantDispatcher(**SETTINGS | settings, transport=transport, exchange=exchange, device="cpu")

    exchanges = EXCHANGES if transport == "collective" else ("auto",)
    return [lambda exchange=exchange, **settings: build(exchange, **settings) for exchange in exchanges]


def tokens_of(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(3, 4, generator=generator).argsort(1)[:, :2].int()
    return torch.randn(3, 16, generator=generator).bfloat16(), ids, torch.rand(3, 2, generator=generator)


def expect_error(dispatcher: MoEQuantDispatcher, *calls: Callable[[], Any]) -> None:
    """One of the calls, or the check that follows, is heard to be unlike the other ranks'; from then on every call is."""

    def call_all() -> None:
        for call in calls:
            call()
            dispatcher.check()

    with pytest.raises(OutOfStepError, match=r"ranks of the group (are at|made) different calls"):
        call_all()
    with pytest.raises(OutOfStepError):
        dispatcher.check()
    dispatcher.close()


def skip_a_layer(rank: int, build: Build) -> None:
    """Rank 0 leaves one of four layers out in the second pass."""
    layers, dispatcher = [Experts(1.0 + layer, 2 * rank) for layer in range(4)], build()
    tokens = tokens_of(rank)
    for layer in layers:
        dispatcher(*tokens, layer)
    dispatcher.check()
    passes = [lambda layer=layer: dispatcher(*tokens, layer) for layer in layers if rank or layer is not layers[2]]
    expect_error(dispatcher, *passes)


def say_other_layers(rank: int, build: Build) -> None:
    dispatcher, tokens = build(), tokens_of(rank)
    expect_error(dispatcher, lambda: dispatcher.dispatch(*tokens, layer=3 + rank))


def refuse_a_call(rank: int, build: Build) -> None:
    """What rank 0 was refused counts."""
    dispatcher, (hidden, ids, weights) = build(), tokens_of(rank)
    dispatcher(hidden, ids, weights, Experts(1.0, 2 * rank))
    if rank == 0:
        with pytest.raises(ValueError, match="topk_ids must be in"):
            dispatcher.dispatch(hidden, ids + 9, weights)
    expect_error(dispatcher, lambda: dispatcher(hidden, ids, weights, Experts(1.0, 2 * rank)))


def return_other_types(rank: int, build: Build) -> None:
    """bfloat16 on rank 0, float16 on rank 1."""
    dispatcher, tokens = build(), tokens_of(rank)
    dtype = (torch.bfloat16, torch.float16)[rank]
    expect_error(dispatcher, lambda: dispatcher(*tokens, lambda batch: stand_in(batch, 2 * rank).to(dtype)))


def use_other_slots(rank: int, build: Build) -> None:
    dispatcher, tokens = build(slots=2), tokens_of(rank)
    expect_error(dispatcher, lambda: dispatcher.dispatch(*tokens, slot=rank))


def combine_slots_in_another_order(rank: int, build: Build) -> None:
    dispatcher, tokens = build(slots=2), tokens_of(rank)
    there = [dispatcher.dispatch(*tokens, slot=slot) for slot in (0, 1)]
    order = there if rank else there[::-1]
    expect_error(dispatcher, *(lambda one=one: dispatcher.combine(stand_in(one[0], 2 * rank), one[1]) for one in order))


def push_and_pull(rank: int, build: Build) -> None:
    """Rank 0's rows are pushed, rank 1's pulled."""
    dispatcher, tokens = build(), tokens_of(rank)
    batch, handle = dispatcher.dispatch(*tokens)
    output = stand_in(batch, 2 * rank)
    if rank == 0:
        dispatcher.push(output, handle)
        expect_error(dispatcher, lambda: dispatcher.combine_pushed(handle))
    else:
        expect_error(dispatcher, lambda: dispatcher.combine(output, handle))


def send_other_waves(rank: int, build: Build) -> None:
    experts = torch.randn(3, 32, 16).bfloat16(), torch.randn(3, 16, 16).bfloat16()
    layer, dispatcher, tokens = GroupedExperts.from_weights(*experts), build(num_experts=6), tokens_of(rank)
    dispatcher(*tokens, layer, first_experts=1)
    dispatcher.check()
    expect_error(dispatcher, lambda: dispatcher(*tokens, layer, first_experts=1 + rank))


ANYWHERE = (skip_a_layer, say_other_layers, refuse_a_call, return_other_types)
ON_COLLECTIVE = (use_other_slots, combine_slots_in_another_order)
ON_SYMMETRIC = (push_and_pull, send_other_waves)


def run_cases(rank: int, ranks: int, transport: str, cases: tuple[Callable[[int, Build], None], ...]) -> None:
    for build in builders(transport):
        for case in cases:
            case(rank, build)


def test_unlike_calls_are_heard_of_on_gloo():
    run_ranks(run_cases, 2, "collective", ANYWHERE + ON_COLLECTIVE)


def test_unlike_calls_are_heard_of_by_interpreted_kernels(interpreted):
    run_ranks(run_cases, 2, "symmetric", ANYWHERE + ON_SYMMETRIC, setup=install_interpreter)


def run_two_dispatchers(rank: int, ranks: int) -> None:
    """Called in another order; and in turn, after a call of one of them was refused: no sum of the other's rows comes out."""
    for build in builders("collective"):
        first, second, tokens = build(), build(), tokens_of(rank)
        order = (first, second) if rank else (second, first)
        with pytest.raises(OutOfStepError, match="rank 0: call 1, dispatch in slot 0 of dispatcher [0-9]+; rank 1: call 1"):
            order[0].dispatch(*tokens)

        first, second, (hidden, ids, weights) = build(), build(), tokens_of(rank)
        right = [
            dispatcher(hidden, ids, weights, Experts(factor, 2 * rank)) for dispatcher, factor in ((first, 1.0), (second, 2.0))
        ]
        errors = 0
        for _ in range(2):
            for dispatcher, factor, expected in zip((first, second), (1.0, 2.0), right, strict=True):
                refused = rank == 0 and dispatcher is first and errors == 0
                try:
                    out = dispatcher(hidden.double() if refused else hidden, ids, weights, Experts(factor, 2 * rank))
                    dispatcher.check()
                    assert_bit_equal(out, expected)
                except (ValueError, OutOfStepError):
                    errors += 1
        assert errors >= 3


def test_two_dispatchers_are_never_mixed_up():
    run_ranks(run_two_dispatchers, 2)


def run_decode_and_prefill(rank: int, ranks: int) -> None:
    """Each rank chooses by its own number of tokens."""
    tokens = tokens_of(rank)
    decode, prefill = (MoEQuantDispatcher(**SETTINGS, exchange=exchange, device="cpu") for exchange in EXCHANGES)
    with pytest.raises(OutOfStepError, match="are at different calls"):
        (prefill if rank else decode)(*tokens, Experts(1.0, 2 * rank))


def test_ranks_that_choose_other_dispatchers_hear_of_it():
    run_ranks(run_decode_and_prefill, 2)


def run_in_step(rank: int, ranks: int, transport: str) -> None:
    """Layers in another order than that of their first calls, calls with and without a layer, experts that are made anew, slots in
    turn, combines twice: no rank hears of anything."""
    for build in builders(transport):
        dispatcher, tokens = build(slots=2), tokens_of(rank)
        layers = [Experts(1.0, 2 * rank) for _ in range(3)]
        for number in (0, 2, 1, 1, 0):
            dispatcher(*tokens, layers[number], slot=number % 2)
        # one rank gives a function where the other gives a module
        dispatcher(*tokens, layers[0] if rank else lambda batch: stand_in(batch, 2 * rank))
        for _ in range(3):
            dispatcher(*tokens, Experts(1.0, 2 * rank), layer=1500)
        batch, handle = dispatcher.dispatch(*tokens, slot=1)
        for _ in range(3):
            dispatcher.combine(stand_in(batch, 2 * rank), handle)
        assert dispatcher.check() == 0
        dispatcher.close()


def test_ranks_in_step_hear_of_nothing_on_gloo():
    run_ranks(run_in_step, 2, "collective")


def test_ranks_in_step_hear_of_nothing_from_interpreted_kernels(interpreted):
    run_ranks(run_in_step, 2, "symmetric", setup=install_interpreter)


def run_error_between(rank: int, ranks: int) -> None:
    """Rank 0's experts raise, and it goes on with the next layer: nobody gets a sum."""
    for build in builders("collective"):
        dispatcher, tokens = build(timeout=5.0), tokens_of(rank)
        if rank == 0:
            with pytest.raises(ZeroDivisionError):
                dispatcher(*tokens, lambda batch: 1 / 0)  # pyright: ignore[reportArgumentType]
        with pytest.raises((OutOfStepError, PeerTimeoutError)):
            dispatcher(*tokens, Experts(1.0, 2 * rank))
        dispatcher.close()


def test_a_rank_whose_experts_raise_and_that_goes_on_is_noticed():
    run_ranks(run_error_between, 2)
