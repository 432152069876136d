"""Dispatch and combine over torch.distributed: NCCL over any number of nodes, gloo on CPUs. Two exchanges, one result.

`PaddedTransport` is the plainest pipeline: route into padded (E, C, H) buffers, quantize those, equal-split all-to-all, close the gaps
between the sources' rows. Nothing syncs with the host, so a CUDA graph can hold it; C rows are sent for each (source, expert).
`PackedTransport` sends each token once to each rank that has one of its experts, with split sizes that the host has to learn: the least
on the wire, one host sync, no graph.

With `reduce="per_rank"` the weights travel too, and a rank sends back one sum for each token of each source (padded), or for each token
that travelled to it (packed), instead of a row for each expert.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, C of them at most from one source rank,
H hidden size, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig, round_up
from moequant.errors import OutOfStepError
from moequant.transport.base import BufferSpec, Slot, Transport, batch_specs, routing_specs
from moequant.transport.calls import Call, unlike
from moequant.transport.wire import Wire

# Up to so many bytes of padded values and scales, the padded exchange's extra rows cost less than the packed one's host sync and its
# launches: on H200s these cost about 1 ms a layer (benchmarks/results).
PADDED_WIRE_BYTES = 128 << 20
NO_LIMIT = 2**31 - 1


class CollectiveTransport(Transport):
    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(config, rank, device, status)
        self.wire = Wire(group, config.timeout, waits=device.type == "cpu")
        self.first_expert = rank * config.num_local_experts

    def allocate(self, number: int = 0) -> Slot:
        slot = super().allocate(number)
        slot.calls = self._words(slot)[:1].zero_()
        return slot

    def _words(self, slot: Slot) -> Tensor:
        """What a slot's counts say of the call, (2,) int32: its number, and its word."""
        return slot["counts"][self.config.num_experts :][:2]

    def _begin(self, slot: Slot) -> None:
        """Counts the call, and says what it is behind the counts."""
        words = self._words(slot)
        words[:1].add_(1)
        words[1:].fill_(slot.call.word)
        if self.wire.waits:
            # at once, before messages whose sizes are this call's
            self._meet(slot)

    def _meet(self, slot: Slot) -> None:
        """Learns what all ranks are about to do. On a CPU raises OutOfStepError unless it is the same, on a GPU counts who differs."""
        self.wire.all_gather(slot["all_words"], self._words(slot))
        if self.wire.waits:
            check_in_step(slot["all_words"].tolist())
        else:
            ops.count_strangers(slot["all_words"], self.rank, self.status)

    def _begin_combine(self, slot: Slot, dtype: torch.dtype) -> None:
        call = slot.call._replace(first_experts=0, combines=True, float16=dtype == torch.float16 and not self.config.per_rank)
        self._words(slot)[1:].fill_(call.word)
        self._meet(slot)


def check_in_step(words: list[list[int]]) -> None:
    """Raises OutOfStepError unless all ranks' calls, (number, word) each, are the same."""
    number, word = words[0]
    if any(theirs != number or unlike(word, call) for theirs, call in words):
        calls = "; ".join(f"rank {rank}: call {number}, {Call.of(word)}" for rank, (number, word) in enumerate(words))
        raise OutOfStepError(
            f"ranks of the group are at different calls ({calls}). One raised an error, skipped a call, or made another where the others "
            "went on; all ranks have to make the same calls in the same order. Build new dispatchers"
        )


def choose_exchange(config: DispatcherConfig) -> str:
    """The exchange that `exchange="auto"` means: padded while its rows are few, packed otherwise."""
    if config.exchange != "auto":
        return config.exchange
    row_bytes = config.hidden_size * config.dtype.itemsize + 4 * config.num_groups
    return "padded" if config.num_experts * config.rows_per_source * row_bytes <= PADDED_WIRE_BYTES else "packed"


