"""Dispatch and combine over NVLink with nothing in between: kernels that store to other ranks' memory, and load from it.

    dispatch   route            rows in their experts and counts of this rank's tokens
               exchange_counts  counts to all ranks, which carry their own flags; where each row goes
               push_tokens      quantizes each token once, stores it to its final rows; the last program raises the flags
               unpack_rows        transposes scales, fills in sources, copies tokens that came once for several experts
    combine    "exact", pushed  whoever makes the rows stores them at the slot's destinations, or `push_rows` does; a flag round, then a
                                local `combine`
               "exact", pulled  with overlap=False: a flag round, then `combine` reads the rows where they lie, in the output buffer,
                                which no other way needs
               "per_rank"       push_rank_sums sums what this rank holds of a token and stores it at its rank; a local `combine`

Why no buffer is overwritten too early stands in `kernels/library/symmetric.py`, with flags, epochs and faults. Nothing here syncs with
the host, so a CUDA graph can hold all of it.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, R rows of a rank's, H hidden size, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig
from moequant.errors import PeerTimeoutError
from moequant.transport.base import Transport
from moequant.transport.buffers import BufferSpec, named, shared_by_all
from moequant.transport.calls import Call
from moequant.transport.guards import Guards, offsets_of
from moequant.transport.peer_memory import PeerMemory, host_words, view_of
from moequant.transport.rendezvous import exchange
from moequant.transport.symmetric_slot import SymmetricBuffers, SymmetricSlot, shared_specs

if TYPE_CHECKING:
    from moequant.kernels.library.symmetric import Peers

# of a phase that is not done in time: what the culprit did not do
PHASES = ("say how many rows it sends", "send its rows", "finish its experts' output")
# the constructor compiles kernels, each rank at its own speed
WARM_UP_SECONDS = 600.0


class SymmetricTransport(Transport[SymmetricSlot]):
    repeats = True

    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup) -> None:
        from moequant.kernels.library.symmetric import NO_FAULT

        super().__init__(config, rank, device, status)
        self.group = group
        specs = shared_specs(config)
        self.offsets, self.slot_bytes = offsets_of(specs)
        # behind the slots: the abort word
        self.abort_offset = config.slots * self.slot_bytes
        self.memory = PeerMemory(group, self.abort_offset + 256, device, config.first_limit)
        self.guards = Guards(self.memory.local, specs, config.slots)
        self.no_fault: int = NO_FAULT.value
        self.memory.local[self.abort_offset :][:4].view(torch.int32).fill_(self.no_fault)
        self.record = host_words(1, torch.int32, device).fill_(self.no_fault)
        self.noticed = view_of(self.record)
        self.warm_up = WARM_UP_SECONDS if config.first_timeout is None else config.first_timeout
        self._limit(self.warm_up)
        # no rank may signal before every abort word and flag is set
        self._barrier(config.first_limit)

    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> SymmetricBuffers[BufferSpec]:
        shared, one = shared_specs(config), BufferSpec((1,), torch.int32)
        guards = offsets_of(shared)[1] - sum(spec.nbytes for spec in shared.values())
        addresses = BufferSpec(config.batch_shape, torch.int64)
        return SymmetricBuffers(
            **{**shared_by_all(config), **shared},
            guards=BufferSpec((guards,), torch.uint8),
            row_offsets=BufferSpec((config.num_experts,), torch.int32),
            epochs=BufferSpec((2,), torch.int32),
            calls=one,
            arrivals=one,
            fault=one,
            destinations=None if config.per_rank else addresses,
        )

    def allocate(self, number: int = 0) -> SymmetricSlot:
        specs, offsets = self.buffer_specs(self.config), self.offsets_of(number)
        shared = {}
        for name in self.offsets:
            spec = named(specs)[name]
            shared[name] = self.memory.local[offsets[name] :][: spec.nbytes].view(spec.dtype).view(spec.shape)
        own = {name: spec for name, spec in named(specs).items() if name not in shared and name != "guards"}
        buffers = SymmetricBuffers(**shared, **self.make_buffers(own))
        for counter in (buffers.epochs, buffers.calls, buffers.arrivals):
            counter.zero_()
        buffers.fault.fill_(self.no_fault)
        if buffers.destinations is not None:
            # addresses that may be stored to, whatever happens in the first dispatch
            buffers.destinations.fill_(buffers.returns.data_ptr())
        return SymmetricSlot(number, buffers, [self._peers_of(offsets, buffers, phase) for phase in (1, 2, 3)], self)

    def offsets_of(self, number: int) -> dict[str, int]:
        """Of a slot's buffers in every rank's memory."""
        return {name: number * self.slot_bytes + offset for name, offset in self.offsets.items()}

    def _peers_of(self, offsets: dict[str, int], buffers: SymmetricBuffers[Tensor], phase: int) -> Peers:
        """phase: of the flags, 1 for rows, 2 for outputs, 3 for the rows of a second wave."""
        from moequant.kernels.library.symmetric import Peers

        return Peers(
            self.memory.pointers,
            buffers.epochs[1:] if phase == 2 else buffers.epochs,
            buffers.arrivals,
            buffers.fault,
            self.record,
            flags=offsets["flags"] + 4 * self.config.world_size * (phase - 1),
            abort=self.abort_offset,
            rank=self.rank,
            ranks=self.config.world_size,
            wait_limit=self.wait_limit,
        )

    def _peers(self, slot: SymmetricSlot, phase: int) -> Peers:
        if slot.peers[0].wait_limit != self.wait_limit:
            slot.peers = [peers._replace(wait_limit=self.wait_limit) for peers in slot.peers]
        return slot.peers[phase - 1]

    def check_guards(self) -> None:
        self.guards.check(self.memory.local, self.rank)

    def close(self) -> None:
        self.memory.close()

    def start(self) -> None:
        fault = self.fault()
        self._limit(self.config.first_limit)
        if fault is not None:
            raise fault
        self._barrier(self.warm_up)

    def settle(self) -> None:
        if self.seconds != self.config.timeout:
            self._limit(self.config.timeout)

    def _limit(self, seconds: float) -> None:
        """Of the waits that are launched from now on."""
        self.seconds, self.wait_limit = seconds, self._units(seconds)

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: SymmetricSlot
    ) -> tuple[ExpertBatch, Tensor]:
        self._exchange(topk_ids, slot)
        rows = self._push(hidden_states, topk_ids, topk_weights, slot, wait=True)
        return self._land(slot, hidden_states.shape[0]), rows

    def dispatch_send(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: SymmetricSlot) -> Tensor:
        self._exchange(topk_ids, slot)
        return self._push(hidden_states, topk_ids, topk_weights, slot, wait=False)

    def dispatch_recv(self, tokens: int, slot: SymmetricSlot) -> ExpertBatch:
        self._flag_round(slot, 1, signal=False)
        return self._land(slot, tokens)

    def dispatch_first(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: SymmetricSlot, experts: int
    ) -> tuple[ExpertBatch, Tensor]:
        """`dispatch` of the rows of each rank's first `experts` experts; the batch is theirs."""
        local = self.config.num_local_experts
        if not 1 <= experts < local:
            raise ValueError(f"experts must be from 1 to {local - 1}, as a rank has {local}, got {experts}")
        # the flags of the second wave may be so old that they seem to be ahead; nobody signals before it has this call's counts
        slot.buffers.flags[2].copy_(slot.buffers.epochs[0].expand(self.config.world_size))
        self._exchange(topk_ids, slot)
        rows = self._push(hidden_states, topk_ids, topk_weights, slot, wait=True, wave=(1, experts))
        slot.second = hidden_states, topk_ids, topk_weights, experts
        return self._land(slot, hidden_states.shape[0], (0, experts)), rows

    def dispatch_second(self, slot: SymmetricSlot) -> ExpertBatch:
        """`dispatch` of the rows of the other experts, after `dispatch_first`."""
        assert slot.second is not None
        hidden_states, topk_ids, topk_weights, experts = slot.second
        slot.second = None
        self._push(hidden_states, topk_ids, topk_weights, slot, wait=True, wave=(2, experts))
        return self._land(slot, len(hidden_states), (experts, self.config.num_local_experts))

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: SymmetricSlot, state: Tensor) -> None:
        self._return(expert_output, slot, wait=True)
        self._sum(expert_output.dtype, topk_weights, out, slot, state)

    def combine_send(self, expert_output: Tensor, slot: SymmetricSlot) -> None:
        self._return(expert_output, slot, wait=False)
        slot.pending = expert_output

    def combine_recv(self, topk_weights: Tensor, out: Tensor, slot: SymmetricSlot, state: Tensor) -> None:
        assert slot.pending is not None
        self._flag_round(slot, 2, signal=False, way=self._way(slot, slot.pending.dtype))
        self._sum(slot.pending.dtype, topk_weights, out, slot, state)

    def fault(self) -> PeerTimeoutError | None:
        word = self.noticed[0]
        if word == self.no_fault:
            return None
        step, culprit = word >> 8, word & 0xFF
        return PeerTimeoutError(
            f"rank {culprit} of the group did not {PHASES[step & 3]} within {self.seconds:g} s of call {step >> 2}: it is lost or "
            "late, and results since then are NaN; close this dispatcher and build one on a new group of the ranks that are left",
            culprit,
        )

    def _exchange(self, topk_ids: Tensor, slot: SymmetricSlot) -> None:
        """From this rank's ids to the places of its rows, and the rows of this rank's experts."""
        from moequant.kernels.routing.route import route
        from moequant.kernels.symmetric.exchange_counts import exchange_counts

        route(topk_ids, slot.take(len(topk_ids)).rows_in_expert, slot.buffers.counts, status=self.status, pdl=True)
        exchange_counts(slot.exchanged, self._peers(slot, 1), self.config.max_rows, slot.call.word)

    def _push(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        slot: SymmetricSlot,
        wait: bool,
        wave: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Stores this rank's rows, or those of a wave, at their places. Returns rows (T, K) int32: the row of each entry among all ranks'
        W * R rows, -1 where there is none."""
        from moequant.kernels.symmetric.push_tokens import Entries, push_tokens

        config, buffers, taken = self.config, slot.buffers, slot.take(len(topk_ids))
        entries = Entries(taken.rows_in_expert, buffers.row_offsets, taken.rows, buffers.partials)
        weights = topk_weights if config.per_rank else None
        peers = self._peers(slot, 3 if wave[0] == 2 else 1)
        push_tokens(hidden_states, topk_ids, weights, entries, slot.landing, peers, config.dtype, wait, wave)
        return taken.rows

    def _land(self, slot: SymmetricSlot, tokens: int, part: tuple[int, int] | None = None) -> ExpertBatch:
        from moequant.kernels.symmetric.unpack_rows import unpack_rows

        batch, width = self.expert_batch(slot, tokens), self.config.dtype.itemsize
        unpack_rows(slot.landed, slot.headers, self._peers(slot, 1), slot.returns, width, batch.expected_rows, part)
        return batch if part is None else batch.part(*part)

    def _return(self, expert_output: Tensor, slot: SymmetricSlot, wait: bool) -> None:
        """Makes the experts' output available to the tokens' ranks."""
        from moequant.kernels.symmetric.push_rank_sums import push_rank_sums
        from moequant.kernels.symmetric.push_rows import push_rows

        buffers = slot.buffers
        if self.config.per_rank:
            peers = self._peers(slot, 2)
            counts = buffers.num_tokens, buffers.expert_start
            push_rank_sums(expert_output, slot.headers, *counts, peers, slot.sums, self.config.top_k, wait)
            return
        if buffers.output is None:
            self.push(expert_output, slot)
        elif expert_output.data_ptr() != buffers.output.data_ptr():
            push_rows(expert_output, buffers.num_tokens, buffers.expert_start, buffers.output.view(expert_output.dtype), None)
        self._flag_round(slot, 2, wait=wait, way=self._way(slot, expert_output.dtype))

    def destinations(self, slot: SymmetricSlot) -> Tensor:
        """Where the rows of a slot's batch go back to: (L, M) or (R,) int64, addresses."""
        assert slot.buffers.destinations is not None
        return slot.buffers.destinations

    def push(self, expert_output: Tensor, slot: SymmetricSlot) -> None:
        from moequant.kernels.symmetric.push_rows import push_rows

        push_rows(expert_output, slot.buffers.num_tokens, slot.buffers.expert_start, None, self.destinations(slot))

    def combine_pushed(self, dtype: torch.dtype, topk_weights: Tensor, out: Tensor, slot: SymmetricSlot, state: Tensor) -> None:
        self._flag_round(slot, 2, way=self._way(slot, dtype))
        self._sum_pushed(dtype, topk_weights, out, slot, state)

    def _sum_pushed(self, dtype: torch.dtype, topk_weights: Tensor, out: Tensor, slot: SymmetricSlot, rows: Tensor) -> None:
        from moequant.kernels.routing.combine import combine_shared

        combine_shared(slot.buffers.returns.view(dtype), rows, topk_weights, out, slot.buffers.fault, in_order=True)

    def _sum(self, dtype: torch.dtype, topk_weights: Tensor, out: Tensor, slot: SymmetricSlot, rows: Tensor) -> None:
        from moequant.kernels.routing.combine import combine_shared

        buffers = slot.buffers
        if self.config.per_rank:
            combine_shared(buffers.returns, slot.take(out.shape[0]).partials, None, out, buffers.fault)
        elif buffers.output is None:
            self._sum_pushed(dtype, topk_weights, out, slot, rows)
        else:
            combine_shared(buffers.output.view(dtype), rows, topk_weights, out, buffers.fault, remote=slot.remote)

    def _way(self, slot: SymmetricSlot, dtype: torch.dtype) -> int:
        """What this rank's combine says of its rows; sums of a rank are always bfloat16."""
        if self.config.per_rank:
            return 0
        return Call(0, 0, float16=dtype == torch.float16, pushed=slot.pushing is not None).way

    def _flag_round(self, slot: SymmetricSlot, phase: int, signal: bool = True, wait: bool = True, way: int = 0) -> None:
        from moequant.kernels.symmetric.signal_and_wait import signal_and_wait

        signal_and_wait(self._peers(slot, phase), self.status, phase, signal, wait, way)

    def again(self, slot: SymmetricSlot) -> None:
        self._flag_round(slot, 2)

    def give_up(self, slot: SymmetricSlot) -> None:
        # a rank has sent its rows when it has read all counts, and others may store their next ones
        self._flag_round(slot, 1, signal=False)

    def _barrier(self, seconds: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        exchange(self.group, None, seconds, "the end of the dispatcher's constructor")

    @staticmethod
    def _units(seconds: float) -> int:
        """Units of 2**20 ns, in which the kernels measure: at least one, and the longest time that a dispatcher takes fits an int32."""
        return max(1, int(seconds * 1e9) >> 20)
