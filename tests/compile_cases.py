"""What is compiled ahead of time: calls of each operation, with the arguments that decide what a kernel looks like.

Operations are called as the package calls them, on CPU tensors; `compile_kernels.py` makes their launches compile and do nothing more.

Letters: T tokens, K top-k, E experts in all, W ranks, L local experts, M rows of an expert's buffer, C of them per source rank,
H hidden size, I intermediate size, G = ceil(H / 128) groups, N and K_dim of a GEMM.
"""

from __future__ import annotations

import torch

from compile_case import BF16, E4M3, E5M2, FNUZ, INT8, cases, counted, each_format, empty, quantized
from compile_peers import combine_shared, land_rows, peers_of, push_tokens
from moequant import ops
from moequant.batch import ceil_div, empty_scales
from moequant.kernels.library.symmetric import notes_of
from moequant.kernels.symmetric import exchange_counts as exchange_counts_module, signal_and_wait as signal_and_wait_module


def quantize(dtype: torch.dtype, columns: int = 7168, recipe: str = "default", rows: int = 256) -> None:
    x = empty(4, rows, columns)
    values, scales = quantized(4, rows, columns, dtype)
    assert scales is not None
    ops.quantize_expert_batch(x, counted(x), values, scales, recipe=recipe)


def quantize_packed(dtype: torch.dtype) -> None:
    outputs = empty(1, 256, 7168, dtype=dtype), empty_scales(1, 256, 56, "ue8m0_packed", "cpu")
    ops.quantize_expert_batch(empty(1, 256, 7168), None, *outputs, recipe="ue8m0")


