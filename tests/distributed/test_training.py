"""Layers that are trained over the symmetric transport, in Triton's interpreter, in processes that share memory; and backwards that are
unlike on two ranks, on every transport."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trials import install_interpreter

from moequant import MoEQuantDispatcher, OutOfStepError
from moequant.nn import MoEExperts
from moequant.testing import assert_bit_equal, run_ranks
from training_cases import HIDDEN, INNER, run_layer, tokens_of

WAYS = [
    {"transport": "collective", "exchange": "packed"},
    {"transport": "collective", "exchange": "padded", "layout": "ragged", "quant": "fp8_e4m3fn", "recipe": "ue8m0"},
    {"transport": "symmetric"},
]
COMMON: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": HIDDEN, "max_tokens_per_rank": 6, "quant": "none"}


@pytest.mark.parametrize(("quant", "layout", "reduce"), [("fp8_e4m3fn", "ragged", "exact")])
def test_gradients_over_the_symmetric_transport_have_the_bits_of_the_collective_one(quant, layout, reduce, interpreted):
    sizes, settings = (72, 40, 5), {"quant": quant, "layout": layout, "reduce": reduce}
    symmetric, collective = (
        run_ranks(run_layer, 2, "cpu", settings | {"transport": transport}, sizes, {"passes": 1}, setup=install_interpreter)
        for transport in ("symmetric", "collective")
    )
    for rank, (mine, expected) in enumerate(zip(symmetric, collective, strict=True)):
        assert len(mine) == 5
        for name in expected:
            assert_bit_equal(mine[name], expected[name], f"rank {rank}: {name}")


class Trained:
    """One layer of a rank that is to be out of step, on a dispatcher of its own."""

    def __init__(self, rank: int, way: dict[str, Any], **settings: Any) -> None:
        self.dispatcher = MoEQuantDispatcher(**COMMON | way, timeout=60.0, device="cpu")
        self.experts = MoEExperts(self.dispatcher, INNER, **settings)
        self.hidden, self.ids, self.weights, _ = tokens_of(6, 2, 4, HIDDEN, seed=rank)
        self.hidden.requires_grad_()

    def forward(self) -> Tensor:
        return self.experts(self.hidden, self.ids, self.weights)

    def steps_by_hand(self) -> Tensor:
        batch, handle = self.dispatcher.dispatch(self.hidden, self.ids, self.weights)
        return self.dispatcher.combine(batch.values * 2, handle)

    def expect(self, *calls: Any, message: str = "") -> None:
        """One of the calls, or the check behind it, is heard to be unlike the other rank's. message: on a transport that says who did
        what."""

        def call_all() -> None:
            for call in calls:
                call()
                self.dispatcher.check()

        collective = self.dispatcher.config.transport == "collective"
        with pytest.raises(OutOfStepError, match=message if collective else "ranks of the group made different calls"):
            call_all()
        self.dispatcher.close()


def leave_out_a_backward(rank: int, way: dict[str, Any]) -> None:
    """Rank 1 goes on with the next step's forward, or with a validation."""
    message = r"rank 0: call 2, dispatch of gradients of layer 1 that makes .*; rank 1: call 2, dispatch of layer 1 in slot 0"
    for validates in (False, True):
        of = Trained(rank, way)
        out = of.forward()
        if rank == 0:
            of.expect(lambda out=out: out.sum().backward(), of.forward, message=message)
        else:
            with torch.set_grad_enabled(not validates):
                of.expect(of.forward, of.forward, message=message)


def leave_out_a_backward_of_steps_by_hand(rank: int, way: dict[str, Any]) -> None:
    if way.get("quant", "none") == "none":
        of = Trained(rank, way)
        out = of.steps_by_hand()
        calls = (of.steps_by_hand,) * 2 if rank else (lambda: out.sum().backward(), of.steps_by_hand)
        of.expect(*calls, message="rank 0: call 2, dispatch of gradients that makes .*; rank 1: call 2, dispatch in slot 0")


def recompute_on_one_rank(rank: int, way: dict[str, Any]) -> None:
    of = Trained(rank, way, recompute=rank == 0)
    out = of.forward()
    message = "rank 0: call 2, dispatch of tokens once more for a backward of layer 1 .*; rank 1: call 2, dispatch of gradients"
    of.expect(lambda: out.sum().backward(), of.forward, message=message)


def freeze_on_one_rank(rank: int, way: dict[str, Any]) -> None:
    """What only one rank makes has exchanges that the other would not come to."""
    for name in ("weights", "w13", "bias2"):
        of = Trained(rank, way, bias=True)
        if name == "weights":
            of.weights.requires_grad_(rank == 0)
        else:
            getattr(of.experts, name).requires_grad_(rank == 0)
        out = of.forward()
        of.expect(lambda out=out: out.sum().backward(), of.forward, message="dispatch of gradients of layer 1 that makes")


def run_unlike_backwards(rank: int, ranks: int, way: dict[str, Any]) -> None:
    for case in (leave_out_a_backward, leave_out_a_backward_of_steps_by_hand, recompute_on_one_rank, freeze_on_one_rank):
        case(rank, way)


@pytest.mark.parametrize("way", WAYS[:2], ids=["packed", "padded"])
def test_unlike_backwards_are_heard_of_on_gloo(way):
    run_ranks(run_unlike_backwards, 2, way)


def test_unlike_backwards_are_heard_of_by_interpreted_kernels(interpreted):
    run_ranks(run_unlike_backwards, 2, WAYS[2], setup=install_interpreter)


def run_alike_backwards(rank: int, ranks: int, way: dict[str, Any]) -> None:
    """Micro-batches, frozen weights, recomputation, alike on both ranks: nobody hears of anything."""
    for settings in ({"bias": True}, {"recompute": True}):
        of = Trained(rank, way, **settings)
        for _ in range(2):
            outs = [of.forward(), of.forward()]
            for out in outs:
                out.sum().backward()
            of.experts.w13.requires_grad_(False)
        assert of.dispatcher.check() == 0
        of.dispatcher.close()


@pytest.mark.parametrize("way", WAYS[:2], ids=["packed", "padded"])
def test_alike_backwards_hear_of_nothing(way):
    run_ranks(run_alike_backwards, 2, way)
