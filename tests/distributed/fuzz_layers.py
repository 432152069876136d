"""Random settings of whole layers for `fuzz_gpu.py`: a dispatcher and its experts, on one rank or on a GPU each. A family is a
dispatcher; a call draws tokens, ids and the way that rows go.

T tokens, K top-k, E experts, W ranks, L local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from trials import KEPT, assert_same_batch, stand_in

from fuzz_activations import check_steps, draw_grouped_experts
from fuzz_operations import Place, by_reference, draw_columns
from guarded import Guarded
from moequant import MoEQuantDispatcher
from moequant.batch import ceil_div
from moequant.experts import can_push
from moequant.kernels.library import hopper
from moequant.testing import assert_bit_equal, in_one_process, relative_error
from moequant.transport.buffers import named

# seconds that a rank may be late
LIMIT = 20.0
Inputs = list[list[Tensor]]


def draw_layer(rng: random.Random, place: Place) -> dict[str, Any]:
    """Settings of a dispatcher, but for its transport."""
    ranks, tiny = place.ranks, place.tiny
    top_k, hidden = rng.randint(1, 4 if tiny else 8), draw_columns(rng, place, 3000)
    local = rng.randint(ceil_div(top_k, ranks), ceil_div(top_k, ranks) + rng.choice([0, 3, 24]) * (not tiny))
    # what one process can check in a fraction of a second
    most = min(rng.choice([1, 7, 40, 129, 600]), 8 if tiny else max(1, 2**21 // (ranks * top_k * hidden)))
    quant = rng.choice(["fp8_e4m3fn", "fp8_e4m3fn", "int8", "none", "float16", "fp8_e5m2"])
    layout = rng.choice(["padded", "ragged"])
    padded_rows = rng.choice([None, None, rng.randint(1, 2 * most)])
    ragged_rows = rng.choice([None, None, rng.randint(1, 2 * most * top_k), rng.uniform(0.1, 3.0)])
    return {
        "num_experts": ranks * local,
        "top_k": top_k,
        "hidden_size": hidden,
        "max_tokens_per_rank": most,
        "quant": quant,
        "recipe": rng.choice(["default", "default", "ue8m0", "deepgemm"]),
        "reduce": rng.choice(["exact", "exact", "per_rank"]),
        "layout": layout,
        "capacity": padded_rows if layout == "padded" else None,
        "rank_capacity": ragged_rows if layout == "ragged" else None,
        "on_overflow": "drop",
        "slots": rng.choice([1, 2]),
    }


def draw_inputs(rng: random.Random, settings: dict[str, Any], ranks: int, dtype: torch.dtype, twice: bool) -> Inputs:
    """Each rank's hidden states, ids and weights. twice: some tokens may name an expert more than once."""
    top_k, experts, most = (settings[name] for name in ("top_k", "num_experts", "max_tokens_per_rank"))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    kind, absent = rng.choice(["uniform", "uniform", "hot", "one rank", "same"]), rng.choice([0.0, 0.0, 0.1, 0.9])
    inputs = []
    for _ in range(ranks):
        tokens = rng.choice([0, 1, most, most, rng.randint(0, most)])
        scores = torch.rand(tokens, experts, generator=generator)
        if kind == "hot":
            scores[:, rng.randrange(experts)] = -1.0
        elif kind == "one rank":
            # experts of one rank are preferred
            scores[:, : experts // ranks] -= 1.0
        elif kind == "same" and tokens:
            scores[:] = scores[:1].clone()
        ids = scores.argsort(1)[:, :top_k].contiguous()
        if twice and tokens and rng.random() < 0.3:
            ids = torch.randint(0, experts, ids.shape, generator=generator)
        ids[torch.rand(ids.shape, generator=generator) < absent] = -1
        weights = torch.rand(tokens, top_k, generator=generator)
        inputs.append([torch.randn(tokens, settings["hidden_size"], generator=generator).to(dtype), ids, weights])
    return inputs


def spoil_ids(rng: random.Random, inputs: Inputs, experts: int) -> list[Tensor]:
    """Makes some entries of each rank's ids absent, and returns the ids with ids beyond the range in the place of all that are."""
    generator, spoiled = torch.Generator().manual_seed(rng.randrange(2**31)), []
    dtype = rng.choice([torch.int32, torch.int64])
    # as an int32 the last ones would be experts
    beyond = [-2, -experts, experts, 2 * experts, 2**31 - 1, -(2**31)]
    beyond += [2**32, 2**40 + experts - 1, -(2**63), 2**63 - 1] if dtype == torch.int64 else []
    for tensors in inputs:
        ids = tensors[1]
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
        others = torch.tensor([-1, *beyond])[torch.randint(len(beyond) + 1, ids.shape, generator=generator)]
        spoiled.append(torch.where(ids < 0, others, ids).to(dtype))
    return spoiled


def draw_guess(rng: random.Random, rank: int, tokens: int) -> int:
    """`expected_tokens`, seldom right, and another one on each rank."""
    guesses = [0, 1, tokens, 3 * tokens + 1, 40 * tokens + 5, 2**20, 2**31 - 1]
    return guesses[(rng.randrange(len(guesses)) + rank) % len(guesses)]


class Given(NamedTuple):
    """hidden: given to a layer. out: for its result. memory: of out, of which nothing else may be written."""

    hidden: Tensor
    out: Tensor
    memory: Guarded

    def check(self) -> None:
        columns = torch.arange(self.memory.tensor.shape[1], device=self.out.device)
        self.memory.assert_only(columns < self.out.shape[1], "a layer's output")


def draw_out(rng: random.Random, hidden: Tensor) -> Given:
    """An output between guards: contiguous, of rows that lie apart, or the hidden states themselves."""
    (tokens, columns), kind = hidden.shape, rng.choice(["contiguous", "apart", "hidden"])
    more = rng.randint(1, 40) if kind == "apart" else 0
    memory = Guarded(tokens, columns + more, dtype=hidden.dtype, device=hidden.device)
    out = memory.tensor[:, :columns]
    return Given(out.copy_(hidden) if kind == "hidden" else hidden, out, memory)


def from_one_process(settings: dict[str, Any], inputs: Inputs) -> tuple[Any, list[Tensor], int]:
    """`in_one_process` with the stand-in expert, by the reference and not by interpreted kernels."""
    with by_reference():
        return in_one_process(settings, inputs, stand_in)


def poison(buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        # addresses that are there from the start may be stored to
        if name not in (*KEPT, "destinations"):
            buffer.view(torch.uint8).fill_(0xFF)


def assert_near_layer(out: Tensor, expected: Tensor, name: str) -> None:
    """Other tiles add in another order, which may move quantized numbers by a step."""
    assert bool(out.isfinite().all()), f"{name}: not finite"
    error = relative_error(out, expected)
    assert error <= 0.02, f"{name}: relative error {error:.2e}"


class Layers:
    """A dispatcher on this process's rank. Every rank makes the same draws."""

    family = "layers"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        transports = [{"transport": "collective", "exchange": "padded"}, {"transport": "collective", "exchange": "packed"}]
        transports += [{"transport": "symmetric"}] * 4
        self.transport = rng.choice(transports) if place.ranks > 1 else {"transport": "local"}
        self.name = "-".join(self.transport.values())
        self.settings: dict[str, Any] = draw_layer(rng, place) | {"on_invalid_id": rng.choice(["error", "error", "absent"])}
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.experts = draw_grouped_experts(rng, place, self.settings)
        # Hopper's kernels for few tiles too
        self.hopper = rng.random() < 0.7
        limit = {"timeout": LIMIT, "device": place.device}
        self.dispatcher: Any = MoEQuantDispatcher(**self.settings, **self.transport, **limit)

    def check(self, rng: random.Random) -> None:
        rank, ranks, device = self.place.rank, self.place.ranks, self.place.device
        dispatcher, settings = self.dispatcher, self.settings
        # more than the padded exchange has room for
        inputs = draw_inputs(rng, settings, ranks, self.dtype, twice=self.transport.get("exchange") != "padded")
        slot, local = rng.randrange(settings["slots"]), settings["num_experts"] // ranks
        ids = inputs[rank][1]
        if settings["on_invalid_id"] == "absent":
            self.drawn.add("ids beyond the range")
            ids = spoil_ids(rng, inputs, settings["num_experts"])[rank]
        expected, outputs, dropped = from_one_process(settings, inputs)
        for buffers in dispatcher._slots:
            poison(named(buffers.buffers))
        mine = [tensor.to(device) for tensor in (inputs[rank][0], ids, inputs[rank][2])]
        self._together()
        batch, handle = self._dispatch(rng, mine, slot)
        guarded = Guarded(*mine[0].shape, dtype=self.dtype, device=device)
        y = stand_in(batch, rank * local)
        self._return(rng, y, handle, guarded.tensor, slot)
        assert dispatcher.check() == dropped, f"dropped rows: {dropped} expected"
        guarded.assert_only(name="combine's output")
        assert_same_batch(rank, ranks, settings, inputs, batch, expected, self.name)
        assert_bit_equal(guarded.tensor.cpu(), outputs[rank], "combine")
        self._products(rng, mine, slot, dropped)
        self._guards()

    def _guess(self, rng: random.Random, mine: list[Tensor]) -> int | None:
        """Half of the time a number of tokens, which no bit of a batch may depend on."""
        if rng.random() < 0.5:
            return None
        self.drawn.add("expected_tokens")
        return draw_guess(rng, self.place.rank, len(mine[0]))

    def close(self) -> None:
        self.dispatcher.close()

    def _together(self) -> None:
        """A faster rank's first rows must not be overwritten."""
        if self.place.device != "cpu":
            torch.cuda.synchronize()
        if self.place.ranks > 1:
            dist.barrier()

    def _dispatch(self, rng: random.Random, mine: list[Tensor], slot: int) -> tuple[Any, Any]:
        ways = ["whole", "halves"]
        local = self.settings["num_experts"] // self.place.ranks
        if self.transport["transport"] == "symmetric" and local > 1:
            ways.append("waves")
        way, first, guess = rng.choice(ways), rng.randint(1, max(1, local - 1)), self._guess(rng, mine)
        if way == "halves":
            handle = self.dispatcher.dispatch_send(*mine, slot=slot, expected_tokens=guess)
            return self.dispatcher.dispatch_recv(handle), handle
        if way == "waves":
            batch, handle = self.dispatcher.dispatch_first(*mine, slot, first)
            self.dispatcher.dispatch_second(handle)
            return self.dispatcher._transport.expert_batch(self.dispatcher._slots[slot], len(mine[0])), handle
        return self.dispatcher.dispatch(*mine, slot=slot, expected_tokens=guess)

    def _return(self, rng: random.Random, y: Tensor, handle: Any, out: Tensor, slot: int) -> None:
        ways = ["combine", "halves", "buffer"]
        if self.dispatcher.config.pushes:
            ways += ["push", "push"]
        way = rng.choice(ways)
        if way == "push":
            self.dispatcher.push(y, handle)
            self.dispatcher.combine_pushed(handle, out=out)
        elif way == "halves":
            self.dispatcher.combine_send(y, handle)
            self.dispatcher.combine_recv(handle, out=out)
        elif way == "buffer":
            self.dispatcher.combine(self.dispatcher.output_buffer(slot).view(y.dtype).copy_(y), handle, out=out)
        else:
            self.dispatcher.combine(y, handle, out=out)

    def _products(self, rng: random.Random, mine: list[Tensor], slot: int, dropped: int) -> None:
        """The layer by its steps, as one call, repeated and captured; pushed, in waves and in halves, which have room for more rows."""
        dispatcher = self.dispatcher
        pushes = dispatcher.config.pushes and can_push(self.experts)
        with all_sizes(self.hopper):
            batch, handle = self.dispatcher.dispatch(*mine, slot=slot)
            check_steps(self.experts, batch)
            apart = self.dispatcher.combine(self.experts(batch), handle)
            for _ in range(3):
                once = self.dispatcher(*mine, self.experts, slot=slot, chunks=1, first_experts=0)
                assert_bit_equal(once.cpu(), apart.cpu(), "a layer whose rows are pushed" if pushes else "a layer")
            self._into(rng, mine, slot, apart)
            if rng.random() < 0.3 and self.place.device != "cpu" and self.transport.get("exchange") != "packed":
                self.drawn.add("captured")
                captured(lambda: dispatcher(*mine, self.experts, slot=slot, chunks=1, first_experts=0), apart)
            assert bool(apart.isfinite().all()), "a layer is not finite"
            local = self.settings["num_experts"] // self.place.ranks
            if pushes and local > 1 and rng.random() < 0.5:
                first = rng.randint(1, local - 1)
                out = self._placed(rng, mine, slot=slot, first_experts=first)
                assert_near_layer(out, apart, f"waves of {first} of {local} experts")
            if pushes and self.settings["slots"] == 2 and not dropped:
                out = self._placed(rng, mine, chunks=2)
                assert_near_layer(out, apart, "halves")
        self.dispatcher.check()

    def _into(self, rng: random.Random, mine: list[Tensor], slot: int, expected: Tensor) -> None:
        """A layer into a place of one's own, and, by another guess of the rows, with other tiles, whose bits are the same each time."""
        found = self._placed(rng, mine, slot=slot)
        assert_bit_equal(found.cpu(), expected.cpu(), "a layer that is written where it was asked for")
        guess = self._guess(rng, mine)
        if guess is not None:
            first, second = (self.dispatcher(*mine, self.experts, slot=slot, expected_tokens=guess) for _ in range(2))
            assert_near_layer(first, expected, f"a layer for {guess} tokens")
            assert_bit_equal(second.cpu(), first.cpu(), f"a layer for {guess} tokens, again")

    def _placed(self, rng: random.Random, mine: list[Tensor], **how: int) -> Tensor:
        """A layer's result in a place of one's own."""
        given = draw_out(rng, mine[0])
        self.drawn.add("out")
        found = self.dispatcher(given.hidden, *mine[1:], self.experts, **how, out=given.out)
        assert found is given.out, "a layer returns another tensor than out"
        given.check()
        return found

    def _guards(self) -> None:
        check = getattr(self.dispatcher._transport, "check_guards", None)
        if check is not None:
            check()


def captured(layer: Callable[[], Tensor], expected: Tensor) -> None:
    """A graph of a layer has its bits."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = layer()
    for turn in range(2):
        graph.replay()
        assert_bit_equal(out.cpu(), expected.cpu(), f"replay {turn} of a layer")


@contextlib.contextmanager
def all_sizes(active: bool) -> Iterator[None]:
    """While it lasts, Hopper's kernels take products of any number of tiles."""
    before = hopper.too_small
    if active:
        hopper.too_small = lambda *arguments: False
    try:
        yield
    finally:
        hopper.too_small = before
