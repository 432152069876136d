"""Offsets of source ranks, against the worked example and the reference."""

from __future__ import annotations

import pytest
import torch

from compile_case import cases, empty
from moequant import ops, reference
from moequant.testing import assert_bit_equal, poison
from operation_case import integers, small_counts


def run_offsets(function, counts, first, local, capacity, limit):
    offsets = poison(torch.empty_like(counts))
    num_tokens = poison(torch.empty(local, dtype=torch.int32, device=counts.device))
    status = torch.zeros(3, dtype=torch.int64, device=counts.device)
    function(counts, first, capacity, limit, offsets, num_tokens, status)
    return offsets, num_tokens, status


def kernel(*args):
    from moequant.kernels.routing.expert_offsets import expert_offsets

    expert_offsets(*args)


@pytest.mark.parametrize("function", [reference.expert_offsets, kernel], ids=["reference", "kernel"])
def test_the_worked_example(function, device):
    counts = torch.tensor([[3], [6]], dtype=torch.int32, device=device)
    offsets, num_tokens, status = run_offsets(function, counts, 0, 1, capacity=5, limit=4)
    assert offsets.tolist() == [[0], [3]]
    assert num_tokens.tolist() == [5]
    assert status.tolist() == [0, 4, 0]


@pytest.mark.parametrize(("ranks", "experts"), [(1, 3), (2, 130), (8, 256), (5, 20)])
def test_the_kernel_matches_the_reference(ranks, experts, device):
    counts = torch.randint(0, 50, (ranks, experts), dtype=torch.int32, device=device)
    local = experts // ranks
    first = (ranks - 1) * local
    for capacity, limit in ((10**6, 10**6), (60, 40), (1, 2**31 - 1)):
        results = [run_offsets(function, counts, first, local, capacity, limit) for function in (kernel, reference.expert_offsets)]
        for result, expected in zip(*results, strict=True):
            assert_bit_equal(result, expected)


def call_expert_offsets() -> None:
    counts, offsets = empty(8, 256, dtype=torch.int32), empty(8, 256, dtype=torch.int32)
    ops.expert_offsets(counts, 32, 1024, 128, offsets, empty(32, dtype=torch.int32), empty(3, dtype=torch.int64))


COMPILE_CASES = cases(call_expert_offsets, {}, wide=False)


OPERATION_CASES = {
    "expert_offsets": {
        "with status": lambda: (
            integers([3, 1], [6, 0]),
            0,
            5,
            4,
            integers([0, 0], [0, 0]),
            small_counts(),
            torch.zeros(2, dtype=torch.int64),
        ),
        "ragged": lambda: (
            integers([3, 1], [6, 0]),
            0,
            16,
            4,
            integers([0, 0], [0, 0]),
            small_counts(1),
            torch.zeros(2, dtype=torch.int64),
            small_counts(1),
        ),
        "without status": lambda: (integers([3, 1], [6, 0]), 1, 5, 4, integers([0, 0], [0, 0]), small_counts(1)),
    },
}
