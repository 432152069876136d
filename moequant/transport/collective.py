"""Dispatch and combine over torch.distributed: NCCL over any number of nodes, gloo on CPUs. Two exchanges, one result.

`PaddedTransport` is the plainest pipeline: route into padded (E, C, H) buffers, quantize those, equal-split all-to-all, close the gaps
between the sources' rows. Nothing syncs with the host, so a CUDA graph can hold it; C rows are sent for each (source, expert).
`PackedTransport` sends each token once to each rank that has one of its experts, with split sizes that the host has to learn: the least
on the wire, one host sync, no graph.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, C of them at most from one source rank,
H hidden size, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch
from moequant.config import DispatcherConfig, round_up
from moequant.errors import PeerTimeoutError
from moequant.transport.base import BufferSpec, Slot, Transport, batch_specs, routing_specs

# Up to so many bytes on the wire a rank, the padded exchange's extra rows cost less than the packed one's host sync.
PADDED_WIRE_BYTES = 32 << 20
NO_LIMIT = 2**31 - 1


class Wire:
    """The group's collectives on contiguous tensors of any type, sent as bytes: gloo knows neither float8 nor bfloat16.

    waits: on a CPU every call waits, within the dispatcher's time limit, and a lost or late rank raises PeerTimeoutError. On GPUs the
    waits are the stream's, under the limit of the process group's own watchdog.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float, waits: bool) -> None:
        self.group = group
        self.timeout = timeout
        self.waits = waits

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """out (W, ...) from each rank's x (...)."""
        if self.waits:
            self._wait("all_gather", lambda: dist.all_gather(list(out), x, group=self.group, async_op=True))
        else:
            dist.all_gather_into_tensor(out, x, group=self.group)

    def all_to_all(self, out: Tensor, x: Tensor, out_splits: list[int] | None = None, in_splits: list[int] | None = None) -> None:
        """Splits along the first dimension, equal ones by default."""
        out, x = out.view(torch.uint8), x.view(torch.uint8)
        if self.waits:
            self._wait(
                "all_to_all",
                lambda: dist.all_to_all_single(out, x, out_splits, in_splits, group=self.group, async_op=True),
            )
        else:
            dist.all_to_all_single(out, x, out_splits, in_splits, group=self.group)

    def _wait(self, name: str, start: Callable[[], Any]) -> None:
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise PeerTimeoutError(
                f"{name} did not complete within {self.timeout:g} s: a rank of the group is lost or late ({error}); "
                "close this dispatcher and build one on a new group of the ranks that are left"
            ) from error


class CollectiveTransport(Transport):
    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(config, rank, device, status)
        self.wire = Wire(group, config.timeout, waits=device.type == "cpu")
        self.first_expert = rank * config.num_local_experts


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
        specs = {
            **batch_specs(config),
            **routing_specs(config),
            "all_counts": BufferSpec((config.world_size, experts), torch.int32),
            "offsets": BufferSpec((config.world_size, experts), torch.int32),
            # routed tokens on their way out, expert output on its way back; 2 bytes a number, more once float32 tokens come
            "routed": BufferSpec((experts, limit, columns), torch.bfloat16),
            # values sent and received, side by side; the expert output that is sent back
            "exchanged": BufferSpec((experts, limit, columns), torch.bfloat16),
            # G rows of scales and a row of sources for each expert
            "meta": BufferSpec((2, experts, (config.num_groups if config.quantized else 0) + 1, limit), torch.int32),
        }
        return specs

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, slot: Slot) -> tuple[ExpertBatch, Tensor]:
        config, tokens = self.config, hidden_states.shape[0]
        slots, rows = slot["slots"][:tokens], slot["rows"][:tokens]
        counts, all_counts, offsets = slot["counts"], slot["all_counts"], slot["offsets"]
        batch = self.expert_batch(slot, tokens)

        ops.route(topk_ids, slots, counts, status=self.status)
        self.wire.all_gather(all_counts, counts)
        ops.expert_offsets(
            all_counts, self.first_expert, config.max_rows, config.rows_per_source, offsets, slot["num_tokens"], self.status
        )
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
        return batch, rows

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: Tensor) -> None:
        sent = slot["exchanged"].view(expert_output.dtype)
        returned = self._routed(slot, expert_output.dtype)
        ops.move_source_rows(self._by_source(sent), expert_output, slot["offsets"], slot["all_counts"], self.first_expert, False)
        self.wire.all_to_all(returned, sent)
        ops.combine(returned.flatten(0, 1), state, topk_weights, out)

    def _by_source(self, x: Tensor) -> Tensor:
        """(E, ...) as received, which is (W, L, ...)."""
        return x.unflatten(0, (self.config.world_size, self.config.num_local_experts))

    @staticmethod
    def _scales(meta: Tensor) -> Tensor:
        """The (E, C, G) float32 scales in an (E, G + 1, C) int32 buffer: strides ((G + 1) * C, 1, C)."""
        return meta[:, :-1].view(torch.float32).transpose(1, 2)

    def _routed(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """The (E, C, H) buffer of routed tokens in a type. It grows when float32 tokens first come."""
        buffer = slot["routed"]
        if buffer.dtype != dtype and buffer.itemsize < dtype.itemsize:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"buffers for {dtype} tokens don't exist yet; dispatch once before capturing the graph")
            buffer = slot.buffers["routed"] = torch.empty(buffer.shape, dtype=dtype, device=self.device)
        return buffer.flatten().view(dtype)[: buffer.numel()].view(buffer.shape)


