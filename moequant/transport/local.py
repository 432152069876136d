"""The transport of a single rank: rows go straight into their experts' buffers.

T tokens, K top-k, L local experts (here all), M rows of an expert's buffer, H hidden size, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig
from moequant.transport.base import BufferSpec, Slot, Transport, batch_specs, routing_specs


class LocalTransport(Transport):
    repeats = True

    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> Mapping[str, BufferSpec]:
        specs = {**batch_specs(config), **routing_specs(config), "counts": BufferSpec((config.num_experts,), torch.int32)}
        if config.per_rank:
            specs["sums"] = BufferSpec((config.max_tokens_per_rank, config.hidden_size), torch.bfloat16)
        return specs

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot) -> tuple[ExpertBatch, Tensor]:
        tokens = hidden_states.shape[0]
        slots, rows = slot["slots"][:tokens], slot["rows"][:tokens]
        batch = self.expert_batch(slot, tokens)
        ops.route(topk_ids, slots, slot["counts"], self.config.max_rows, slot["num_tokens"], self.status)
        ops.scatter(
            hidden_states,
            topk_ids,
            slots,
            batch.values,
            batch.scales,
            rows=rows,
            sources=batch.sources,
            recipe=self.config.recipe,
        )
        if self.config.per_rank:
            ops.plan_partials(topk_ids, rows, self.config.num_experts, tokens, slot["partials"][:tokens])
        return batch, rows

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: Tensor) -> None:
        if not self.config.per_rank:
            ops.combine(expert_output.flatten(0, 1), state, topk_weights, out)
            return
        tokens = out.shape[0]
        ops.presum(expert_output.flatten(0, 1), state, topk_weights, slot["sums"][:tokens])
        ops.combine(slot["sums"], slot["partials"][:tokens], None, out)
