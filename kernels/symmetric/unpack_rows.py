"""Makes an expert batch of the rows that other ranks stored: scales transposed, sources, and copies of tokens that came once.

W ranks, K top-k, L local experts, M rows of an expert's buffer, R rows of the rank's, if the layout is ragged, H hidden size, G groups.
Headers: `push_tokens.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Shape
from moequant.kernels.library.common import first_row, locate_block, most_row_tiles, num_sms, row_blocks
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import may_use_pdl, most_programs, pdl_option, wait_for_previous
from moequant.kernels.library.symmetric import NO_FAULT, Headers, Peers
from moequant.sizes import ceil_div, next_power_of_2


class Landed(NamedTuple):
    """The expert batch that is made.

    rows: (L, M, bytes of a row) uint8. scales: (L, M, G) float32 with strides (M*G, 1, M), or None. num_tokens: (L,) int32.
    sources: (L, M) int64. expert_start: (L,) int32, if the layout is ragged: then rows are (R, bytes of a row), scales (R, G) with
    strides (1, R), and sources (R,).
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    num_tokens: torch.Tensor
    sources: torch.Tensor
    expert_start: torch.Tensor | None = None


class Returns(NamedTuple):
    """Where rows go back to: to the source rank's block, `offset` bytes from its beginning, where each of `entries` has row_bytes.

    destinations: (L, M) or (R,) int64, where the addresses are written, or None.
    """

    destinations: torch.Tensor | None
    offset: int
    entries: int
    row_bytes: int


class Tile(NamedTuple):
    """rows, groups: of a program's tile. width: bytes of a number. experts: rounded up to a power of two. pdl: as the launch."""

    rows: int
    groups: int
    width: int
    experts: int
    pdl: bool


