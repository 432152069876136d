"""Where rows go, and how they get there and back. Letters as in `moequant.reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moequant.config import ROW_ALIGNMENT
from moequant.reference.quantization import quantize_groups
from moequant.transport.calls import unlike

__all__ = [
    "combine",
    "combine_per_rank",
    "count_mismatched",
    "expert_offsets",
    "locate_entries",
    "move_source_rows",
    "plan_rank_sums",
    "plan_returns",
    "plan_sends",
    "presum",
    "route",
    "scatter",
]


def ragged_rows(counts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Layout "ragged": where each expert's rows begin in a rank's buffer, and how many of them find a place.

    counts: (..., L) rows that come for the experts of a rank. capacity: R, a multiple of 16. Returns both, as counts.

    Example: R=48, counts [3, 0, 17, 20]: the experts begin at rows 0, 16, 16 and 48, and 3, 0, 17 and 0 rows have a place.
    """
    aligned = (counts + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    starts = (aligned.cumsum(-1) - aligned).clamp_max(capacity)
    return starts.to(counts.dtype), counts.minimum(capacity - starts).to(counts.dtype)


def route(
    topk_ids: Tensor,
    rows_in_expert: Tensor,
    counts: Tensor,
    capacity: int | None = None,
    num_tokens: Tensor | None = None,
    status: Tensor | None = None,
    expert_start: Tensor | None = None,
) -> None:
    """Numbers the rows of each expert in the order of (token, k).

    topk_ids: (T, K) int32 or int64; -1 means "no expert". An id outside -1..E-1 counts as -1.
    rows_in_expert: (T, K) int32, written: the number of earlier entries with the same id, or -1 where there is no expert.
    counts: (E,) int32, written: entries of each expert, before any limit. Its length says how many experts there are.
    capacity: rows that an expert has room for, or None for no limit. Ragged: rows that all have room for together, R.
    num_tokens: (E,) int32, written if given: min(counts, capacity). Ragged: the rows of each expert that are below R.
    status: (3,) int64, of which the first two are added to if given: ids out of range, and rows without room.
    expert_start: (E,) int32, written if given, and then the layout is ragged: the first row of each expert, as `ragged_rows` has it.
        capacity and num_tokens have to be given too.

    Example: E=3, topk_ids [[2, 0], [0, -1], [2, 2]] gives rows_in_expert [[0, 0], [1, -1], [1, 2]] and counts [2, 0, 3].
    """
    num_experts = counts.shape[0]
    ids = topk_ids.long()
    invalid = (ids < -1) | (ids >= num_experts)
    present = (ids >= 0) & ~invalid
    one_hot = F.one_hot(torch.where(present, ids, num_experts).flatten(), num_experts + 1)[:, :num_experts]
    earlier = (one_hot.cumsum(0) - one_hot).gather(1, ids.clamp(0, num_experts - 1).flatten().unsqueeze(1))
    rows_in_expert.copy_(torch.where(present, earlier.view(ids.shape), -1))
    counts.copy_(one_hot.sum(0))
    placed = counts if capacity is None else counts.clamp_max(capacity)
    if expert_start is not None:
        assert capacity is not None
        starts, placed = ragged_rows(counts, capacity)
        expert_start.copy_(starts)
    if num_tokens is not None:
        num_tokens.copy_(placed)
    if status is not None:
        status[0] += invalid.sum()
        status[1] += (counts - placed).sum()


def expert_offsets(
    counts: Tensor,
    first_expert: int,
    capacity: int,
    rows_per_source: int,
    offsets: Tensor,
    num_tokens: Tensor,
    status: Tensor | None = None,
    expert_start: Tensor | None = None,
) -> None:
    """Where each source rank's rows start in each expert's buffer, or, ragged, in the buffer of the expert's rank.

    counts: (W, E) int32, as each rank's `route` gave them; counts above rows_per_source (C) are cut to it.
    capacity: M, or, ragged, R.
    offsets: (W, E) int32, written: rows of lower ranks; ragged: the expert's first row is added. It may exceed capacity: such rows
        have no place.
    num_tokens: (L,) int32, written for the experts from first_expert on: valid rows, at most capacity.
    status: (3,) int64; status[1] is raised by the rows, of all ranks and experts, that found no place.
    expert_start: (L,) int32, written for the same experts if given, and then the layout is ragged: the first row of each.

    Example: W=2, C=4, M=5, counts of one expert [3, 6]: offsets [0, 3], num_tokens 5, and 4 rows have no place (2 of them past C).
    Ragged, R=32, counts of the two experts of one rank [[3, 1], [4, 20]]: offsets [[0, 16], [3, 17]], num_tokens [7, 16], expert_start
    [0, 16], and 5 rows have no place.
    """
    sent = counts.clamp_max(rows_per_source)
    ends = sent.cumsum(0, dtype=torch.int32)
    offsets.copy_(ends - sent)
    local = num_tokens.shape[0]
    mine = slice(first_expert, first_expert + local)
    if expert_start is None:
        placed = ends[-1].clamp_max(capacity)
    else:
        starts, placed = (x.flatten() for x in ragged_rows(ends[-1].unflatten(0, (-1, local)), capacity))
        offsets += starts
        expert_start.copy_(starts[mine])
    num_tokens.copy_(placed[mine])
    if status is not None:
        status[1] += counts.sum() - placed.sum()


def count_mismatched(words: Tensor, rank: int, status: Tensor) -> None:
    """How many ranks' calls are not this rank's.

    words: (W, 2) int32, the number of each rank's call and its word (`moequant.transport.calls`). rank: this one. status: (3,) int64;
    status[2] is raised by the number of the others.
    """
    mine, *_ = everyone = words.roll(-rank, 0).tolist()
    status[2] += sum(number != mine[0] or unlike(mine[1], word) for number, word in everyone)


def plan_sends(topk_ids: Tensor, local_experts: int, send_tokens: Tensor, send_counts: Tensor) -> None:
    """Packed exchange: lists the tokens that have an expert on each rank, each token once, in their order.

    topk_ids: (T, K); rank w has experts w * local_experts .. (w + 1) * local_experts - 1.
    send_tokens: (W, at least T) int32; send_tokens[w, :send_counts[w]] is written. send_counts: (W,) int32, written.

    Example: local_experts=2, ids [[0, 1], [3, -1], [1, 2]]: send_tokens [[0, 2], [1, 2]], send_counts [2, 2].
    """
    for rank in range(send_counts.shape[0]):
        here = (topk_ids >= rank * local_experts) & (topk_ids < (rank + 1) * local_experts)
        listed = here.any(1).nonzero().flatten()
        send_tokens[rank, : listed.numel()] = listed.to(send_tokens.dtype)
        send_counts[rank] = listed.numel()


def plan_returns(
    topk_ids: Tensor, rows_in_expert: Tensor, offsets: Tensor, capacity: int, local_experts: int, starts: Tensor, rows: Tensor
) -> None:
    """Packed exchange: the order in which the expert rows of this rank's tokens come back: by rank, then by (token, k).

    topk_ids, rows_in_expert: (T, K), as `route` took and gave them. offsets: (E,) int32, of this rank's rows; those that reach capacity
    (M, or, ragged, R) were placed nowhere. starts: (W,) int32, where each rank's rows begin. rows: (T, K) int32, written; -1 for
    entries without a row.

    Example: local_experts=2, M=1, ids [[0, 1], [3, 1]], rows_in_expert [[0, 0], [0, 1]], offsets all 0, starts [0, 2]: expert 1 has no
    room for its second row, so rows are [[0, 1], [2, -1]].
    """
    placed = rows_in_expert >= 0
    placed &= offsets[torch.where(placed, topk_ids, 0).long()] + rows_in_expert < capacity
    owners = torch.where(placed, topk_ids // local_experts, -1)
    for rank in range(starts.shape[0]):
        mine = owners == rank
        rows[mine] = starts[rank] + torch.arange(int(mine.sum()), dtype=torch.int32, device=rows.device)
    rows[~placed] = -1


def scatter(
    x: Tensor,
    topk_ids: Tensor,
    rows_in_expert: Tensor,
    values: Tensor,
    scales: Tensor | None = None,
    x_scales: Tensor | None = None,
    rows: Tensor | None = None,
    sources: Tensor | None = None,
    row_sources: Tensor | None = None,
    offsets: Tensor | None = None,
    capacity: int | None = None,
    recipe: str = "default",
    expert_start: Tensor | None = None,
) -> None:
    """Places each token's row into the buffer of each of its experts, quantizing it on the way where scales are wanted.

    x: (T, H), any row stride.
    topk_ids, rows_in_expert: (T, K); others than 0..L-1 are skipped, as is a row of -1 or one not less than the buffers' M, or,
        ragged, that leads to no row below R.
    values: (L, M, H), or, ragged, (R, H), written. Its type says what happens: bfloat16 etc.: x is converted; quantized, with x_scales
        None: x is quantized by recipe; quantized, with x_scales (T, G) float32: x is quantized already and is copied.
    scales: (L, M, G), ragged (R, G), float32 of any strides, written, if values are quantized.
    rows: (T, K) int32, written if given: the flat row `expert * M` or, ragged, `expert_start[expert]`, plus rows_in_expert; -1 where
        nothing was placed.
    sources: (L, M), ragged (R,), int64 or int32, written if given: row_sources[t] + k; row_sources (T,) int64 is t * K where it is None.
    offsets, capacity: (E,) int32 and rows that fit an expert (ragged: a rank) in all: a row with offsets[expert] + slot >= capacity is
        not placed.
    expert_start: (L,) int32, the first row of each expert, ragged.
    """
    tokens, top_k = topk_ids.shape
    local = topk_ids.long()
    if expert_start is None:
        experts, limit = values.shape[:2]
        first = local * limit
    else:
        experts, limit = expert_start.shape[0], values.shape[0]
        first = expert_start.long()[local.clamp(0, experts - 1)]
    placed = (local >= 0) & (local < experts) & (rows_in_expert >= 0)
    placed &= (rows_in_expert if expert_start is None else first + rows_in_expert) < limit
    if offsets is not None and capacity is not None:
        start = offsets.long()[local.clamp(0, offsets.shape[0] - 1)]
        placed &= start + rows_in_expert < capacity
    flat = torch.where(placed, first + rows_in_expert, -1)
    if rows is not None:
        rows.copy_(flat)
    token, k = placed.nonzero(as_tuple=True)
    row = flat[token, k]
    at = (row,) if expert_start is not None else (row // limit, row % limit)
    if scales is not None:
        new_values, new_scales = (x, x_scales) if x_scales is not None else quantize_groups(x, 128, values.dtype, recipe, None)
        values.view(torch.int8)[at] = new_values.view(torch.int8)[token]
        scales[at] = new_scales[token]
    else:
        values[at] = x[token].to(values.dtype)
    if sources is not None:
        base = torch.arange(tokens, device=x.device) * top_k if row_sources is None else row_sources
        sources[at] = (base[token] + k).to(sources.dtype)


def move_source_rows(
    padded: Tensor,
    merged: Tensor,
    offsets: Tensor,
    counts: Tensor,
    to_merged: bool,
    padded_scales: Tensor | None = None,
    merged_scales: Tensor | None = None,
    padded_sources: Tensor | None = None,
    merged_sources: Tensor | None = None,
) -> None:
    """Moves rows between buffers padded for each source rank and expert buffers with the sources' rows side by side.

    Row c of (source w, local expert l) is row offsets[w, l] + c of expert l, or, ragged, of the buffer, for c below counts, C and the
    end of M or R.
    padded: (W, L, C, H). merged: (L, M, H), or, ragged, (R, H), same type. to_merged: the direction; the other side is written.
    offsets, counts: (W, L) int32, of this rank's experts; any row stride.
    *_scales: (W, L, C, G) and (L, M, G) or (R, G) float32, any strides. *_sources: (W, L, C) int32, each a token * K + k, and (L, M)
        or (R,) int64, into which the source's rank goes too. Both only with to_merged.

    Example: W=2, L=1, C=2, M=4, counts [1, 2], offsets [0, 1]: merged rows 0, 1, 2 are padded (0, 0), (1, 0), (1, 1).
    """
    limit, capacity = padded.shape[2], merged.shape[-2]
    start, count = offsets.long().unsqueeze(-1), counts.unsqueeze(-1)
    c = torch.arange(limit, device=padded.device)
    source, expert, row = ((c < count) & (start + c < capacity)).nonzero(as_tuple=True)
    target = start[source, expert, 0] + row
    at = (target,) if merged.dim() == 2 else (expert, target)
    if not to_merged:
        padded[source, expert, row] = merged[at]
        return
    merged.view(torch.int8)[at] = padded.view(torch.int8)[source, expert, row]
    if padded_scales is not None and merged_scales is not None:
        merged_scales[at] = padded_scales[source, expert, row]
    if padded_sources is not None and merged_sources is not None:
        merged_sources[at] = padded_sources[source, expert, row].long() + (source << 32)


def plan_rank_sums(
    topk_ids: Tensor, rows: Tensor, local_experts: int, stride: int, partials: Tensor, starts: Tensor | None = None
) -> None:
    """`reduce="per_rank"`: where the sums that ranks make of each token's rows lie, once they have come back.

    topk_ids: (T, K); rank w has experts w * local_experts .. (w + 1) * local_experts - 1. rows: (T, K); not negative where an entry has
    a row. partials: (T, W) int32, written: -1 where rank w has no row of the token, otherwise the sum's row: w * stride + t, or, with
    starts (W,) int32, starts[w] + the number of earlier tokens that name an expert of rank w, as `plan_sends` lists them.

    Example: local_experts=2, ids [[0, 1], [3, -1], [1, 2]], of which [1, 2]'s first has no row: partials are [[0, -1], [-1, 4],
    [-1, 5]] with stride 3, and [[0, -1], [-1, 2], [-1, 3]] with starts [0, 2].
    """
    tokens, ranks = partials.shape
    ids = topk_ids.long().unsqueeze(-1)
    # not a division: ids out of range belong to no rank
    first = torch.arange(ranks, device=ids.device) * local_experts
    here = (ids >= first) & (ids < first + local_experts)
    if starts is None:
        token = torch.arange(tokens, device=ids.device).unsqueeze(1)
        row = token + stride * torch.arange(ranks, device=ids.device)
    else:
        named = here.any(1).long()
        row = starts + named.cumsum(0) - named
    partials.copy_(torch.where((here & (rows >= 0).unsqueeze(-1)).any(1), row, -1))


def locate_entries(
    entries: Tensor,
    offsets: Tensor,
    first_expert: int,
    limit: int,
    capacity: int,
    rows: Tensor,
    weights: Tensor,
    ragged: bool = False,
) -> None:
    """Padded exchange with `reduce="per_rank"`: where the rows of every rank's tokens lie in this rank's expert buffers.

    entries: (W, 3, T, K) int32, of each rank: rows_in_expert, as `route` gave them (-1 for tokens that the rank doesn't have), the low
        halves of topk_ids, and the bits of float32 weights.
    offsets: (W, E) int32. limit: C; rows from there on were not sent. capacity: M, or, ragged, R.
    rows: (W, T, K) int32, written: the flat row (id - first_expert) * M + offsets[w, id] + rows_in_expert; -1 for experts that are not
        among the L from first_expert on, and for rows without a place.
    weights: (W, T, K) float32, written.
    ragged: whether offsets are rows of the rank's buffer, not of the expert's: then they are the flat rows' beginnings.

    Example: first_expert=2, C=2, M=4, of rank 0 ids [3, 0], rows_in_expert [1, 0], offsets[0, 3] 2: rows [4 + 2 + 1, -1] = [7, -1].
    """
    rows_in_expert, ids = entries[:, 0].long(), entries[:, 1].long()
    experts = offsets.shape[1] // offsets.shape[0]
    local = ids - first_expert
    placed = (rows_in_expert >= 0) & (rows_in_expert < limit) & (local >= 0) & (local < experts)
    row = offsets.long().gather(1, torch.where(placed, ids, 0).flatten(1)).view(ids.shape) + rows_in_expert
    rows.copy_(torch.where(placed & (row < capacity), row if ragged else local * capacity + row, -1))
    weights.copy_(entries[:, 2].contiguous().view(torch.float32))


def weighted_sum(expert_output: Tensor, rows: Tensor, topk_weights: Tensor | None) -> Tensor:
    """(T, H) float32; see `combine`."""
    acc = torch.zeros(rows.shape[0], expert_output.shape[1], dtype=torch.float32, device=rows.device)
    for k in range(rows.shape[1]):
        token = (rows[:, k] >= 0).nonzero().flatten()
        product = expert_output[rows[token, k].long()].float()
        if topk_weights is not None:
            product = topk_weights[token, k].float().unsqueeze(1) * product
        # once for each token
        acc.index_add_(0, token, product)
    return acc


def presum(expert_output: Tensor, rows: Tensor, topk_weights: Tensor, out: Tensor) -> None:
    """`reduce="per_rank"`: what one rank's rows contribute to each token, by the arithmetic of `combine`, rounded to out's type.

    expert_output: (R, H) rows of this rank. rows: (N, K) int32 indices into them, -1 for absent. topk_weights: (N, K). out: (N, H)
    bfloat16; a token without a row here is not written.
    """
    present = (rows >= 0).any(1)
    out[present] = weighted_sum(expert_output, rows[present], topk_weights[present]).to(out.dtype)


def combine(expert_output: Tensor, rows: Tensor, topk_weights: Tensor | None, out: Tensor) -> None:
    """Sums each token's expert rows by their weights: over k in order, `acc = acc + weight * row` in float32, the product rounded
    before the addition, rounded once to out's type. Absent entries are skipped, never multiplied by zero.

    expert_output: (R, H) rows. rows: (T, K) int32 indices into them, -1 for absent. topk_weights: (T, K), or None for a sum without
    weights: that of the ranks' partial sums, where K is W. out: (T, H), written.
    """
    out.copy_(weighted_sum(expert_output, rows, topk_weights))


def combine_per_rank(expert_output: Tensor, rows: Tensor, topk_weights: Tensor, rows_per_rank: int, out: Tensor) -> None:
    """All of `reduce="per_rank"`, as if one process had every rank's rows: `presum` for each rank, then `combine` of the partial sums in
    rank order.

    As `combine`'s arguments; rank w has rows w * rows_per_rank .. (w + 1) * rows_per_rank - 1 of expert_output.

    Example: rows_per_rank=2, rows[t] [3, 0, 2]: (0 + bf16(w1 * y[0])) + bf16(w0 * y[3] + w2 * y[2]).
    """
    tokens, ranks = rows.shape[0], expert_output.shape[0] // rows_per_rank
    sums = torch.empty(ranks, *out.shape, dtype=torch.bfloat16, device=out.device)
    partials = torch.full((tokens, ranks), -1, dtype=torch.int32, device=out.device)
    for rank in range(ranks):
        here = (rows >= rank * rows_per_rank) & (rows < (rank + 1) * rows_per_rank)
        presum(expert_output, torch.where(here, rows, -1), topk_weights, sums[rank])
        held = here.any(1)
        partials[held, rank] = (rank * tokens + held.nonzero().flatten()).int()
    combine(sums.flatten(0, 1), partials, None, out)
