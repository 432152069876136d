"""A slot's buffers by name, before they exist and after, and the part of them that so many tokens take."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

import torch

from moequant.config import DispatcherConfig

T = TypeVar("T")


class BufferSpec(NamedTuple):
    """A buffer before it exists: what `buffer_bytes` adds up and `allocate` makes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(kw_only=True, eq=False)
class Buffers(Generic[T]):
    """What every transport has: the expert batch, and what `route` and `scatter` write for the tokens of this rank.

    T is `BufferSpec`, or Tensor when they are there. None: not with these settings, or not made yet.
    """

    values: T
    num_tokens: T
    sources: T
    # layout "ragged"
    expert_start: T | None = None
    # of quantized values
    scales: T | None = None
    rows_in_expert: T
    rows: T
    counts: T
    # per_rank: where `plan_rank_sums` says that the ranks' partial sums lie
    partials: T | None = None


def named(buffers: Buffers[T]) -> dict[str, T]:
    """Those that are there."""
    each = {field.name: getattr(buffers, field.name) for field in fields(buffers)}
    return {name: buffer for name, buffer in each.items() if buffer is not None}


def shared_by_all(config: DispatcherConfig, counts: int | None = None) -> dict[str, BufferSpec]:
    """The specs of `Buffers`. counts: numbers that travel as counts; None: one for each expert."""
    rows, experts, tokens = config.batch_shape, config.num_local_experts, config.max_tokens_per_rank
    specs = {
        "values": BufferSpec((*rows, config.hidden_size), config.dtype),
        "num_tokens": BufferSpec((experts,), torch.int32),
        "sources": BufferSpec(rows, torch.int64),
        "rows_in_expert": BufferSpec((tokens, config.top_k), torch.int32),
        "rows": BufferSpec((tokens, config.top_k), torch.int32),
        "counts": BufferSpec((config.num_experts if counts is None else counts,), torch.int32),
    }
    if config.ragged:
        specs["expert_start"] = BufferSpec((experts,), torch.int32)
    if config.quantized:
        specs["scales"] = BufferSpec((*rows[:-1], config.num_groups, rows[-1]), torch.float32)
    if config.per_rank:
        specs["partials"] = BufferSpec((tokens, config.world_size), torch.int32)
    return specs
