"""Dispatch and combine over NVLink with nothing in between: kernels that store to other ranks' memory, and load from it.

    dispatch   route            slots and counts of this rank's tokens
               exchange_counts  counts to all ranks, which carry their own flags; where each row goes
               push_tokens      quantizes each token once, stores it to its final rows; the last program raises the flags
               land_rows        transposes scales, fills in sources, copies tokens that came once for several experts
    combine    "exact", pulled  a flag round, then `combine` reads the rows where they lie
               "exact", pushed  the producer kernel stores its rows at the slot's destinations; a flag round, then a local `combine`
               "per_rank"       push_partial_sums sums what this rank holds of a token and stores it at its rank; a local `combine`

Why no buffer is overwritten too early stands in `kernels/library/symmetric.py`, with flags, epochs and faults. Nothing here syncs with
the host, so a CUDA graph can hold all of it.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, H hidden size, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig, round_up
from moequant.errors import PeerTimeoutError
from moequant.ops import quantize_settings
from moequant.transport.base import BufferSpec, Slot, Transport, batch_specs, routing_specs
from moequant.transport.calls import Call
from moequant.transport.guards import Guards, offsets_of
from moequant.transport.peer_memory import PeerMemory, host_words, view_of
from moequant.transport.rendezvous import exchange

# of a phase that is not done in time: what the culprit did not do
PHASES = ("say how many rows it sends", "send its rows", "finish its experts' output")
# the first call compiles kernels, each rank at its own speed
WARM_UP_SECONDS = 600.0


def shared_specs(config: DispatcherConfig) -> dict[str, BufferSpec]:
    """What other ranks write to and read from, for one slot."""
    from moequant.kernels.symmetric.push_tokens import note_words

    ranks, experts, rows, columns = config.world_size, config.num_local_experts, config.max_rows, config.hidden_size
    words = note_words(config.num_groups if config.quantized else 0, config.top_k, config.per_rank)
    returned = ranks if config.per_rank else config.top_k
    return {
        # of the rows, of the outputs and of the rows of a second wave, one for each rank
        "flags": BufferSpec((3, ranks), torch.int32),
        # of each rank: rows for each expert, the number of the call and its word, with the epoch in the upper half
        "count_words": BufferSpec((ranks, config.num_experts + 2), torch.int64),
        "values": BufferSpec((experts, rows, columns), config.dtype),
        "notes": BufferSpec((experts, rows, words), torch.int32),
        "output": BufferSpec((experts, rows, columns), torch.bfloat16),
        # rows pushed back to this rank: one an entry, or one for each rank and token
        "returns": BufferSpec((config.max_tokens_per_rank * returned, columns), torch.bfloat16),
    }


class SymmetricTransport(Transport):
    repeats = True

    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup) -> None:
        from moequant.kernels.library.symmetric import NO_FAULT

        super().__init__(config, rank, device, status)
        self.group = group
        specs = shared_specs(config)
        self.offsets, self.slot_bytes = offsets_of(specs)
        # behind the slots: the abort word
        self.abort_offset = config.slots * self.slot_bytes
        self.memory = PeerMemory(group, self.abort_offset + 256, device, config.timeout)
        self.guards = Guards(self.memory.local, specs, config.slots)
        self.no_fault: int = NO_FAULT.value
        self.memory.local[self.abort_offset :][:4].view(torch.int32).fill_(self.no_fault)
        self.record = host_words(1, torch.int32, device).fill_(self.no_fault)
        self.noticed = view_of(self.record)
        self.limit = self._units(WARM_UP_SECONDS)
        # no rank may signal before every abort word and flag is set
        self._barrier(config.timeout)

    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> Mapping[str, BufferSpec]:
        experts, shared = config.num_experts, shared_specs(config)
        specs = {
            **batch_specs(config),
            **routing_specs(config),
            **shared,
            # not a tensor: what lies between those that are shared
            "guards": BufferSpec((offsets_of(shared)[1] - sum(spec.nbytes for spec in shared.values()),), torch.uint8),
            "counts": BufferSpec((experts,), torch.int32),
            "row_offsets": BufferSpec((experts,), torch.int32),
            # how many dispatches and combines the slot has seen; and how many dispatches were called, with those that raised; how many
            # programs of a kernel are done
            "epochs": BufferSpec((2,), torch.int32),
            "calls": BufferSpec((1,), torch.int32),
            "ticket": BufferSpec((1,), torch.int32),
            # what the last wait found
            "fault": BufferSpec((1,), torch.int32),
        }
        if not config.per_rank:
            specs["destinations"] = BufferSpec((config.num_local_experts, config.max_rows), torch.int64)
        return specs

    def allocate(self, number: int = 0) -> Slot:
        begin = number * self.slot_bytes
        buffers = {}
        for name, spec in self.buffer_specs(self.config).items():
            if name in self.offsets:
                block = self.memory.local[begin + self.offsets[name] :][: spec.nbytes]
                buffers[name] = block.view(spec.dtype).view(spec.shape)
            elif name != "guards":
                buffers[name] = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        for name in ("epochs", "calls", "ticket"):
            buffers[name].zero_()
        buffers["fault"].fill_(self.no_fault)
        if "destinations" in buffers:
            # addresses that may be stored to, whatever happens in the first dispatch
            buffers["destinations"].fill_(buffers["returns"].data_ptr())
        return Slot(number, buffers, buffers["calls"])

    def check_guards(self) -> None:
        self.guards.check(self.memory.local, self.rank)

    def close(self) -> None:
        self.memory.close()

    def start(self) -> None:
        self.limit = self._units(self.config.timeout)
        fault = self.fault()
        if fault is not None:
            raise fault
        self._barrier(WARM_UP_SECONDS)

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot) -> tuple[ExpertBatch, Tensor]:
        self._exchange(topk_ids, slot)
        rows = self._push(hidden_states, topk_ids, topk_weights, slot, wait=True)
        return self._land(slot, hidden_states.shape[0]), rows

    def dispatch_send(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot) -> Tensor:
        self._exchange(topk_ids, slot)
        return self._push(hidden_states, topk_ids, topk_weights, slot, wait=False)

    def dispatch_recv(self, tokens: int, slot: Slot) -> ExpertBatch:
        self._flag_round(slot, 1, signal=False)
        return self._land(slot, tokens)

    def dispatch_first(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot, experts: int
    ) -> tuple[ExpertBatch, Tensor]:
        """`dispatch` of the rows of each rank's first `experts` experts; the batch is theirs."""
        local = self.config.num_local_experts
        if not 1 <= experts < local:
            raise ValueError(f"experts must be from 1 to {local - 1}, as a rank has {local}, got {experts}")
        # the flags of the second wave may be so old that they seem to be ahead; nobody signals before it has this call's counts
        slot["flags"][2].copy_(slot["epochs"][0].expand(self.config.world_size))
        self._exchange(topk_ids, slot)
        rows = self._push(hidden_states, topk_ids, topk_weights, slot, wait=True, wave=1, first_experts=experts)
        slot.second = hidden_states, topk_ids, topk_weights, experts
        return self._land(slot, hidden_states.shape[0], (0, experts)), rows

    def dispatch_second(self, slot: Slot) -> ExpertBatch:
        """`dispatch` of the rows of the other experts, after `dispatch_first`."""
        assert slot.second is not None
        hidden_states, topk_ids, topk_weights, experts = slot.second
        slot.second = None
        self._push(hidden_states, topk_ids, topk_weights, slot, wait=True, wave=2, first_experts=experts)
        return self._land(slot, len(hidden_states), (experts, self.config.num_local_experts))

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: Tensor) -> None:
        self._return(expert_output, slot, wait=True)
        self._sum(expert_output.dtype, topk_weights, out, slot, state)

    def combine_send(self, expert_output: Tensor, slot: Slot) -> None:
        self._return(expert_output, slot, wait=False)
        slot.pending = expert_output

    def combine_recv(self, topk_weights: Tensor, out: Tensor, slot: Slot, state: Tensor) -> None:
        assert slot.pending is not None
        self._flag_round(slot, 2, signal=False, way=self._way(slot, slot.pending.dtype))
        self._sum(slot.pending.dtype, topk_weights, out, slot, state)

    def fault(self) -> PeerTimeoutError | None:
        word = self.noticed[0]
        if word == self.no_fault:
            return None
        step, culprit = word >> 8, word & 0xFF
        return PeerTimeoutError(
            f"rank {culprit} of the group did not {PHASES[step & 3]} within {self.config.timeout:g} s of call {step >> 2}: it is lost or "
            "late, and results since then are NaN; close this dispatcher and build one on a new group of the ranks that are left",
            culprit,
        )

    def _exchange(self, topk_ids: Tensor, slot: Slot) -> None:
        """From this rank's ids to the places of its rows, and the rows of this rank's experts."""
        from moequant.kernels.routing.route import route
        from moequant.kernels.symmetric.exchange_counts import exchange_counts

        route(topk_ids, slot["slots"][: len(topk_ids)], slot["counts"], status=self.status, early=True)
        exchange_counts(
            slot["counts"],
            slot["row_offsets"],
            slot["num_tokens"],
            self.status,
            self.memory.pointers,
            slot["epochs"],
            slot["calls"],
            slot["fault"],
            self.record,
            self._offset(slot, "count_words"),
            self.abort_offset,
            self.rank,
            self.config.max_rows,
            slot.call.word,
            self.limit,
        )

    def _push(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        slot: Slot,
        wait: bool,
        wave: int = 0,
        first_experts: int = 0,
    ) -> Tensor:
        """Stores this rank's rows, or those of a wave, at their places. Returns rows (T, K) int32: the row of each entry among all ranks'
        E * M rows, -1 where there is none."""
        from moequant.kernels.symmetric.push_tokens import push_tokens

        config, tokens = self.config, len(topk_ids)
        rows = slot["rows"][:tokens]
        settings = quantize_settings(slot["values"], config.recipe, None) if config.quantized else {}
        push_tokens(
            hidden_states,
            topk_ids,
            slot["slots"][:tokens],
            topk_weights if config.per_rank else None,
            slot["row_offsets"],
            rows,
            slot["partials"] if config.per_rank else None,
            self.memory.pointers,
            slot["epochs"],
            slot["ticket"],
            slot["fault"],
            self.record,
            self._offset(slot, "values"),
            self._offset(slot, "notes"),
            self._flags(slot, 3 if wave == 2 else 1),
            self.abort_offset,
            self.rank,
            config.max_tokens_per_rank,
            config.num_local_experts,
            config.max_rows,
            config.dtype,
            wait,
            self.limit,
            wave=wave,
            first_experts=first_experts,
            **settings,
        )
        return rows

    def _land(self, slot: Slot, tokens: int, part: tuple[int, int] | None = None) -> ExpertBatch:
        from moequant.kernels.symmetric.land_rows import land_rows

        config, batch = self.config, self.expert_batch(slot, tokens)
        land_rows(
            batch.values,
            slot["notes"],
            batch.num_tokens,
            batch.scales,
            batch.sources,
            slot.buffers.get("destinations"),
            self.memory.pointers,
            slot["fault"],
            self._offset(slot, "returns"),
            config.max_tokens_per_rank * config.top_k,
            2 * config.hidden_size,
            batch.expected_rows,
            part,
        )
        return batch if part is None else batch.part(*part)

    def _return(self, expert_output: Tensor, slot: Slot, wait: bool) -> None:
        """Makes the experts' output available to the tokens' ranks."""
        from moequant.kernels.symmetric.push_partial_sums import push_partial_sums
        from moequant.kernels.symmetric.push_rows import push_rows

        config = self.config
        if config.per_rank:
            groups = config.num_groups if config.quantized else 0
            push_partial_sums(
                expert_output,
                slot["notes"],
                slot["num_tokens"],
                self.memory.pointers,
                slot["epochs"][1:],
                slot["ticket"],
                slot["fault"],
                self.record,
                self._offset(slot, "returns"),
                self._flags(slot, 2),
                self.abort_offset,
                self.rank,
                config.max_tokens_per_rank,
                config.top_k,
                round_up(groups, 4),
                wait,
                self.limit,
            )
            return
        output = slot["output"]
        if expert_output.data_ptr() != output.data_ptr():
            push_rows(expert_output, slot["num_tokens"], output.view(expert_output.dtype), None)
        self._flag_round(slot, 2, wait=wait, way=self._way(slot, expert_output.dtype))

    def destinations(self, slot: Slot) -> Tensor:
        """Where the rows of a slot's batch go back to: (L, M) int64, addresses."""
        return slot["destinations"]

    def push(self, expert_output: Tensor, slot: Slot) -> None:
        from moequant.kernels.symmetric.push_rows import push_rows

        push_rows(expert_output, slot["num_tokens"], None, slot["destinations"])

    def combine_pushed(self, dtype: torch.dtype, topk_weights: Tensor, out: Tensor, slot: Slot, state: Tensor) -> None:
        from moequant.kernels.routing.combine import combine_shared

        self._flag_round(slot, 2, way=self._way(slot, dtype))
        combine_shared(slot["returns"].view(dtype), state, topk_weights, out, slot["fault"], in_order=True)

    def _sum(self, dtype: torch.dtype, topk_weights: Tensor, out: Tensor, slot: Slot, rows: Tensor) -> None:
        from moequant.kernels.routing.combine import combine_shared

        config = self.config
        if config.per_rank:
            combine_shared(slot["returns"], slot["partials"][: out.shape[0]], None, out, slot["fault"])
            return
        combine_shared(
            slot["output"].view(dtype),
            rows,
            topk_weights,
            out,
            slot["fault"],
            peers=self.memory.pointers,
            peer_offset=self._offset(slot, "output"),
            rows_of_rank=config.num_local_experts * config.max_rows,
        )

    def _way(self, slot: Slot, dtype: torch.dtype) -> int:
        """What this rank's combine says of its rows; sums of a rank are always bfloat16."""
        if self.config.per_rank:
            return 0
        return Call(0, 0, float16=dtype == torch.float16, pushed=slot.pushing is not None).way

    def _flag_round(self, slot: Slot, phase: int, signal: bool = True, wait: bool = True, way: int = 0) -> None:
        from moequant.kernels.symmetric.signal_and_wait import signal_and_wait

        signal_and_wait(
            self.memory.pointers,
            slot["epochs"][phase - 1 :],
            slot["fault"],
            self.record,
            self.status,
            self._flags(slot, phase),
            self.abort_offset,
            self.rank,
            self.limit,
            phase,
            signal,
            wait,
            way,
        )

    def again(self, slot: Slot) -> None:
        self._flag_round(slot, 2)

    def _offset(self, slot: Slot, name: str) -> int:
        return slot.number * self.slot_bytes + self.offsets[name]

    def _flags(self, slot: Slot, phase: int) -> int:
        return self._offset(slot, "flags") + 4 * self.config.world_size * (phase - 1)

    def _barrier(self, seconds: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        exchange(self.group, None, seconds, "the end of the dispatcher's constructor")

    @staticmethod
    def _units(seconds: float) -> int:
        """Units of 2**20 ns, in which the kernels measure: at least one, and the longest time that a dispatcher takes fits an int32."""
        return max(1, int(seconds * 1e9) >> 20)
