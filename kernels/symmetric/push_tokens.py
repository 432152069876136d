"""Quantizes each token once and stores it straight to its experts' rows on their ranks.

T tokens, K top-k, W ranks, E experts, L local experts, M rows of an expert's buffer, R rows of a rank's (L * M, or the
layout is ragged), H hidden size, G groups. Memory and flags: `symmetric.py`.

Scales can't be stored straight: in the batch the scales of a row lie M numbers apart, and single 4-byte stores to another rank cost more
than the row itself. They travel side by side in the row's header, and the receiver transposes them (`unpack_rows.py`). A header is
int32 words: G scales (float32), padded to a multiple of 4; then the entry (token * K + k), the source rank, the first copy, a spare; and,
for reduce="per_rank", in the first copy's header, the token's K rows on its rank (-1 for the others), padded to a multiple of 4, and its
K weights (float32), likewise. The first copy of a row is the row of the first of the token's entries on the same rank, itself if it is
the first.

In two waves, one launch each, the rows of each rank's first experts go before the others'; entries of the first wave come first then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import QuantSpec
from moequant.kernels.library.common import num_sms, quantize_group
from moequant.kernels.library.launch import launchable
from moequant.kernels.library.pdl import launch_dependents, may_use_pdl, pdl_option, uses_pdl, wait_for_previous
from moequant.kernels.library.symmetric import ROWS, Peers, last_program, peer_block, signal_peers, wait_for_peers
from moequant.sizes import ceil_div, next_power_of_2


def header_words(groups: int, top_k: int, per_rank: bool) -> int:
    """int32 words of a row's header, a multiple of 4. groups: 0 where rows have no scales."""
    return 4 * (ceil_div(groups, 4) + 1 + (2 * ceil_div(top_k, 4) if per_rank else 0))


class Entries(NamedTuple):
    """What a slot has for the entries of a call: as `exchange_counts` left them, and what is written.

    rows_in_expert: (T, K) int32. offsets: (E,) int32.
    rows: (T, K) int32, written: the flat row of each entry among all ranks' W * R rows, -1 where there is none.
    partials: (T, W) int32, written with reduce="per_rank": r * max_tokens + t for each rank r that holds rows of token t, otherwise -1.
    """

    rows_in_expert: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor
    partials: torch.Tensor | None


class Landing(NamedTuple):
    """Where rows land: the offsets of a slot's rows and headers in every rank's block, and how large all is. spec: of the format and the
    recipe; None for bfloat16 and float16. ragged: a constant: capacity is then R, not M."""

    rows: int
    headers: int
    experts: int
    local_experts: int
    capacity: int
    columns: int
    max_tokens: int
    spec: QuantSpec | None
    ragged: tl.constexpr = tl.constexpr(False)


class Tile(NamedTuple):
    """How a launch is compiled.

    element: the type of what is stored. groups: of a program. header_words: of a header, of which the first scale_words hold scales.
    top_k_lanes, lanes: top-k and ranks, rounded up to powers of two. pdl: the launch before may still run.
    wave: 0 for all rows, 1 for those of each rank's first experts, 2 for the others. waits: the last program, for all ranks' rows.
    """

    element: tl.dtype
    groups: int
    header_words: int
    scale_words: int
    top_k: int
    top_k_lanes: int
    lanes: int
    pdl: bool
    wave: int
    waits: bool


