"""Numbers the rows of each expert in the order of (token, k), and counts them.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import launch_dependents, uses_pdl


# Not specialized on the number of entries, which changes from call to call.
@launchable
@triton.jit(do_not_specialize=["entries"])
def route_kernel(
    ids_ptr,
    rows_in_expert_ptr,
    counts_ptr,
    num_tokens_ptr,
    status_ptr,
    entries,
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e < E reads all entries and numbers those of expert e; program E marks those of no expert, and counts the invalid ones.
    size: E, and the rows that an expert has room for, or None.

    Each program walks the entries in order, so the numbers are deterministic without atomics, scratch memory or a second launch; E
    reads of the ids come from the cache.

    Example: E=3, ids 2 0 | 0 -1 | 2 2. Program 2 finds entries 0, 4, 5 and writes rows_in_expert 0, 1, 2 there and counts[2] = 3;
    program 3 writes -1 to entry 3.
    """
    launch_dependents(PDL)
    experts, capacity = size
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    seen = tl.zeros((), tl.int32)
    invalid = tl.zeros((), tl.int32)
    for start in range(0, entries, BLOCK):
        entry = start + lane
        inside = entry < entries
        ids = tl.load(ids_ptr + entry, mask=inside, other=-1).to(tl.int64)
        if expert < experts:
            mine = (ids == expert).to(tl.int32)
            tl.store(rows_in_expert_ptr + entry, seen + tl.cumsum(mine, axis=0) - 1, mask=mine > 0)
            seen += tl.sum(mine, axis=0)
        else:
            absent = (ids < 0) | (ids >= experts)
            tl.store(rows_in_expert_ptr + entry, tl.full((BLOCK,), -1, tl.int32), mask=inside & absent)
            invalid += tl.sum((absent & (ids != -1)).to(tl.int32), axis=0)
    if expert < experts:
        tl.store(counts_ptr + expert, seen)
        if num_tokens_ptr is not None:
            if capacity is not None:
                tl.store(num_tokens_ptr + expert, tl.minimum(seen, capacity))
            else:
                tl.store(num_tokens_ptr + expert, seen)
        if capacity is not None and status_ptr is not None:
            if seen > capacity:
                tl.atomic_add(status_ptr + 1, (seen - capacity).to(tl.int64), sem="relaxed")
    elif status_ptr is not None:
        if invalid > 0:
            tl.atomic_add(status_ptr, invalid.to(tl.int64), sem="relaxed")


def route(
    topk_ids: torch.Tensor,
    rows_in_expert: torch.Tensor,
    counts: torch.Tensor,
    capacity: int | None = None,
    num_tokens: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """As `moequant.reference.route`. All tensors contiguous. pdl: the next launch may begin early (`pdl.py`)."""
    entries, experts = topk_ids.numel(), counts.shape[0]
    block = 1024 if entries <= 4096 else 4096
    route_kernel[(experts + 1,)](
        topk_ids,
        rows_in_expert,
        counts,
        num_tokens,
        status,
        entries=entries,
        size=(experts, capacity),
        BLOCK=block,
        PDL=pdl and uses_pdl(topk_ids.device),
        num_warps=block // 512,
    )
