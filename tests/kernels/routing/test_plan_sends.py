"""The packed exchange's index work: worked examples, and kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from compile_case import cases, empty
from moequant import ops, reference
from moequant.testing import assert_bit_equal, poison, routing
from operation_case import integers, small_counts


def kernels(name):
    from moequant.kernels.routing import plan_sends

    return getattr(plan_sends, name)


def run_sends(function, ids, local_experts, ranks):
    send_tokens = torch.full((ranks, ids.shape[0] + 3), -7, dtype=torch.int32, device=ids.device)
    send_counts = poison(torch.empty(ranks, dtype=torch.int32, device=ids.device))
    function(ids, local_experts, send_tokens, send_counts)
    return send_tokens, send_counts


def run_returns(function, ids, rows_in_expert, offsets, capacity, local_experts, starts):
    rows = poison(torch.empty_like(rows_in_expert))
    function(ids, rows_in_expert, offsets, capacity, local_experts, starts, rows)
    return rows


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_the_worked_examples(backend, device):
    sends, returns = (getattr(reference, n) if backend == "reference" else kernels(n) for n in ("plan_sends", "plan_returns"))
    send_tokens, send_counts = run_sends(sends, torch.tensor([[0, 1], [3, -1], [1, 2]], device=device), 2, 2)
    assert send_tokens.tolist() == [[0, 2, -7, -7, -7, -7], [1, 2, -7, -7, -7, -7]] and send_counts.tolist() == [2, 2]
    rows = run_returns(
        returns,
        torch.tensor([[0, 1], [3, 1]], device=device),
        torch.tensor([[0, 0], [0, 1]], dtype=torch.int32, device=device),
        torch.zeros(4, dtype=torch.int32, device=device),
        1,
        2,
        torch.tensor([0, 2], dtype=torch.int32, device=device),
    )
    assert rows.tolist() == [[0, 1], [2, -1]]


@pytest.mark.parametrize(
    ("tokens", "top_k", "local_experts", "ranks"), [(0, 2, 2, 2), (5, 1, 1, 3), (700, 6, 4, 2), (300, 9, 5, 4)]
)
def test_the_kernels_match_the_reference(tokens, top_k, local_experts, ranks, device):
    experts = local_experts * ranks
    ids = routing(tokens, min(top_k, experts), experts)[0].to(device)
    ids[torch.rand(ids.shape, device=device) < 0.2] = -1
    ids[torch.rand(ids.shape, device=device) < 0.05] = experts + 1
    sends = [run_sends(function, ids, local_experts, ranks) for function in (kernels("plan_sends"), reference.plan_sends)]
    for result, expected in zip(*sends, strict=True):
        assert_bit_equal(result, expected)
    rows_in_expert = torch.empty(ids.shape, dtype=torch.int32, device=device)
    reference.route(ids, rows_in_expert, torch.empty(experts, dtype=torch.int32, device=device))
    offsets = torch.randint(0, 20, (experts,), dtype=torch.int32, device=device)
    starts = torch.arange(ranks, dtype=torch.int32, device=device) * 10_000
    returns = [
        run_returns(function, ids, rows_in_expert, offsets, 25, local_experts, starts)
        for function in (kernels("plan_returns"), reference.plan_returns)
    ]
    assert_bit_equal(returns[0], returns[1])


def call_plan_sends() -> None:
    topk_ids, rows_in_expert, rows = (
        empty(128, 8, dtype=torch.int64),
        empty(128, 8, dtype=torch.int32),
        empty(128, 8, dtype=torch.int32),
    )
    counts, offsets = empty(8, dtype=torch.int32), empty(256, dtype=torch.int32)
    ops.plan_sends(topk_ids, 32, empty(8, 128, dtype=torch.int32), counts)
    ops.plan_returns(topk_ids, rows_in_expert, offsets, 1024, 32, counts, rows)


COMPILE_CASES = cases(call_plan_sends, {}, wide=False)


OPERATION_CASES = {
    "plan_sends": {
        "one rank's list is empty": lambda: (
            integers([0, 1], [3, -1], [1, 2]),
            2,
            torch.zeros(3, 4, dtype=torch.int32),
            small_counts(3),
        )
    },
    "plan_returns": {
        "without room for one": lambda: (
            integers([0, 1], [3, 1]),
            integers([0, 0], [0, 1]),
            small_counts(4),
            1,
            2,
            torch.tensor([0, 2], dtype=torch.int32),
            integers([9, 9], [9, 9]),
        )
    },
}