@launchable
@triton.jit(do_not_specialize=["tokens", "peers"])
def push_tokens_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    entries,
    peers,
    landing,
    tokens,
    given,
    TILE: tl.constexpr,
):
    """Program (t, b) does groups b * TILE.groups.. of token t. The last program tells all ranks. given: x's
    elements from one token to the next, and how many experts of a rank are its first.

    Only the first row of a token on a rank, the first copy, gets its values and scales; `unpack_rows` copies them to the others.

    Example: W=2, L=2, M=8, ids[t] [3, 0, 2], rows_in_expert[t] [0, 1, 0], offsets [4, 0, 8, 5]. Entry 0 goes to row 5 of expert 3, row
    1 * 8 + 5 = 13 of rank 1; entry 1 to row 5 of expert 0 on rank 0; entry 2 would be row 8 of expert 2, for which there is no room.
    rows[t] is [3 * 8 + 5, 0 * 8 + 5, -1]. Ragged: with R=16, offsets [4, 0, 16, 13], rows[t] is [1 * 16 + 13, 0 * 16 + 5, -1].
    """
    K: tl.constexpr = TILE.top_k
    x_stride, first_experts = given
    experts, local_experts, capacity = landing.experts, landing.local_experts, landing.capacity
    token = tl.program_id(0)
    # a launch has a program even where there is no token
    here = token < tokens
    group = tl.program_id(1) * TILE.groups + tl.arange(0, TILE.groups)
    columns = landing.columns
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < columns
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=inside & here, other=0.0)
    if TILE.scale_words > 0:
        values, scales = quantize_group(x.to(tl.float32), landing.spec, 1, TILE.element)
    else:
        values = x.to(TILE.element)
    wait_for_previous(TILE.pdl)
    # not before: behind the wait for counts stands this launch alone
    launch_dependents(TILE.pdl)
    epoch = tl.load(peers.epoch)
    if here:
        rows = ()
        owners = ()
        first_copies = ()
        # of the first wave
        firsts = ()
        for k in tl.static_range(K):
            expert = tl.load(ids_ptr + token * K + k).to(tl.int64)
            place_in_expert = tl.load(entries.rows_in_expert + token * K + k)
            named = (place_in_expert >= 0) & (expert >= 0) & (expert < experts)
            place = tl.load(entries.offsets + expert, mask=named, other=capacity) + place_in_expert
            placed = named & (place >= 0) & (place < capacity)
            # int32 holds a row's number, not its offset in elements
            # that has place 0
            first = (expert // local_experts if landing.ragged else expert) * capacity
            row = tl.where(placed, first + place, -1).to(tl.int32)
            owner = tl.where(placed, expert // local_experts, -1).to(tl.int32)
            first_copy = row
            for back in tl.static_range(k):
                first_copy = tl.where(owners[k - 1 - back] == owner, rows[k - 1 - back], first_copy)
            rows = rows + (row,)
            owners = owners + (owner,)
            first_copies = first_copies + (first_copy,)
            firsts = firsts + (expert % local_experts < first_experts,)
        first_block = tl.program_id(1) == 0
        # the second wave would write the same
        if first_block & (TILE.wave != 2):
            for k in tl.static_range(K):
                tl.store(entries.rows + token * K + k, rows[k])
            if weights_ptr is not None:
                for peer in range(peers.ranks):
                    present = owners[0] == peer
                    for k in tl.static_range(1, K):
                        present = present | (owners[k] == peer)
                    tl.store(
                        entries.partials + token * peers.ranks + peer, tl.where(present, peer * landing.max_tokens + token, -1)
                    )

        word = tl.arange(0, 4)
        lane = tl.arange(0, TILE.top_k_lanes)
        rows_of_rank = capacity if landing.ragged else local_experts * capacity
        for k in tl.static_range(K):
            first_copy = first_copies[k]
            if TILE.wave > 0:
                for back in tl.static_range(K):
                    ahead = firsts[K - 1 - back] & (owners[K - 1 - back] == owners[k])
                    first_copy = tl.where(ahead, rows[K - 1 - back], first_copy)
            if (rows[k] >= 0) & ((TILE.wave == 0) | (firsts[k] == (TILE.wave == 1))):
                owner = owners[k]
                local_row = (rows[k] - owner * rows_of_rank).to(tl.int64)
                is_first = first_copy == rows[k]
                header = peer_block(peers, owner, landing.headers, tl.int32)
                header = tl.multiple_of(header + local_row * TILE.header_words, 16)
                if is_first:
                    block = peer_block(peers, owner, landing.rows, TILE.element)
                    tl.store(block + local_row * columns + column, values, mask=inside)
                    if TILE.scale_words > 0:
                        tl.store(header + group, scales.to(tl.int32, bitcast=True), mask=group * 128 < columns)
                if first_block:
                    first_here = first_copy - owner * rows_of_rank
                    words = tl.where(word == 0, token * K + k, tl.where(word == 1, peers.rank, tl.where(word == 2, first_here, 0)))
                    tl.store(header + TILE.scale_words + word, words)
                    if weights_ptr is not None and is_first:
                        for other in tl.static_range(K):
                            theirs = tl.where(owners[other] == owner, rows[other] - owner * rows_of_rank, -1)
                            tl.store(header + TILE.scale_words + 4 + other, theirs)
                        weights = tl.load(weights_ptr + token * K + lane, mask=lane < K, other=0.0).to(tl.float32)
                        at = header + (TILE.scale_words + 4 + (K + 3) // 4 * 4) + lane
                        tl.store(at, weights.to(tl.int32, bitcast=True), mask=lane < K)
    if last_program(peers.arrivals):
        signal_peers(peers, epoch, TILE.lanes)
        if TILE.waits:
            wait_for_peers(peers, epoch, 0, ROWS, TILE.lanes)


# Triton's name of each type that rows travel in; e4m3fnuz travels as the bytes that quantize_group makes of it.
VALUE_TYPES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fnuz: tl.uint8,
    torch.int8: tl.int8,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# Registers of a thread where a launch begins early; the code of waves has more to remember.
REGISTERS, REGISTERS_OF_WAVES = 80, 96


class Parts(NamedTuple):
    """How a launch cuts tokens: groups and warps of a program, and whether it begins early, with so many registers a thread."""

    groups: int
    warps: int
    pdl: bool
    registers: int


def parts_of_tokens(tokens: int, groups: int, wave: int, device: torch.device) -> Parts:
    """The smallest parts of a token with which the launch may begin early. Without, large ones where they fill the device."""
    registers = REGISTERS_OF_WAVES if wave else REGISTERS
    most = next_power_of_2(groups)
    for block in (min(most, size) for size in (8, 32, 64)):
        warps = min(8, max(2, block // 4))
        if may_use_pdl(device, max(tokens, 1) * ceil_div(groups, block), warps, registers):
            return Parts(block, warps, True, registers)
    block = min(most, 32 if tokens >= num_sms(device) // 2 else 8)
    return Parts(block, max(2, block // 8), False, registers)


def push_tokens(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    entries: Entries,
    landing: Landing,
    peers: Peers,
    dtype: torch.dtype,
    wait: bool,
    wave: tuple[int, int] = (0, 0),
) -> None:
    """x: (T, H) with contiguous rows. topk_ids: (T, K). topk_weights: (T, K), for reduce="per_rank"; otherwise None. dtype: of the values
    that are stored. peers: with the flags of the rows, or of a second wave's. wait: for all ranks' rows. wave: its number, 1 and then 2,
    and the number of each rank's experts whose rows go first; 0 for all at once."""
    (tokens, columns), top_k = x.shape, topk_ids.shape[1]
    groups, quantized = ceil_div(columns, 128), landing.spec is not None
    number, first_experts = wave
    parts = parts_of_tokens(tokens, groups, number, x.device)
    tile = Tile(
        element=VALUE_TYPES[dtype],
        groups=parts.groups,
        header_words=header_words(groups if quantized else 0, top_k, topk_weights is not None),
        scale_words=ceil_div(groups, 4) * 4 if quantized else 0,
        top_k=top_k,
        top_k_lanes=next_power_of_2(top_k),
        lanes=next_power_of_2(peers.ranks),
        pdl=uses_pdl(x.device),
        wave=number,
        waits=wait,
    )
    push_tokens_kernel[(max(tokens, 1), ceil_div(groups, parts.groups))](
        x,
        topk_ids,
        topk_weights,
        entries,
        peers,
        landing,
        tokens=tokens,
        given=(x.stride(0), first_experts),
        TILE=tile,
        num_warps=parts.warps,
        # as in the quantize kernel
        enable_fp_fusion=False,
        **pdl_option(parts.pdl, parts.registers),
    )
