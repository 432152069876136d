"""A flag round of its own: for phases whose stores come from other kernels. W ranks. Memory and flags: `symmetric.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import launch_dependents, uses_pdl
from moequant.kernels.library.symmetric import NO_FAULT, Peers, first_flag, signal_peers, wait_for_peers
from moequant.sizes import next_power_of_2


@launchable
@triton.jit(do_not_specialize=["peers", "way"])
def signal_and_wait_kernel(
    peers,
    status_ptr,
    way,
    PHASE: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. Kernels before it on the stream have done their stores; kernels after it see those of all ranks. SIGNAL begins the
    next epoch.

    Example: W=2, phase OUTPUTS, epoch 6, way 2: rank 0 writes 7 * 4 + 2 = 30 into word 0 of both ranks' flags, and waits until both words
    of its own are at least 28. If rank 1's is 28, it does this in way 0, and status[2] grows by 1.
    """
    launch_dependents(PDL)
    epoch = tl.load(peers.epoch)
    if SIGNAL:
        epoch += 1
        signal_peers(peers, first_flag(epoch, PHASE) + way, LANES)
        # behind a barrier: every warp has read the old one
        tl.store(peers.epoch, epoch)
    if WAIT:
        fault, mismatched = wait_for_peers(peers, epoch, way, PHASE, LANES)
        if (fault == NO_FAULT) & (mismatched > 0):
            tl.atomic_add(status_ptr + 2, mismatched.to(tl.int64), sem="relaxed")


def signal_and_wait(peers: Peers, status: torch.Tensor, phase: int, signal: bool = True, wait: bool = True, way: int = 0) -> None:
    """peers: with the flags of the phase, one of `symmetric`'s. way: of outputs, below `WAYS`; the ranks that have another are added to
    status[2], (3,) int64."""
    signal_and_wait_kernel[(1,)](
        peers,
        status,
        way=way,
        PHASE=phase,
        SIGNAL=signal,
        WAIT=wait,
        LANES=next_power_of_2(peers.ranks),
        PDL=uses_pdl(peers.pointers.device),
        num_warps=1,
    )
