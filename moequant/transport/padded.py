"""The padded exchange of the collective transport, the plainest pipeline: route into padded (E, C, H) buffers, quantize those,
equal-split all-to-all, close the gaps between the sources' rows.

Nothing syncs with the host, so a CUDA graph can hold it; C rows are sent for each (source, expert). With `reduce="per_rank"` the weights
travel too, and a rank sends back one sum for each token of each source instead of a row for each expert.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, C of them at most from one source rank,
H hidden size, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig
from moequant.transport.buffers import BufferSpec, T, named
from moequant.transport.collective import CollectiveBuffers, CollectiveSlot, CollectiveTransport, collective_specs


@dataclass(kw_only=True, eq=False)
class PaddedBuffers(CollectiveBuffers[T]):
    # routed tokens on their way out, expert output on its way back; float32 tokens get a buffer of their own when they come
    routed: T
    routed_float32: T | None = None
    # values sent and received, side by side; the expert output that is sent back
    exchanged: T
    # G rows of scales and a row of sources for each expert
    meta: T
    # per_rank
    received_rows: T | None = None
    received_weights: T | None = None
    # of this rank's rows for all ranks' tokens, and what all ranks made of this one's
    sums: T | None = None


class PaddedSlot(CollectiveSlot[PaddedBuffers[Tensor]]):
    """With what is said of this rank's experts: their counts and offsets, (W, L)."""

    def __init__(self, number: int, buffers: PaddedBuffers[Tensor], config: DispatcherConfig, first_expert: int) -> None:
        super().__init__(number, buffers, config.num_experts)
        local = slice(first_expert, first_expert + config.num_local_experts)
        self.local_counts, self.local_offsets = buffers.all_counts[:, local], buffers.offsets[:, local]


