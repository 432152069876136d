"""How many rows each rank sends to each expert: told to all ranks, and turned into the places of this rank's rows.

W ranks, E experts, L local experts, M rows of an expert's buffer, R rows of a rank's, if the layout is ragged. Memory and flags:
`symmetric.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from moequant.kernels.library.common import takes_ptx, unlike
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import launch_dependents, pdl_option, uses_pdl, wait_for_previous
from moequant.kernels.library.symmetric import COUNTS, NO_FAULT, Peers, end_wait, made_uniform, peer_block
from moequant.sizes import next_power_of_2

EXPIRED = tl.constexpr(1 << 16)


@triton.jit
def behind(words, epoch):
    """Which words are of an earlier epoch, as 1."""
    return ((words >> 32).to(tl.int32) - epoch < 0).to(tl.int32)


@triton.jit
def store_word(pointers, word, mask):
    """Stores 8 bytes that another GPU polls: in one piece, and not held back."""
    if takes_ptx():
        store: tl.constexpr = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }"
        tl.inline_asm_elementwise(store, "=r,l,l,r", [pointers, word, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(pointers, word, mask=mask)


class Counts(NamedTuple):
    """What a slot has for its counts; all but counts are written. words: the offset of the words that travel.

    counts: (E,) int32, rows of this rank for each expert. offsets: (E,) int32. num_tokens: (L,) int32. calls: (1,) int32, how many the
    slot has seen. status: (3,) int64. expert_start: (L,) int32, if the layout is ragged: then offsets count from the beginning of a
    rank's buffer, otherwise of an expert's, and experts begin at multiples of `alignment`.
    """

    counts: torch.Tensor
    offsets: torch.Tensor
    num_tokens: torch.Tensor
    calls: torch.Tensor
    status: torch.Tensor
    words: int
    expert_start: torch.Tensor | None = None
    alignment: tl.constexpr = tl.constexpr(1)


@launchable
@triton.jit(do_not_specialize=["call", "peers"])
def exchange_counts_kernel(
    slot,
    peers,
    experts,
    local_experts,
    capacity,
    call,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program, the only one of a dispatch that waits for counts. Begins the slot's next epoch, and counts its calls.

    Each count travels in one word of 8 bytes together with the epoch: it is complete when it is there, and needs no flag behind it.
    Nothing else is read here that a peer has stored; the kernels that follow see, as after any kernel, what this one has seen. After a
    fault nothing has a place: offsets are M, or R, and the batch is empty. capacity: M, or R.

    Example: rank 1 of 2, M=5, L=1, counts [2, 4] of rank 0 and [1, 3] of rank 1: rank 1's rows begin at row 2 of expert 0 and row 4 of
    expert 1; of expert 1, which is rank 1's, min(4 + 3, 5) = 5 rows are valid and 2 have no place.

    Ragged: R=32, alignment 16, L=2, counts [2, 9, 8, 1] of rank 0 and [1, 8, 9, 16] of rank 1. The experts of a rank get 3, 17 | 17, 17
    rows and begin at rows 0, 16 | 0, 32 of its buffer; rank 1's rows begin at 2, 25 | 8, 32. Of expert 1, one row has no place, and none
    of expert 3 has one.
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    rank, ranks = peers.rank, peers.ranks
    epoch = tl.load(peers.epoch) + 1
    number = tl.load(slot.calls) + 1
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    peer = tl.arange(0, LANES)
    present = peer < ranks
    everyone = present[:, None] & inside[None, :]
    # what the call is travels behind the counts: its number and its word
    width = experts + 2
    upper = epoch.to(tl.int64) << 32
    mine = upper | tl.load(slot.counts + expert, mask=inside, other=0)
    theirs = tl.load(peers.pointers + peer, mask=present, other=0) + slot.words + (8 * rank * width).to(tl.int64)
    theirs = theirs.to(tl.pointer_type(tl.int64))
    # all stores, and later all loads, are in flight at once
    store_word(theirs[:, None] + expert[None, :], tl.broadcast_to(mine[None, :], (LANES, EXPERTS)), everyone)
    place = tl.arange(0, 2)
    said = upper | tl.where(place == 0, number.to(tl.int64) & 0xFFFFFFFF, call)
    store_word(
        theirs[:, None] + experts + place[None, :], tl.broadcast_to(said[None, :], (LANES, 2)), (present[:, None] & (place >= 0))
    )

    words = peer_block(peers, rank, slot.words, tl.int64) + peer * width
    calls = words[:, None] + experts + place[None, :]
    abort_ptr = peer_block(peers, rank, peers.abort, tl.int32)
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
        missing = tl.max(tl.max(tl.where(everyone & (late > 0), ranks - peer[:, None], 0), axis=1), axis=0)
        late = behind(tl.load(calls, mask=present[:, None], other=0, volatile=True), epoch)
        late = tl.max(tl.max(tl.where(present[:, None] & (late > 0), ranks - peer[:, None], 0), axis=1), axis=0)
        missing = tl.maximum(missing, late)
        over = (globaltimer() - started) >> 20 >= peers.wait_limit
        state = made_uniform(missing + tl.where(over & (missing > 0), EXPIRED, 0))
    missing = ranks - state % EXPIRED
    fault = end_wait(peers, epoch, missing, fault, COUNTS, LANES)
    # behind a barrier: every warp has read the old ones
    tl.store(peers.epoch, epoch)
    tl.store(slot.calls, number)

    # read anew, behind the barrier: several threads may hold one word, and what a wait looks at is one thread's view of it
    counts = tl.load(words[:, None] + expert[None, :], mask=everyone, other=0, volatile=True).to(tl.int32)
    theirs = tl.load(calls, mask=present[:, None], other=0, volatile=True).to(tl.int32)
    other = tl.where(place[None, :] == 0, theirs != number, unlike(call, theirs))
    mismatched = tl.sum(tl.max((present[:, None] & other).to(tl.int32), axis=1), axis=0)
    # whatever came, the sums stay in int32 and in order
    counts = tl.where(everyone, tl.minimum(tl.maximum(counts, 0), 1 << 24), 0)
    before = tl.sum(tl.where((peer < rank)[:, None], counts, 0), axis=0)
    wanted = tl.sum(counts, axis=0)
    local = expert - rank * local_experts
    is_local = (local >= 0) & (local < local_experts)
    well = fault == NO_FAULT
    if slot.expert_start is None:
        placed = tl.minimum(wanted, capacity)
    else:
        # behind the rows of all experts before; those of the rank's own count
        taken = tl.cdiv(wanted.to(tl.int64), slot.alignment) * slot.alignment
        ahead = tl.cumsum(taken, axis=0) - taken
        start = ahead - tl.gather(ahead, expert // local_experts * local_experts, 0)
        before = tl.minimum(start + before, capacity).to(tl.int32)
        start = tl.minimum(start, capacity).to(tl.int32)
        placed = tl.minimum(wanted, capacity - start)
        tl.store(slot.expert_start + local, tl.where(well, start, 0), mask=is_local)
    tl.store(slot.offsets + expert, tl.where(well, before, capacity), mask=inside)
    tl.store(slot.num_tokens + local, tl.where(well, placed, 0), mask=is_local)
    dropped = tl.sum(tl.where(inside, (wanted - placed).to(tl.int64), 0), axis=0)
    if well & (mismatched > 0):
        tl.atomic_add(slot.status + 2, mismatched.to(tl.int64), sem="relaxed")
    if well & (dropped > 0):
        tl.atomic_add(slot.status + 1, dropped, sem="relaxed")


def exchange_counts(slot: Counts, peers: Peers, capacity: int, call: int) -> None:
    """Writes offsets, num_tokens, expert_start, status, peers' epoch and calls.

    The launch before is `route`, which began when all before it had ended: `push_tokens` may begin early behind this one, and reads then
    what was there before `route`.
    capacity: M, or R. call: the word of this call (`moequant.transport.calls`), the same on all ranks that are in step; the ranks
    where it or the number of calls differs are added to status[2].
    """
    experts = slot.counts.shape[0]
    pdl = uses_pdl(slot.counts.device)
    exchange_counts_kernel[(1,)](
        slot,
        peers,
        experts=experts,
        local_experts=slot.num_tokens.shape[0],
        capacity=capacity,
        call=call,
        EXPERTS=next_power_of_2(experts),
        LANES=next_power_of_2(peers.ranks),
        PDL=pdl,
        num_warps=8,
        # 8 warps of so many fit in `early.ROOM`
        **pdl_option(pdl, 96),
    )
