"""`reduce="per_rank"`: the index work, as the reference does it."""

from __future__ import annotations

import pytest
import torch

from compile_case import cases, empty
from moequant import ops, reference
from moequant.testing import assert_bit_equal, poison
from operation_case import integers, small_counts


@pytest.mark.parametrize(
    "tokens, top_k, ranks, local, dtype", [(0, 2, 2, 1, torch.int64), (5, 1, 1, 3, torch.int32), (700, 6, 4, 3, torch.int64)]
)
@pytest.mark.parametrize("listed", [False, True])
def test_partials_match_the_reference(tokens, top_k, ranks, local, dtype, listed, device):
    from moequant.kernels.routing.rank_sums import plan_rank_sums

    # some ids lie out of range, one far
    ids = torch.randint(-2, ranks * local + 2, (tokens, top_k), dtype=dtype, device=device)
    if tokens and dtype == torch.int64:
        ids[0, 0] = 2**32
    rows = torch.where((ids >= 0) & (torch.rand(ids.shape, device=device) < 0.7), ids, -1).int()
    starts = torch.arange(ranks, dtype=torch.int32, device=device) * 1000 if listed else None
    results = [poison(torch.empty(tokens, ranks, dtype=torch.int32, device=device)) for _ in range(2)]
    plan_rank_sums(ids, rows, local, 800, results[0], starts)
    reference.plan_rank_sums(ids, rows, local, 800, results[1], starts)
    assert_bit_equal(results[0], results[1])


@pytest.mark.parametrize("tokens, top_k, ranks, local", [(3, 2, 2, 1), (300, 6, 3, 4)])
@pytest.mark.parametrize("ragged", [False, True])
def test_located_entries_match_the_reference(tokens, top_k, ranks, local, ragged, device):
    from moequant.kernels.routing.rank_sums import locate_entries

    # rows of a wider buffer, as counts stand before them
    wide = torch.randint(-1, ranks * local, (ranks, 5 + 3 * tokens * top_k), dtype=torch.int32, device=device)
    entries = wide[:, 5:].unflatten(1, (3, tokens, top_k))
    # whatever stands where there is no row
    entries[:, 1] = torch.where(entries[:, 0] >= 0, entries[:, 1].clamp_min(0), 2**30)
    offsets = torch.randint(0, 9, (ranks, ranks * local), dtype=torch.int32, device=device)
    shape = ranks, tokens, top_k
    results = [
        (poison(torch.empty(shape, dtype=torch.int32, device=device)), poison(torch.empty(shape, device=device))) for _ in range(2)
    ]
    locate_entries(entries, offsets, local, 3, 8, *results[0], ragged)
    reference.locate_entries(entries, offsets, local, 3, 8, *results[1], ragged)
    assert_bit_equal(results[0][0], results[1][0])
    assert_bit_equal(results[0][1], results[1][1])


def call_partials(listed: bool) -> None:
    ids, rows = empty(128, 8, dtype=torch.int64), empty(128, 8, dtype=torch.int32)
    starts = empty(8, dtype=torch.int32) if listed else None
    ops.plan_rank_sums(ids, rows, 32, 128, empty(128, 8, dtype=torch.int32), starts)
    entries, offsets = empty(8, 3, 128, 8, dtype=torch.int32), empty(8, 256, dtype=torch.int32)
    shape = 8, 128, 8
    for ragged in (False, True):
        rows, weights = empty(*shape, dtype=torch.int32), empty(*shape, dtype=torch.float32)
        ops.locate_entries(entries, offsets, 32, 128, 1024, rows, weights, ragged)


COMPILE_CASES = cases(call_partials, {"listed": False}, {"listed": True}, wide=False)


OPERATION_CASES = {
    "plan_rank_sums": {
        "by rank": lambda: (integers([0, 1], [3, -1]), integers([0, -1], [7, -1]), 2, 5, integers([9, 9], [9, 9])),
        "listed": lambda: (integers([0, 1], [3, 2]), integers([0, -1], [7, 1]), 2, 0, integers([9, 9], [9, 9]), small_counts()),
    },
    "locate_entries": {
        "of one rank": lambda: (
            integers([[[0, 1]], [[0, 0]], [[3, 4]]]),
            integers([1]),
            0,
            2,
            3,
            integers([[9, 9]]),
            torch.full((1, 1, 2), 9.0),
        )
    },
}
