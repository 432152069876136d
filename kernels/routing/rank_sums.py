"""The index work of `reduce="per_rank"`: which rows a rank sums for whom, and where the sums lie that come back.

T tokens, K top-k, E experts, W ranks, L = E / W experts of a rank, C rows of an expert's buffer per source rank, M rows of an expert's
buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Experts, rows_of
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div

# of a program that finds rows
ENTRIES = tl.constexpr(1024)


@launchable
@triton.jit(do_not_specialize=["tokens"])
def plan_rank_sums_kernel(
    ids_ptr,
    rows_ptr,
    starts_ptr,
    partials_ptr,
    tokens,
    local_experts,
    stride,
    ranks,
    K: tl.constexpr,
):
    """Program w walks the tokens in order and says where rank w's sum of each lies, or -1.

    Example: L=2, ids [[0, 1], [3, -1], [1, 2]], of which [1, 2]'s first has no row: program 1 finds tokens 1 and 2 and writes
    stride + 1 and stride + 2, or starts[1] and starts[1] + 1; program 0 writes -1 to both.
    """
    LANES: tl.constexpr = triton.next_power_of_2(K)
    BLOCK: tl.constexpr = 4096 // LANES if LANES < 4096 else 1
    rank = tl.program_id(0)
    lane = tl.arange(0, LANES)[None, :]
    seen = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        entry = token[:, None] * K + lane
        inside = (token < tokens)[:, None] & (lane < K)
        ids = tl.load(ids_ptr + entry, mask=inside, other=-1).to(tl.int64)
        here = (ids >= rank * local_experts) & (ids < (rank + 1) * local_experts)
        placed = here & (tl.load(rows_ptr + entry, mask=inside, other=-1) >= 0)
        if starts_ptr is None:
            row = rank * stride + token
        else:
            named = tl.max(here.to(tl.int32), axis=1)
            row = tl.load(starts_ptr + rank) + seen + tl.cumsum(named, axis=0) - named
            seen += tl.sum(named, axis=0)
        held = tl.max(placed.to(tl.int32), axis=1) > 0
        tl.store(partials_ptr + token * ranks + rank, tl.where(held, row, -1), mask=token < tokens)


@launchable
@triton.jit
def locate_entries_kernel(
    entries,
    offsets_ptr,
    rows_ptr,
    weights_ptr,
    rank_entries,
    experts,
    limit,
    capacity,
    RAGGED: tl.constexpr,
):
    """Program (w, b) finds the rows of ENTRIES entries of rank w's tokens.

    Example: L=2, first_expert=2, C=2, M=4, of rank 0 ids [3, 0], rows_in_expert [1, 0], offsets[0, 3] 2: rows [4 + 2 + 1, -1] = [7, -1].
    """
    source = tl.program_id(0)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < rank_entries
    at = entries.pointer + source.to(tl.int64) * entries.stride + entry
    rows_in_expert = tl.load(at, mask=inside, other=-1)
    ids = tl.load(at + rank_entries, mask=inside, other=-1)
    weights = tl.load(at + 2 * rank_entries, mask=inside, other=0)
    local = ids - experts.first
    placed = (rows_in_expert >= 0) & (rows_in_expert < limit) & (local >= 0) & (local < experts.local)
    row = tl.load(offsets_ptr + source * experts.all + ids, mask=placed, other=0) + rows_in_expert
    to = source.to(tl.int64) * rank_entries + entry
    if RAGGED:
        tl.store(rows_ptr + to, tl.where(placed & (row < capacity), row, -1), mask=inside)
    else:
        tl.store(rows_ptr + to, tl.where(placed & (row < capacity), local * capacity + row, -1), mask=inside)
    tl.store(weights_ptr + to, weights.to(tl.float32, bitcast=True), mask=inside)


def plan_rank_sums(
    topk_ids: torch.Tensor,
    rows: torch.Tensor,
    local_experts: int,
    stride: int,
    partials: torch.Tensor,
    starts: torch.Tensor | None,
) -> None:
    """As `moequant.reference.plan_rank_sums`. All tensors contiguous."""
    (tokens, top_k), ranks = topk_ids.shape, partials.shape[1]
    plan_rank_sums_kernel[(ranks,)](
        topk_ids,
        rows,
        starts,
        partials,
        tokens,
        local_experts=local_experts,
        stride=stride,
        ranks=ranks,
        K=top_k,
        num_warps=8,
    )


def locate_entries(
    entries: torch.Tensor,
    offsets: torch.Tensor,
    first_expert: int,
    limit: int,
    capacity: int,
    rows: torch.Tensor,
    weights: torch.Tensor,
    ragged: bool = False,
) -> None:
    """As `moequant.reference.locate_entries`. Each rank's entries contiguous, at any stride; the others contiguous."""
    ranks, experts = offsets.shape
    rank_entries = rows[0].numel()
    locate_entries_kernel[(ranks, ceil_div(rank_entries, ENTRIES.value))](
        rows_of(entries),
        offsets,
        rows,
        weights,
        rank_entries=rank_entries,
        experts=Experts(experts, experts // ranks, first_expert),
        limit=limit,
        capacity=capacity,
        RAGGED=ragged,
        num_warps=4,
    )
