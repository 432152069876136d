"""The packed exchange of the collective transport: each token goes once to each rank that has one of its experts, with split sizes that
the host has to learn. The least on the wire, one host sync, no graph.

With `reduce="per_rank"` the weights travel too, and a rank sends back one sum for each token that travelled to it, instead of a row for
each expert.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, N received tokens, H hidden size, G groups.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig, round_up
from moequant.reference.routing import ragged_rows
from moequant.transport.buffers import BufferSpec, T, named
from moequant.transport.collective import CollectiveBuffers, CollectiveSlot, CollectiveTransport, check_in_step, collective_specs

NO_LIMIT = 2**31 - 1


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

    rows: (T, K) int32, each entry's row among those that come back, -1 where nothing was placed; per_rank: (T, W), as `plan_rank_sums`
    gives it. received_rows: (N, K) int32, the flat row of each entry of each received token, -1 where it is not on this rank.
    received_weights: (N, K) float32, per_rank only. sent, returned: rows that combine sends to, and gets from, each rank.
    """

    rows: Tensor
    received_rows: Tensor
    received_weights: Tensor | None
    sent: list[int]
    returned: list[int]


@dataclass(kw_only=True, eq=False)
class PackedBuffers(CollectiveBuffers[T]):
    send_tokens: T


PackedSlot = CollectiveSlot[PackedBuffers[Tensor]]


class PackedTransport(CollectiveTransport[PackedSlot]):
    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> PackedBuffers[BufferSpec]:
        ranks = config.world_size
        send_tokens = BufferSpec((ranks, config.max_tokens_per_rank), torch.int32)
        # tokens to each rank
        return PackedBuffers(**collective_specs(config, ranks), send_tokens=send_tokens)

    def allocate(self, number: int = 0) -> PackedSlot:
        buffers = PackedBuffers(**self.make_buffers(named(self.buffer_specs(self.config))))
        return CollectiveSlot(number, buffers, self.config.num_experts)

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: PackedSlot
    ) -> tuple[ExpertBatch, PackedState]:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'exchange "packed" has to sync with the host and can\'t be captured in a graph; use exchange="padded"'
            )
        config, buffers, tokens = self.config, slot.buffers, hidden_states.shape[0]
        local, offsets = config.num_local_experts, buffers.offsets
        _, rows_in_expert, rows, partials = slot.take(tokens)
        batch = self.expert_batch(slot, tokens)

        self._begin(slot)
        ops.route(topk_ids, rows_in_expert, slot.counts, status=self.status)
        ops.plan_sends(topk_ids, local, buffers.send_tokens, buffers.counts[config.num_experts + 2 :])
        self.wire.all_gather(buffers.all_counts, buffers.counts)
        ops.expert_offsets(
            slot.all_counts,
            self.first_expert,
            config.max_rows,
            NO_LIMIT,
            offsets,
            buffers.num_tokens,
            self.status,
            buffers.expert_start,
        )
        traffic, placed = self._learn_sizes(buffers.all_counts)

        message = self._pack(hidden_states, topk_ids, topk_weights, rows_in_expert)
        chosen = [listed[:count] for listed, count in zip(buffers.send_tokens, traffic[self.rank], strict=True)]
        from_ranks = [row[self.rank] for row in traffic]
        received = message.new_empty(sum(from_ranks), message.shape[1])
        self.wire.all_to_all(received, message.index_select(0, torch.cat(chosen)), from_ranks, traffic[self.rank])

        values, scales, ids, first_source, weights = self._fields(received)
        local_ids = ids - self.first_expert
        received_slots, received_rows = torch.empty_like(local_ids), torch.empty_like(local_ids)
        # experts of other ranks are out of range here, and have no slot
        ops.route(local_ids, received_slots, buffers.counts[:local])
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
            expert_start=batch.expert_start,
        )
        # a token that travelled brings back its sum, or each of its rows that was placed
        going_back = traffic if config.per_rank else placed
        returned = going_back[self.rank]
        starts = torch.tensor([0, *itertools.accumulate(returned[:-1])], dtype=torch.int32, device="cpu")
        starts = starts.to(self.device, non_blocking=True)
        ops.plan_returns(topk_ids, rows_in_expert, offsets[self.rank], config.max_rows, local, starts, rows)
        received_weights = None
        if config.per_rank:
            received_weights = weights.contiguous()
            ops.plan_rank_sums(topk_ids, rows, local, 0, partials, starts)
            rows = partials
        return batch, PackedState(rows, received_rows, received_weights, [row[self.rank] for row in going_back], returned)

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: PackedSlot, state: PackedState) -> None:
        self._begin_combine(slot, expert_output.dtype)
        if self.device.type == "cuda":
            # made on the stream of the dispatch, which may be another
            for made in (state.rows, state.received_rows, state.received_weights):
                if made is not None:
                    made.record_stream(torch.cuda.current_stream(self.device))
        if state.received_weights is not None:
            sums = torch.empty(sum(state.sent), out.shape[1], dtype=torch.bfloat16, device=self.device)
            back = torch.empty(sum(state.returned), out.shape[1], dtype=torch.bfloat16, device=self.device)
            ops.presum(expert_output.flatten(0, -2), state.received_rows, state.received_weights, sums)
            self.wire.all_to_all(back, sums, state.returned, state.sent)
            ops.combine(back, state.rows, None, out)
            return
        received = state.received_rows.flatten()
        send_rows = received[torch.nonzero_static(received >= 0, size=sum(state.sent)).squeeze(1)]
        returned = expert_output.new_empty(sum(state.returned), out.shape[1])
        self.wire.all_to_all(returned, expert_output.flatten(0, -2).index_select(0, send_rows), state.returned, state.sent)
        ops.combine(returned, state.rows, topk_weights, out)

    def _learn_sizes(self, all_counts: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """The one host sync. Returns, by source and target rank, the tokens that are sent, and their rows that find a place."""
        config = self.config
        host = all_counts.cpu()
        counts, words, traffic = host.split((config.num_experts, 2, config.world_size), 1)
        check_in_step(words.tolist())
        ends = counts.cumsum(0)
        by_rank = config.world_size, config.num_local_experts
        if config.ragged:
            _, room = ragged_rows(ends[-1].unflatten(0, by_rank), config.total_rows)
            ends = ends.minimum(room.flatten())
        else:
            ends = ends.clamp_max(config.max_rows)
        placed = ends.diff(dim=0, prepend=torch.zeros_like(ends[:1]))
        return traffic.tolist(), placed.unflatten(1, by_rank).sum(2).tolist()

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

    def _pack(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, rows_in_expert: Tensor) -> Tensor:
        """Each token as one row of bytes, quantized; see `_fields`."""
        config, (tokens, top_k) = self.config, topk_ids.shape
        message = torch.empty(tokens, message_bytes(config), dtype=torch.uint8, device=self.device)
        values, scales, ids, first_source, weights = self._fields(message)
        if config.quantized:
            ops.quantize_expert_batch(hidden_states[None], None, None, values[None], scales[None], recipe=config.recipe)
        else:
            values.copy_(hidden_states)
        # an id out of range has no slot, and must not become one of another rank's by losing its upper half
        ids.copy_(torch.where(rows_in_expert >= 0, topk_ids, -1))
        if config.per_rank:
            weights.copy_(topk_weights)
        base = self.rank << 32
        first_source.copy_(torch.arange(base, base + tokens * top_k, top_k, device=self.device))
        return message
