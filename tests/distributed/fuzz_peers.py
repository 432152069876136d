"""Ranks that are blocks and streams of one GPU, for `fuzz_gpu.py`: every kernel of the symmetric transport, without a second GPU.

W ranks.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from fuzz_layers import LIMIT, all_sizes, draw_inputs, draw_layer, from_one_process, poison
from torch import Tensor
from trials import assert_same_batch, stand_in

from fuzz_activations import draw_grouped_experts
from fuzz_operations import Place
from guarded import Guarded
from moequant.batch import ceil_div
from moequant.config import DispatcherConfig
from moequant.experts import can_push
from moequant.testing import assert_bit_equal
from moequant.transport import symmetric
from moequant.transport.buffers import named
from moequant.transport.symmetric import SymmetricTransport


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

    name = family = "peers"

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