class PaddedTransport(CollectiveTransport[PaddedSlot]):
    by_source = True

    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> PaddedBuffers[BufferSpec]:
        experts, limit, columns = config.num_experts, config.rows_per_source, config.hidden_size
        ranks, tokens, top_k = config.world_size, config.max_tokens_per_rank, config.top_k
        meta_rows = (config.num_groups if config.quantized else 0) + 1
        specs = {
            # per_rank: rows_in_expert, ids and weights of each token, as `locate_entries` takes them
            **collective_specs(config, 3 * tokens * top_k if config.per_rank else 0),
            "routed": BufferSpec((experts, limit, columns), torch.bfloat16),
            "exchanged": BufferSpec((experts, limit, columns), torch.bfloat16),
            "meta": BufferSpec((2, experts, meta_rows, limit), torch.int32),
        }
        if config.per_rank:
            specs |= {
                "received_rows": BufferSpec((ranks, tokens, top_k), torch.int32),
                "received_weights": BufferSpec((ranks, tokens, top_k), torch.float32),
                "sums": BufferSpec((2, ranks, tokens, columns), torch.bfloat16),
            }
        return PaddedBuffers(**specs)

    def allocate(self, number: int = 0) -> PaddedSlot:
        buffers = PaddedBuffers(**self.make_buffers(named(self.buffer_specs(self.config))))
        return PaddedSlot(number, buffers, self.config, self.first_expert)

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: PaddedSlot
    ) -> tuple[ExpertBatch, Tensor]:
        config, buffers, tokens = self.config, slot.buffers, hidden_states.shape[0]
        _, rows_in_expert, rows, partials = slot.take(tokens)
        offsets, batch = buffers.offsets, self.expert_batch(slot, tokens)

        self._begin(slot)
        ops.route(topk_ids, rows_in_expert, slot.counts, status=self.status)
        if config.per_rank:
            self._announce(slot, rows_in_expert, topk_ids, topk_weights)
        self.wire.all_gather(buffers.all_counts, buffers.counts)
        ops.expert_offsets(
            slot.all_counts,
            self.first_expert,
            config.max_rows,
            config.rows_per_source,
            offsets,
            buffers.num_tokens,
            self.status,
            buffers.expert_start,
        )
        if not self.wire.waits:
            ops.count_mismatched(slot.all_calls, self.rank, self.status)
        meta_out, meta_in = buffers.meta
        routed = self._routed(slot, hidden_states.dtype if config.quantized else config.dtype)
        ops.scatter(
            hidden_states,
            topk_ids,
            rows_in_expert,
            routed,
            rows=rows,
            sources=meta_out[:, -1],
            offsets=offsets[self.rank],
            capacity=config.max_rows,
        )
        if config.quantized:
            values_out, values_in = buffers.exchanged.view(config.dtype).view(2, *routed.shape)
            ops.quantize_expert_batch(routed, slot.counts, None, values_out, self._scales(meta_out), recipe=config.recipe)
        else:
            values_out, values_in = routed, buffers.exchanged.view(config.dtype)
        self.wire.all_to_all(values_in, values_out)
        self.wire.all_to_all(meta_in, meta_out)
        ops.move_source_rows(
            self._by_source(values_in),
            batch.values,
            slot.local_offsets,
            slot.local_counts,
            True,
            self._by_source(self._scales(meta_in)) if config.quantized else None,
            batch.scales,
            self._by_source(meta_in[:, -1]),
            batch.sources,
        )
        if buffers.received_rows is not None and buffers.received_weights is not None:
            ops.locate_entries(
                self._entries(buffers.all_counts),
                offsets,
                self.first_expert,
                config.rows_per_source,
                config.max_rows,
                buffers.received_rows,
                buffers.received_weights,
                config.ragged,
            )
            ops.plan_rank_sums(topk_ids, rows, config.num_local_experts, config.max_tokens_per_rank, partials)
        return batch, rows

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: PaddedSlot, state: Tensor) -> None:
        self._begin_combine(slot, expert_output.dtype)
        buffers = slot.buffers
        if buffers.sums is not None and buffers.received_rows is not None and buffers.received_weights is not None:
            sent, returned = buffers.sums.flatten(1, 2)
            rows, weights = buffers.received_rows.flatten(0, 1), buffers.received_weights.flatten(0, 1)
            ops.presum(expert_output.flatten(0, -2), rows, weights, sent)
            self.wire.all_to_all(returned, sent)
            ops.combine(returned, slot.take(out.shape[0]).partials, None, out)
            return
        sent = buffers.exchanged.view(expert_output.dtype)
        returned = self._routed(slot, expert_output.dtype)
        ops.move_source_rows(self._by_source(sent), expert_output, slot.local_offsets, slot.local_counts, False)
        self.wire.all_to_all(returned, sent)
        ops.combine(returned.flatten(0, 1), state, topk_weights, out)

    def _entries(self, counts: Tensor) -> Tensor:
        """What follows the counts (..., E + 2 + 3 * T * K): (..., 3, T, K), T being max_tokens_per_rank."""
        config = self.config
        return counts[..., config.num_experts + 2 :].unflatten(-1, (3, config.max_tokens_per_rank, config.top_k))

    def _announce(self, slot: PaddedSlot, rows_in_expert: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Writes this rank's tokens behind its counts."""
        announced, ids, weights = self._entries(slot.buffers.counts)
        tokens = rows_in_expert.shape[0]
        announced[:tokens].copy_(rows_in_expert)
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

    def _routed(self, slot: PaddedSlot, dtype: torch.dtype) -> Tensor:
        """The (E, C, H) buffer of routed tokens in a type. One for float32 tokens is made when they first come; the other stays, since
        a graph may hold it."""
        buffers = slot.buffers
        if dtype.itemsize == buffers.routed.itemsize:
            return buffers.routed.view(dtype)
        if buffers.routed_float32 is None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"buffers for {dtype} tokens don't exist yet; dispatch once before capturing the graph")
            # kept, so that it has to be no inference tensor
            with torch.inference_mode(False):
                buffers.routed_float32 = torch.empty(buffers.routed.shape, dtype=dtype, device=self.device)
        return buffers.routed_float32
