"""Sums the rows that this rank holds for a token by their weights, and stores the sum at the token's rank.

T tokens, K top-k, W ranks, L local experts, M rows of an expert's buffer, H hidden size. Memory and flags: `symmetric.py`; notes:
`push_tokens.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import locate_block, num_sms, row_blocks
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.symmetric import NO_FAULT, OUTPUTS, first_flag, last_program, peer_block, signal_peers, wait_for_peers


@launchable
@triton.jit(do_not_specialize=["limit"])
def push_partial_sums_kernel(
    y_ptr,
    notes_ptr,
    num_tokens_ptr,
    peers_ptr,
    epoch_ptr,
    ticket_ptr,
    fault_ptr,
    record_ptr,
    returns_offset,
    flags_offset,
    abort_offset,
    rank,
    ranks,
    max_tokens,
    local_experts,
    capacity,
    columns,
    limit,
    NOTE: tl.constexpr,
    SCALES: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Tiles of one valid row and BLOCK columns are dealt to the programs in turn; only rows that lead have a sum. The last program
    begins the next epoch, tells all ranks, and, with WAIT, waits for them. The launch forbids fused multiply-add.

    Example: K=3, rank 1, row 4 leads token 6 of rank 0, its note says rows [4, -1, 9]: acc = (0 + w[0] * y[4]) + w[2] * y[9] goes,
    rounded to bfloat16, to row 1 * max_tokens + 6 of rank 0's buffer.
    """
    counts, ends = row_blocks(num_tokens_ptr, local_experts, capacity, 1, EXPERTS, True)
    column_blocks = tl.cdiv(columns, BLOCK)
    rows_here = local_experts * capacity
    # after a fault the notes may be anything
    tiles = tl.where(tl.load(fault_ptr) == NO_FAULT, tl.max(ends, axis=0) * column_blocks, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, row, _ = locate_block(tile // column_blocks, counts, ends, 1, EXPERTS)
        flat = expert * capacity + row
        note = notes_ptr + flat.to(tl.int64) * NOTE + SCALES
        entry = tl.load(note)
        token = entry // K
        source = tl.load(note + 1)
        leads = tl.load(note + 2) == flat
        # nothing that came from another rank becomes an address unchecked
        if leads & (source >= 0) & (source < ranks) & (entry >= 0) & (token < max_tokens):
            column = tile % column_blocks * BLOCK + tl.arange(0, BLOCK)
            inside = column < columns
            acc = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(K):
                other = tl.load(note + 4 + k)
                weight = tl.load(note + (4 + (K + 3) // 4 * 4) + k).to(tl.float32, bitcast=True)
                present = (other >= 0) & (other < rows_here)
                y = tl.load(y_ptr + other.to(tl.int64) * columns + column, mask=present & inside, other=0.0)
                acc = tl.where(present, acc + weight * y.to(tl.float32), acc)
            out = peer_block(peers_ptr, source, returns_offset, tl.bfloat16)
            tl.store(out + (rank * max_tokens + token).to(tl.int64) * columns + column, acc.to(tl.bfloat16), mask=inside)
    if last_program(ticket_ptr):
        epoch = tl.load(epoch_ptr) + 1
        signal_peers(peers_ptr, flags_offset, first_flag(epoch, OUTPUTS), rank, ranks, LANES)
        # behind a barrier: every warp has read the old one
        tl.store(epoch_ptr, epoch)
        if WAIT:
            wait_for_peers(
                peers_ptr, flags_offset, abort_offset, fault_ptr, record_ptr, epoch, 0, limit, rank, ranks, OUTPUTS, LANES
            )


def push_partial_sums(
    y: torch.Tensor,
    notes: torch.Tensor,
    num_tokens: torch.Tensor,
    peers: torch.Tensor,
    epoch: torch.Tensor,
    ticket: torch.Tensor,
    fault: torch.Tensor,
    record: torch.Tensor,
    returns_offset: int,
    flags_offset: int,
    abort_offset: int,
    rank: int,
    max_tokens: int,
    top_k: int,
    scale_words: int,
    wait: bool,
    limit: int,
) -> None:
    """y: (L, M, H) contiguous. notes: (L, M, words) int32. num_tokens: (L,) int32. scale_words: of a note, before the entry.

    Stores each sum as a row of H bfloat16 numbers in the (W, max_tokens, H) buffer at returns_offset of the token's rank, in this rank's
    part of it.
    """
    local_experts, capacity, columns = y.shape
    ranks = peers.shape[0]
    block = min(1024, triton.next_power_of_2(columns))
    worst = local_experts * capacity * triton.cdiv(columns, block)
    push_partial_sums_kernel[(min(worst, 16 * num_sms(y.device)),)](
        y,
        notes,
        num_tokens,
        peers,
        epoch,
        ticket,
        fault,
        record,
        returns_offset,
        flags_offset,
        abort_offset,
        rank,
        ranks,
        max_tokens,
        local_experts,
        capacity,
        columns,
        limit,
        NOTE=notes.shape[2],
        SCALES=scale_words,
        K=top_k,
        LANES=triton.next_power_of_2(ranks),
        WAIT=wait,
        BLOCK=block,
        EXPERTS=triton.next_power_of_2(local_experts),
        num_warps=4,
        # the product is rounded before the addition
        enable_fp_fusion=False,
    )
