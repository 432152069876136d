"""Dispatch and combine over torch.distributed: NCCL over any number of nodes, gloo on CPUs. Two exchanges, `padded.py` and `packed.py`,
with one result; what both do is here.

T tokens, K top-k, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moequant import ops
from moequant.config import DispatcherConfig
from moequant.errors import OutOfStepError
from moequant.transport.base import Slot, Transport
from moequant.transport.buffers import Buffers, BufferSpec, T, shared_by_all
from moequant.transport.calls import Call, unlike
from moequant.transport.wire import Wire

# Up to so many bytes of padded values and scales, the padded exchange's extra rows cost less than the packed one's host sync and its
# launches: on H200s these cost about 1 ms a layer (benchmarks/results).
PADDED_WIRE_BYTES = 128 << 20


@dataclass(kw_only=True, eq=False)
class CollectiveBuffers(Buffers[T]):
    """counts: of each expert, then what the call is, then what the exchange adds. all_counts, all_words: of all ranks."""

    all_counts: T
    all_words: T
    offsets: T


def collective_specs(config: DispatcherConfig, announced: int) -> dict[str, BufferSpec]:
    """announced: int32 numbers that a rank's counts have behind those of the experts and what the call is."""
    ranks, experts = config.world_size, config.num_experts
    counts = experts + 2 + announced
    return {
        **shared_by_all(config, counts),
        "all_counts": BufferSpec((ranks, counts), torch.int32),
        "all_words": BufferSpec((ranks, 2), torch.int32),
        "offsets": BufferSpec((ranks, experts), torch.int32),
    }


Kept = TypeVar("Kept", bound=CollectiveBuffers[Tensor])


class CollectiveSlot(Slot[Kept]):
    """With the parts of its counts: of the experts; what the call is, (2,), its number and its word. all_counts: (W, E)."""

    def __init__(self, number: int, buffers: Kept, experts: int) -> None:
        self.counts, self.words = buffers.counts[:experts], buffers.counts[experts : experts + 2]
        self.all_counts, self.all_calls = buffers.all_counts[:, :experts], buffers.all_counts[:, experts : experts + 2]
        super().__init__(number, buffers, self.words[:1].zero_())


Whose = TypeVar("Whose", bound=CollectiveSlot)


class CollectiveTransport(Transport[Whose]):
    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(config, rank, device, status)
        self.wire = Wire(group, config.first_limit, waits=device.type == "cpu")
        self.first_expert = rank * config.num_local_experts

    def settle(self) -> None:
        if self.wire.timeout != self.config.timeout:
            self.wire.limit(self.config.timeout)

    def _begin(self, slot: Whose) -> None:
        """Counts the call, and says what it is behind the counts."""
        slot.words[:1].add_(1)
        slot.words[1:].fill_(slot.call.word)
        if self.wire.waits:
            # at once, before messages whose sizes are this call's
            self._meet(slot)

    def _meet(self, slot: Whose) -> None:
        """Learns what all ranks are about to do. On a CPU raises OutOfStepError unless it is the same, on a GPU counts who differs."""
        words = slot.buffers.all_words
        self.wire.all_gather(words, slot.words)
        if self.wire.waits:
            check_in_step(words.tolist())
        else:
            ops.count_mismatched(words, self.rank, self.status)

    def _begin_combine(self, slot: Whose, dtype: torch.dtype) -> None:
        call = slot.call.combine(float16=dtype == torch.float16 and not self.config.per_rank)
        slot.words[1:].fill_(call.word)
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
