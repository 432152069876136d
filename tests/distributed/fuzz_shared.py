"""Random batches that all ranks hold, `shared_batch=True`, for `fuzz_gpu.py`: each rank gets the sums that one rank has, to the bit.

T tokens, K top-k, E experts, W ranks, L local experts.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
import torch.distributed as dist
from fuzz_layers import (
    LIMIT,
    all_sizes,
    assert_near_layer,
    captured,
    draw_guess,
    draw_inputs,
    draw_layer,
    draw_out,
    from_one_process,
    poison,
    spoil_ids,
)
from torch import Tensor
from trials import stand_in

from fuzz_activations import check_steps, draw_grouped_experts
from fuzz_invariant import ALONE, by_rows
from fuzz_operations import Place
from guarded import Guarded
from moequant import ExpertBatch, GroupedExperts, MoEQuantDispatcher, QuantizedTensor
from moequant.testing import assert_bit_equal
from moequant.transport import shared
from moequant.transport.buffers import named

FEW_BYTES = shared.FEW_BYTES


def part_of(experts: GroupedExperts, begin: int, end: int) -> GroupedExperts:
    """Some of them, in memory of their own."""

    def some(w: Any) -> Any:
        if isinstance(w, QuantizedTensor):
            return dataclasses.replace(w, values=w.values[begin:end].clone(), scales=w.scales[begin:end].clone())
        return None if w is None else w[begin:end].clone()

    biases = {"bias13": some(experts.bias13), "bias2": some(experts.bias2)}
    return GroupedExperts(some(experts.w13), some(experts.w2), activation=experts.kind, **biases)


def assert_part(batch: ExpertBatch, expected: ExpertBatch, first: int) -> None:
    """A rank's batch has the rows that one rank has for its experts."""
    for expert in range(len(batch.num_tokens)):
        whole = first + expert
        for name in ("values", "scales", "sources"):
            mine, theirs = getattr(batch, name), getattr(expected, name)
            if mine is not None and theirs is not None:
                rows = batch.rows_of(mine, expert).cpu(), expected.rows_of(theirs, whole)
                assert_bit_equal(*rows, f"{name} of expert {whole}")


class Shared:
    """A dispatcher of ranks that hold the same tokens; with batch_invariant beside one rank that has all experts."""

    name = family = "shared"
    alone: Any

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        invariant = rng.random() < 0.5
        settings: dict[str, Any] = draw_layer(rng, place)
        settings |= {"capacity": None, "rank_capacity": None}
        settings |= ALONE if invariant else {"slots": rng.choice([1, 2])}
        self.settings: dict[str, Any] = settings | {"layout": "ragged", "on_invalid_id": rng.choice(["error", "error", "absent"])}
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        # which tokens' rows all ranks get: none, some, or all
        most = place.ranks * settings["max_tokens_per_rank"] * settings["top_k"] * settings["hidden_size"] * 2
        shared.FEW_BYTES = rng.choice([0, most // 2, most])
        self.hopper = rng.random() < 0.7
        local = settings["num_experts"] // place.ranks
        every = draw_grouped_experts(rng, place._replace(rank=0, ranks=1), settings)
        self.first = place.rank * local
        self.experts = part_of(every, self.first, self.first + local)
        more = {"timeout": LIMIT, "device": place.device}
        self.dispatcher: Any = MoEQuantDispatcher(**self.settings, **more, shared_batch=True)
        self.every, self.alone = None, None
        if invariant:
            layout = {"layout": rng.choice(["padded", "ragged"])}
            self.every, self.alone = every, MoEQuantDispatcher(**self.settings | layout, **more, transport="local")

    def check(self, rng: random.Random) -> None:
        place, dispatcher, settings = self.place, self.dispatcher, self.settings
        # one rank's buffers may have no room for tokens that name an expert twice
        inputs = draw_inputs(rng, settings, place.ranks, self.dtype, twice=self.alone is None)[:1]
        ids = inputs[0][1]
        if settings["on_invalid_id"] == "absent":
            self.drawn.add("ids beyond the range")
            (ids,) = spoil_ids(rng, inputs, settings["num_experts"])
        experts, top_k, most = (settings[name] for name in ("num_experts", "top_k", "max_tokens_per_rank"))
        room = settings | {"rank_capacity": place.ranks * most * top_k + 16 * experts}
        expected, outputs, _ = from_one_process(room | {"reduce": "exact"}, inputs)
        if settings["reduce"] == "per_rank":
            # as if each rank had sent them
            _, outputs, _ = from_one_process(room, inputs * place.ranks)
        mine = [tensor.to(place.device) for tensor in (inputs[0][0], ids, inputs[0][2])]
        slot = rng.randrange(settings["slots"])
        for buffers in dispatcher._slots:
            poison(named(buffers.buffers))
        if place.device != "cpu":
            torch.cuda.synchronize()
        dist.barrier()
        guess = draw_guess(rng, place.rank, len(mine[0])) if rng.random() < 0.5 else None
        self.drawn |= set() if guess is None else {"expected_tokens"}
        batch, handle = dispatcher.dispatch(*mine, slot=slot, expected_tokens=guess)
        assert_part(batch, expected, self.first)
        guarded = Guarded(*mine[0].shape, dtype=self.dtype, device=place.device)
        dispatcher.combine(stand_in(batch, self.first), handle, out=guarded.tensor)
        assert dispatcher.check() == 0
        guarded.assert_only(name="combine's output")
        assert_bit_equal(guarded.tensor.cpu(), outputs[0], "combine")
        with all_sizes(self.hopper), by_rows(place):
            self._products(rng, mine, slot)
        dispatcher.check()

    def _products(self, rng: random.Random, mine: list[Tensor], slot: int) -> None:
        """The layer by its steps, as one call, captured, and beside one rank."""
        batch, handle = self.dispatcher.dispatch(*mine, slot=slot)
        check_steps(self.experts, batch)
        apart = self.dispatcher.combine(self.experts(batch), handle)
        given = draw_out(rng, mine[0])
        self.drawn.add("out")
        out = self.dispatcher(given.hidden, *mine[1:], self.experts, slot=slot, out=given.out)
        given.check()
        assert_bit_equal(out.cpu(), apart.cpu(), "a layer")
        assert bool(apart.isfinite().all()), "a layer is not finite"
        if rng.random() < 0.3 and self.place.device != "cpu":
            self.drawn.add("captured")
            captured(lambda: self.dispatcher(*mine, self.experts, slot=slot), apart)
        guess = draw_guess(rng, self.place.rank, len(mine[0]))
        out = self.dispatcher(*mine, self.experts, slot=slot, expected_tokens=guess)
        if self.alone is None:
            assert_near_layer(out, apart, f"a layer for {guess} tokens")
            return
        self.drawn.add("one rank's bits")
        assert_bit_equal(self.alone(*mine, self.every).cpu(), apart.cpu(), "one rank's layer")
        assert_bit_equal(out.cpu(), apart.cpu(), f"a layer for {guess} tokens")

    def close(self) -> None:
        shared.FEW_BYTES = FEW_BYTES
        for dispatcher in (self.dispatcher, self.alone):
            if dispatcher is not None:
                dispatcher.close()