@dataclass(frozen=True, eq=False)
class PackedState:
    """Where a packed dispatch's rows went.

    owners: (T, K) int32, the rank of each entry's expert, -1 where nothing was placed. received_rows: (R, K) int32, the flat row of
    each entry of each received token, -1 where it is not on this rank. sent, returned: rows that combine sends to, and gets from, each
    rank.
    """

    owners: Tensor
    received_rows: Tensor
    sent: list[int]
    returned: list[int]


class PackedTransport(CollectiveTransport):
    @staticmethod
    def buffer_specs(config: DispatcherConfig) -> Mapping[str, BufferSpec]:
        return {**batch_specs(config), **routing_specs(config)}

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, slot: Slot) -> tuple[ExpertBatch, PackedState]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'exchange "packed" has to sync with the host and can\'t be captured in a graph; use exchange="padded"'
            )
        config, tokens = self.config, hidden_states.shape[0]
        experts, ranks, local = config.num_experts, config.world_size, config.num_local_experts
        slots = slot["slots"][:tokens]
        batch = self.expert_batch(slot, tokens)

        ops.route(topk_ids, slots, slot["counts"], status=self.status)
        owners = torch.where(slots >= 0, topk_ids // local, -1).int()
        once = drop_repeats(owners)
        send_slots, send_counts = torch.empty_like(once), torch.empty(ranks, dtype=torch.int32, device=self.device)
        ops.route(once, send_slots, send_counts)

        mine = torch.cat((slot["counts"], send_counts))
        table = torch.empty(ranks, experts + ranks, dtype=torch.int32, device=self.device)
        self.wire.all_gather(table, mine)
        counts, offsets = table[:, :experts].contiguous(), torch.empty(ranks, experts, dtype=torch.int32, device=self.device)
        ops.expert_offsets(counts, self.first_expert, config.max_rows, NO_LIMIT, offsets, slot["num_tokens"], self.status)
        # the one host sync: split sizes
        host = torch.cat((table, offsets), 1).cpu()
        traffic = host[:, experts : experts + ranks]
        placed = (config.max_rows - host[:, experts + ranks :]).clamp_min(0).minimum(host[:, :experts])
        placed = placed.unflatten(1, (ranks, local)).sum(2)

        message = self._pack(hidden_states, torch.where(slots >= 0, topk_ids, -1))
        position = starts(send_counts)[once.clamp_min(0)] + send_slots
        token = torch.arange(tokens, device=self.device).unsqueeze(1).expand_as(once)
        send_tokens = compact(token, position, send_slots >= 0, int(traffic[self.rank].sum()))
        received = message.new_empty(int(traffic[:, self.rank].sum()), message.shape[1])
        in_splits, out_splits = traffic[self.rank].tolist(), traffic[:, self.rank].tolist()
        self.wire.all_to_all(received, message.index_select(0, send_tokens), out_splits, in_splits)

        values, scales, ids, first_source = self._unpack(received)
        ids = torch.where((ids >= self.first_expert) & (ids < self.first_expert + local), ids - self.first_expert, -1)
        received_slots, received_rows = torch.empty_like(ids), torch.empty_like(ids)
        ops.route(ids, received_slots, torch.empty(local, dtype=torch.int32, device=self.device))
        source = torch.arange(ranks, device=self.device).repeat_interleave(
            traffic[:, self.rank].to(self.device), output_size=received.shape[0]
        )
        ops.scatter(
            values,
            ids,
            received_slots,
            batch.values,
            batch.scales,
            x_scales=scales,
            rows=received_rows,
            sources=batch.sources,
            row_sources=(source << 32) + first_source,
        )
        kept = offsets[self.rank][topk_ids.clamp(0, experts - 1)] + slots < config.max_rows
        return batch, PackedState(
            torch.where(kept, owners, -1), received_rows, placed[:, self.rank].tolist(), placed[self.rank].tolist()
        )

    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: PackedState) -> None:
        present = state.received_rows.flatten() >= 0
        send_rows = compact(state.received_rows.flatten(), present.cumsum(0) - 1, present, sum(state.sent))
        returned = expert_output.new_empty(sum(state.returned), out.shape[1])
        self.wire.all_to_all(returned, expert_output.flatten(0, 1).index_select(0, send_rows), state.returned, state.sent)
        slots, counts = torch.empty_like(state.owners), torch.empty(self.config.world_size, dtype=torch.int32, device=self.device)
        ops.route(state.owners, slots, counts)
        rows = torch.where(slots >= 0, starts(counts)[state.owners.clamp_min(0)] + slots, -1).int()
        ops.combine(returned, rows, topk_weights, out)

    def _layout(self) -> tuple[int, int, int]:
        """Bytes of a message row's values, of its 4-byte words (G scales, K ids, the token's first source), and of the whole row; the
        words and the rows start at multiples of 16."""
        config = self.config
        values = config.hidden_size * config.dtype.itemsize
        words = 4 * ((config.num_groups if config.quantized else 0) + config.top_k + 1)
        return values, words, round_up(values, 16) + round_up(words, 16)

    def _fields(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of message rows: values (rows, H), scales (rows, G or 0) float32, ids and source (rows, K + 1) int32."""
        values, words, _ = self._layout()
        numbers = message[:, round_up(values, 16) :][:, :words]
        split = words - 4 * (self.config.top_k + 1)
        return (
            message[:, :values].view(self.config.dtype),
            numbers[:, :split].view(torch.float32),
            numbers[:, split:].view(torch.int32),
        )

    def _pack(self, hidden_states: Tensor, topk_ids: Tensor) -> Tensor:
        """Each token as one row of bytes, quantized."""
        tokens, top_k = topk_ids.shape
        message = torch.empty(tokens, self._layout()[2], dtype=torch.uint8, device=self.device)
        values, scales, routing = self._fields(message)
        if self.config.quantized:
            ops.quantize_expert_batch(hidden_states[None], None, values[None], scales[None], recipe=self.config.recipe)
        else:
            values.copy_(hidden_states)
        routing[:, :top_k] = topk_ids
        routing[:, top_k] = torch.arange(tokens, device=self.device) * top_k
        return message

    def _unpack(self, message: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Received rows as values (R, H), scales (R, G) or None, ids (R, K) and first source (R,)."""
        values, scales, routing = self._fields(message)
        return values, scales if self.config.quantized else None, routing[:, :-1], routing[:, -1]


def drop_repeats(owners: Tensor) -> Tensor:
    """(T, K) ids, each kept where it first stands in its row, -1 elsewhere. Example: [3, 1, 3, -1] gives [3, 1, -1, -1]."""
    same = owners.unsqueeze(2) == owners.unsqueeze(1)
    return torch.where(same.tril(-1).any(2), -1, owners)


def starts(counts: Tensor) -> Tensor:
    """Exclusive prefix sums. Example: [2, 0, 3] gives [0, 2, 2]."""
    return counts.cumsum(0) - counts


def compact(entries: Tensor, position: Tensor, present: Tensor, size: int) -> Tensor:
    """The present entries, each at its position, as (size,) int64; without a sync, since the size is known."""
    out = torch.empty(size + 1, dtype=torch.int64, device=entries.device)
    out[torch.where(present, position, size).flatten()] = entries.flatten().long()
    return out[:size]
