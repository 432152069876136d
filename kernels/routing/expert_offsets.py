"""Where each source rank's rows start in each expert's buffer.

W ranks, E experts, L local experts, M rows of an expert's buffer, C of them at most from one source rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Experts, rows_of
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div


@launchable
@triton.jit
def expert_offsets_kernel(
    counts,
    offsets_ptr,
    num_tokens_ptr,
    status_ptr,
    ranks,
    experts,
    capacity,
    rows_per_source,
    BLOCK: tl.constexpr,
):
    """Each program adds up BLOCK experts' counts over the ranks, in rank order.

    Example: C=4, M=5, one expert with counts [3, 6] of two ranks: offsets 0 and 3; 3 + min(6, 4) = 7 rows arrive, 5 are valid, and of
    all 9 rows 4 have no place.
    """
    expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = expert < experts.all
    arrived = tl.zeros((BLOCK,), tl.int32)
    wanted = tl.zeros((BLOCK,), tl.int32)
    for rank in range(ranks):
        count = tl.load(counts.pointer + rank * counts.stride + expert, mask=inside, other=0)
        tl.store(offsets_ptr + rank * experts.all + expert, arrived, mask=inside)
        arrived += tl.minimum(count, rows_per_source)
        wanted += count
    placed = tl.minimum(arrived, capacity)
    local = expert - experts.first
    tl.store(num_tokens_ptr + local, placed, mask=(local >= 0) & (local < experts.local))
    if status_ptr is not None:
        dropped = tl.sum((wanted - placed).to(tl.int64), axis=0)
        if dropped > 0:
            tl.atomic_add(status_ptr + 1, dropped, sem="relaxed")


def expert_offsets(
    counts: torch.Tensor,
    first_expert: int,
    capacity: int,
    rows_per_source: int,
    offsets: torch.Tensor,
    num_tokens: torch.Tensor,
    status: torch.Tensor | None = None,
) -> None:
    """As `moequant.reference.expert_offsets`. All tensors contiguous, but for the rows of counts."""
    ranks, experts = offsets.shape
    block = 128
    expert_offsets_kernel[(ceil_div(experts, block),)](
        rows_of(counts),
        offsets,
        num_tokens,
        status,
        ranks=ranks,
        experts=Experts(experts, num_tokens.shape[0], first_expert),
        capacity=capacity,
        rows_per_source=rows_per_source,
        BLOCK=block,
        num_warps=4,
    )
