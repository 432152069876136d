"""What a transport is to the dispatcher."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moequant.batch import ExpertBatch, Owner, ceil_div
from moequant.config import DispatcherConfig
from moequant.errors import PeerTimeoutError


class BufferSpec(NamedTuple):
    """A buffer before it exists: what `buffer_bytes` adds up and `allocate` makes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Slot:
    """One slot's buffers, by name, and how many dispatches it has served."""

    def __init__(self, number: int, buffers: dict[str, Tensor]) -> None:
        self.number = number
        self.buffers = buffers
        # of the dispatcher's call its number, slot and first wave, in bits: the same on all ranks that are in step
        self.call = 0
        self.generation = 0
        # the expert output that `combine_send` was given, for `combine_recv`
        self.pending: Tensor | None = None
        # the arguments of `dispatch_first`, for `dispatch_second`
        self.second: tuple[Tensor, Tensor, Tensor, int] | None = None
        # whether the last dispatch was combined
        self.answered = True

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name]


class Transport(ABC):
    """Moves rows to their experts and back. One instance serves one dispatcher; `slot` says whose buffers a call uses."""

    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor) -> None:
        """status: (3,) int64 on device, to which ids out of range, rows without a place and ranks out of step are added."""
        self.config = config
        self.rank = rank
        self.device = device
        self.status = status
        # of this dispatcher's batches: experts keep workspaces for it
        self.owner = Owner()

    @staticmethod
    @abstractmethod
    def buffer_specs(config: DispatcherConfig) -> Mapping[str, BufferSpec]:
        """The buffers of one slot."""

    @abstractmethod
    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot) -> tuple[ExpertBatch, Any]:
        """hidden_states (T, H) with contiguous rows, topk_ids and topk_weights (T, K) contiguous. Returns the batch, and what `combine`
        needs. Weights travel with `reduce="per_rank"` alone."""

    @abstractmethod
    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: Slot, state: Any) -> None:
        """expert_output (L, M, H) contiguous, topk_weights (T, K) contiguous. Writes out (T, H)."""

    def dispatch_send(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: Slot) -> Any:
        """`dispatch` without waiting for the other ranks' rows, where that can be. Returns what `dispatch_recv` and `combine` need."""
        _, state = self.dispatch(hidden_states, topk_ids, topk_weights, slot)
        return state

    def dispatch_recv(self, tokens: int, slot: Slot) -> ExpertBatch:
        """The batch of the slot's last `dispatch_send`, which had so many tokens."""
        return self.expert_batch(slot, tokens)

    def combine_send(self, expert_output: Tensor, slot: Slot) -> None:
        """`combine` without waiting for the other ranks' rows, where that can be."""
        slot.pending = expert_output

    def combine_recv(self, topk_weights: Tensor, out: Tensor, slot: Slot, state: Any) -> None:
        """The rest of `combine` after `combine_send`. Writes out (T, H)."""
        assert slot.pending is not None
        self.combine(slot.pending, topk_weights, out, slot, state)

    def output_buffer(self, slot: Slot) -> Tensor:
        """(L, M, H) bfloat16, where expert output is best written."""
        if "output" not in slot.buffers:
            config = self.config
            shape = config.num_local_experts, config.max_rows, config.hidden_size
            slot.buffers["output"] = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return slot["output"]

    def start(self) -> None:  # noqa: B027 (most transports have nothing to do)
        """Called once, on all ranks, when the kernels are compiled and before the first call."""

    def fault(self) -> PeerTimeoutError | None:
        """What went wrong on the device since the start, without waiting for it."""
        return None

    def allocate(self, number: int = 0) -> Slot:
        """A slot's buffers on the device, uninitialised."""
        specs = self.buffer_specs(self.config)
        try:
            return Slot(
                number, {name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for name, spec in specs.items()}
            )
        except RuntimeError as error:
            size = sum(spec.nbytes for spec in specs.values()) / 2**30
            raise RuntimeError(
                f"{self.device} has no room for {size:.1f} GiB of buffers: {str(error).splitlines()[0]}; lower capacity or "
                "max_tokens_per_rank (MoEQuantDispatcher.buffer_bytes says what settings need)"
            ) from error

    def expert_batch(self, slot: Slot, tokens: int) -> ExpertBatch:
        """The slot's batch buffers as the batch that dispatch returns. tokens: of this rank, for the guess of the mean."""
        config = self.config
        mean = ceil_div(tokens * config.top_k * config.world_size, config.num_experts)
        scales = slot["scales"].transpose(1, 2) if config.quantized else None
        rows = min(max(mean, 1), config.max_rows)
        return ExpertBatch(
            slot["values"], scales, slot["num_tokens"], slot["sources"], config.recipe, rows, slot.number, self.owner
        )


def batch_specs(config: DispatcherConfig) -> dict[str, BufferSpec]:
    """The expert batch: every transport has one."""
    experts, rows = config.num_local_experts, config.max_rows
    specs = {
        "values": BufferSpec((experts, rows, config.hidden_size), config.dtype),
        "num_tokens": BufferSpec((experts,), torch.int32),
        "sources": BufferSpec((experts, rows), torch.int64),
    }
    if config.quantized:
        specs["scales"] = BufferSpec((experts, config.num_groups, rows), torch.float32)
    return specs


def routing_specs(config: DispatcherConfig) -> dict[str, BufferSpec]:
    """What `route` and `scatter` write for the tokens of this rank."""
    tokens, top_k = config.max_tokens_per_rank, config.top_k
    return {
        "slots": BufferSpec((tokens, top_k), torch.int32),
        "rows": BufferSpec((tokens, top_k), torch.int32),
        # where `plan_partials` says that the ranks' partial sums lie
        **({"partials": BufferSpec((tokens, config.world_size), torch.int32)} if config.per_rank else {}),
    }
