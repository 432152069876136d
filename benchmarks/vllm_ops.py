"""Stand-ins in Triton for what vLLM's Triton experts call of its compiled extensions, which can't be carried: for bench_vllm.py alone.

T tokens, K top-k, E experts, N routed rows, H columns.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# said beside the results
REPLACED = (
    "vLLM's compiled moe_align_block_size (here three launches), silu_and_mul_per_block_quant and moe_sum are Triton kernels of this "
    "benchmark, and per_token_group_fp8_quant is vLLM's own Triton fallback; eager, all are launched by Python, which takes longer"
)


@triton.jit
def count_rows_kernel(ids, expert_map, ends, cursors, total, rows, E: tl.constexpr, ALIGN: tl.constexpr, MAPPED: tl.constexpr):
    """Where each expert's rows begin and end, in multiples of ALIGN. One program: counts (5, 0, 1) and ALIGN 4 give ends (8, 8, 12) and
    cursors (0, 8, 8). E: a power of two."""
    counts = tl.zeros((E,), tl.int32)
    for start in range(0, rows, 1024):
        offsets = start + tl.arange(0, 1024)
        expert = tl.load(ids + offsets, mask=offsets < rows, other=-1)
        if MAPPED:
            expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
        counts += tl.histogram(tl.maximum(expert, 0), E, mask=expert >= 0)
    counts = (counts + ALIGN - 1) // ALIGN * ALIGN
    sums = tl.cumsum(counts, 0)
    tl.store(ends + tl.arange(0, E), sums)
    tl.store(cursors + tl.arange(0, E), sums - counts)
    tl.store(total, tl.sum(counts, 0))


@triton.jit
def place_rows_kernel(
    ids, expert_map, ends, cursors, sorted_ids, expert_ids, rows, blocks, E: tl.constexpr, ALIGN: tl.constexpr, MAPPED: tl.constexpr
):
    """Gives rows their places, in any order within an expert, and blocks their experts."""
    offsets = tl.program_id(0) * 128 + tl.arange(0, 128)
    expert = tl.load(ids + offsets, mask=offsets < rows, other=-1)
    if MAPPED:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
    place = tl.atomic_add(cursors + tl.maximum(expert, 0), 1, mask=expert >= 0)
    tl.store(sorted_ids + place, offsets, mask=expert >= 0)
    begins = tl.program_id(0) * 32 + tl.arange(0, 32)
    before = tl.load(ends + tl.arange(0, E))[None, :] <= (begins * ALIGN)[:, None]
    tl.store(expert_ids + begins, tl.minimum(tl.sum(before.to(tl.int32), 1), E - 1), mask=begins < blocks)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    total: Tensor,
    expert_map: Tensor | None,
    *_: Any,
) -> None:
    rows, experts, blocks = topk_ids.numel(), 1 << (num_experts - 1).bit_length(), expert_ids.numel()
    ends, cursors = torch.empty((2, experts), dtype=torch.int32, device=topk_ids.device)
    sorted_ids.fill_(rows)
    mapped = topk_ids if expert_map is None else expert_map, ends, cursors
    options = {"E": experts, "ALIGN": block, "MAPPED": expert_map is not None}
    count_rows_kernel[(1,)](topk_ids, *mapped, total, rows, **options)
    grid = max(triton.cdiv(rows, 128), triton.cdiv(blocks, 32))
    place_rows_kernel[(grid,)](topk_ids, *mapped, sorted_ids, expert_ids, rows, blocks, **options)


@triton.jit
def silu_and_mul_quantize_kernel(both, values, scales, columns, GROUPS: tl.constexpr):
    """A row's columns in groups of 128, GROUPS of them a program. columns: a multiple of 128."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    offsets = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    gate = tl.load(both + row * 2 * columns + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * columns + columns + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    inner = gate / (1 + tl.exp(-gate)) * up
    scale = tl.maximum(tl.max(tl.abs(inner), 1), 1e-10) / 448
    tl.store(values + row * columns + offsets, (inner / scale[:, None]).to(values.dtype.element_ty), mask=offsets < columns)
    tl.store(scales + row * (columns // 128) + group, scale, mask=group < columns // 128)


def silu_and_mul_per_block_quant(values: Tensor, both: Tensor, scales: Tensor, group: int, *_: Any) -> None:
    assert group == 128 and scales.is_contiguous()
    rows, columns = values.shape
    groups: Any = 8
    silu_and_mul_quantize_kernel[(rows, triton.cdiv(columns, 1024))](both, values, scales, columns, GROUPS=groups)


@triton.jit
def moe_sum_kernel(rows, out, ids, expert_map, columns, K: tl.constexpr, MAPPED: tl.constexpr, BLOCK: tl.constexpr):
    token, offsets = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        wanted = offsets < columns
        if MAPPED:
            expert = tl.load(ids + token * K + k)
            wanted &= tl.load(expert_map + tl.maximum(expert, 0)) >= 0
        total += tl.load(rows + (token * K + k) * columns + offsets, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + token * columns + offsets, total.to(out.dtype.element_ty), mask=offsets < columns)


def moe_sum(rows: Tensor, out: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    tokens, k, columns = rows.shape
    mapped, of_rank = (rows, rows) if topk_ids is None or expert_map is None else (topk_ids, expert_map)
    options = {"K": k, "MAPPED": expert_map is not None, "BLOCK": 1024}
    moe_sum_kernel[(tokens, triton.cdiv(columns, 1024))](rows, out, mapped, of_rank, columns, **options)


def per_token_group_fp8_quant(
    x: Tensor, values: Tensor, scales: Tensor, group: int, eps: float, low: float, high: float, *_: Any
) -> None:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import _per_token_group_quant_fp8

    sizes = {"fp8_min": low, "fp8_max": high, "use_ue8m0": False, "BLOCK": triton.next_power_of_2(group)}
    grid = (x.numel() // group,)
    _per_token_group_quant_fp8[grid](x, values, scales, group, x.shape[1], x.stride(0), eps, **sizes, num_warps=1, num_stages=1)


LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in ("_C", "_moe_C")}
OPERATIONS = {
    "_C::silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub, bool "
    "is_scale_transposed) -> ()": silu_and_mul_per_block_quant,
    "_C::per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float "
    "fp8_max, bool scale_ue8m0, bool column_major, bool tma_aligned) -> ()": per_token_group_fp8_quant,
    "_moe_C::moe_sum(Tensor input, Tensor! output, Tensor? topk_ids, Tensor? expert_map) -> ()": moe_sum,
    "_moe_C::moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, "
    "Tensor! num_tokens_post_pad, Tensor? expert_map, Tensor? scatter_idx) -> ()": moe_align_block_size,
}


# what vLLM asks when it is imported: whether its GEMMs of other kinds are there
QUESTIONS = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported")
OPERATIONS |= {f"_C::{name}(int capability) -> bool": lambda capability: False for name in QUESTIONS}


def install() -> None:
    """Makes vLLM importable where it can't load its extensions. Before it is imported."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn"):
        module = sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
        # attention's functions, which no experts call
        module.__getattr__ = lambda _: None  # type: ignore[method-assign]
    for schema, function in OPERATIONS.items():
        library, _, rest = schema.partition("::")
        LIBRARIES[library].define(rest)
        LIBRARIES[library].impl(rest.partition("(")[0], function, "CompositeExplicitAutograd")
