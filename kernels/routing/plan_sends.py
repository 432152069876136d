"""Which tokens go to which rank, and where their rows come back: the index work of the packed exchange.

T tokens, K top-k, E experts, W ranks, L = E / W experts of a rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.launch import launchable
from moequant.sizes import next_power_of_2

# of which `plan_returns` numbers so many at a time
ENTRIES = tl.constexpr(4096)


@launchable
@triton.jit(do_not_specialize=["tokens"])
def plan_sends_kernel(
    ids_ptr, tokens_ptr, counts_ptr, tokens, local_experts, most, K: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Program w lists the tokens that have an expert on rank w, in their order.

    Example: L=2, ids [[0, 1], [3, -1], [1, 2]]: program 0 lists tokens 0, 2, program 1 tokens 1, 2.
    """
    rank = tl.program_id(0)
    lane = tl.arange(0, LANES)[None, :]
    seen = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + token[:, None] * K + lane, mask=(token < tokens)[:, None] & (lane < K), other=-1).to(tl.int64)
        here = (ids >= rank * local_experts) & (ids < (rank + 1) * local_experts)
        goes = tl.max(here.to(tl.int32), axis=1)
        tl.store(tokens_ptr + rank * most + seen + tl.cumsum(goes, axis=0) - 1, token, mask=goes > 0)
        seen += tl.sum(goes, axis=0)
    tl.store(counts_ptr + rank, seen)


@launchable
@triton.jit(do_not_specialize=["entries"])
def plan_returns_kernel(ids_ptr, rows_in_expert_ptr, offsets_ptr, starts_ptr, rows_ptr, entries, local_experts, ranks, capacity):
    """Program w < W numbers the placed entries of rank w's experts in their order, from starts[w] on; program W marks those that were
    placed nowhere.

    Example: L=2, M=1, ids [[0, 1], [3, 1]], rows_in_expert [[0, 0], [0, 1]], offsets all 0, starts [0, 2]: expert 1 has no room for
    its second row, so rows are [[0, 1], [2, -1]].
    """
    rank = tl.program_id(0)
    seen = tl.zeros((), tl.int32)
    start_row = tl.load(starts_ptr + rank, mask=rank < ranks, other=0)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < entries
        ids = tl.load(ids_ptr + entry, mask=inside, other=-1).to(tl.int64)
        rows_in_expert = tl.load(rows_in_expert_ptr + entry, mask=inside, other=-1)
        placed = rows_in_expert >= 0
        placed = placed & (tl.load(offsets_ptr + ids, mask=placed, other=0) + rows_in_expert < capacity)
        if rank < ranks:
            mine = (placed & (ids // local_experts == rank)).to(tl.int32)
            tl.store(rows_ptr + entry, start_row + seen + tl.cumsum(mine, axis=0) - 1, mask=mine > 0)
            seen += tl.sum(mine, axis=0)
        else:
            tl.store(rows_ptr + entry, tl.full((ENTRIES,), -1, tl.int32), mask=inside & (placed == 0))


def plan_sends(topk_ids: torch.Tensor, local_experts: int, send_tokens: torch.Tensor, send_counts: torch.Tensor) -> None:
    """As `moequant.reference.plan_sends`. All tensors contiguous."""
    tokens, top_k = topk_ids.shape
    lanes = next_power_of_2(top_k)
    plan_sends_kernel[(send_counts.shape[0],)](
        topk_ids,
        send_tokens,
        send_counts,
        tokens=tokens,
        local_experts=local_experts,
        most=send_tokens.shape[1],
        K=top_k,
        LANES=lanes,
        BLOCK=max(1, 4096 // lanes),
        num_warps=8,
    )


def plan_returns(
    topk_ids: torch.Tensor,
    rows_in_expert: torch.Tensor,
    offsets: torch.Tensor,
    capacity: int,
    local_experts: int,
    starts: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """As `moequant.reference.plan_returns`. All tensors contiguous."""
    ranks = starts.shape[0]
    plan_returns_kernel[(ranks + 1,)](
        topk_ids,
        rows_in_expert,
        offsets,
        starts,
        rows,
        entries=topk_ids.numel(),
        local_experts=local_experts,
        ranks=ranks,
        capacity=capacity,
        num_warps=8,
    )
