"""How many rows each rank sends to each expert: told to all ranks, and turned into the places of this rank's rows.

W ranks, E experts, L local experts, M rows of an expert's buffer. Memory and flags: `symmetric.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.symmetric import COUNTS, NO_FAULT, peer_block, signal_peers, wait_for_peers


@triton.jit(do_not_specialize=["call", "limit"])
def exchange_counts_kernel(
    counts_ptr,
    offsets_ptr,
    num_tokens_ptr,
    status_ptr,
    peers_ptr,
    epoch_ptr,
    record_ptr,
    counts_offset,
    flags_offset,
    abort_offset,
    rank,
    ranks,
    experts,
    local_experts,
    capacity,
    call,
    limit,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program, the only one of a dispatch that waits for counts. Begins the slot's next epoch.

    After a fault nothing has a place: offsets are M, and the batch is empty.

    Example: rank 1 of 2, M=5, L=1, counts [2, 4] of rank 0 and [1, 3] of rank 1: rank 1's rows begin at row 2 of expert 0 and row 4 of
    expert 1; of expert 1, which is rank 1's, min(4 + 3, 5) = 5 rows are valid and 2 have no place.
    """
    epoch = tl.load(epoch_ptr) + 1
    tl.store(epoch_ptr, epoch)
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    peer = tl.arange(0, LANES)
    # the number of the call travels behind the counts; rows begin at multiples of 16 bytes
    width = (experts + 4) // 4 * 4
    counts = tl.load(counts_ptr + expert, mask=inside, other=0)
    theirs = tl.load(peers_ptr + peer, mask=peer < ranks, other=0) + (counts_offset + 4 * rank * width)
    theirs = tl.multiple_of(theirs.to(tl.pointer_type(tl.int32)), 16)
    # all stores and all loads are in flight at once
    at = tl.max_contiguous(tl.multiple_of(theirs[:, None] + expert[None, :], (1, 16)), (1, EXPERTS))
    everyone = (peer < ranks)[:, None] & inside[None, :]
    tl.store(at, tl.broadcast_to(counts[None, :], (LANES, EXPERTS)), mask=everyone)
    tl.store(theirs + experts, tl.zeros((LANES,), tl.int32) + call, mask=peer < ranks)
    signal_peers(peers_ptr, flags_offset, epoch, rank, ranks, LANES)
    fault = wait_for_peers(peers_ptr, flags_offset, abort_offset, record_ptr, epoch, limit, rank, ranks, COUNTS, LANES)

    mine = peer_block(peers_ptr, rank, counts_offset, tl.int32)
    calls = tl.load(mine + peer * width + experts, mask=peer < ranks, other=0, volatile=True)
    strangers = tl.sum(((calls != call) & (peer < ranks)).to(tl.int32), axis=0)
    counts = tl.load(mine + peer[:, None] * width + expert[None, :], mask=everyone, other=0, volatile=True)
    # whatever came, the sums stay in int32 and in order
    counts = tl.minimum(tl.maximum(counts, 0), 1 << 24)
    before = tl.sum(tl.where((peer < rank)[:, None], counts, 0), axis=0)
    wanted = tl.sum(counts, axis=0)
    placed = tl.minimum(wanted, capacity)
    local = expert - rank * local_experts
    is_local = (local >= 0) & (local < local_experts)
    well = fault == NO_FAULT
    tl.store(offsets_ptr + expert, tl.where(well, before, capacity), mask=inside)
    tl.store(num_tokens_ptr + local, tl.where(well, placed, 0), mask=is_local)
    dropped = tl.sum(tl.where(inside, (wanted - placed).to(tl.int64), 0), axis=0)
    if well & (strangers > 0):
        tl.atomic_add(status_ptr + 2, strangers.to(tl.int64), sem="relaxed")
    if well & (dropped > 0):
        tl.atomic_add(status_ptr + 1, dropped, sem="relaxed")


def exchange_counts(
    counts: torch.Tensor,
    offsets: torch.Tensor,
    num_tokens: torch.Tensor,
    status: torch.Tensor,
    peers: torch.Tensor,
    epoch: torch.Tensor,
    record: torch.Tensor,
    counts_offset: int,
    flags_offset: int,
    abort_offset: int,
    rank: int,
    capacity: int,
    call: int,
    limit: int,
) -> None:
    """counts: (E,) int32, rows of this rank for each expert. Written: offsets (E,) int32, num_tokens (L,) int32, status, epoch.

    call: the number of the dispatcher's call, the same on all ranks that are in step. limit: of the wait, in units of 1024 ns.
    """
    experts, ranks = counts.shape[0], peers.shape[0]
    exchange_counts_kernel[(1,)](
        counts,
        offsets,
        num_tokens,
        status,
        peers,
        epoch,
        record,
        counts_offset,
        flags_offset,
        abort_offset,
        rank,
        ranks,
        experts,
        num_tokens.shape[0],
        capacity,
        call,
        limit,
        EXPERTS=triton.next_power_of_2(experts),
        LANES=triton.next_power_of_2(ranks),
        num_warps=4,
    )
