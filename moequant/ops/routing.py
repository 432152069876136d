"""Where rows go, and how they get there and back."""

from __future__ import annotations

from torch import Tensor

from moequant import reference
from moequant.config import ROW_ALIGNMENT
from moequant.ops.quantization import quant_spec
from moequant.ops.registration import registered, uses_kernels

__all__ = [
    "combine",
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

# of rows that one source rank can send
NO_LIMIT = 2**31 - 1


@registered(mutates=("rows_in_expert", "counts", "num_tokens", "status", "expert_start"))
def route(
    topk_ids: Tensor,
    rows_in_expert: Tensor,
    counts: Tensor,
    capacity: int | None = None,
    num_tokens: Tensor | None = None,
    status: Tensor | None = None,
    expert_start: Tensor | None = None,
) -> None:
    """`reference.route` into given outputs; the number of experts is counts.shape[0]."""
    if not uses_kernels(topk_ids):
        reference.route(topk_ids, rows_in_expert, counts, capacity, num_tokens, status, expert_start)
        return
    from moequant.kernels.routing.route import route as kernel

    if expert_start is None:
        kernel(topk_ids, rows_in_expert, counts, capacity, num_tokens, status)
        return
    from moequant.kernels.routing.ragged_rows import ragged_rows

    assert capacity is not None and num_tokens is not None
    kernel(topk_ids, rows_in_expert, counts, status=status)
    ragged_rows(counts[None], 0, capacity, NO_LIMIT, None, num_tokens, status, expert_start, ROW_ALIGNMENT)


@registered(mutates=("offsets", "num_tokens", "status", "expert_start"))
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
    """`reference.expert_offsets`."""
    arguments = counts, first_expert, capacity, rows_per_source, offsets, num_tokens, status
    if not uses_kernels(counts):
        reference.expert_offsets(*arguments, expert_start)
    elif expert_start is None:
        from moequant.kernels.routing.expert_offsets import expert_offsets as kernel

        kernel(*arguments)
    else:
        from moequant.kernels.routing.ragged_rows import ragged_rows

        ragged_rows(*arguments, expert_start, ROW_ALIGNMENT)


@registered(mutates=("status",))
def count_mismatched(words: Tensor, rank: int, status: Tensor) -> None:
    """`reference.count_mismatched`."""
    if not uses_kernels(words):
        reference.count_mismatched(words, rank, status)
        return
    from moequant.kernels.routing.count_mismatched import count_mismatched as kernel

    kernel(words, rank, status)


@registered(mutates=("send_tokens", "send_counts"))
def plan_sends(topk_ids: Tensor, local_experts: int, send_tokens: Tensor, send_counts: Tensor) -> None:
    """`reference.plan_sends`."""
    if not uses_kernels(topk_ids):
        reference.plan_sends(topk_ids, local_experts, send_tokens, send_counts)
        return
    from moequant.kernels.routing.plan_sends import plan_sends as kernel

    kernel(topk_ids, local_experts, send_tokens, send_counts)


@registered(mutates=("rows",))
def plan_returns(
    topk_ids: Tensor, rows_in_expert: Tensor, offsets: Tensor, capacity: int, local_experts: int, starts: Tensor, rows: Tensor
) -> None:
    """`reference.plan_returns`."""
    if not uses_kernels(topk_ids):
        reference.plan_returns(topk_ids, rows_in_expert, offsets, capacity, local_experts, starts, rows)
        return
    from moequant.kernels.routing.plan_sends import plan_returns as kernel

    kernel(topk_ids, rows_in_expert, offsets, capacity, local_experts, starts, rows)


@registered(mutates=("values", "scales", "rows", "sources"))
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
    """`reference.scatter`."""
    arguments = x, topk_ids, rows_in_expert, values, scales, x_scales, rows, sources, row_sources, offsets, capacity
    if not uses_kernels(x):
        reference.scatter(*arguments, recipe, expert_start)
        return
    from moequant.kernels.routing.scatter import scatter as kernel

    spec = quant_spec(values.dtype, recipe) if scales is not None else None
    kernel(*arguments, spec, expert_start)


@registered(mutates=("padded", "merged", "merged_scales", "merged_sources"))
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
    """`reference.move_source_rows`."""
    if not uses_kernels(padded):
        move = reference.move_source_rows
    else:
        from moequant.kernels.routing.move_source_rows import move_source_rows as move

    move(
        padded,
        merged,
        offsets,
        counts,
        to_merged,
        padded_scales,
        merged_scales,
        padded_sources,
        merged_sources,
    )


@registered(mutates=("partials",))
def plan_rank_sums(
    topk_ids: Tensor, rows: Tensor, local_experts: int, stride: int, partials: Tensor, starts: Tensor | None = None
) -> None:
    """`reference.plan_rank_sums`."""
    if not uses_kernels(topk_ids):
        reference.plan_rank_sums(topk_ids, rows, local_experts, stride, partials, starts)
        return
    from moequant.kernels.routing.rank_sums import plan_rank_sums as kernel

    kernel(topk_ids, rows, local_experts, stride, partials, starts)


@registered(mutates=("rows", "weights"))
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
    """`reference.locate_entries`."""
    if not uses_kernels(entries):
        reference.locate_entries(entries, offsets, first_expert, limit, capacity, rows, weights, ragged)
        return
    from moequant.kernels.routing.rank_sums import locate_entries as kernel

    kernel(entries, offsets, first_expert, limit, capacity, rows, weights, ragged)


@registered(mutates=("out",))
def presum(expert_output: Tensor, rows: Tensor, topk_weights: Tensor, out: Tensor) -> None:
    """`reference.presum`."""
    if not uses_kernels(expert_output):
        reference.presum(expert_output, rows, topk_weights, out)
        return
    from moequant.kernels.routing.combine import presum as kernel

    kernel(expert_output, rows, topk_weights, out)


@registered(mutates=("out",))
def combine(expert_output: Tensor, rows: Tensor, topk_weights: Tensor | None, out: Tensor) -> None:
    """`reference.combine`."""
    if not uses_kernels(expert_output):
        reference.combine(expert_output, rows, topk_weights, out)
        return
    from moequant.kernels.routing.combine import combine as kernel

    kernel(expert_output, rows, topk_weights, out)
