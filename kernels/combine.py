"""The weighted sum of each token's expert rows: of all of them, or of those that one rank has.

T tokens, K top-k, R rows in all, H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    y_ptr,
    rows_ptr,
    weights_ptr,
    out_ptr,
    columns,
    out_stride_t,
    SKIPS: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, b) sums columns b * BLOCK.. of token t over k in order. The launch forbids fused multiply-add: the product is rounded
    before the addition. SKIPS: tokens without any row are not written.

    Example: K=3, rows[t] [7, -1, 2]: acc = (0 + weights[t, 0] * y[7]) + weights[t, 2] * y[2].
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    rows = tl.load(rows_ptr + token * K + lane, mask=lane < K, other=-1)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + token * K + lane, mask=lane < K, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.sum(tl.where(lane == k, rows, 0), axis=0)
        present = row >= 0
        y = tl.load(y_ptr + row.to(tl.int64) * columns + column, mask=present & (column < columns), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y = tl.sum(tl.where(lane == k, weights, 0.0), axis=0) * y
        acc = tl.where(present, acc + y, acc)
    written = column < columns
    if SKIPS:
        written = written & (tl.max(rows, axis=0) >= 0)
    tl.store(out_ptr + token * out_stride_t + column, acc.to(out_ptr.dtype.element_ty), mask=written)


def combine(expert_output: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor | None, out: torch.Tensor) -> None:
    """As `moequant.reference.combine`. expert_output (R, H), rows and topk_weights (T, K) contiguous; out (T, H) with contiguous rows."""
    launch(expert_output, rows, topk_weights, out, skips=False)


def presum(expert_output: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
    """As `moequant.reference.presum`. Tensors as for `combine`."""
    launch(expert_output, rows, topk_weights, out, skips=True)


def launch(
    expert_output: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor | None, out: torch.Tensor, skips: bool
) -> None:
    tokens, columns = out.shape
    if tokens == 0:
        return
    top_k = rows.shape[1]
    block = min(1024, triton.next_power_of_2(columns))
    combine_kernel[(tokens, triton.cdiv(columns, block))](
        expert_output,
        rows,
        topk_weights,
        out,
        columns,
        out.stride(0),
        SKIPS=skips,
        K=top_k,
        LANES=triton.next_power_of_2(top_k),
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
