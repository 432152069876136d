"""Makes an expert batch of the rows that other ranks stored: scales transposed, sources, and copies of tokens that came once.

W ranks, K top-k, L local experts, M rows of an expert's buffer, H hidden size, G groups. Notes: `push_tokens.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import locate_block, num_sms, row_blocks
from moequant.kernels.library.early import await_previous, launch_option, may_begin_early, most_programs
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.symmetric import NO_FAULT


@launchable
@triton.jit
def land_rows_kernel(
    values_ptr,
    notes_ptr,
    num_tokens_ptr,
    scales_ptr,
    sources_ptr,
    destinations_ptr,
    peers_ptr,
    fault_ptr,
    returns_offset,
    ranks,
    entries,
    first_expert,
    experts,
    local_experts,
    capacity,
    columns,
    return_bytes,
    groups,
    NOTE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EXPERTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Tiles of BLOCK valid rows and BLOCK_G groups of columns are dealt to the programs in turn. The rows are those of `experts` experts
    from first_expert on.

    Example: M=8, L=2, NOTE=4: row 5 of expert 1 has its note at word (1 * 8 + 5) * 4; if that says entry 9, source 2, leader 3, then
    sources[1, 5] = 2 << 32 | 9, and values and scales are those of row 3 of expert 0.
    """
    await_previous(EARLY)
    counts, ends = row_blocks(num_tokens_ptr + first_expert, experts, capacity, BLOCK, EXPERTS, True)
    column_blocks = tl.cdiv(groups, BLOCK_G)
    # after a fault the notes may be anything; the batch is empty, so that no product stores rows at addresses of an earlier call
    well = tl.load(fault_ptr) == NO_FAULT
    tiles = tl.where(well, tl.max(ends, axis=0) * column_blocks, 0)
    if (tl.program_id(0) == 0) & (not well):
        expert = tl.arange(0, EXPERTS)
        tl.store(num_tokens_ptr + first_expert + expert, tl.zeros((EXPERTS,), tl.int32), mask=expert < experts)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, first_row, count = locate_block(tile // column_blocks, counts, ends, BLOCK, EXPERTS)
        first_group = tile % column_blocks * BLOCK_G
        row = first_row + tl.arange(0, BLOCK)
        there = row < count
        expert += first_expert
        flat = expert.to(tl.int64) * capacity + row
        note = notes_ptr + flat * NOTE + SCALES
        leader = tl.load(note + 2, mask=there, other=0)
        if first_group == 0:
            entry = tl.load(note, mask=there, other=0)
            source = tl.load(note + 1, mask=there, other=0)
            tl.store(sources_ptr + flat, (source.to(tl.int64) << 32) | entry, mask=there)
            if destinations_ptr is not None:
                # nothing that came from another rank becomes an address unchecked
                known = there & (source >= 0) & (source < ranks) & (entry >= 0) & (entry < entries)
                returns = tl.load(peers_ptr + source, mask=known, other=0) + returns_offset
                tl.store(destinations_ptr + flat, returns + entry.to(tl.int64) * return_bytes, mask=known)
        there = there & (leader >= 0) & (leader < local_experts * capacity)
        leader = leader.to(tl.int64)
        if SCALES > 0:
            group = first_group + tl.arange(0, BLOCK_G)
            scaled = there[:, None] & (group < groups)[None, :]
            scales = tl.load(notes_ptr + leader[:, None] * NOTE + group[None, :], mask=scaled, other=0)
            at = (expert * groups + group).to(tl.int64)[None, :] * capacity + row[:, None]
            tl.store(scales_ptr + at, scales.to(tl.float32, bitcast=True), mask=scaled)
        follows = there & (leader != flat)
        if tl.max(follows.to(tl.int32), axis=0) > 0:
            byte = first_group * (128 * WIDTH) + tl.arange(0, BLOCK_G * 128 * WIDTH)
            inside = follows[:, None] & (byte < columns * WIDTH)[None, :]
            values = tl.load(values_ptr + leader[:, None] * columns * WIDTH + byte[None, :], mask=inside, other=0)
            tl.store(values_ptr + flat[:, None] * columns * WIDTH + byte[None, :], values, mask=inside)


# Registers of a thread where the launch begins early, and the tiles that a program has then.
REGISTERS, TURNS = 80, 2


def land_rows(
    values: torch.Tensor,
    notes: torch.Tensor,
    num_tokens: torch.Tensor,
    scales: torch.Tensor | None,
    sources: torch.Tensor,
    destinations: torch.Tensor | None,
    peers: torch.Tensor,
    fault: torch.Tensor,
    returns_offset: int,
    entries: int,
    return_bytes: int,
    expected_rows: int,
    part: tuple[int, int] | None = None,
) -> None:
    """values: (L, M, H), notes (L, M, words) int32: as `push_tokens` on all ranks left them. num_tokens: (L,) int32.

    Written for the valid rows: values of rows that don't lead, scales (L, M, G) with strides (M*G, 1, M), sources (L, M)
    int64, and destinations (L, M) int64: where the row goes on its source rank, `return_bytes` for each of its `entries` entries. After a
    fault num_tokens becomes 0 instead.

    expected_rows: of an expert, a guess by which the launch is sized. part: the experts to do, from the first to before the second; None:
    all.
    """
    local_experts, capacity, columns = values.shape
    first_expert, end = part or (0, local_experts)
    experts = end - first_expert
    groups = triton.cdiv(columns, 128)
    # few programs with whole rows, if the launch may begin early and has few rows
    block, block_g, warps = 4, min(64 // values.element_size(), triton.next_power_of_2(groups)), 8
    columns_of_tiles = experts * triton.cdiv(groups, block_g)
    programs = min(columns_of_tiles * triton.cdiv(capacity, block), most_programs(values.device))
    few = columns_of_tiles * triton.cdiv(expected_rows, block) <= TURNS * programs
    early = few and may_begin_early(values.device, programs, warps, REGISTERS)
    if not early:
        block, block_g, warps = 8, min(8, triton.next_power_of_2(groups)), 4
        worst = experts * triton.cdiv(groups, block_g) * triton.cdiv(capacity, block)
        programs = min(worst, 8 * num_sms(values.device))
    land_rows_kernel[(programs,)](
        values.view(torch.uint8),
        notes,
        num_tokens,
        scales,
        sources,
        destinations,
        peers,
        fault,
        returns_offset,
        peers.shape[0],
        entries,
        first_expert,
        experts,
        local_experts,
        capacity,
        columns,
        return_bytes,
        groups,
        NOTE=notes.shape[2],
        SCALES=0 if scales is None else triton.cdiv(groups, 4) * 4,
        BLOCK=block,
        WIDTH=values.element_size(),
        BLOCK_G=block_g,
        EXPERTS=triton.next_power_of_2(experts),
        EARLY=early,
        num_warps=warps,
        **launch_option(early, REGISTERS),
    )
