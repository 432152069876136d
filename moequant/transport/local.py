"""The transport of a single rank: rows go straight into their experts' buffers.

T tokens, K top-k, L local experts (here all), M rows of an expert's buffer, R rows of all (ragged), H hidden size, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig
from moequant.transport.base import Slot, Transport
from moequant.transport.buffers import Buffers, BufferSpec, T, named, shared_by_all


@dataclass(kw_only=True, eq=False)
class LocalBuffers(Buffers[T]):
    # per_rank
    sums: T | None = None


LocalSlot = Slot[LocalBuffers[Tensor]]


class LocalTransport(Transport[LocalSlot]):
    repeats = True

    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> LocalBuffers[BufferSpec]:
        sums = BufferSpec((config.max_tokens_per_rank, config.hidden_size), torch.bfloat16) if config.per_rank else None
        return LocalBuffers(**shared_by_all(config), sums=sums)

    def allocate(self, number: int = 0) -> LocalSlot:
        return Slot(number, LocalBuffers(**self.make_buffers(named(self.buffer_specs(self.config)))))

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: LocalSlot
    ) -> tuple[ExpertBatch, Tensor]:
        tokens, buffers = hidden_states.shape[0], slot.buffers
        taken, batch = slot.take(tokens), self.expert_batch(slot, tokens)
        ops.route(
            topk_ids,
            taken.rows_in_expert,
            buffers.counts,
            self.config.max_rows,
            buffers.num_tokens,
            self.status,
            buffers.expert_start,
        )
        ops.scatter(
            hidden_states,
            topk_ids,
            taken.rows_in_expert,
            batch.values,
            batch.scales,
            rows=taken.rows,
            sources=batch.sources,
            recipe=self.config.recipe,
            expert_start=batch.expert_start,
        )
        if self.config.per_rank:
            ops.plan_rank_sums(topk_ids, taken.rows, self.config.num_experts, tokens, taken.partials)
        return batch, taken.rows

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: LocalSlot, state: Tensor) -> None:
        sums = slot.buffers.sums
        if sums is None:
            ops.combine(expert_output.flatten(0, -2), state, topk_weights, out)
            return
        tokens = out.shape[0]
        ops.presum(expert_output.flatten(0, -2), state, topk_weights, sums[:tokens])
        ops.combine(sums, slot.take(tokens).partials, None, out)
