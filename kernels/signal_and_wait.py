"""A flag round of its own: for phases whose stores come from other kernels. W ranks. Memory and flags: `symmetric.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.early import begins_early, let_next_begin
from moequant.kernels.symmetric import signal_peers, wait_for_peers


@triton.jit(do_not_specialize=["limit"])
def signal_and_wait_kernel(
    peers_ptr,
    epoch_ptr,
    fault_ptr,
    record_ptr,
    flags_offset,
    abort_offset,
    rank,
    ranks,
    limit,
    PHASE: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program. Kernels before it on the stream have done their stores; kernels after it see those of all ranks. SIGNAL begins the
    next epoch.

    Example: W=2, epoch 6: rank 0 writes 7 into word 0 of both ranks' flags, and waits until both words of its own are at least 7.
    """
    let_next_begin(EARLY)
    epoch = tl.load(epoch_ptr)
    if SIGNAL:
        epoch += 1
        signal_peers(peers_ptr, flags_offset, epoch, rank, ranks, LANES)
        # behind a barrier: every warp has read the old one
        tl.store(epoch_ptr, epoch)
    if WAIT:
        wait_for_peers(peers_ptr, flags_offset, abort_offset, fault_ptr, record_ptr, epoch, limit, rank, ranks, PHASE, LANES)


def signal_and_wait(
    peers: torch.Tensor,
    epoch: torch.Tensor,
    fault: torch.Tensor,
    record: torch.Tensor,
    flags_offset: int,
    abort_offset: int,
    rank: int,
    limit: int,
    phase: int,
    signal: bool = True,
    wait: bool = True,
) -> None:
    """phase: whose flags these are, one of `symmetric`'s. limit: of the wait, in units of 1024 ns."""
    ranks = peers.shape[0]
    signal_and_wait_kernel[(1,)](
        peers,
        epoch,
        fault,
        record,
        flags_offset,
        abort_offset,
        rank,
        ranks,
        limit,
        PHASE=phase,
        SIGNAL=signal,
        WAIT=wait,
        LANES=triton.next_power_of_2(ranks),
        EARLY=begins_early(peers.device),
        num_warps=1,
    )
