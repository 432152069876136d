"""Calls of products that the tests of several kernels make. Letters as in `compile_case.py`."""

from __future__ import annotations

import torch

from compile_case import BF16, INT8, PLAIN, counted, empty, quantized, ragged
from moequant import ops, quantize_expert_batch, quantize_weight
from moequant.batch import ceil_div
from operation_case import COUNTS, quantize_outputs


def call_grouped_gemm(
    dtype: torch.dtype,
    expected_rows: int = 128,
    out_dtype: torch.dtype = BF16,
    columns: int = 4096,
    depth: int = 7168,
    experts: int = 4,
    push: bool = False,
    starts: bool = False,
) -> None:
    """starts: of ragged rows."""
    a, a_scales = (ragged if starts else quantized)(experts, 1024, depth, dtype)
    b = empty(experts, columns, depth, dtype=dtype)
    b_scales = None if dtype in PLAIN else empty(experts, ceil_div(columns, 128), ceil_div(depth, 128), dtype=torch.float32)
    operands, counts = (a, a_scales, b, b_scales), (counted(b), counted(b) if starts else None)
    if push:
        ops.grouped_gemm_push(*operands, *counts, empty(*a.shape[:-1], dtype=torch.int64), expected_rows, None)
        return
    out = empty(*a.shape[:-1], columns, dtype=out_dtype)
    ops.grouped_gemm_blockscale(*operands, *counts, out, expected_rows=expected_rows)


def call_int8_addmm(
    out_dtype: torch.dtype = torch.float16,
    bias: bool = True,
    rows: int = 1024,
    columns: int = 4096,
    depth: int = 7168,
    out_block_size: int = 128,
) -> None:
    a, b = empty(rows, depth, dtype=INT8), empty(columns, depth, dtype=INT8)
    groups = ceil_div(depth, 128)
    scales = empty(rows, groups, dtype=torch.float32), empty(ceil_div(columns, 128), groups, dtype=torch.float32)
    out_scales = empty(rows, ceil_div(columns, out_block_size), dtype=torch.float32) if out_dtype == INT8 else None
    added, out = empty(columns) if bias else None, empty(rows, columns, dtype=out_dtype)
    ops.int8_addmm(a, scales[0], b, scales[1], added, out, out_scales, out_block_size)


def gemm_arguments(quantized: bool) -> tuple:
    a, b, out = torch.randn(2, 4, 140).bfloat16(), torch.randn(2, 6, 140).bfloat16(), torch.zeros(2, 4, 6)
    if not quantized:
        return a, None, b, None, None, None, out, 1, 7
    qa, qb = quantize_expert_batch(a, dtype=torch.int8), quantize_weight(b, dtype=torch.int8, segments=2)
    return qa.values, qa.scales, qb.values, qb.scales, COUNTS, None, out, 2, None


def gemm1_arguments(dtype: torch.dtype) -> tuple:
    a, w13 = torch.randn(2, 4, 140).bfloat16(), torch.randn(2, 2 * 140, 140).bfloat16()
    qa, qw = quantize_expert_batch(a, dtype=dtype), quantize_weight(w13, dtype=dtype, segments=2)
    return qa.values, qa.scales, qw.values, qw.scales, COUNTS, None, *quantize_outputs(dtype), "ue8m0", 2
