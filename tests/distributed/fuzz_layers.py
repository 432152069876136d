"""Random settings of whole layers for `fuzz_gpu.py`: a dispatcher and its experts, on one rank, on ranks that are streams of one GPU, or
on a GPU each. A family is a dispatcher; a call draws tokens, ids and the way that rows go.

T tokens, K top-k, E experts, W ranks, L local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trials import KEPT, assert_same_batch, stand_in

from fuzz_activations import check_steps, draw_grouped_experts
from fuzz_operations import Place, draw_columns
from guarded import Guarded
from moequant import MoEQuantDispatcher
from moequant.batch import ceil_div
from moequant.config import DispatcherConfig
from moequant.experts import can_push
from moequant.kernels.library import hopper
from moequant.testing import assert_bit_equal, in_one_process, relative_error
from moequant.transport import symmetric
from moequant.transport.buffers import named
from moequant.transport.symmetric import SymmetricTransport

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


def from_one_process(settings: dict[str, Any], inputs: Inputs) -> tuple[Any, list[Tensor], int]:
    """`in_one_process` with the stand-in expert, by the reference and not by interpreted kernels."""
    before = os.environ.pop("MOEQUANT_CPU_KERNELS", None)
    try:
        return in_one_process(settings, inputs, stand_in)
    finally:
        if before is not None:
            os.environ["MOEQUANT_CPU_KERNELS"] = before


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

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place = place
        transports = [{"transport": "collective", "exchange": "padded"}, {"transport": "collective", "exchange": "packed"}]
        transports += [{"transport": "symmetric"}] * 4
        self.transport = rng.choice(transports) if place.ranks > 1 else {"transport": "local"}
        self.name = "-".join(self.transport.values())
        self.settings = draw_layer(rng, place)
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
        expected, outputs, dropped = from_one_process(settings, inputs)
        for buffers in dispatcher._slots:
            poison(named(buffers.buffers))
        mine = [tensor.to(device) for tensor in inputs[rank]]
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
        way, first = rng.choice(ways), rng.randint(1, max(1, local - 1))
        if way == "halves":
            handle = self.dispatcher.dispatch_send(*mine, slot=slot)
            return self.dispatcher.dispatch_recv(handle), handle
        if way == "waves":
            batch, handle = self.dispatcher.dispatch_first(*mine, slot, first)
            self.dispatcher.dispatch_second(handle)
            return self.dispatcher._transport.expert_batch(self.dispatcher._slots[slot], len(mine[0])), handle
        return self.dispatcher.dispatch(*mine, slot=slot)

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
        pushes = self.dispatcher.config.pushes and can_push(self.experts)
        with all_sizes(self.hopper):
            batch, handle = self.dispatcher.dispatch(*mine, slot=slot)
            check_steps(self.experts, batch)
            apart = self.dispatcher.combine(self.experts(batch), handle)
            for _ in range(3):
                once = self.dispatcher(*mine, self.experts, slot=slot, chunks=1, first_experts=0)
                assert_bit_equal(once.cpu(), apart.cpu(), "a layer whose rows are pushed" if pushes else "a layer")
            if rng.random() < 0.3 and self.place.device != "cpu" and self.transport.get("exchange") != "packed":
                self._captured(mine, slot, apart)
            assert bool(apart.isfinite().all()), "a layer is not finite"
            local = self.settings["num_experts"] // self.place.ranks
            if pushes and local > 1 and rng.random() < 0.5:
                first = rng.randint(1, local - 1)
                out = self.dispatcher(*mine, self.experts, slot=slot, chunks=1, first_experts=first)
                assert_near_layer(out, apart, f"waves of {first} of {local} experts")
            if pushes and self.settings["slots"] == 2 and not dropped:
                out = self.dispatcher(*mine, self.experts, chunks=2, first_experts=0)
                assert_near_layer(out, apart, "halves")
        self.dispatcher.check()

    def _captured(self, mine: list[Tensor], slot: int, expected: Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self.dispatcher(*mine, self.experts, slot=slot, chunks=1, first_experts=0)
        for turn in range(2):
            graph.replay()
            assert_bit_equal(out.cpu(), expected.cpu(), f"replay {turn} of a layer")

    def _guards(self) -> None:
        check = getattr(self.dispatcher._transport, "check_guards", None)
        if check is not None:
            check()


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


@contextlib.contextmanager
def nothing_pdl() -> Iterator[None]:
    """While it lasts, no launch begins early: on one GPU it would hold the room that other ranks need, while it waits for them."""
    loaded: list[Any] = list(sys.modules.values())
    modules = {module: module.uses_pdl for module in loaded if hasattr(module, "uses_pdl")}
    for module in modules:
        module.uses_pdl = lambda device: False
    try:
        yield
    finally:
        for module, before in modules.items():
            module.uses_pdl = before


class PeersOnOneGPU:
    """The symmetric transport of W ranks that are blocks and streams of one GPU: every kernel of it, every byte in reach.

    All launches of a call are queued without a wait of the host, rank by rank, so that the kernels that wait for other ranks find them.
    Nothing may be compiled or loaded meanwhile: each call is made once before with waits that end at once, as after a fault.
    """

    name = "peers"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.ranks = rng.randint(2, 4)
        self.place = place._replace(ranks=self.ranks)
        self.settings = draw_layer(rng, self.place)
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.hopper = rng.random() < 0.7
        self.config = DispatcherConfig(**self.settings, world_size=self.ranks, transport="symmetric")
        self.device = torch.device(place.device)
        self.blocks: Tensor | None = None
        symmetric.PeerMemory = self._memory  # type: ignore[misc,assignment]
        self.transports: list[SymmetricTransport] = []
        self.status = [torch.zeros(3, dtype=torch.int64, device=self.device) for _ in range(self.ranks)]
        for rank in range(self.ranks):
            self.transports.append(OnOneGPU(self.config, rank, self.device, self.status[rank], rank))  # type: ignore[arg-type]
        self.slots = [[transport.allocate(number) for number in range(self.config.slots)] for transport in self.transports]
        seed = rng.randrange(2**31)
        places = [self.place._replace(rank=rank) for rank in range(self.ranks)]
        self.experts = [draw_grouped_experts(random.Random(seed), place, self.settings) for place in places]
        self.streams = streams(self.ranks)

    def _memory(self, group: int, nbytes: int, device: torch.device, *limits: float) -> Any:
        """Rank `group`'s block, in the place of `PeerMemory`."""
        if self.blocks is None:
            self.blocks = torch.zeros(self.ranks, ceil_div(nbytes, 256) * 256, dtype=torch.uint8, device=device)
            self.pointers = torch.tensor([block.data_ptr() for block in self.blocks], device=device)
        return BlockOfMany(self.blocks[group][:nbytes], self.pointers)

    def check(self, rng: random.Random) -> None:
        inputs = draw_inputs(rng, self.settings, self.ranks, self.dtype, twice=True)
        slot, experts = rng.randrange(self.config.slots), self.config.num_local_experts
        expected, outputs, dropped = from_one_process(self.settings, inputs)
        ways = ["pull", "halves", "buffer"]
        ways += [] if self.config.per_rank else ["push", *["experts"] * 3 * can_push(self.experts[0])]
        way, first = rng.choice(ways), rng.choice([0, rng.randint(1, experts - 1)]) if experts > 1 else 0
        mine = [[tensor.to(self.device) for tensor in tensors] for tensors in inputs]
        outs = [[Guarded(*hidden.shape, dtype=self.dtype, device=self.device) for _ in range(2)] for hidden, _, _ in mine]
        batches: list[Any] = []
        with all_sizes(self.hopper), nothing_pdl():
            for dry in (True, False):
                self._reset(dry)
                batches = []
                for rank, stream in enumerate(self.streams):
                    with torch.cuda.stream(stream):
                        batches.append(self._call(rank, slot, mine[rank], [out.tensor for out in outs[rank]], way, first))
                torch.cuda.synchronize()
        for rank, transport in enumerate(self.transports):
            fault = transport.fault()
            assert fault is None, f"rank {rank}, {way}, first {first}: {fault}"
            for out in outs[rank]:
                out.assert_only(name="combine's output")
            assert_same_batch(rank, self.ranks, self.settings, inputs, batches[rank], expected, way)
            if way == "experts":
                assert_bit_equal(outs[rank][0].tensor, outs[rank][1].tensor, f"rank {rank}: pushed products")
                assert bool(outs[rank][0].tensor.isfinite().all()), f"rank {rank}: not finite"
            else:
                assert_bit_equal(outs[rank][0].tensor.cpu(), outputs[rank], f"rank {rank}, {way}, first {first}")
            check = getattr(transport, "check_guards", None)
            if check is not None:
                check()
        invalid, counted, mismatched = torch.stack(self.status).sum(0).tolist()
        assert (invalid, mismatched) == (0, 0), f"{invalid} invalid ids, {mismatched} ranks out of step"
        # every rank counts those of all
        wanted = dropped * self.ranks * (2 if way == "experts" else 1)
        assert counted == wanted, f"dropped rows: {counted}, {wanted} expected"

    def close(self) -> None:
        self.blocks = None

    def _reset(self, dry: bool) -> None:
        """All words as the constructor leaves them, everything else poisoned."""
        torch.cuda.synchronize()
        for transport, slots, status in zip(self.transports, self.slots, self.status, strict=True):
            # odd, and not 1, so that neither compiles anew
            transport.wait_limit = 3 if dry else transport._units(LIMIT) | 1
            transport.memory.local[transport.abort_offset :][:4].view(torch.int32).fill_(transport.no_fault)
            transport.record.fill_(transport.no_fault)
            status.zero_()
            for slot in slots:
                poison(named(slot.buffers))
                for name in ("flags", "count_words", "epochs", "calls", "arrivals"):
                    getattr(slot.buffers, name).zero_()
                slot.buffers.fault.fill_(transport.no_fault)
        torch.cuda.synchronize()

    def _call(self, rank: int, number: int, mine: list[Tensor], outs: list[Tensor], way: str, first: int) -> Any:
        transport, slot = self.transports[rank], self.slots[rank][number]
        hidden, ids, weights = mine
        if first:
            _, state = transport.dispatch_first(hidden, ids, weights, slot, first)
            transport.dispatch_second(slot)
            batch = transport.expert_batch(slot, len(hidden))
        elif way == "halves":
            state = transport.dispatch_send(hidden, ids, weights, slot)
            batch = transport.dispatch_recv(len(hidden), slot)
        else:
            batch, state = transport.dispatch(hidden, ids, weights, slot)
        if way == "experts":
            transport.combine(self.experts[rank](batch), weights, outs[0], slot, state)
            batch, state = transport.dispatch(hidden, ids, weights, slot)
            self.experts[rank].push(batch, transport.destinations(slot))
            transport.combine_pushed(self.config.output_dtype, weights, outs[1], slot, state)
            return batch
        y = stand_in(batch, rank * self.config.num_local_experts)
        if way == "push":
            transport.push(y, slot)
            transport.combine_pushed(torch.bfloat16, weights, outs[0], slot, state)
        elif way == "halves":
            transport.combine_send(y, slot)
            transport.combine_recv(weights, outs[0], slot, state)
        else:
            y = transport.output_buffer(slot).view(y.dtype).copy_(y) if way == "buffer" else y
            transport.combine(y, weights, outs[0], slot, state)
        return batch


class BlockOfMany:
    def __init__(self, local: Tensor, pointers: Tensor) -> None:
        self.local, self.pointers = local, pointers


class OnOneGPU(SymmetricTransport):
    def _barrier(self, seconds: float = 0.0) -> None:
        """The ranks are one process."""


STREAMS: list[Any] = []


def streams(count: int) -> list[Any]:
    """The same ones for every family: more would share queues of the device, where one waits for the other."""
    while len(STREAMS) < count:
        STREAMS.append(torch.cuda.Stream())
    return STREAMS[:count]
