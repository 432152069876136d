"""Counts the ranks whose call is not this rank's. W ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import unlike
from moequant.kernels.library.launch import launchable
from moequant.sizes import next_power_of_2


@launchable
@triton.jit
def count_mismatched_kernel(words_ptr, status_ptr, rank, ranks, stride, LANES: tl.constexpr):
    """One program. A rank's words are the number of its call and what it is.

    Example: words [[5, 9], [4, 9]] at rank 0: rank 1 is at call 4, so status[2] grows by 1.
    """
    peer = tl.arange(0, LANES)
    present = peer < ranks
    numbers = tl.load(words_ptr + stride * peer, mask=present, other=0)
    calls = tl.load(words_ptr + stride * peer + 1, mask=present, other=0)
    mine = words_ptr + stride * rank
    other = (numbers != tl.load(mine)) | unlike(tl.load(mine + 1), calls)
    mismatched = tl.sum((present & other).to(tl.int64), axis=0)
    if mismatched > 0:
        tl.atomic_add(status_ptr + 2, mismatched, sem="relaxed")


def count_mismatched(words: torch.Tensor, rank: int, status: torch.Tensor) -> None:
    """As `moequant.reference.count_mismatched`. words: a rank's two side by side."""
    ranks = words.shape[0]
    count_mismatched_kernel[(1,)](words, status, rank, ranks, words.stride(0), LANES=next_power_of_2(ranks), num_warps=1)
