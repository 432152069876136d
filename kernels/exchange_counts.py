"""How many rows each rank sends to each expert: told to all ranks, and turned into the places of this rank's rows.

W ranks, E experts, L local experts, M rows of an expert's buffer. Memory and flags: `symmetric.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from moequant.kernels.early import await_previous, begins_early, launch_option, let_next_begin
from moequant.kernels.symmetric import COUNTS, NO_FAULT, agreed, end_wait, peer_block

EXPIRED = tl.constexpr(1 << 16)


@triton.jit
def behind(words, epoch):
    """Which words are of an earlier epoch, as 1."""
    return ((words >> 32).to(tl.int32) - epoch < 0).to(tl.int32)


@triton.jit(do_not_specialize=["call", "limit"])
def exchange_counts_kernel(
    counts_ptr,
    offsets_ptr,
    num_tokens_ptr,
    status_ptr,
    peers_ptr,
    epoch_ptr,
    fault_ptr,
    record_ptr,
    words_offset,
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
    EARLY: tl.constexpr,
):
    """One program, the only one of a dispatch that waits for counts. Begins the slot's next epoch.

    Each count travels in one word of 8 bytes together with the epoch: it is complete when it is there, and needs no flag behind it.
    Nothing else is read here that a peer has stored; the kernels that follow see, as after any kernel, what this one has seen. After a
    fault nothing has a place: offsets are M, and the batch is empty.

    Example: rank 1 of 2, M=5, L=1, counts [2, 4] of rank 0 and [1, 3] of rank 1: rank 1's rows begin at row 2 of expert 0 and row 4 of
    expert 1; of expert 1, which is rank 1's, min(4 + 3, 5) = 5 rows are valid and 2 have no place.
    """
    let_next_begin(EARLY)
    await_previous(EARLY)
    epoch = tl.load(epoch_ptr) + 1
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    peer = tl.arange(0, LANES)
    present = peer < ranks
    everyone = present[:, None] & inside[None, :]
    # the number of the call travels behind the counts
    width = experts + 1
    upper = epoch.to(tl.int64) << 32
    mine = upper | tl.load(counts_ptr + expert, mask=inside, other=0)
    theirs = tl.load(peers_ptr + peer, mask=present, other=0) + (words_offset + 8 * rank * width)
    theirs = theirs.to(tl.pointer_type(tl.int64))
    # all stores, and later all loads, are in flight at once
    tl.store(theirs[:, None] + expert[None, :], tl.broadcast_to(mine[None, :], (LANES, EXPERTS)), mask=everyone)
    tl.store(theirs + experts, tl.zeros((LANES,), tl.int64) + (upper | call), mask=present)

    words = peer_block(peers_ptr, rank, words_offset, tl.int64) + peer * width
    abort_ptr = peer_block(peers_ptr, rank, abort_offset, tl.int32)
    started = globaltimer()
    # of the first rank that is late: its distance from the last; from EXPIRED on, the time is over
    state = tl.full((), 1, tl.int32)
    turn = tl.zeros((), tl.int32)
    fault = tl.full((), NO_FAULT, tl.int32)
    while (state > 0) & (state < EXPIRED) & (fault == NO_FAULT):
        # a way to memory and back of its own, which the first counts are under way for anyhow
        if turn % 8 == 0:
            fault = tl.atomic_add(abort_ptr, 0, sem="relaxed", scope="sys")
        turn += 1
        late = behind(tl.load(words[:, None] + expert[None, :], mask=everyone, other=0, volatile=True), epoch)
        calls_late = behind(tl.load((words + experts)[:, None], mask=present[:, None], other=0, volatile=True), epoch)
        late = tl.where(everyone, late, 0) | tl.where(present[:, None], calls_late, 0)
        missing = tl.max(tl.max(tl.where(late > 0, ranks - peer[:, None], 0), axis=1), axis=0)
        over = (globaltimer() - started) >> 10 >= limit
        state = agreed(missing + tl.where(over & (missing > 0), EXPIRED, 0))
    missing = ranks - state % EXPIRED
    fault = end_wait(peers_ptr, abort_offset, fault_ptr, record_ptr, epoch, missing, fault, ranks, COUNTS, LANES)
    # behind a barrier: every warp has read the old one
    tl.store(epoch_ptr, epoch)

    # read anew, behind the barrier: several threads may hold one word, and what a wait looks at is one thread's view of it
    counts = tl.load(words[:, None] + expert[None, :], mask=everyone, other=0, volatile=True).to(tl.int32)
    calls = tl.load(words + experts, mask=present, other=0, volatile=True).to(tl.int32)
    strangers = tl.sum((present & (calls != call)).to(tl.int32), axis=0)
    # whatever came, the sums stay in int32 and in order
    counts = tl.where(everyone, tl.minimum(tl.maximum(counts, 0), 1 << 24), 0)
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
    fault: torch.Tensor,
    record: torch.Tensor,
    words_offset: int,
    abort_offset: int,
    rank: int,
    capacity: int,
    call: int,
    limit: int,
) -> None:
    """counts: (E,) int32, rows of this rank for each expert. Written: offsets (E,) int32, num_tokens (L,) int32, status, epoch.

    The launch before is `route`, which began when all before it had ended: `push_tokens` may begin early behind this one, and reads then
    what was there before `route`.
    call: the number of the dispatcher's call, the same on all ranks that are in step. limit: of the wait, in units of 1024 ns.
    """
    experts, ranks = counts.shape[0], peers.shape[0]
    early = begins_early(counts.device)
    exchange_counts_kernel[(1,)](
        counts,
        offsets,
        num_tokens,
        status,
        peers,
        epoch,
        fault,
        record,
        words_offset,
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
        EARLY=early,
        num_warps=8,
        # 8 warps of so many fit in `early.ROOM`
        **launch_option(early, 96),
    )