@launchable
@triton.jit(do_not_specialize=["peers"])
def unpack_rows_kernel(
    batch,
    headers,
    peers,
    returns,
    first_expert,
    experts,
    shape,
    groups,
    TILE: tl.constexpr,
):
    """Tiles of BLOCK valid rows and BLOCK_G groups of columns are dealt to the programs in turn. The rows are those of `experts` experts
    from first_expert on. groups: of all columns, with scales or without. shape: its rows are M, or R.

    Example: M=8, L=2, headers of 4 words: row 5 of expert 1 has its header at word (1 * 8 + 5) * 4; if that says entry 9, source 2,
    first_copy 3, then sources[1, 5] = 2 << 32 | 9, and values and scales are those of row 3 of expert 0.
    """
    wait_for_previous(TILE.pdl)
    BLOCK: tl.constexpr = TILE.rows
    BLOCK_G: tl.constexpr = TILE.groups
    EXPERTS: tl.constexpr = TILE.experts
    WIDTH: tl.constexpr = TILE.width
    capacity, columns = shape.rows, shape.columns
    starts = batch.expert_start
    if starts is not None:
        starts += first_expert
    counts, ends = row_blocks(batch.num_tokens + first_expert, experts, capacity, BLOCK, EXPERTS, True, starts)
    column_blocks = tl.cdiv(groups, BLOCK_G)
    # after a fault the headers may be anything; the batch is empty, so that no product stores rows at addresses of an earlier call
    well = tl.load(peers.fault) == NO_FAULT
    tiles = tl.where(well, tl.max(ends, axis=0) * column_blocks, 0)
    if (tl.program_id(0) == 0) & (not well):
        expert = tl.arange(0, EXPERTS)
        tl.store(batch.num_tokens + first_expert + expert, tl.zeros((EXPERTS,), tl.int32), mask=expert < experts)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, first, count = locate_block(tile // column_blocks, counts, ends, BLOCK, EXPERTS)
        first_group = tile % column_blocks * BLOCK_G
        row = first + tl.arange(0, BLOCK)
        there = row < count
        expert += first_expert
        flat = first_row(batch.expert_start, expert.to(tl.int64), capacity) + row
        header = headers.pointer + flat * headers.words + headers.scale_words
        first_copy = tl.load(header + 2, mask=there, other=0)
        if first_group == 0:
            entry = tl.load(header, mask=there, other=0)
            source = tl.load(header + 1, mask=there, other=0)
            tl.store(batch.sources + flat, (source.to(tl.int64) << 32) | entry, mask=there)
            if returns.destinations is not None:
                # nothing that came from another rank becomes an address unchecked
                known = there & (source >= 0) & (source < peers.ranks) & (entry >= 0) & (entry < returns.entries)
                back = tl.load(peers.pointers + source, mask=known, other=0) + returns.offset
                tl.store(returns.destinations + flat, back + entry.to(tl.int64) * returns.row_bytes, mask=known)
        rows_here = shape.experts * capacity if starts is None else capacity
        there = there & (first_copy >= 0) & (first_copy < rows_here)
        first_copy = first_copy.to(tl.int64)
        if headers.scale_words > 0:
            group = first_group + tl.arange(0, BLOCK_G)
            scaled = there[:, None] & (group < groups)[None, :]
            scales = tl.load(headers.pointer + first_copy[:, None] * headers.words + group[None, :], mask=scaled, other=0)
            if starts is None:
                at = (expert * groups + group).to(tl.int64)[None, :] * capacity + row[:, None]
            else:
                at = group.to(tl.int64)[None, :] * capacity + flat[:, None]
            tl.store(batch.scales + at, scales.to(tl.float32, bitcast=True), mask=scaled)
        follows = there & (first_copy != flat)
        if tl.max(follows.to(tl.int32), axis=0) > 0:
            byte = first_group * (128 * WIDTH) + tl.arange(0, BLOCK_G * 128 * WIDTH)
            inside = follows[:, None] & (byte < columns * WIDTH)[None, :]
            values = tl.load(batch.rows + first_copy[:, None] * columns * WIDTH + byte[None, :], mask=inside, other=0)
            tl.store(batch.rows + flat[:, None] * columns * WIDTH + byte[None, :], values, mask=inside)


# Registers of a thread where the launch begins early, and the tiles that a program has then.
REGISTERS, TURNS = 80, 2


def unpack_rows(
    batch: Landed,
    headers: Headers,
    peers: Peers,
    returns: Returns,
    width: int,
    expected_rows: int,
    part: tuple[int, int] | None = None,
) -> None:
    """Values and headers are as `push_tokens` on all ranks left them. width: bytes of a number.

    Written for the valid rows: values of rows that don't lead, scales, sources and destinations. After a fault num_tokens becomes 0
    instead.

    expected_rows: of an expert, a guess by which the launch is sized. part: the experts to do, from the first to before the second; None:
    all.
    """
    device = batch.rows.device
    local_experts, (capacity, row_bytes) = batch.num_tokens.shape[0], batch.rows.shape[-2:]
    columns = row_bytes // width
    first_expert, end = part or (0, local_experts)
    experts = end - first_expert
    groups = ceil_div(columns, 128)
    # few programs with whole rows, if the launch may begin early and has few rows
    block, block_g, warps = 4, min(64 // width, next_power_of_2(groups)), 8
    tiles = most_row_tiles(experts, capacity, block, batch.expert_start) * ceil_div(groups, block_g)
    programs = min(tiles, most_programs(device))
    few = experts * ceil_div(groups, block_g) * ceil_div(expected_rows, block) <= TURNS * programs
    pdl = few and may_use_pdl(device, programs, warps, REGISTERS)
    if not pdl:
        block, block_g, warps = 8, min(8, next_power_of_2(groups)), 4
        tiles = most_row_tiles(experts, capacity, block, batch.expert_start) * ceil_div(groups, block_g)
        programs = min(tiles, 8 * num_sms(device))
    unpack_rows_kernel[(programs,)](
        batch,
        headers,
        peers,
        returns,
        first_expert=first_expert,
        experts=experts,
        shape=Shape(local_experts, capacity, columns),
        groups=groups,
        TILE=Tile(block, block_g, width, next_power_of_2(experts), pdl),
        num_warps=warps,
        **pdl_option(pdl, REGISTERS),
    )
