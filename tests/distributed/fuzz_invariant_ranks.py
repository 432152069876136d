"""Random layers with `batch_invariant=True` over several ranks for `fuzz_gpu.py`: a token's bits alone, in a batch on one rank, and
spread over the ranks with others, by each transport that they have.

T tokens, K top-k, E experts, W ranks, L local experts.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.distributed as dist
from fuzz_layers import LIMIT, Given, captured, draw_guess, draw_inputs, draw_layer, draw_out, poison, spoil_ids
from fuzz_shared import part_of
from torch import Tensor

from fuzz_activations import draw_grouped_experts
from fuzz_invariant import ALONE, by_rows
from fuzz_operations import Place
from moequant import GroupedExperts, MoEQuantDispatcher, ops
from moequant.experts import can_push
from moequant.testing import assert_bit_equal
from moequant.transport.buffers import named

# Sizes and types that kernels are compiled for, a multiple of the formats: blocks share them, so that most of the time goes to batches.
# One GPU's family draws any.
SHAPES = 18
QUANTS = ("fp8_e4m3fn", "int8", "none", "float16", "fp8_e4m3fn", "fp8_e5m2")


def draw_ways(rng: random.Random, place: Place) -> dict[str, dict[str, Any]]:
    """Settings of dispatchers over all ranks, by what a record calls them: two of torch.distributed, and the symmetric one."""
    layouts = [rng.choice(["padded", "ragged"]) for _ in range(3)]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("padded exchange", {"transport": "collective", "exchange": "padded", "layout": layouts[0]}),
        ("packed exchange", {"transport": "collective", "exchange": "packed", "layout": layouts[1]}),
        ("shared batch", {"shared_batch": True, "layout": "ragged"}),
    ]
    del ways[rng.randrange(3)]
    overlap = rng.random() < 0.8
    # on CPUs where kernels are interpreted
    if ops.uses_kernels(torch.empty(0, device=place.device)):
        ways.append(("symmetric", {"transport": "symmetric", "layout": layouts[2], "overlap": overlap}))
    return dict(ways)


def draw_spread(rng: random.Random, tokens: int, ranks: int, most: int) -> list[list[int]]:
    """Which of some tokens each rank has, in any order, each at most so many: all of them or a part, some twice, often none."""
    count = rng.choice([1, tokens, tokens, rng.randint(0, tokens)]) if tokens else 0
    places = rng.sample(range(tokens), count) if rng.random() < 0.7 else rng.choices(range(tokens), k=count)
    shares = [rng.choice([0.0, 0.1, *[1.0] * 4]) for _ in range(ranks)]
    shares[rng.randrange(ranks)] += 0.01
    owners = rng.choices(range(ranks), shares, k=count)
    spread = [[place for place, owner in zip(places, owners, strict=True) if owner == rank] for rank in range(ranks)]
    return [part[:most] for part in spread]


class InvariantRanks:
    """Dispatchers of one rank, for one token and for all ranks' tokens, and dispatchers over the ranks."""

    name = family = "invariant"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        number = rng.randrange(SHAPES)
        shape = random.Random(f"shape {number}")
        settings: dict[str, Any] = draw_layer(shape, place) | ALONE | {"quant": QUANTS[number % len(QUANTS)]}
        self.dtype = shape.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        every = draw_grouped_experts(shape, place._replace(rank=0, ranks=1), settings)
        # rows with a bias are not pushed
        bias2 = every.bias2 if number // len(QUANTS) % 2 else None
        self.every = GroupedExperts(every.w13, every.w2, activation=every.kind, bias13=every.bias13, bias2=bias2)
        local = settings["num_experts"] // place.ranks
        self.experts = part_of(self.every, place.rank * local, (place.rank + 1) * local)
        self.most = rng.choice([1, 3, 8, 8] if place.tiny else [1, 7, 40, 129, 600, 600])
        settings |= {"on_invalid_id": rng.choice(["error", "absent"]), "max_tokens_per_rank": self.most}
        self.settings = settings
        more: dict[str, Any] = {"timeout": LIMIT, "device": place.device}
        one: dict[str, Any] = settings | more | {"transport": "local"}
        single: dict[str, Any] = {"max_tokens_per_rank": 1}
        whole: dict[str, Any] = {"max_tokens_per_rank": place.ranks * self.most, "layout": rng.choice(["padded", "ragged"])}
        self.alone: Any = MoEQuantDispatcher(**one | single)
        self.whole: Any = MoEQuantDispatcher(**one | whole)
        self.ways: dict[str, Any] = {}
        for name, way in draw_ways(rng, place).items():
            room = self.most + rng.choice([0, 1, 100])
            sizes: dict[str, Any] = {"max_tokens_per_rank": room, "slots": rng.choice([1, 2])}
            # between the first calls each rank compiles products
            self.ways[name] = MoEQuantDispatcher(**settings | more | sizes | way, first_timeout=6 * LIMIT)

    def check(self, rng: random.Random) -> None:
        place, experts = self.place, self.settings["num_experts"]
        inputs = draw_inputs(rng, self.settings, place.ranks, self.dtype, twice=False)
        ids = [tensors[1] for tensors in inputs]
        if self.settings["on_invalid_id"] == "absent":
            self.drawn.add("ids beyond the range")
            ids = spoil_ids(rng, inputs, experts)
        hidden, _, weights = (torch.cat(tensors).to(place.device) for tensors in zip(*inputs, strict=True))
        pool = [hidden, torch.cat(ids).to(place.device), weights]
        tokens = len(hidden)
        self._spoil_buffers()
        # other ones on each rank
        few = rng.sample(range(tokens), min(tokens, place.ranks * (2 if place.tiny else 12)))[place.rank :: place.ranks]
        found: list[tuple[str, Tensor, Any]] = []
        givens: list[Given] = []
        with by_rows(place):
            expected = self.whole(*pool, self.every)
            found += [("a token alone", self.alone(*self._chosen(pool, [token]), self.every), [token]) for token in few]
            for name, dispatcher in self.ways.items():
                spread = draw_spread(rng, tokens, place.ranks, self.most)
                shared = dispatcher.config.shared_batch
                mine = [token for part in spread for token in part][: self.most] if shared else spread[place.rank]
                how = self._draw_call(rng, dispatcher, len(mine))
                self.drawn |= {name, *how.keys() - {"slot"}} | ({"a rank without tokens"} if not shared and [] in spread else set())
                given = self._chosen(pool, mine)
                out = draw_out(rng, given[0])
                made = dispatcher(out.hidden, *given[1:], self.experts, **how, out=out.out)
                found.append((f"{name}, {how}", made, mine))
                givens.append(out)
                once = name != "packed exchange" and not how.keys() & {"chunks", "first_experts"}
                if place.device != "cpu" and once and rng.random() < 0.1:
                    self.drawn.add("captured")
                    layer = functools.partial(dispatcher, *given, self.experts, **how)
                    captured(layer, expected[self._at(mine)])
        # when all ranks have made all calls, so that none waits for one that has found an error
        assert bool(expected.isfinite().all()), "a layer is not finite"
        for name, made, places in found:
            assert_bit_equal(made, expected[self._at(places)], f"tokens in a batch of one rank and elsewhere: {name}")
        for out in givens:
            out.check()
        for dispatcher in self._dispatchers():
            dispatcher.check()

    def _draw_call(self, rng: random.Random, dispatcher: Any, tokens: int) -> dict[str, int]:
        """How a layer is called: what every rank must say alike, and a guess, which they need not."""
        how = {"slot": rng.randrange(dispatcher.config.slots)} if dispatcher.config.slots > 1 else {}
        if dispatcher.config.pushes and can_push(self.experts):
            local = dispatcher.config.num_local_experts
            kinds = ["whole", *["halves"] * (dispatcher.config.slots == 2), *["waves"] * (local > 1)]
            kind, first = rng.choice(kinds), rng.randint(1, max(1, local - 1))
            how |= {"chunks": 2} if kind == "halves" else {"first_experts": first} if kind == "waves" else {}
        guess = draw_guess(rng, self.place.rank, tokens)
        return how | ({"expected_tokens": guess} if rng.random() < 0.5 else {})

    def _spoil_buffers(self) -> None:
        """What earlier batches left is no number. A faster rank's first rows must not be overwritten."""
        for dispatcher in self._dispatchers():
            for slot in dispatcher._slots:
                poison(named(slot.buffers))
        if self.place.device != "cpu":
            torch.cuda.synchronize()
        dist.barrier()

    def _at(self, places: list[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64).to(self.place.device)

    def _chosen(self, pool: list[Tensor], places: list[int]) -> list[Tensor]:
        return [tensor[self._at(places)] for tensor in pool]

    def _dispatchers(self) -> list[Any]:
        return [self.alone, self.whole, *self.ways.values()]

    def close(self) -> None:
        for dispatcher in self._dispatchers():
            dispatcher.close()