class PaddedTransport(CollectiveTransport):
    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> Mapping[str, BufferSpec]:
        experts, limit, columns = config.num_experts, config.rows_per_source, config.hidden_size
        ranks, tokens, top_k = config.world_size, config.max_tokens_per_rank, config.top_k
        announced = experts + 2 + (3 * tokens * top_k if config.per_rank else 0)
        specs = {
            **batch_specs(config),
            **routing_specs(config),
            # rows of each expert, what the call is; per_rank: slots, ids and weights of each token, as `locate_entries` takes them
            "counts": BufferSpec((announced,), torch.int32),
            "all_counts": BufferSpec((ranks, announced), torch.int32),
            "all_words": BufferSpec((ranks, 2), torch.int32),
            "offsets": BufferSpec((ranks, experts), torch.int32),
            # routed tokens on their way out, expert output on its way back; float32 tokens get a buffer of their own when they come
            "routed": BufferSpec((experts, limit, columns), torch.bfloat16),
            # values sent and received, side by side; the expert output that is sent back
            "exchanged": BufferSpec((experts, limit, columns), torch.bfloat16),
            # G rows of scales and a row of sources for each expert
            "meta": BufferSpec((2, experts, (config.num_groups if config.quantized else 0) + 1, limit), torch.int32),
        }
        if config.per_rank:
            specs |= {
                "received_rows": BufferSpec((ranks, tokens, top_k), torch.int32),
                "received_weights": BufferSpec((ranks, tokens, top_k), torch.float32),
                # of this rank's rows for all ranks' tokens, and what all ranks made of this one's
                "sums": BufferSpec((2, ranks, tokens, columns), torch.bfloat16),
            }
        return specs

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot) -> tuple[ExpertBatch, Tensor]:
        config, tokens, experts = self.config, hidden_states.shape[0], self.config.num_experts
        slots, rows = slot["slots"][:tokens], slot["rows"][:tokens]
        counts, all_counts, offsets = slot["counts"][:experts], slot["all_counts"][:, :experts], slot["offsets"]
        batch = self.expert_batch(slot, tokens)

        self._begin(slot)
        ops.route(topk_ids, slots, counts, status=self.status)
        if config.per_rank:
            self._announce(slot, slots, topk_ids, topk_weights)
        self.wire.all_gather(slot["all_counts"], slot["counts"])
        ops.expert_offsets(
            all_counts, self.first_expert, config.max_rows, config.rows_per_source, offsets, slot["num_tokens"], self.status
        )
        if not self.wire.waits:
            ops.count_strangers(slot["all_counts"][:, experts : experts + 2], self.rank, self.status)
        meta_out, meta_in = slot["meta"]
        routed = self._routed(slot, hidden_states.dtype if config.quantized else torch.bfloat16)
        ops.scatter(
            hidden_states,
            topk_ids,
            slots,
            routed,
            rows=rows,
            sources=meta_out[:, -1],
            offsets=offsets[self.rank],
            capacity=config.max_rows,
        )
        if config.quantized:
            values_out, values_in = slot["exchanged"].view(config.dtype).view(2, *routed.shape)
            ops.quantize_expert_batch(routed, counts, values_out, self._scales(meta_out), recipe=config.recipe)
        else:
            values_out, values_in = routed, slot["exchanged"]
        self.wire.all_to_all(values_in, values_out)
        self.wire.all_to_all(meta_in, meta_out)
        ops.move_source_rows(
            self._by_source(values_in),
            batch.values,
            offsets,
            all_counts,
            self.first_expert,
            True,
            self._by_source(self._scales(meta_in)) if config.quantized else None,
            batch.scales,
            self._by_source(meta_in[:, -1]),
            batch.sources,
        )
        if config.per_rank:
            ops.locate_entries(
                self._entries(slot["all_counts"]),
                offsets,
                self.first_expert,
                config.rows_per_source,
                config.max_rows,
                slot["received_rows"],
                slot["received_weights"],
            )
            ops.plan_partials(topk_ids, rows, config.num_local_experts, config.max_tokens_per_rank, slot["partials"][:tokens])
        return batch, rows

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: Tensor) -> None:
        self._begin_combine(slot, expert_output.dtype)
        if self.config.per_rank:
            sent, returned = slot["sums"].flatten(1, 2)
            rows, weights = slot["received_rows"].flatten(0, 1), slot["received_weights"].flatten(0, 1)
            ops.presum(expert_output.flatten(0, 1), rows, weights, sent)
            self.wire.all_to_all(returned, sent)
            ops.combine(returned, slot["partials"][: out.shape[0]], None, out)
            return
        sent = slot["exchanged"].view(expert_output.dtype)
        returned = self._routed(slot, expert_output.dtype)
        ops.move_source_rows(self._by_source(sent), expert_output, slot["offsets"], slot["all_counts"], self.first_expert, False)
        self.wire.all_to_all(returned, sent)
        ops.combine(returned.flatten(0, 1), state, topk_weights, out)

    def _entries(self, counts: Tensor) -> Tensor:
        """What follows the counts (..., E + 2 + 3 * T * K): (..., 3, T, K), T being max_tokens_per_rank."""
        config = self.config
        return counts[..., config.num_experts + 2 :].unflatten(-1, (3, config.max_tokens_per_rank, config.top_k))

    def _announce(self, slot: Slot, slots: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Writes this rank's tokens behind its counts."""
        announced, ids, weights = self._entries(slot["counts"])
        tokens = slots.shape[0]
        announced[:tokens].copy_(slots)
        announced[tokens:].fill_(-1)
        # an id out of range loses its upper half, and has no slot
        ids[:tokens].copy_(topk_ids)
        weights[:tokens].view(torch.float32).copy_(topk_weights)

    def _by_source(self, x: Tensor) -> Tensor:
        """(E, ...) as received, which is (W, L, ...)."""
        return x.unflatten(0, (self.config.world_size, self.config.num_local_experts))

    @staticmethod
    def _scales(meta: Tensor) -> Tensor:
        """The (E, C, G) float32 scales in an (E, G + 1, C) int32 buffer: strides ((G + 1) * C, 1, C)."""
        return meta[:, :-1].view(torch.float32).transpose(1, 2)

    def _routed(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """The (E, C, H) buffer of routed tokens in a type. One for float32 tokens is made when they first come; the other stays, since
        a graph may hold it."""
        buffer = slot["routed"]
        if dtype.itemsize == buffer.itemsize:
            return buffer.view(dtype)
        if "routed_float32" not in slot.buffers:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"buffers for {dtype} tokens don't exist yet; dispatch once before capturing the graph")
            # kept, so that it has to be no inference tensor
            with torch.inference_mode(False):
                slot.buffers["routed_float32"] = torch.empty(buffer.shape, dtype=dtype, device=self.device)
        return slot["routed_float32"]


def message_parts(config: DispatcherConfig) -> list[int]:
    """Bytes of the parts of a packed token: values, scales, K ids, first source, K weights if they are needed. Each part begins at a
    multiple of 16."""
    groups = config.num_groups if config.quantized else 0
    weights = 4 * config.top_k if config.per_rank else 0
    return [config.hidden_size * config.dtype.itemsize, 4 * groups, 4 * config.top_k, 8, weights]


def message_bytes(config: DispatcherConfig) -> int:
    """Bytes of a packed token on the wire."""
    return sum(round_up(part, 16) for part in message_parts(config))


@dataclass(frozen=True, eq=False)
class PackedState:
    """Where a packed dispatch's rows went.

    rows: (T, K) int32, each entry's row among those that come back, -1 where nothing was placed; per_rank: (T, W), as `plan_partials`
    gives it. received_rows: (R, K) int32, the flat row of each entry of each received token, -1 where it is not on this rank.
    received_weights: (R, K) float32, per_rank only. sent, returned: rows that combine sends to, and gets from, each rank.
    """

    rows: Tensor
    received_rows: Tensor
    received_weights: Tensor | None
    sent: list[int]
    returned: list[int]


class PackedTransport(CollectiveTransport):
    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> Mapping[str, BufferSpec]:
        ranks, experts = config.world_size, config.num_experts
        return {
            **batch_specs(config),
            **routing_specs(config),
            # rows of each expert, what the call is, tokens to each rank
            "counts": BufferSpec((experts + 2 + ranks,), torch.int32),
            "all_counts": BufferSpec((ranks, experts + 2 + ranks), torch.int32),
            "all_words": BufferSpec((ranks, 2), torch.int32),
            "offsets": BufferSpec((ranks, experts), torch.int32),
            "send_tokens": BufferSpec((ranks, config.max_tokens_per_rank), torch.int32),
        }

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot
    ) -> tuple[ExpertBatch, PackedState]:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'exchange "packed" has to sync with the host and can\'t be captured in a graph; use exchange="padded"'
            )
        config, tokens = self.config, hidden_states.shape[0]
        experts, local = config.num_experts, config.num_local_experts
        slots, rows, offsets = slot["slots"][:tokens], slot["rows"][:tokens], slot["offsets"]
        batch = self.expert_batch(slot, tokens)

        self._begin(slot)
        ops.route(topk_ids, slots, slot["counts"][:experts], status=self.status)
        ops.plan_sends(topk_ids, local, slot["send_tokens"], slot["counts"][experts + 2 :])
        self.wire.all_gather(slot["all_counts"], slot["counts"])
        all_counts = slot["all_counts"]
        ops.expert_offsets(
            all_counts[:, :experts], self.first_expert, config.max_rows, NO_LIMIT, offsets, slot["num_tokens"], self.status
        )
        traffic, placed = self._learn_sizes(all_counts)

        message = self._pack(hidden_states, topk_ids, topk_weights, slots)
        chosen = [listed[:count] for listed, count in zip(slot["send_tokens"], traffic[self.rank], strict=True)]
        from_ranks = [row[self.rank] for row in traffic]
        received = message.new_empty(sum(from_ranks), message.shape[1])
        self.wire.all_to_all(received, message.index_select(0, torch.cat(chosen)), from_ranks, traffic[self.rank])

        values, scales, ids, first_source, weights = self._fields(received)
        local_ids = ids - self.first_expert
        received_slots, received_rows = torch.empty_like(local_ids), torch.empty_like(local_ids)
        # experts of other ranks are out of range here, and have no slot
        ops.route(local_ids, received_slots, slot["counts"][:local])
        ops.scatter(
            values,
            local_ids,
            received_slots,
            batch.values,
            batch.scales,
            x_scales=scales if config.quantized else None,
            rows=received_rows,
            sources=batch.sources,
            row_sources=first_source,
        )
        # a token that travelled brings back its sum, or each of its rows that was placed
        going_back = traffic if config.per_rank else placed
        returned = going_back[self.rank]
        starts = torch.tensor([0, *itertools.accumulate(returned[:-1])], dtype=torch.int32, device="cpu")
        starts = starts.to(self.device, non_blocking=True)
        ops.plan_returns(topk_ids, slots, offsets[self.rank], config.max_rows, local, starts, rows)
        received_weights = None
        if config.per_rank:
            partials, received_weights = slot["partials"][:tokens], weights.contiguous()
            ops.plan_partials(topk_ids, rows, local, 0, partials, starts)
            rows = partials
        return batch, PackedState(rows, received_rows, received_weights, [row[self.rank] for row in going_back], returned)

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: PackedState) -> None:
        self._begin_combine(slot, expert_output.dtype)
        if self.device.type == "cuda":
            # made on the stream of the dispatch, which may be another
            for made in (state.rows, state.received_rows, state.received_weights):
                if made is not None:
                    made.record_stream(torch.cuda.current_stream(self.device))
        if state.received_weights is not None:
            sums = torch.empty(sum(state.sent), out.shape[1], dtype=torch.bfloat16, device=self.device)
            back = torch.empty(sum(state.returned), out.shape[1], dtype=torch.bfloat16, device=self.device)
            ops.presum(expert_output.flatten(0, 1), state.received_rows, state.received_weights, sums)
            self.wire.all_to_all(back, sums, state.returned, state.sent)
            ops.combine(back, state.rows, None, out)
            return
        received = state.received_rows.flatten()
        send_rows = received[torch.nonzero_static(received >= 0, size=sum(state.sent)).squeeze(1)]
        returned = expert_output.new_empty(sum(state.returned), out.shape[1])
        self.wire.all_to_all(returned, expert_output.flatten(0, 1).index_select(0, send_rows), state.returned, state.sent)
        ops.combine(returned, state.rows, topk_weights, out)

    def _learn_sizes(self, all_counts: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """The one host sync. Returns, by source and target rank, the tokens that are sent, and their rows that find a place."""
        config = self.config
        host = all_counts.cpu()
        counts, words, traffic = host.split((config.num_experts, 2, config.world_size), 1)
        check_in_step(words.tolist())
        ends = counts.cumsum(0).clamp_max(config.max_rows)
        placed = ends - torch.cat((torch.zeros_like(ends[:1]), ends[:-1]))
        return traffic.tolist(), placed.unflatten(1, (config.world_size, config.num_local_experts)).sum(2).tolist()

    def _fields(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The parts of message rows, as views: values (rows, H), scales (rows, G; 0 columns unquantized) float32, ids (rows, K) int32,
        first source (rows,) int64, weights (rows, K; 0 columns unless per_rank) float32."""
        parts = message_parts(self.config)
        begins = itertools.accumulate((round_up(part, 16) for part in parts), initial=0)
        values, scales, ids, source, weights = (message[:, begin:][:, :part] for begin, part in zip(begins, parts, strict=False))
        return (
            values.view(self.config.dtype),
            scales.view(torch.float32),
            ids.view(torch.int32),
            source.view(torch.int64)[:, 0],
            weights.view(torch.float32),
        )

    def _pack(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slots: Tensor) -> Tensor:
        """Each token as one row of bytes, quantized; see `_fields`."""
        config, (tokens, top_k) = self.config, topk_ids.shape
        message = torch.empty(tokens, message_bytes(config), dtype=torch.uint8, device=self.device)
        values, scales, ids, first_source, weights = self._fields(message)
        if config.quantized:
            ops.quantize_expert_batch(hidden_states[None], None, values[None], scales[None], recipe=config.recipe)
        else:
            values.copy_(hidden_states)
        # an id out of range has no slot, and must not become one of another rank's by losing its upper half
        ids.copy_(torch.where(slots >= 0, topk_ids, -1))
        if config.per_rank:
            weights.copy_(topk_weights)
        base = self.rank << 32
        first_source.copy_(torch.arange(base, base + tokens * top_k, top_k, device=self.device))
        return message
