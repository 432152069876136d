"""What the symmetric transport keeps for a slot, and of it what other ranks write to and read from.

W ranks, E experts, K top-k, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.config import ROW_ALIGNMENT, DispatcherConfig
from moequant.ops import quant_spec
from moequant.transport.base import Slot
from moequant.transport.buffers import Buffers, BufferSpec, T

if TYPE_CHECKING:
    from moequant.kernels.library.symmetric import Peers
    from moequant.transport.symmetric import SymmetricTransport


def shared_specs(config: DispatcherConfig) -> dict[str, BufferSpec]:
    """What other ranks write to and read from, for one slot."""
    from moequant.kernels.symmetric.push_tokens import header_words

    ranks, rows, columns = config.world_size, config.batch_shape, config.hidden_size
    words = header_words(config.num_groups if config.quantized else 0, config.top_k, config.per_rank)
    returned = ranks if config.per_rank else config.top_k
    specs = {
        # of the rows, of the outputs and of the rows of a second wave, one for each rank
        "flags": BufferSpec((3, ranks), torch.int32),
        # of each rank: rows for each expert, the number of the call and its word, with the epoch in the upper half
        "count_words": BufferSpec((ranks, config.num_experts + 2), torch.int64),
        "values": BufferSpec((*rows, columns), config.dtype),
        "headers": BufferSpec((*rows, words), torch.int32),
        # rows pushed back to this rank: one an entry, or one for each rank and token
        "returns": BufferSpec((config.max_tokens_per_rank * returned, columns), torch.bfloat16),
    }
    if pulls(config):
        specs["output"] = BufferSpec((*rows, columns), config.output_dtype)
    return specs


def pulls(config: DispatcherConfig) -> bool:
    """Whether `combine` loads rows where they lie, for which all ranks share their expert output."""
    return not config.overlap and not config.per_rank


@dataclass(kw_only=True, eq=False)
class SymmetricBuffers(Buffers[T]):
    # those of `shared_specs`, besides values
    flags: T
    count_words: T
    headers: T
    returns: T
    # where expert output is pulled from
    output: T | None = None
    # no tensor: what lies between those that are shared
    guards: T | None = None
    row_offsets: T
    # how many dispatches and combines the slot has seen; and how many dispatches were called, with those that raised; how many programs
    # of a kernel are done; what the last wait found
    epochs: T
    calls: T
    arrivals: T
    fault: T
    # where rows that are pushed back go, unless sums are
    destinations: T | None = None


class SymmetricSlot(Slot[SymmetricBuffers[Tensor]]):
    """With what its kernels are told in every call. peers: with the flags of the rows, the outputs, and the rows of a second wave."""

    def __init__(self, number: int, buffers: SymmetricBuffers[Tensor], peers: list[Peers], transport: SymmetricTransport) -> None:
        import triton.language as tl

        from moequant.kernels.library.symmetric import headers_of
        from moequant.kernels.routing.combine import Remote
        from moequant.kernels.symmetric.exchange_counts import Counts
        from moequant.kernels.symmetric.push_rank_sums import Sums
        from moequant.kernels.symmetric.push_tokens import Landing
        from moequant.kernels.symmetric.unpack_rows import Landed, Returns

        super().__init__(number, buffers, buffers.calls)
        config, offsets = transport.config, transport.offsets_of(number)
        self.output = buffers.output
        self.peers = peers
        self.exchanged = Counts(
            buffers.counts,
            buffers.row_offsets,
            buffers.num_tokens,
            buffers.calls,
            transport.status,
            words=offsets["count_words"],
            expert_start=buffers.expert_start,
            alignment=tl.constexpr(ROW_ALIGNMENT),
        )
        self.landing = Landing(
            rows=offsets["values"],
            headers=offsets["headers"],
            experts=config.num_experts,
            local_experts=config.num_local_experts,
            # of an expert, or of the rank
            capacity=config.max_rows,
            columns=config.hidden_size,
            max_tokens=config.max_tokens_per_rank,
            spec=quant_spec(config.dtype, config.recipe) if config.quantized else None,
            ragged=tl.constexpr(config.ragged),
        )
        self.landed = Landed(
            buffers.values.view(torch.uint8), self.scales, buffers.num_tokens, buffers.sources, buffers.expert_start
        )
        self.headers = headers_of(buffers.headers, config.num_groups if config.quantized else 0)
        self.returns = Returns(
            buffers.destinations,
            offset=offsets["returns"],
            entries=config.max_tokens_per_rank * config.top_k,
            row_bytes=2 * config.hidden_size,
        )
        self.sums = Sums(offsets["returns"], config.max_tokens_per_rank)
        self.remote = None
        if buffers.output is not None:
            self.remote = Remote(peers[0].pointers, offsets["output"], config.total_rows, config.world_size)
