"""Moves rows between buffers padded for each source rank and expert buffers with the sources' rows side by side.

W ranks, L local experts, C rows of an expert's buffer per source rank, M rows of an expert's buffer, R rows of a rank's (ragged),
H hidden size, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import rows_of
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2


class Side(NamedTuple):
    """The padded buffers, of which a block is a matrix, or the merged ones, of which an expert is one. Rows are contiguous."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    sources: torch.Tensor | None
    scales_matrix: int
    scales_row: int
    scales_group: int
    sources_matrix: int


class Size(NamedTuple):
    """limit, capacity: rows of a padded block and of an expert's buffer, C and M, or, ragged, of the rank's, R."""

    experts: int
    limit: int
    capacity: int
    columns: int
    groups: int


class Tile(NamedTuple):
    """rows, columns: that are moved at a time. groups: all, rounded up to a power of two. ragged: the merged buffer is one for all
    experts, and offsets are rows of it."""

    rows: int
    columns: int
    groups: int
    ragged: bool


@launchable
@triton.jit
def move_source_rows_kernel(
    padded,
    merged,
    offsets,
    counts,
    size,
    TO_MERGED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (b, c) moves rows c * TILE.rows.. of block b, which is (source rank, local expert) = (b // L, b % L).

    Example: W=2, L=1, C=2, M=4, counts [1, 2], offsets [0, 1]: block 1 has 2 rows, padded rows (1, 0, 0..1), merged rows (0, 1..2).
    """
    BLOCK_H: tl.constexpr = TILE.columns
    experts, limit, capacity = size.experts, size.limit, size.capacity
    block = tl.program_id(0)
    source = block // experts
    expert = block % experts
    start = tl.load(offsets.pointer + source * offsets.stride + expert)
    count = tl.load(counts.pointer + source * counts.stride + expert)
    valid = tl.minimum(tl.minimum(count, limit), capacity - start)
    first = tl.program_id(1) * TILE.rows
    if first < valid:
        c = first + tl.arange(0, TILE.rows)
        inside = c < valid
        padded_row = block.to(tl.int64) * limit + c
        if TILE.ragged:
            merged_row = start.to(tl.int64) + c
        else:
            merged_row = expert.to(tl.int64) * capacity + start + c
        columns = size.columns
        for h in range(0, columns, BLOCK_H):
            column = h + tl.arange(0, BLOCK_H)
            mask = inside[:, None] & (column < columns)[None, :]
            apart = padded.rows + padded_row[:, None] * columns + column[None, :]
            together = merged.rows + merged_row[:, None] * columns + column[None, :]
            if TO_MERGED:
                tl.store(together, tl.load(apart, mask=mask), mask=mask)
            else:
                tl.store(apart, tl.load(together, mask=mask), mask=mask)
        if padded.scales is not None:
            # rows vary fastest: both sides keep the rows of a group side by side
            group = tl.arange(0, TILE.groups)
            mask = (group < size.groups)[:, None] & inside[None, :]
            g = group.to(tl.int64)[:, None]
            at = block.to(tl.int64) * padded.scales_matrix + g * padded.scales_group + c[None, :] * padded.scales_row
            to = expert.to(tl.int64) * merged.scales_matrix + g * merged.scales_group + (start + c)[None, :] * merged.scales_row
            tl.store(merged.scales + to, tl.load(padded.scales + at, mask=mask), mask=mask)
        if padded.sources is not None:
            entry = tl.load(padded.sources + block.to(tl.int64) * padded.sources_matrix + c, mask=inside).to(tl.int64)
            tl.store(merged.sources + merged_row, entry + (source.to(tl.int64) << 32), mask=inside)


def block_stride(x: torch.Tensor) -> int:
    """Elements from one (source rank, local expert) of x (W, L, ...) to the next. With L = 1, stride(1) may be anything."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.itemsize == 1 else x


def move_source_rows(
    padded: torch.Tensor,
    merged: torch.Tensor,
    offsets: torch.Tensor,
    counts: torch.Tensor,
    to_merged: bool,
    padded_scales: torch.Tensor | None = None,
    merged_scales: torch.Tensor | None = None,
    padded_sources: torch.Tensor | None = None,
    merged_sources: torch.Tensor | None = None,
) -> None:
    """As `moequant.reference.move_source_rows`. padded and merged contiguous; (W, L) of the padded tensors can be joined into one
    dimension; the rows of padded_sources, offsets and counts are contiguous."""
    ranks, experts, limit, columns = padded.shape
    if padded.numel() == 0:
        return
    ragged = merged.dim() == 2
    groups, padded_strides, merged_strides = 0, (0, 0, 0), (0, 0, 0)
    if padded_scales is not None and merged_scales is not None:
        groups, merged_strides = merged_scales.shape[-1], (0, *merged_scales.stride()) if ragged else merged_scales.stride()
        padded_strides = block_stride(padded_scales), *padded_scales.stride()[2:]
    sources_block = 0 if padded_sources is None else block_stride(padded_sources)
    block = min(16, next_power_of_2(limit))
    move_source_rows_kernel[(ranks * experts, ceil_div(limit, block))](
        Side(bytes_of(padded), padded_scales, padded_sources, *padded_strides, sources_matrix=sources_block),
        Side(bytes_of(merged), merged_scales, merged_sources, *merged_strides, sources_matrix=0),
        rows_of(offsets),
        rows_of(counts),
        Size(experts, limit, merged.shape[-2], columns, groups),
        TO_MERGED=to_merged,
        TILE=Tile(block, min(1024, next_power_of_2(columns)), max(1, next_power_of_2(groups)), ragged),
        num_warps=8,
    )
