"""Device functions of the symmetric transport: addresses in other ranks' memory, flags, and waits that end.

W ranks. Every rank has one block of memory of the same layout, which all of them can address, and an offset counts bytes from the
beginning of a block. `Peers` says where the blocks lie, and what else a kernel has to know of the ranks.

Flags are int32 words, W of them for the rows, for the outputs and for the rows of a second wave of a call, in the memory of the rank that
waits: word r belongs to rank r, which writes the number of the call (the epoch) into it; into that of the outputs 4 * epoch + way, where
the way says how they come back. Counts carry their epoch with them (`exchange_counts.py`). Epochs live in device memory, so that a
captured graph counts on when it is replayed, and flags are compared by their difference, which is right across the wrap to negative
numbers. The words of the second wave, which few calls signal, are set to the epoch before by the rank that waits, before it sends its
counts.

Why nothing is overwritten too early: a rank publishes its counts for call n + 1 of a slot only after all its own work on call n, in
stream order, and no rank stores rows of call n + 1 anywhere before it has the counts of all ranks for it. Whoever reads a buffer in call
n has thus finished before the first store of call n + 1 to it, whether combine was called or not. A rank without tokens publishes its
counts as well.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from moequant.sizes import ceil_div

# The abort word while all is well. A fault is a smaller number: step << 8 | rank, where step is (epoch * 4 + phase) modulo 2**22. Ranks
# that notice different faults agree on the smallest, the earliest step.
NO_FAULT = tl.constexpr(0x7FFFFFFF)
STEP_MASK = tl.constexpr((1 << 22) - 1)
# The phases of a call.
COUNTS, ROWS, OUTPUTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The ways in which outputs come back.
WAYS = tl.constexpr(4)


class Peers(NamedTuple):
    """What a kernel is told of the ranks: one argument of it and of what it calls. Kernels don't specialize on it.

    pointers: (W,) int64, where each rank's block lies in this rank's address space.
    epoch, arrivals: (1,) int32, the number of the last call, and how many programs of a launch are done.
    fault, record: (1,) int32, what the last wait found, for the kernels that follow, and in the host's memory.
    flags, abort: offsets of the flags of a phase and of the abort word.
    wait_limit: of a wait, in units of 2**20 ns.
    """

    pointers: Tensor
    epoch: Tensor
    arrivals: Tensor
    fault: Tensor
    record: Tensor
    flags: int
    abort: int
    rank: int
    ranks: int
    wait_limit: int


class Headers(NamedTuple):
    """The headers of a rank's rows (`push_tokens.py`), (L, M, words) or (R, words) int32, of which the first scale_words hold scales: two
    constants."""

    pointer: Tensor
    words: tl.constexpr
    scale_words: tl.constexpr


def headers_of(headers: Tensor, groups: int) -> Headers:
    """groups: 0 where rows have no scales."""
    return Headers(headers, tl.constexpr(headers.shape[-1]), tl.constexpr(ceil_div(groups, 4) * 4))


@triton.jit
def first_flag(epoch, PHASE: tl.constexpr):
    """The least flag of an epoch."""
    return epoch * WAYS if PHASE == OUTPUTS else epoch


@triton.jit
def peer_block(peers, rank, offset, element: tl.constexpr):
    """The address of byte `offset` of a rank's block, a multiple of 16, which the compiler can't know of an address from a table."""
    return tl.multiple_of((tl.load(peers.pointers + rank) + offset).to(tl.pointer_type(element)), 16)


@triton.jit
def made_uniform(x):
    """The largest x of any warp, in all of them. What warps read one after the other from memory that others write, or from a clock, may
    differ, and warps that leave a loop at different turns no longer meet at its barriers."""
    return tl.max(tl.zeros((1024,), x.dtype) + x, axis=0)


@triton.jit
def signal_peers(peers, flag, LANES: tl.constexpr):
    """Tells all ranks that this one's stores for a phase are done: those of this program, and those of programs that this one has
    synchronised with."""
    lane = tl.arange(0, LANES)
    inside = lane < peers.ranks
    flags = (tl.load(peers.pointers + lane, mask=inside, other=0) + peers.flags).to(tl.pointer_type(tl.int32)) + peers.rank
    # every warp's stores are issued before one lane for each peer releases them
    tl.debug_barrier()
    tl.atomic_xchg(flags, tl.zeros((LANES,), tl.int32) + flag, mask=inside, sem="release", scope="sys")


@triton.jit
def end_wait(peers, epoch, missing, fault, PHASE: tl.constexpr, LANES: tl.constexpr):
    """After a wait: where rank `missing` did not come, and nobody has said so yet, tells all ranks. Returns the fault, or NO_FAULT, and
    leaves it in peers.fault and peers.record."""
    if (missing < peers.ranks) & (fault == NO_FAULT):
        fault = (((epoch * 4 + PHASE) & STEP_MASK) << 8) | missing
        lane = tl.arange(0, LANES)
        inside = lane < peers.ranks
        aborts = (tl.load(peers.pointers + lane, mask=inside, other=0) + peers.abort).to(tl.pointer_type(tl.int32))
        tl.atomic_min(aborts, tl.zeros((LANES,), tl.int32) + fault, mask=inside, sem="release", scope="sys")
    tl.store(peers.fault, fault)
    if fault != NO_FAULT:
        tl.store(peers.record, fault)
    # loads of what the peers stored come after the wait in every warp
    tl.debug_barrier()
    return fault


@triton.jit
def wait_for_peers(peers, epoch, way, PHASE: tl.constexpr, LANES: tl.constexpr):
    """Waits until all ranks have signalled the epoch. Returns the fault, or NO_FAULT, and how many ranks' outputs come in another way
    than this rank's; of one that is an epoch ahead that can't be seen any more.

    Ends as well when a fault is known, or after peers.wait_limit: then the first rank that is missing is the culprit, and every rank is
    told. A fault stays, so that later waits end at once.
    """
    lane = tl.arange(0, 2 * LANES)
    ranks = peers.ranks
    mine = tl.load(peers.pointers + peers.rank)
    # the abort word is looked at together with the flags: one way to memory and back, not two
    words = mine + tl.where(lane == ranks, peers.abort, peers.flags + 4 * lane)
    words = words.to(tl.pointer_type(tl.int32))
    started = globaltimer()
    waited = started - started
    missing = tl.zeros((), tl.int32)
    fault = tl.full((), NO_FAULT, tl.int32)
    mismatched = tl.zeros((), tl.int32)
    while (missing < ranks) & (fault == NO_FAULT) & (waited < peers.wait_limit):
        # what an atomic operation returns is the same in all warps
        seen = tl.atomic_add(words, tl.zeros((2 * LANES,), tl.int32), mask=lane <= ranks, sem="acquire", scope="sys")
        ahead = seen - first_flag(epoch, PHASE)
        missing = tl.min(tl.where((lane < ranks) & (ahead < 0), lane, ranks), axis=0)
        if PHASE == OUTPUTS:
            mismatched = tl.sum(((lane < ranks) & (ahead < WAYS) & (ahead != way)).to(tl.int32), axis=0)
        fault = tl.sum(tl.where(lane == ranks, seen, 0), axis=0)
        waited = made_uniform((globaltimer() - started) >> 20)
    fault = end_wait(peers, epoch, missing, fault, PHASE, LANES)
    return fault, mismatched


@triton.jit
def last_program(arrivals_ptr):
    """Whether this program is the last of its launch to come here; what the others stored before is then visible to it.

    The word goes back to 0 for the next launch.
    """
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1)
    # what is released to the last program here, it releases to all ranks with its own signal
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last
