"""The weighted sum of each token's expert rows: of all of them, or of those that one rank has.

T tokens, K top-k, R rows in all, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import num_sms, widened
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import may_use_pdl, pdl_option, wait_for_previous
from moequant.kernels.library.symmetric import NO_FAULT
from moequant.sizes import ceil_div, next_power_of_2


class Remote(NamedTuple):
    """Rows that lie with other ranks: row i is row i % rows_of_rank of rank i // rows_of_rank.

    pointers: (W,) int64, where each rank's block of memory begins (`symmetric.py`); its rows begin `offset` bytes further on.
    """

    pointers: torch.Tensor
    offset: int
    rows_of_rank: int
    ranks: int


class Tile(NamedTuple):
    """How a launch is compiled.

    columns: of a program. lanes, ranks: top-k and ranks, rounded up to powers of two. pdl: the launch before may still run.
    skips: tokens without any row are not written. in_order: the row of entry (t, k) is t * K + k, if rows[t, k] is not negative.
    """

    columns: int
    top_k: int
    lanes: int
    ranks: int
    pdl: bool
    skips: bool
    in_order: bool


@launchable
@triton.jit
def combine_kernel(
    y_ptr,
    rows_ptr,
    weights_ptr,
    out_ptr,
    remote,
    fault_ptr,
    size,
    TILE: tl.constexpr,
):
    """Program (t, b) sums columns b * BLOCK.. of token t over k in order. The launch forbids fused multiply-add: the product is rounded
    before the addition.

    size: columns, and out's elements from one token to the next. With remote the rows are other ranks', and y_ptr tells their type
    alone. With fault_ptr, every sum is NaN after a fault.

    Example: K=3, rows[t] [7, -1, 2]: acc = (0 + weights[t, 0] * y[7]) + weights[t, 2] * y[2]. With rows_of_rank=4, y[7] is row 3 of
    rank 1.
    """
    K: tl.constexpr = TILE.top_k
    BLOCK: tl.constexpr = TILE.columns
    columns, out_stride = size
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, TILE.lanes)
    rows = tl.load(rows_ptr + token * K + lane, mask=lane < K, other=-1)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + token * K + lane, mask=lane < K, other=0.0).to(tl.float32)
    if TILE.in_order:
        rows = tl.where(rows >= 0, tl.program_id(0) * K + lane, -1)
    if remote is not None:
        # the table is loaded while the rows are, not after them
        peer = tl.arange(0, TILE.ranks)
        table = tl.load(remote.pointers + peer, mask=peer < remote.ranks, other=0) + remote.offset
        ranks = tl.maximum(rows, 0) // remote.rows_of_rank
        blocks = tl.sum(tl.where(ranks[:, None] == peer[None, :], table[None, :], 0), axis=1)
        rows = tl.where(rows >= 0, rows - ranks * remote.rows_of_rank, -1)
    # the rows are those of others, who may still be writing them; what says where they lie is older
    wait_for_previous(TILE.pdl)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.sum(tl.where(lane == k, rows, 0), axis=0)
        present = row >= 0
        first = y_ptr
        if remote is not None:
            block = tl.sum(tl.where(lane == k, blocks, 0), axis=0)
            # which the compiler can't know of an address from a table
            first = tl.multiple_of(block.to(tl.pointer_type(y_ptr.dtype.element_ty)), 16)
        y = tl.load(first + row.to(tl.int64) * columns + column, mask=present & (column < columns), other=0.0)
        y = widened(y, out_ptr.dtype.element_ty)
        if weights_ptr is not None:
            y = tl.sum(tl.where(lane == k, weights, 0.0), axis=0) * y
        acc = tl.where(present, acc + y, acc)
    if fault_ptr is not None:
        acc = tl.where(tl.load(fault_ptr) == NO_FAULT, acc, float("nan"))
    written = column < columns
    if TILE.skips:
        written = written & (tl.max(rows, axis=0) >= 0)
    tl.store(out_ptr + token * out_stride + column, acc.to(out_ptr.dtype.element_ty), mask=written)


def combine(expert_output: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor | None, out: torch.Tensor) -> None:
    """As `moequant.reference.combine`. expert_output (R, H), rows and topk_weights (T, K) contiguous; out (T, H) with contiguous rows."""
    launch_combine(expert_output, rows, topk_weights, out)


def presum(expert_output: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
    """As `moequant.reference.presum`. Tensors as for `combine`."""
    launch_combine(expert_output, rows, topk_weights, out, skips=True)


def combine_shared(
    expert_output: torch.Tensor,
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    out: torch.Tensor,
    fault: torch.Tensor,
    *,
    in_order: bool = False,
    remote: Remote | None = None,
) -> None:
    """`combine` of rows that other ranks stored, or that lie with them; out is NaN after a fault.

    fault: (1,) int32, what the last wait left (`symmetric.py`).
    in_order: the row of entry (t, k) is t * K + k, if rows[t, k] is not negative.
    remote: where the rows lie. Of expert_output only the type counts then.
    """
    launch_combine(expert_output, rows, topk_weights, out, fault=fault, in_order=in_order, remote=remote)


# Registers of a thread where a launch begins early.
REGISTERS = 32


def program_of(tokens: int, columns: int, waits: bool, device: torch.device) -> tuple[int, int, bool]:
    """A program's columns and warps, and whether the launch begins early. waits: the launch before may wait for other ranks."""
    most = next_power_of_2(columns)
    for block, warps in ((1024, 8), (2048, 16)):
        if waits and may_use_pdl(device, tokens * ceil_div(columns, block), warps, REGISTERS):
            return min(block, most), warps, True
    block = min(1024, most)
    # few programs get more warps, which load less each
    return block, 8 if tokens * ceil_div(columns, block) <= 4 * num_sms(device) else 4, False


def launch_combine(
    expert_output: torch.Tensor,
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    out: torch.Tensor,
    *,
    skips: bool = False,
    in_order: bool = False,
    fault: torch.Tensor | None = None,
    remote: Remote | None = None,
) -> None:
    tokens, columns = out.shape
    if tokens == 0:
        return
    top_k = rows.shape[1]
    block, warps, pdl = program_of(tokens, columns, fault is not None, out.device)
    combine_kernel[(tokens, ceil_div(columns, block))](
        expert_output,
        rows,
        topk_weights,
        out,
        remote,
        fault,
        size=(columns, out.stride(0)),
        TILE=Tile(
            columns=block,
            top_k=top_k,
            lanes=next_power_of_2(top_k),
            ranks=1 if remote is None else next_power_of_2(remote.ranks),
            pdl=pdl,
            skips=skips,
            in_order=in_order,
        ),
        num_warps=warps,
        enable_fp_fusion=False,
        **pdl_option(pdl, REGISTERS),
    )
