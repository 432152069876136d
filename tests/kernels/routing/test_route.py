"""Route's rows_in_expert and counts, against hand-worked cases and the reference, which is checked against a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile_case import cases, empty
from moequant import ops, reference
from moequant.testing import assert_bit_equal, poison, routing
from operation_case import integers, small_counts


def run_route(function, ids, experts, capacity=None):
    rows_in_expert = poison(torch.empty(ids.shape, dtype=torch.int32, device=ids.device))
    counts, num_tokens = (poison(torch.empty(experts, dtype=torch.int32, device=ids.device)) for _ in range(2))
    status = torch.zeros(2, dtype=torch.int64, device=ids.device)
    function(ids, rows_in_expert, counts, capacity, num_tokens, status)
    return rows_in_expert, counts, num_tokens, status


def kernel(*args):
    from moequant.kernels.routing.route import route

    route(*args)


@pytest.mark.parametrize("function", [reference.route, kernel], ids=["reference", "kernel"])
def test_the_worked_example(function, device):
    ids = torch.tensor([[2, 0], [0, -1], [2, 2], [7, -5]], device=device)
    rows_in_expert, counts, num_tokens, status = run_route(function, ids, 3, 2)
    assert rows_in_expert.tolist() == [[0, 0], [1, -1], [1, 2], [-1, -1]]
    assert counts.tolist() == [2, 0, 3]
    assert num_tokens.tolist() == [2, 0, 2]
    assert status.tolist() == [2, 1]


def test_the_reference_counts_as_a_loop_does():
    ids = torch.randint(-1, 5, (40, 3))
    rows_in_expert, counts, _, _ = run_route(reference.route, ids, 5)
    seen = [0] * 5
    for entry, slot in zip(ids.flatten().tolist(), rows_in_expert.flatten().tolist(), strict=True):
        assert slot == (-1 if entry < 0 else seen[entry])
        if entry >= 0:
            seen[entry] += 1
    assert counts.tolist() == seen


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"),
    [
        (0, 2, 4, "uniform"),
        (1, 1, 1, "uniform"),
        (7, 3, 5, "uniform"),
        (64, 8, 9, "one-hot"),
        (300, 4, 6, "zipf:1.2"),
        (700, 8, 12, "uniform"),
    ],
)
def test_the_kernel_matches_the_reference(tokens, top_k, experts, kind, dtype, device):
    ids = routing(tokens, top_k, experts, kind)[0].to(device, dtype)
    ids[torch.rand(ids.shape, device=device) < 0.1] = -1
    for result, expected in zip(run_route(kernel, ids, experts, 20), run_route(reference.route, ids, experts, 20), strict=True):
        assert_bit_equal(result, expected)


def test_hostile_ids_are_counted_and_go_nowhere(device):
    ids = torch.tensor([[2**31, -(2**40), 3], [2**63 - 1, -2, 0], [4, -1, 3]], dtype=torch.int64, device=device)
    for function in (kernel, reference.route):
        rows_in_expert, counts, _, status = run_route(function, ids, 4)
        assert rows_in_expert.tolist() == [[-1, -1, 0], [-1, -1, 0], [-1, -1, 1]]
        assert counts.tolist() == [1, 0, 0, 2]
        assert status.tolist() == [5, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 4096, 30000])
def test_large_routings_match_the_reference_on_the_gpu(tokens):
    ids = routing(tokens, 8, 256, "zipf:0.8")[0].cuda()
    for result, expected in zip(run_route(kernel, ids, 256, 999), run_route(reference.route, ids, 256, 999), strict=True):
        assert_bit_equal(result, expected)


def call_route(ids: torch.dtype = torch.int64, capacity: int | None = None) -> None:
    topk_ids, rows_in_expert = empty(128, 8, dtype=ids), empty(128, 8, dtype=torch.int32)
    counts, num_tokens = empty(256, dtype=torch.int32), empty(256, dtype=torch.int32)
    ops.route(topk_ids, rows_in_expert, counts, capacity, num_tokens, empty(2, dtype=torch.int64))


COMPILE_CASES = cases(call_route, {}, {"ids": torch.int32}, {"capacity": 1024}, wide=False)


def route_arguments(*optional: Any) -> tuple:
    return integers([1, 0], [-1, 1], [9, 0]), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), *optional


OPERATION_CASES = {
    "route": {
        "all outputs": lambda: route_arguments(1, small_counts(), torch.zeros(2, dtype=torch.int64)),
        "rows_in_expert and counts": route_arguments,
        "ragged": lambda: route_arguments(16, small_counts(), torch.zeros(2, dtype=torch.int64), small_counts()),
    },
}
