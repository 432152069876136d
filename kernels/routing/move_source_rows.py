"""Moves rows between buffers padded for each source rank and expert buffers with the sources' rows side by side.

W ranks, L local experts, C rows of an expert's buffer per source rank, M rows of an expert's buffer, H hidden size, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.launch import launchable


@launchable
@triton.jit
def move_source_rows_kernel(
    padded_ptr,
    merged_ptr,
    offsets_ptr,
    counts_ptr,
    padded_scales_ptr,
    merged_scales_ptr,
    padded_sources_ptr,
    merged_sources_ptr,
    experts,
    all_experts,
    first_expert,
    limit,
    capacity,
    columns,
    groups,
    p_stride_block,
    p_stride_row,
    p_stride_group,
    m_stride_l,
    m_stride_m,
    m_stride_g,
    sources_stride_block,
    counts_stride,
    TO_MERGED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Program (b, c) moves rows c * BLOCK_C.. of block b, which is (source rank, local expert) = (b // L, b % L).

    Example: W=2, L=1, C=2, M=4, counts [1, 2], offsets [0, 1]: block 1 has 2 rows, padded rows (1, 0, 0..1), merged rows (0, 1..2).
    """
    block = tl.program_id(0)
    source = block // experts
    expert = block % experts
    start = tl.load(offsets_ptr + source * all_experts + first_expert + expert)
    count = tl.load(counts_ptr + source * counts_stride + first_expert + expert)
    valid = tl.minimum(tl.minimum(count, limit), capacity - start)
    first = tl.program_id(1) * BLOCK_C
    if first < valid:
        c = first + tl.arange(0, BLOCK_C)
        inside = c < valid
        padded_row = block.to(tl.int64) * limit + c
        merged_row = expert.to(tl.int64) * capacity + start + c
        for h in range(0, columns, BLOCK_H):
            column = h + tl.arange(0, BLOCK_H)
            mask = inside[:, None] & (column < columns)[None, :]
            padded = padded_ptr + padded_row[:, None] * columns + column[None, :]
            merged = merged_ptr + merged_row[:, None] * columns + column[None, :]
            if TO_MERGED:
                tl.store(merged, tl.load(padded, mask=mask), mask=mask)
            else:
                tl.store(padded, tl.load(merged, mask=mask), mask=mask)
        if HAS_SCALES:
            # rows vary fastest: both sides keep the rows of a group side by side
            group = tl.arange(0, GROUPS)
            mask = (group < groups)[:, None] & inside[None, :]
            g = group.to(tl.int64)[:, None]
            at = block.to(tl.int64) * p_stride_block + g * p_stride_group + c[None, :] * p_stride_row
            to = expert.to(tl.int64) * m_stride_l + g * m_stride_g + (start + c)[None, :] * m_stride_m
            tl.store(merged_scales_ptr + to, tl.load(padded_scales_ptr + at, mask=mask), mask=mask)
        if HAS_SOURCES:
            entry = tl.load(padded_sources_ptr + block.to(tl.int64) * sources_stride_block + c, mask=inside).to(tl.int64)
            tl.store(merged_sources_ptr + merged_row, entry + (source.to(tl.int64) << 32), mask=inside)


def block_stride(x: torch.Tensor) -> int:
    """Elements from one (source rank, local expert) of x (W, L, ...) to the next. With L = 1, stride(1) may be anything."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def move_source_rows(
    padded: torch.Tensor,
    merged: torch.Tensor,
    offsets: torch.Tensor,
    counts: torch.Tensor,
    first_expert: int,
    to_merged: bool,
    padded_scales: torch.Tensor | None,
    merged_scales: torch.Tensor | None,
    padded_sources: torch.Tensor | None,
    merged_sources: torch.Tensor | None,
) -> None:
    """As `moequant.reference.move_source_rows`. padded and merged contiguous; (W, L) of the padded tensors can be joined into one
    dimension; the rows of padded_sources are contiguous."""
    ranks, experts, limit, columns = padded.shape
    capacity = merged.shape[1]
    if padded.numel() == 0:
        return
    block_c = min(16, triton.next_power_of_2(limit))
    groups = 0 if merged_scales is None else merged_scales.shape[2]
    move_source_rows_kernel[(ranks * experts, triton.cdiv(limit, block_c))](
        padded.view(torch.uint8) if padded.itemsize == 1 else padded,
        merged.view(torch.uint8) if merged.itemsize == 1 else merged,
        offsets,
        counts,
        padded_scales,
        merged_scales,
        padded_sources,
        merged_sources,
        experts,
        offsets.shape[1],
        first_expert,
        limit,
        capacity,
        columns,
        groups,
        *((0, 0, 0) if padded_scales is None else (block_stride(padded_scales), *padded_scales.stride()[2:])),
        *((0, 0, 0) if merged_scales is None else merged_scales.stride()),
        0 if padded_sources is None else block_stride(padded_sources),
        counts.stride(0),
        TO_MERGED=to_merged,
        HAS_SCALES=padded_scales is not None,
        HAS_SOURCES=padded_sources is not None,
        BLOCK_C=block_c,
        BLOCK_H=min(1024, triton.next_power_of_2(columns)),
        GROUPS=max(1, triton.next_power_of_2(groups)),
        num_warps=8,
    )
