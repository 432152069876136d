"""Layout "ragged": where each expert's rows, and each source rank's of them, start in the buffer of the expert's rank.

W ranks, E experts, L local experts, R rows of a rank's buffer, C at most of an expert from one source rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Experts, rows_of
from moequant.kernels.library.launch import launchable
from moequant.sizes import next_power_of_2


class Into(NamedTuple):
    """What is written: of this rank's experts the rows and where they begin; of all experts where each source's begin, or None."""

    num_tokens: torch.Tensor
    starts: torch.Tensor
    offsets: torch.Tensor | None


@launchable
@triton.jit
def ragged_rows_kernel(
    counts,
    into,
    status_ptr,
    ranks,
    experts,
    capacity,
    rows_per_source,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r walks the experts of rank r, BLOCK at a time, and adds up their counts over the ranks, in rank order.

    Example: R=32, counts of the two experts of one rank [[3, 1], [4, 20]]: 7 rows come for expert 0 and 21 for expert 1, which start at
    rows 0 and 16. Rank 1's start at 0 + 3 and 16 + 1, 16 of the 21 have a place, and 5 have none.
    """
    end = tl.zeros((), tl.int64)
    dropped = tl.zeros((), tl.int64)
    for begin in range(0, experts.local, BLOCK):
        lane = begin + tl.arange(0, BLOCK)
        inside = lane < experts.local
        expert = tl.program_id(0) * experts.local + lane
        arrived = tl.zeros((BLOCK,), tl.int32)
        wanted = tl.zeros((BLOCK,), tl.int32)
        for source in range(ranks):
            count = tl.load(counts.pointer + source * counts.stride + expert, mask=inside, other=0)
            arrived += tl.minimum(count, rows_per_source)
            wanted += count
        aligned = ((arrived + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT).to(tl.int64)
        start = tl.minimum(end + tl.cumsum(aligned, axis=0) - aligned, capacity).to(tl.int32)
        end += tl.sum(aligned, axis=0)
        placed = tl.minimum(arrived, capacity - start)
        dropped += tl.sum((wanted - placed).to(tl.int64), axis=0)
        local = expert - experts.first
        mine = inside & (local >= 0) & (local < experts.local)
        tl.store(into.num_tokens + local, placed, mask=mine)
        tl.store(into.starts + local, start, mask=mine)
        if into.offsets is not None:
            for source in range(ranks):
                tl.store(into.offsets + source * experts.all + expert, start, mask=inside)
                count = tl.load(counts.pointer + source * counts.stride + expert, mask=inside, other=0)
                start += tl.minimum(count, rows_per_source)
    if status_ptr is not None:
        if dropped > 0:
            tl.atomic_add(status_ptr + 1, dropped, sem="relaxed")


def ragged_rows(
    counts: torch.Tensor,
    first_expert: int,
    capacity: int,
    rows_per_source: int,
    offsets: torch.Tensor | None,
    num_tokens: torch.Tensor,
    status: torch.Tensor | None,
    expert_start: torch.Tensor,
    alignment: int,
) -> None:
    """As `moequant.reference.expert_offsets` with expert_start; offsets None: nobody asks. All tensors contiguous, but for the rows of
    counts. alignment: of each expert's first row."""
    ranks, local = counts.shape[0], num_tokens.shape[0]
    experts = ranks * local
    ragged_rows_kernel[(ranks,)](
        rows_of(counts),
        Into(num_tokens, expert_start, offsets),
        status,
        ranks=ranks,
        experts=Experts(experts, local, first_expert),
        capacity=capacity,
        rows_per_source=rows_per_source,
        ALIGNMENT=alignment,
        BLOCK=min(128, next_power_of_2(local)),
        num_warps=4,
    )