def quantize_weight(dtype: torch.dtype, recipe: str = "default", columns: int = 7168, segments: int = 1, block: int = 128) -> None:
    shape = 4, segments * ceil_div(4096 // segments, block), ceil_div(columns, block)
    outputs = empty(4, 4096, columns, dtype=dtype), empty(*shape, dtype=torch.float32)
    ops.quantize_weight(empty(4, 4096, columns), *outputs, recipe, segments, block)


def fused_rms(dtype: torch.dtype, columns: int = 7168, residual: bool = False, gate: bool = False, rows: int = 256) -> None:
    x, scales = empty(rows, columns), empty(rows, ceil_div(columns, 128), dtype=torch.float32)
    optional = x if residual else None, x if gate else None, x if residual else None
    ops.fused_rms_quantize(x, empty(columns), *optional, empty(rows, columns, dtype=dtype), scales)


def silu_mul_quantize(dtype: torch.dtype, columns: int = 2048, recipe: str = "default") -> None:
    x = empty(4, 256, 2 * columns)
    values, scales = quantized(4, 256, columns, dtype)
    assert scales is not None
    ops.silu_mul_quantize(x, counted(x), values, scales, recipe=recipe)


def grouped_gemm(
    dtype: torch.dtype,
    expected_rows: int = 128,
    out_dtype: torch.dtype = BF16,
    columns: int = 4096,
    depth: int = 7168,
    experts: int = 4,
    push: bool = False,
) -> None:
    a, a_scales = quantized(experts, 1024, depth, dtype)
    b = empty(experts, columns, depth, dtype=dtype)
    b_scales = None if dtype == BF16 else empty(experts, ceil_div(columns, 128), ceil_div(depth, 128), dtype=torch.float32)
    if push:
        destinations = empty(experts, 1024, dtype=torch.int64)
        ops.grouped_gemm_push(a, a_scales, b, b_scales, counted(a), destinations, expected_rows, None)
        return
    out = empty(experts, 1024, columns, dtype=out_dtype)
    ops.grouped_gemm_blockscale(a, a_scales, b, b_scales, counted(a), out, expected_rows=expected_rows)


def gemm1_swiglu(dtype: torch.dtype, columns: int, recipe: str = "default") -> None:
    a, a_scales = quantized(16, 256, 4096, dtype)
    values, scales = quantized(16, 256, columns, dtype)
    assert a_scales is not None and scales is not None
    w13, w13_scales = empty(16, 2 * columns, 4096, dtype=dtype), empty(16, columns // 64, 32, dtype=torch.float32)
    ops.gemm1_swiglu(a, a_scales, w13, w13_scales, counted(a), values, scales, recipe, 128)


def int8_addmm(
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


def fp8_gemm(dtype: torch.dtype, bias: bool = False) -> None:
    a, b = empty(1024, 7168, dtype=dtype), empty(4096, 7168, dtype=dtype)
    factors = empty(1024, dtype=torch.float32), empty(dtype=torch.float32).expand(4096)
    ops.fp8_gemm(a, factors[0], b, factors[1], empty(4096) if bias else None, empty(1024, 4096))


def int8_gelu(block_size: int = 128, columns: int = 4096, rows: int = 256) -> None:
    x, scales = empty(rows, columns, dtype=INT8), empty(rows, ceil_div(columns, block_size), dtype=torch.float32)
    ops.int8_gelu(x, scales, torch.empty_like(x), torch.empty_like(scales), block_size)


def quantize_tensor(dtype: torch.dtype, input_dtype: torch.dtype = BF16, computed: bool = True, count: int = 2**20) -> None:
    ops.quantize_fp8(empty(count, dtype=input_dtype), empty(count, dtype=dtype), empty(dtype=torch.float32), computed)


def dequantize_tensor(dtype: torch.dtype, output_dtype: torch.dtype = BF16) -> None:
    ops.dequantize_fp8(empty(2**20, dtype=dtype), empty(dtype=torch.float32), empty(2**20, dtype=output_dtype))


def dequantize_blocks(
    dtype: torch.dtype, output_dtype: torch.dtype = BF16, group: int = 128, weight: bool = False, columns: int = 7168
) -> None:
    rows = group if weight else 1
    values, scales = empty(4, 256, columns, dtype=dtype), empty(4, 256 // rows, ceil_div(columns, group), dtype=torch.float32)
    ops.dequantize_blocks(values, scales, empty(4, 256, columns, dtype=output_dtype), rows, group)


def route(ids: torch.dtype = torch.int64, capacity: int | None = None) -> None:
    topk_ids, slots = empty(128, 8, dtype=ids), empty(128, 8, dtype=torch.int32)
    counts, num_tokens = empty(256, dtype=torch.int32), empty(256, dtype=torch.int32)
    ops.route(topk_ids, slots, counts, capacity, num_tokens, empty(2, dtype=torch.int64))


def expert_offsets() -> None:
    counts, offsets = empty(8, 256, dtype=torch.int32), empty(8, 256, dtype=torch.int32)
    ops.expert_offsets(counts, 32, 1024, 128, offsets, empty(32, dtype=torch.int32), empty(3, dtype=torch.int64))


def count_strangers() -> None:
    ops.count_strangers(empty(8, 2, dtype=torch.int32), 3, empty(3, dtype=torch.int64))


def plan_sends() -> None:
    topk_ids, slots, rows = empty(128, 8, dtype=torch.int64), empty(128, 8, dtype=torch.int32), empty(128, 8, dtype=torch.int32)
    counts, offsets = empty(8, dtype=torch.int32), empty(256, dtype=torch.int32)
    ops.plan_sends(topk_ids, 32, empty(8, 128, dtype=torch.int32), counts)
    ops.plan_returns(topk_ids, slots, offsets, 1024, 32, counts, rows)


def scatter(dtype: torch.dtype, tokens: int = 128, quantized_before: bool = False) -> None:
    values, scales = quantized(32, 1024, 7168, dtype)
    x, x_scales = empty(tokens, 7168), None
    if quantized_before:
        x, x_scales = empty(tokens, 7168, dtype=dtype), empty(tokens, 56, dtype=torch.float32)
    topk_ids = empty(tokens, 8, dtype=torch.int64)
    slots, rows = empty(tokens, 8, dtype=torch.int32), empty(tokens, 8, dtype=torch.int32)
    offsets, sources = empty(256, dtype=torch.int32), empty(32, 1024, dtype=torch.int64)
    ops.scatter(x, topk_ids, slots, values, scales, x_scales, rows, sources, None, offsets, 1024)


def move_source_rows(dtype: torch.dtype, to_merged: bool = True) -> None:
    padded, (merged, merged_scales) = empty(8, 32, 128, 7168, dtype=dtype), quantized(32, 1024, 7168, dtype)
    offsets, counts = empty(8, 256, dtype=torch.int32)[:, 32:64], empty(8, 257, dtype=torch.int32)[:, 32:64]
    if not to_merged:
        ops.move_source_rows(padded, merged, offsets, counts, False)
        return
    padded_scales = None if merged_scales is None else empty(8, 32, 128, 56, dtype=torch.float32)
    sources, merged_sources = empty(8, 32, 128, dtype=torch.int32), empty(32, 1024, dtype=torch.int64)
    ops.move_source_rows(padded, merged, offsets, counts, True, padded_scales, merged_scales, sources, merged_sources)


def partials(listed: bool) -> None:
    ids, rows = empty(128, 8, dtype=torch.int64), empty(128, 8, dtype=torch.int32)
    starts = empty(8, dtype=torch.int32) if listed else None
    ops.plan_partials(ids, rows, 32, 128, empty(128, 8, dtype=torch.int32), starts)
    entries, offsets = empty(8, 3, 128, 8, dtype=torch.int32), empty(8, 256, dtype=torch.int32)
    shape = 8, 128, 8
    ops.locate_entries(entries, offsets, 32, 128, 1024, empty(*shape, dtype=torch.int32), empty(*shape, dtype=torch.float32))


def combine(weights: torch.dtype | None = torch.float32) -> None:
    rows, topk_weights = empty(128, 8, dtype=torch.int32), None if weights is None else empty(128, 8, dtype=weights)
    ops.combine(empty(32768, 7168), rows, topk_weights, empty(128, 7168))


def presum() -> None:
    rows, topk_weights = empty(128, 8, dtype=torch.int32), empty(128, 8, dtype=torch.float32)
    ops.presum(empty(32768, 7168), rows, topk_weights, empty(128, 7168))


def exchange_counts(experts: int = 256, ranks: int = 8) -> None:
    counts, num_tokens = empty(experts, dtype=torch.int32), empty(experts // ranks, dtype=torch.int32)
    calls, status = empty(1, dtype=torch.int32), empty(3, dtype=torch.int64)
    slot = exchange_counts_module.Counts(counts, counts, num_tokens, calls, status, 1024)
    exchange_counts_module.exchange_counts(slot, peers_of(ranks), 1024, 7)


def push_rows(remote: bool) -> None:
    from moequant.kernels.symmetric.push_rows import push_rows as kernel

    y, destinations = empty(32, 1024, 7168), empty(32, 1024, dtype=torch.int64)
    kernel(y, counted(y), None if remote else y, destinations if remote else None)


def push_partial_sums() -> None:
    from moequant.kernels.symmetric.push_partial_sums import Sums, push_partial_sums as kernel

    y, notes = empty(32, 1024, 7168), empty(32, 1024, 76, dtype=torch.int32)
    kernel(y, notes_of(notes, 56), counted(y), peers_of(), Sums(1024, 128), 8, True)


def signal_and_wait() -> None:
    signal_and_wait_module.signal_and_wait(peers_of(), empty(3, dtype=torch.int64), 2, way=2)


# What is compiled, by operation. A new kernel needs a function above that calls its operation, and an entry here.
CASES = {
    "quantize": [
        *cases(quantize, *each_format(E5M2), *each_format(recipe="deepgemm"), *each_format(recipe="ue8m0")),
        # rounded by hand, so that any GPU can do it
        *cases(quantize, {"dtype": FNUZ}, anywhere=True),
        # few numbers: small tiles
        *cases(quantize, *each_format(columns=1024, rows=1)),
        *cases(quantize_packed, {"dtype": E4M3}),
        # H = 2890: few rows begin on a 16-byte boundary
        *cases(quantize, {"dtype": INT8, "columns": 2890}, wide=False, may_spill=True),
    ],
    "silu_mul_quantize": [
        *cases(silu_mul_quantize, *each_format(), *each_format(recipe="ue8m0")),
        *cases(silu_mul_quantize, {"dtype": FNUZ}, anywhere=True),
        *cases(silu_mul_quantize, {"dtype": INT8, "columns": 1445}, {"dtype": INT8, "columns": 1}, wide=False, may_spill=True),
    ],
    "grouped_gemm": [
        *cases(grouped_gemm, *(case for rows in (16, 1024) for case in each_format(BF16, expected_rows=rows))),
        *cases(grouped_gemm, *each_format(out_dtype=torch.float32)),
        # gpt-oss: a trailing half group
        *cases(grouped_gemm, *each_format(BF16, columns=2880, depth=2880)),
        *cases(grouped_gemm, *each_format(BF16, push=True)),
        # rows that TMA cannot read
        *cases(grouped_gemm, {"dtype": BF16, "depth": 2890}, wide=False, may_spill=True),
    ],
    # few tiles: several programs share one. On sm_80 int8 leaves no register for one scalar
    "sum_parts": [
        *cases(grouped_gemm, *({"dtype": E4M3, "experts": 1, "columns": 512, "push": push} for push in (False, True))),
        *cases(grouped_gemm, {"dtype": INT8, "experts": 1, "columns": 512}, may_spill=True),
    ],
    "grouped_gemm_hopper": [
        *cases(grouped_gemm, *({"dtype": E4M3, "expected_rows": rows, "experts": 16} for rows in (16, 1024)), hopper=True),
        *cases(grouped_gemm, {"dtype": E4M3, "out_dtype": torch.float32}, hopper=True),
        *cases(grouped_gemm, *({"dtype": INT8, "out_dtype": dtype} for dtype in (BF16, torch.float32)), hopper=True),
        *cases(int8_addmm, {"bias": False}, hopper=True),
        # one address of a tile is spilled, outside the loop over groups
        *cases(grouped_gemm, {"dtype": E4M3, "expected_rows": 1024, "experts": 16, "push": True}, hopper=True, may_spill=True),
        *cases(grouped_gemm, *({"dtype": E4M3, "columns": columns, "push": True} for columns in (1024, 2880)), hopper=True),
        # half a wide tile is left
        *cases(
            grouped_gemm,
            {"dtype": E4M3, "expected_rows": 1024, "experts": 16, "columns": 4224, "push": True},
            hopper=True,
            may_spill=True,
        ),
        # few columns: narrow tiles; gpt-oss: tails
        *cases(
            grouped_gemm,
            {"dtype": E4M3, "columns": 1024, "depth": 4096},
            {"dtype": E4M3, "columns": 2880, "depth": 2880},
            hopper=True,
        ),
    ],
    "gemm1_swiglu_hopper": cases(
        gemm1_swiglu, {"dtype": E4M3, "columns": 2048}, {"dtype": E4M3, "columns": 768, "recipe": "ue8m0"}, hopper=True
    ),
    "dense_gemm": [
        *cases(int8_addmm, {}, {"bias": False, "out_dtype": torch.float32}, {"out_dtype": INT8}),
        *cases(int8_addmm, {"out_dtype": INT8, "out_block_size": 32}, {"out_dtype": INT8, "columns": 2880, "depth": 2880}),
        *cases(fp8_gemm, {"dtype": E4M3}, {"dtype": FNUZ}, {"dtype": E4M3, "bias": True}),
        # one row: sizes and strides of 1 are constants
        *cases(int8_addmm, {"rows": 1, "depth": 128}, {"rows": 1, "out_dtype": INT8}, wide=False),
        # rows that TMA cannot read
        *cases(int8_addmm, {"depth": 2890}, wide=False, may_spill=True),
    ],
    "int8_gelu": [
        # a few rows: small tiles
        *cases(int8_gelu, {}, {"block_size": 32}, {"rows": 4, "columns": 2048}),
        *cases(int8_gelu, {"columns": 1445}, {"columns": 1, "rows": 1}, wide=False, may_spill=True),
    ],
    "quantize_tensor": [
        *cases(quantize_tensor, *({"dtype": dtype, "computed": False} for dtype in (E4M3, torch.uint8))),
        *cases(quantize_tensor, {"dtype": E4M3, "computed": False, "input_dtype": torch.float32}),
        # a maximum is one number
        *cases(quantize_tensor, {"dtype": E4M3}, {"dtype": torch.uint8}, wide=False),
        *cases(quantize_tensor, *({"dtype": dtype, "count": 7168} for dtype in (E4M3, torch.uint8))),
    ],
    "dequantize_tensor": cases(
        dequantize_tensor, {"dtype": E4M3}, {"dtype": torch.uint8}, {"dtype": E4M3, "output_dtype": torch.float32}
    ),
    "dequantize_blocks": [
        *cases(dequantize_blocks, {"dtype": INT8}, {"dtype": INT8, "weight": True}, {"dtype": E4M3, "group": 32}),
        *cases(dequantize_blocks, {"dtype": INT8, "output_dtype": torch.float32}),
        *cases(dequantize_blocks, *({"dtype": INT8, "columns": columns} for columns in (2890, 1)), wide=False),
    ],
    "quantize_weight": [
        *cases(quantize_weight, *each_format(E5M2), *each_format(recipe="ue8m0", segments=2), {"dtype": E4M3, "block": 32}),
        *cases(quantize_weight, {"dtype": FNUZ}, anywhere=True),
        *cases(quantize_weight, *({"dtype": INT8, "columns": columns} for columns in (2890, 1)), wide=False, may_spill=True),
    ],
    "fused_rms_quantize": [
        *cases(fused_rms, {"dtype": E4M3}, {"dtype": FNUZ}, {"dtype": E5M2, "columns": 1536, "residual": True}),
        *cases(fused_rms, *({"dtype": dtype, "residual": True, "gate": True} for dtype in (E4M3, FNUZ))),
        *cases(fused_rms, {"dtype": E4M3, "columns": 16384, "residual": True}),
        *cases(fused_rms, {"dtype": FNUZ}, anywhere=True),
        *cases(fused_rms, *({"dtype": E4M3, "columns": columns} for columns in (2890, 32768, 1)), wide=False, may_spill=True),
        *cases(fused_rms, {"dtype": E4M3, "rows": 1, "residual": True}),
    ],
    "route": cases(route, {}, {"ids": torch.int32}, {"capacity": 1024}, wide=False),
    "expert_offsets": cases(expert_offsets, {}, wide=False),
    "count_strangers": cases(count_strangers, {}, wide=False),
    "plan_sends": cases(plan_sends, {}, wide=False),
    "scatter": [
        *cases(scatter, *each_format(BF16)),
        # few tokens: each is cut into parts, of which a thread stores 8 bytes
        *cases(scatter, *each_format(BF16, tokens=4), wide=False),
        *cases(scatter, {"dtype": FNUZ}, anywhere=True),
        *cases(scatter, *each_format(quantized_before=True)),
    ],
    "move_source_rows": cases(move_source_rows, *each_format(BF16), {"dtype": BF16, "to_merged": False}, anywhere=True),
    "combine": [*cases(combine, {}, {"weights": BF16}, {"weights": None}), *cases(presum, {}), *cases(combine_shared, {})],
    "partials": cases(partials, {"listed": False}, {"listed": True}, wide=False),
    "exchange_counts": cases(exchange_counts, {}, wide=False, may_spill=True, nvidia=True),
    "push_tokens": [
        *cases(push_tokens, *each_format(BF16), nvidia=True),
        *cases(
            push_tokens, {"dtype": E4M3, "tokens": 1}, {"dtype": E4M3, "per_rank": True}, {"dtype": E4M3, "wave": 2}, nvidia=True
        ),
    ],
    "land_rows": cases(land_rows, {"dtype": INT8}, {"dtype": BF16}),
    "push_rows": cases(push_rows, {"remote": False}, {"remote": True}),
    "push_partial_sums": cases(push_partial_sums, {}, nvidia=True),
    "signal_and_wait": cases(signal_and_wait, {}, wide=False, nvidia=True),
}
