"""The transport of ranks that all hold the same tokens: each takes those of its own experts, so that nothing travels to them, and the
rows that experts make come back to all ranks. Over torch.distributed; no host sync, and on a GPU nothing that a graph can't hold.

    dispatch   route, scatter   of all entries; this rank's experts get their rows
    combine    "exact"          few tokens: all ranks get all rows, and each sums them;
                                many: each rank gets the rows of a W-th of the tokens, and the sums are gathered
               "per_rank"       each rank sums what it holds of all tokens; all ranks get these sums, and add them in rank order

T tokens, K top-k, E experts, W ranks, L = E / W local experts, R rows of a rank's buffer, H hidden size, P = ceil(T / W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch, ceil_div
from moequant.config import DispatcherConfig
from moequant.errors import OutOfStepError
from moequant.transport.buffers import BufferSpec, T, named
from moequant.transport.collective import CollectiveBuffers, CollectiveSlot, CollectiveTransport, collective_specs

NO_LIMIT = 2**31 - 1
# Of the rows of all entries that a rank gets from each of the others. Below it one collective with more bytes is done before two are.
FEW_BYTES = 1 << 20


@dataclass(kw_only=True, eq=False)
class SharedBuffers(CollectiveBuffers[T]):
    """sent, received: rows on their way back, or, per_rank, a rank's sums."""

    sent: T
    received: T


SharedSlot = CollectiveSlot[SharedBuffers[Tensor]]


def few_tokens(config: DispatcherConfig) -> int:
    """The most tokens whose rows go to all ranks at once."""
    return min(config.max_tokens_per_rank, FEW_BYTES // (config.world_size * config.top_k * config.hidden_size * 2))


class SharedTransport(CollectiveTransport[SharedSlot]):
    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> SharedBuffers[BufferSpec]:
        ranks, tokens, columns = config.world_size, config.max_tokens_per_rank, config.hidden_size
        part = ceil_div(tokens, ranks) * ranks
        if config.per_rank:
            sent, received = tokens, ranks * tokens
        else:
            sent, received = part * config.top_k, max(part, ranks * few_tokens(config)) * config.top_k
        return SharedBuffers(
            **collective_specs(config, 0),
            sent=BufferSpec((sent, columns), torch.bfloat16),
            received=BufferSpec((received, columns), torch.bfloat16),
        )

    def allocate(self, number: int = 0) -> SharedSlot:
        buffers = SharedBuffers(**self.make_buffers(named(self.buffer_specs(self.config))))
        return CollectiveSlot(number, buffers, self.config.num_experts)

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: SharedSlot
    ) -> tuple[ExpertBatch, Tensor]:
        config, buffers, tokens = self.config, slot.buffers, hidden_states.shape[0]
        _, rows_in_expert, rows, partials = slot.take(tokens)
        batch = self.expert_batch(slot, tokens)
        if self.wire.waits:
            self._begin(slot)
            self._compare(topk_ids)
        ops.route(topk_ids, rows_in_expert, slot.counts, status=self.status)
        # of this rank's experts, as if it were alone
        local = config.num_local_experts
        counts = slot.counts[self.first_expert : self.first_expert + local][None]
        starts = buffers.num_tokens, None, buffers.expert_start
        ops.expert_offsets(counts, 0, config.max_rows, NO_LIMIT, buffers.offsets[:1, :local], *starts)
        ops.scatter(
            hidden_states,
            # other ranks' are outside of 0..L-1
            topk_ids - self.first_expert,
            rows_in_expert,
            batch.values,
            batch.scales,
            rows=rows,
            sources=batch.sources,
            recipe=config.recipe,
            expert_start=batch.expert_start,
        )
        if config.per_rank:
            ops.plan_rank_sums(topk_ids, rows_in_expert, config.num_local_experts, tokens, partials)
        return batch, topk_ids

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: SharedSlot, state: Tensor) -> None:
        if self.wire.waits:
            self._begin_combine(slot, expert_output.dtype)
        config, buffers = self.config, slot.buffers
        _, rows_in_expert, here, partials = slot.take(out.shape[0])
        (tokens, top_k), ranks = topk_weights.shape, config.world_size
        if not tokens:
            return
        if config.per_rank:
            sent, received = buffers.sent[:tokens], buffers.received[: ranks * tokens]
            ops.presum(expert_output, here, topk_weights, sent)
            self._all_gather(received, sent)
            ops.combine(received, partials, None, out)
            return
        few = tokens <= few_tokens(config)
        # an entry without a row is no expert's
        owners = torch.where(rows_in_expert < 0, -1, state // config.num_local_experts)
        part = tokens if few else ceil_div(tokens, ranks)
        sent = buffers.sent[: (part if few else part * ranks) * top_k].view(expert_output.dtype)
        received = buffers.received[: ranks * part * top_k].view(expert_output.dtype)
        # rows of other ranks' entries are anything, and not read there
        torch.index_select(expert_output, 0, here.clamp_min(0).flatten(), out=sent[: tokens * top_k])
        if few:
            self._all_gather(received, sent)
        else:
            self.wire.all_to_all(received, sent)
        # of this rank's part of the tokens, each entry as its owner sent it
        mine = slice(0, tokens) if few else slice(min(self.rank * part, tokens), min((self.rank + 1) * part, tokens))
        owners = owners[mine]
        entries = torch.arange(owners.numel(), dtype=owners.dtype, device=self.device).view(owners.shape)
        rows = torch.where(owners < 0, -1, owners * (part * top_k) + entries).int()
        if few:
            ops.combine(received, rows, topk_weights, out)
            return
        sums, everyone = out.new_zeros(part, out.shape[1]), out.new_empty(ranks * part, out.shape[1])
        ops.combine(received, rows, topk_weights[mine], sums[: len(rows)])
        self._all_gather(everyone, sums)
        out.copy_(everyone[:tokens])

    def _all_gather(self, out: Tensor, x: Tensor) -> None:
        """out (W * N, H) from each rank's x (N, H)."""
        self.wire.all_gather(out.view(torch.uint8).unflatten(0, (self.config.world_size, -1)), x.view(torch.uint8))

    def _compare(self, topk_ids: Tensor) -> None:
        """On a CPU: raises OutOfStepError on all ranks unless they have the same tokens, as far as their ids say."""
        places = torch.arange(1, topk_ids.numel() + 1, device=topk_ids.device)
        mine = torch.tensor([topk_ids.shape[0], int((topk_ids.flatten() * places).sum())], device=topk_ids.device)
        everyone = mine.new_empty(self.config.world_size, 2)
        self.wire.all_gather(everyone, mine)
        if bool((everyone != everyone[0]).any()):
            raise OutOfStepError(
                "with shared_batch=True all ranks give the same tokens, and these gave others: numbers of tokens "
                f"{everyone[:, 0].tolist()}, sums of ids by place {everyone[:, 1].tolist()}"
            )
