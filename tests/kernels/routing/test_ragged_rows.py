"""Layout "ragged": where experts' and source ranks' rows start, against worked examples, a loop and the reference."""

from __future__ import annotations

import pytest
import torch

from compile_case import cases, empty
from moequant import ops, reference
from moequant.config import ROW_ALIGNMENT
from moequant.reference.routing import ragged_rows
from moequant.testing import assert_bit_equal, poison, routing


def run_offsets(function, counts, first, local, capacity, limit):
    offsets = poison(torch.empty_like(counts))
    num_tokens, starts = (poison(torch.empty(local, dtype=torch.int32, device=counts.device)) for _ in range(2))
    status = torch.zeros(3, dtype=torch.int64, device=counts.device)
    function(counts, first, capacity, limit, offsets, num_tokens, status, starts)
    return offsets, num_tokens, starts, status


def kernel(*args):
    from moequant.kernels.routing.ragged_rows import ragged_rows

    ragged_rows(*args, alignment=ROW_ALIGNMENT)


@pytest.mark.parametrize("function", [reference.expert_offsets, kernel], ids=["reference", "kernel"])
def test_the_worked_example(function, device):
    counts = torch.tensor([[3, 1], [4, 20]], dtype=torch.int32, device=device)
    # both experts are rank 0's: of one rank there is one row of counts, of two there are four experts
    counts = torch.cat((counts, torch.zeros_like(counts)), 1)
    offsets, num_tokens, starts, status = run_offsets(function, counts, 0, 2, capacity=32, limit=100)
    assert offsets.tolist() == [[0, 16, 0, 0], [3, 17, 0, 0]]
    assert num_tokens.tolist() == [7, 16] and starts.tolist() == [0, 16]
    assert status.tolist() == [0, 5, 0]


def test_the_reference_places_as_a_loop_does():
    for capacity in (16, 48, 96, 10_000):
        counts = torch.randint(0, 40, (9,), dtype=torch.int32)
        starts, placed = ragged_rows(counts, capacity)
        row = 0
        for expert, count in enumerate(counts.tolist()):
            assert (starts[expert], placed[expert]) == (row, max(0, min(count, capacity - row)))
            row = min(capacity, (row + count + 15) // 16 * 16)


def test_no_row_of_an_expert_is_anothers_nor_past_the_end():
    for capacity in (16, 64, 1024):
        starts, placed = ragged_rows(torch.randint(0, 60, (20,), dtype=torch.int32), capacity)
        ends = starts + placed
        assert (ends[:-1] <= starts[1:]).all() and ends.max() <= capacity and (starts % 16 == 0).all()


@pytest.mark.parametrize(("ranks", "experts"), [(1, 3), (2, 260), (8, 256), (5, 20), (3, 3)])
def test_the_kernel_matches_the_reference(ranks, experts, device):
    counts = torch.randint(0, 50, (ranks, experts), dtype=torch.int32, device=device)
    counts[:, ::3] = 0
    local = experts // ranks
    for rank in {0, ranks - 1}:
        for capacity, limit in ((10**6, 10**6), (160, 40), (16, 2**31 - 1)):
            results = [
                run_offsets(function, counts, rank * local, local, capacity, limit)
                for function in (kernel, reference.expert_offsets)
            ]
            for result, expected in zip(*results, strict=True):
                assert_bit_equal(result, expected)


def test_counts_that_int32_can_not_add_up_leave_later_experts_without_rows(device):
    counts = torch.full((1, 200), 2**30, dtype=torch.int32, device=device)
    for function in (kernel, reference.expert_offsets):
        _, num_tokens, starts, status = run_offsets(function, counts, 0, 200, 2**31 - 16, 2**31 - 1)
        assert starts.tolist() == [0, 2**30, *[2**31 - 16] * 198]
        assert num_tokens.tolist() == [2**30, 2**30 - 16, *[0] * 198]
        assert status.tolist() == [0, 198 * 2**30 + 16, 0]


@pytest.mark.parametrize("capacity", [16, 64, 4096])
def test_route_places_as_the_reference_does(capacity, both_paths):
    ids = routing(100, 3, 7)[0]
    ids[torch.rand(ids.shape) < 0.1] = -1
    ids[0, 0] = 99
    rows_in_expert, results = torch.empty(ids.shape, dtype=torch.int32), []
    for function in (ops.route, reference.route):
        counts, num_tokens, starts = (poison(torch.empty(7, dtype=torch.int32)) for _ in range(3))
        status = torch.zeros(3, dtype=torch.int64)
        function(ids, rows_in_expert, counts, capacity, num_tokens, status, starts)
        results.append((rows_in_expert.clone(), counts, num_tokens, starts, status))
    for result, expected in zip(*results, strict=True):
        assert_bit_equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks, local", [(1, 256), (8, 32), (64, 6)])
def test_model_sizes_match_the_reference_on_the_gpu(ranks, local):
    counts = torch.randint(0, 900, (ranks, ranks * local), dtype=torch.int32, device="cuda")
    for capacity in (2**20, 4096):
        results = [run_offsets(function, counts, 0, local, capacity, 800) for function in (kernel, reference.expert_offsets)]
        for result, expected in zip(*results, strict=True):
            assert_bit_equal(result, expected)


def call_ragged_rows(ranks: int) -> None:
    experts, status = empty(ranks, 256, dtype=torch.int32), empty(3, dtype=torch.int64)
    num_tokens, starts = (empty(256 // ranks, dtype=torch.int32) for _ in range(2))
    if ranks > 1:
        ops.expert_offsets(experts, 32, 8192, 128, empty(ranks, 256, dtype=torch.int32), num_tokens, status, starts)
        return
    topk_ids, rows_in_expert = empty(128, 8, dtype=torch.int64), empty(128, 8, dtype=torch.int32)
    ops.route(topk_ids, rows_in_expert, experts[0], 8192, num_tokens, status, starts)


COMPILE_CASES = cases(call_ragged_rows, {"ranks": 1}, {"ranks": 8}, wide=False)
