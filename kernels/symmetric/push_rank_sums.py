"""Sums the rows that this rank holds for a token by their weights, and stores the sum at the token's rank.

T tokens, K top-k, W ranks, L local experts, M rows of an expert's buffer, R rows of the rank's, if the layout is ragged, H hidden size.
Memory and flags: `symmetric.py`; headers: `push_tokens.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Shape
from moequant.kernels.library.common import first_row, locate_block, num_sms, row_blocks
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.symmetric import (
    NO_FAULT,
    OUTPUTS,
    Headers,
    Peers,
    first_flag,
    last_program,
    peer_block,
    signal_peers,
    wait_for_peers,
)
from moequant.sizes import ceil_div, next_power_of_2


class Sums(NamedTuple):
    """The (W, max_tokens, H) bfloat16 buffer of sums in each rank's block, `offset` bytes from its beginning."""

    offset: int
    max_tokens: int


class Tile(NamedTuple):
    """columns: of a program's tile. experts, ranks (lanes): rounded up to powers of two."""

    columns: int
    experts: int
    lanes: int


@launchable
@triton.jit(do_not_specialize=["peers"])
def push_rank_sums_kernel(
    y_ptr,
    headers,
    counted,
    peers,
    sums,
    shape,
    K: tl.constexpr,
    WAIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles of one valid row and BLOCK columns are dealt to the programs in turn; only rows that lead have a sum. The last program
    begins the next epoch, tells all ranks, and, with WAIT, waits for them. The launch forbids fused multiply-add. counted: num_tokens
    and expert_start.

    Example: K=3, rank 1, row 4 is the first copy of token 6 of rank 0, its header says rows [4, -1, 9]:
    acc = (0 + w[0] * y[4]) + w[2] * y[9] goes, rounded to bfloat16, to row 1 * max_tokens + 6 of rank 0's buffer.
    """
    BLOCK: tl.constexpr = TILE.columns
    num_tokens_ptr, expert_start_ptr = counted
    rank, columns = peers.rank, shape.columns
    counts, ends = row_blocks(num_tokens_ptr, shape.experts, shape.rows, 1, TILE.experts, True, expert_start_ptr)
    column_blocks = tl.cdiv(columns, BLOCK)
    rows_here = shape.experts * shape.rows if expert_start_ptr is None else shape.rows
    # after a fault the headers may be anything
    tiles = tl.where(tl.load(peers.fault) == NO_FAULT, tl.max(ends, axis=0) * column_blocks, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, row, _ = locate_block(tile // column_blocks, counts, ends, 1, TILE.experts)
        flat = first_row(expert_start_ptr, expert, shape.rows) + row
        header = headers.pointer + flat.to(tl.int64) * headers.words + headers.scale_words
        entry = tl.load(header)
        token = entry // K
        source = tl.load(header + 1)
        is_first = tl.load(header + 2) == flat
        # nothing that came from another rank becomes an address unchecked
        if is_first & (source >= 0) & (source < peers.ranks) & (entry >= 0) & (token < sums.max_tokens):
            column = tile % column_blocks * BLOCK + tl.arange(0, BLOCK)
            inside = column < columns
            acc = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(K):
                other = tl.load(header + 4 + k)
                weight = tl.load(header + (4 + (K + 3) // 4 * 4) + k).to(tl.float32, bitcast=True)
                present = (other >= 0) & (other < rows_here)
                y = tl.load(y_ptr + other.to(tl.int64) * columns + column, mask=present & inside, other=0.0)
                acc = tl.where(present, acc + weight * y.to(tl.float32), acc)
            out = peer_block(peers, source, sums.offset, tl.bfloat16)
            tl.store(out + (rank * sums.max_tokens + token).to(tl.int64) * columns + column, acc.to(tl.bfloat16), mask=inside)
    if last_program(peers.arrivals):
        epoch = tl.load(peers.epoch) + 1
        signal_peers(peers, first_flag(epoch, OUTPUTS), TILE.lanes)
        # behind a barrier: every warp has read the old one
        tl.store(peers.epoch, epoch)
        if WAIT:
            wait_for_peers(peers, epoch, 0, OUTPUTS, TILE.lanes)


def push_rank_sums(
    y: torch.Tensor,
    headers: Headers,
    num_tokens: torch.Tensor,
    expert_start: torch.Tensor | None,
    peers: Peers,
    sums: Sums,
    top_k: int,
    wait: bool,
) -> None:
    """y: (L, M, H) contiguous, or (R, H) with expert_start. num_tokens, expert_start: (L,) int32. peers: with the flags of outputs. wait:
    for all ranks' sums.

    Stores each sum as a row of H bfloat16 numbers in `sums` of the token's rank, in this rank's part of it.
    """
    shape = Shape(num_tokens.shape[0], *y.shape[-2:])
    tile = Tile(
        min(1024, next_power_of_2(shape.columns)),
        experts=next_power_of_2(shape.experts),
        lanes=next_power_of_2(peers.ranks),
    )
    worst = y.shape[:-1].numel() * ceil_div(shape.columns, tile.columns)
    push_rank_sums_kernel[(min(worst, 16 * num_sms(y.device)),)](
        y,
        headers,
        (num_tokens, expert_start),
        peers,
        sums,
        shape,
        K=top_k,
        WAIT=wait,
        TILE=tile,
        num_warps=4,
        # the product is rounded before the addition
        enable_fp_fusion=False,
    )
