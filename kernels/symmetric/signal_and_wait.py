"""A flag round of its own: for phases whose stores come from other kernels. W ranks. Memory and flags: `symmetric.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.early import begins_early, let_next_begin
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.symmetric import NO_FAULT, first_flag, signal_peers, wait_for_peers


@launchable
@triton.jit(do_not_specialize=["limit", "way"])
def signal_and_wait_kernel(
    peers_ptr,
    epoch_ptr,
    fault_ptr,
    record_ptr,
    status_ptr,
    flags_offset,
    abort_offset,
    rank,
    ranks,
    way,
    limit,
    PHASE: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program. Kernels before it on the stream have done their stores; kernels after it see those of all ranks. SIGNAL begins the
    next epoch.

    Example: W=2, phase OUTPUTS, epoch 6, way 2: rank 0 writes 7 * 4 + 2 = 30 into word 0 of both ranks' flags, and waits until both words
    of its own are at least 28. If rank 1's is 28, it does this in way 0, and status[2] grows by 1.
    """
    let_next_begin(EARLY)
    epoch = tl.load(epoch_ptr)
    if SIGNAL:
        epoch += 1
        signal_peers(peers_ptr, flags_offset, first_flag(epoch, PHASE) + way, rank, ranks, LANES)
        # behind a barrier: every warp has read the old one
        tl.store(epoch_ptr, epoch)
    if WAIT:
        fault, strangers = wait_for_peers(
            peers_ptr, flags_offset, abort_offset, fault_ptr, record_ptr, epoch, way, limit, rank, ranks, PHASE, LANES
        )
        if (fault == NO_FAULT) & (strangers > 0):
            tl.atomic_add(status_ptr + 2, strangers.to(tl.int64), sem="relaxed")


def signal_and_wait(
    peers: torch.Tensor,
    epoch: torch.Tensor,
    fault: torch.Tensor,
    record: torch.Tensor,
    status: torch.Tensor,
    flags_offset: int,
    abort_offset: int,
    rank: int,
    limit: int,
    phase: int,
    signal: bool = True,
    wait: bool = True,
    way: int = 0,
) -> None:
    """phase: whose flags these are, one of `symmetric`'s. limit: of the wait, in units of 2**20 ns. way: of outputs, below `WAYS`; the
    ranks that have another are added to status[2], (3,) int64."""
    ranks = peers.shape[0]
    signal_and_wait_kernel[(1,)](
        peers,
        epoch,
        fault,
        record,
        status,
        flags_offset,
        abort_offset,
        rank,
        ranks,
        way,
        limit,
        PHASE=phase,
        SIGNAL=signal,
        WAIT=wait,
        LANES=triton.next_power_of_2(ranks),
        EARLY=begins_early(peers.device),
        num_warps=1,
    )
