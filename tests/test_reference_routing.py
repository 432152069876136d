"""The reference's routing, placement and combine against cases worked by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

from moequant import reference
from moequant.testing import assert_bit_equal, poison


def route(ids: list[list[int]], experts: int, capacity: int | None = None):
    topk_ids = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    rows_in_expert = poison(torch.empty(topk_ids.shape, dtype=torch.int32))
    counts, num_tokens = (poison(torch.empty(experts, dtype=torch.int32)) for _ in range(2))
    status = torch.tensor([10, 100])
    reference.route(topk_ids, rows_in_expert, counts, capacity, num_tokens, status)
    return rows_in_expert.tolist(), counts.tolist(), num_tokens.tolist(), status.tolist()


def test_route_numbers_rows_in_the_order_of_token_and_k():
    assert route([[2, 0], [0, -1], [2, 2]], 3) == ([[0, 0], [1, -1], [1, 2]], [2, 0, 3], [2, 0, 3], [10, 100])


def test_route_limits_counts_and_reports_what_is_past_capacity():
    assert route([[0, 1], [0, 1], [0, 2]], 3, capacity=2) == ([[0, 0], [1, 1], [2, 0]], [3, 2, 1], [2, 2, 1], [10, 101])


def test_route_counts_ids_out_of_range_and_gives_them_no_slot():
    assert route([[3, 0], [-2, 1], [-1, 2**40]], 3) == ([[-1, 0], [-1, 0], [-1, -1]], [1, 1, 0], [1, 1, 0], [13, 100])


def test_route_of_no_tokens_counts_none():
    assert route([], 2)[1:] == ([0, 0], [0, 0], [10, 100])


def test_offsets_are_the_rows_of_lower_ranks_cut_to_what_they_sent():
    counts = torch.tensor([[3, 0, 1, 2], [6, 1, 0, 2], [2, 1, 1, 2]], dtype=torch.int32)
    offsets, num_tokens = torch.empty_like(counts), torch.empty(2, dtype=torch.int32)
    status = torch.tensor([1, 10])
    reference.expert_offsets(counts, 2, 5, 4, offsets, num_tokens, status)
    assert offsets.tolist() == [[0, 0, 0, 0], [3, 0, 1, 2], [7, 1, 1, 4]]
    # experts 2 and 3 are the local ones; 11 - 5 rows of expert 0 and 6 - 5 of expert 3 have no place
    assert num_tokens.tolist() == [2, 5] and status.tolist() == [1, 17]


def test_ragged_offsets_are_rows_of_a_ranks_buffer_behind_the_experts_before():
    # two ranks of two experts with room for 32 rows; rank 1 sends 4 of its 6 rows of expert 0
    counts = torch.tensor([[3, 0, 1, 20], [6, 1, 0, 2]], dtype=torch.int32)
    offsets, (num_tokens, starts) = torch.empty_like(counts), (torch.empty(2, dtype=torch.int32) for _ in range(2))
    status = torch.tensor([1, 10])
    reference.expert_offsets(counts, 2, 32, 4, offsets, num_tokens, status, starts)
    assert offsets.tolist() == [[0, 16, 0, 16], [3, 16, 1, 20]]
    assert num_tokens.tolist() == [1, 6] and starts.tolist() == [0, 16]
    # 2 rows of expert 0 and 16 of expert 3 were more than C
    assert status.tolist() == [1, 28]
    reference.expert_offsets(counts, 0, 16, 100, offsets, num_tokens, status, starts)
    assert offsets.tolist() == [[0, 16, 0, 16], [3, 16, 1, 36]]
    assert num_tokens.tolist() == [9, 0] and starts.tolist() == [0, 16] and status.tolist() == [1, 28 + 1 + 22]


def test_the_packed_exchange_lists_each_token_once_a_rank_and_numbers_returns_by_rank():
    # 3 ranks of 2 experts with room for 2 rows; expert 1 already has one row of a lower rank, so its second row of ours has no room
    ids, rows_in_expert = torch.tensor([[1, 0], [5, 1], [-1, 4]]), torch.tensor([[0, 0], [0, 1], [-1, 0]], dtype=torch.int32)
    tokens, counts = torch.full((3, 4), -9, dtype=torch.int32), poison(torch.empty(3, dtype=torch.int32))
    reference.plan_sends(ids, 2, tokens, counts)
    assert tokens.tolist() == [[0, 1, -9, -9], [-9] * 4, [1, 2, -9, -9]] and counts.tolist() == [2, 0, 2]
    offsets, starts = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 0, 0, 0, 0], [0, 2, 2]))
    rows = poison(torch.empty(3, 2, dtype=torch.int32))
    reference.plan_returns(ids, rows_in_expert, offsets, 2, 2, starts, rows)
    assert rows.tolist() == [[0, 1], [2, -1], [-1, 3]]


def test_scatter_places_converted_rows_and_says_where_they_came_from():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ids, rows_in_expert = torch.tensor([[1, 0], [-1, 1]]), torch.tensor([[0, 0], [-1, 1]], dtype=torch.int32)
    values = torch.full((2, 3, 2), 9.0, dtype=torch.bfloat16)
    rows, sources = torch.empty(2, 2, dtype=torch.int32), torch.full((2, 3), -7)
    reference.scatter(x, ids, rows_in_expert, values, rows=rows, sources=sources)
    assert values.tolist() == [[[1, 2], [9, 9], [9, 9]], [[1, 2], [3, 4], [9, 9]]]
    assert rows.tolist() == [[3, 0], [-1, 4]]
    assert sources.tolist() == [[1, -7, -7], [0, 3, -7]]


def test_scatter_quantizes_rows_or_copies_quantized_ones_with_their_scales():
    x = torch.tensor([[448.0, 1.0], [2.0, -1.0]])
    ids, rows_in_expert = torch.tensor([[0], [0]]), torch.tensor([[1], [0]], dtype=torch.int32)
    values, scales = torch.zeros(1, 2, 2, dtype=torch.float8_e4m3fn), torch.zeros(1, 2, 1)
    reference.scatter(x, ids, rows_in_expert, values, scales, recipe="ue8m0")
    # 2 / 448 lies below 2**-7, by which 2 is 256 and -1 is -128
    assert values.float().tolist() == [[[256, -128], [448, 1]]] and scales.flatten().tolist() == [2**-7, 1.0]
    copied, copied_scales = torch.zeros_like(values), torch.zeros_like(scales)
    quantized = torch.tensor([[5.0, 6.0], [7.0, 8.0]]).to(torch.float8_e4m3fn)
    reference.scatter(quantized, ids, rows_in_expert, copied, copied_scales, x_scales=torch.tensor([[3.0], [4.0]]))
    assert copied.float().tolist() == [[[7, 8], [5, 6]]] and copied_scales.flatten().tolist() == [4, 3]


def test_scatter_skips_other_ranks_experts_full_buffers_and_rows_past_capacity():
    x, ids = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0, -2], [1, 0], [0, 2]])
    rows_in_expert = torch.tensor([[0, 0], [0, 1], [2, 0]], dtype=torch.int32)
    values, rows = torch.zeros(2, 2, 1), torch.empty(3, 2, dtype=torch.int32)
    reference.scatter(x, ids, rows_in_expert, values, rows=rows)
    assert rows.tolist() == [[0, -1], [2, 1], [-1, -1]] and values.flatten().tolist() == [1, 2, 2, 0]
    offsets = torch.tensor([3, 4, 0], dtype=torch.int32)
    reference.scatter(x, ids, rows_in_expert, values.zero_(), rows=rows, offsets=offsets, capacity=4)
    assert rows.tolist() == [[0, -1], [-1, -1], [-1, -1]] and values.flatten().tolist() == [1, 0, 0, 0]


def test_scatter_takes_source_numbers_that_are_given():
    sources = torch.zeros(1, 2, dtype=torch.int32)
    ids, rows_in_expert = torch.tensor([[0, -1], [-1, 0]]), torch.tensor([[0, -1], [-1, 1]], dtype=torch.int32)
    reference.scatter(
        torch.ones(2, 1), ids, rows_in_expert, torch.zeros(1, 2, 1), sources=sources, row_sources=torch.tensor([40, 60])
    )
    assert sources.tolist() == [[40, 61]]


def test_moving_source_rows_closes_the_gaps_and_opens_them_again():
    # W=2, E=2, of which expert 1 is local, C=3, M=4: the second rank's third row falls off the end
    padded = torch.arange(6, dtype=torch.int8).view(2, 1, 3, 1)
    counts = torch.tensor([[9, 2], [9, 3]], dtype=torch.int32)
    offsets = torch.tensor([[0, 0], [9, 2]], dtype=torch.int32)
    merged, merged_scales = torch.full((1, 4, 1), -1, dtype=torch.int8), torch.zeros(1, 4, 1)
    merged_sources = torch.zeros(1, 4, dtype=torch.int64)
    sources = torch.arange(10, 16, dtype=torch.int32).view(2, 1, 3)
    scales = torch.arange(6.0).view(2, 1, 3, 1)
    arguments = offsets[:, 1:], counts[:, 1:]
    reference.move_source_rows(padded, merged, *arguments, True, scales, merged_scales, sources, merged_sources)
    assert merged.flatten().tolist() == [0, 1, 3, 4] and merged_scales.flatten().tolist() == [0, 1, 3, 4]
    assert merged_sources.flatten().tolist() == [10, 11, (1 << 32) + 13, (1 << 32) + 14]
    back = torch.full_like(padded, -1)
    reference.move_source_rows(back, merged, *arguments, False)
    assert back.flatten().tolist() == [0, 1, -1, 3, 4, -1]


def combined(expert_rows: list[float], rows: list[int], weights: list[float], dtype: torch.dtype = torch.float32) -> float:
    out = poison(torch.empty(1, 1, dtype=dtype))
    expert_output = torch.tensor(expert_rows, dtype=torch.bfloat16).unsqueeze(1)
    reference.combine(expert_output, torch.tensor([rows], dtype=torch.int32), torch.tensor([weights]), out)
    return out.item()


def test_combine_adds_in_the_order_of_k():
    # 2**24 + 1 is a tie that goes to 2**24
    assert combined([2.0**24, 1.0, -(2.0**24)], [0, 1, 2], [1.0] * 3) == 0.0
    assert combined([2.0**24, 1.0, -(2.0**24)], [0, 2, 1], [1.0] * 3) == 1.0


def test_combine_rounds_each_product_before_it_adds():
    weight, row = 1 + 2.0**-20, 1 + 2.0**-7
    product = np.float32(weight) * np.float32(row)
    assert Fraction(weight) * Fraction(row) - Fraction(float(product)) == Fraction(1, 2**27)
    # a fused multiply-add would leave 2**-27
    assert combined([1.0, row], [0, 1], [-float(product), weight]) == 0.0


def test_combine_rounds_to_the_output_type_once():
    # 1 + 2**-8 alone is a tie that goes to 1; with 2**-20 more it lies above the tie
    assert combined([1.0, 2.0**-8, 2.0**-20], [0, 1, 2], [1.0] * 3, torch.bfloat16) == 1 + 2.0**-7


def test_combine_skips_absent_entries_whatever_their_weights():
    assert combined([math.nan, 3.0], [-1, 1, -1], [math.inf, 2.0, math.nan]) == 6.0
    assert combined([math.nan], [-1], [1.0]) == 0.0


def test_partial_sums_lie_by_rank_and_token_or_in_the_order_of_those_that_travelled():
    ids = torch.tensor([[0, 1], [3, -1], [1, 2], [9, -5]])
    rows = torch.tensor([[5, -1], [0, -1], [-1, 2], [-1, -1]], dtype=torch.int32)
    partials = poison(torch.empty(4, 2, dtype=torch.int32))
    reference.plan_rank_sums(ids, rows, 2, 10, partials)
    assert partials.tolist() == [[0, -1], [-1, 11], [-1, 12], [-1, -1]]
    # token 2 travels to rank 0 as well, where its row had no room
    reference.plan_rank_sums(ids, rows, 2, 0, partials, torch.tensor([0, 2], dtype=torch.int32))
    assert partials.tolist() == [[0, -1], [-1, 2], [-1, 3], [-1, -1]]


def test_located_entries_are_the_rows_of_each_ranks_tokens_here():
    # 2 ranks, experts 2 and 3 are here, C=2, M=4; a token of rank 1 lies behind 1 or 3 rows of rank 0
    offsets = torch.tensor([[0, 0, 0, 0], [9, 9, 1, 3]], dtype=torch.int32)
    rows_in_expert = torch.tensor([[[0, 1], [-1, 2]], [[0, 0], [1, 1]]], dtype=torch.int32)
    ids = torch.tensor([[[2, 3], [2, 3]], [[3, 1], [2, 3]]], dtype=torch.int32)
    expected = torch.rand(2, 2, 2)
    entries = torch.stack((rows_in_expert, ids, expected.view(torch.int32)), 1)
    rows, weights = poison(torch.empty(2, 2, 2, dtype=torch.int32)), poison(torch.empty(2, 2, 2))
    reference.locate_entries(entries, offsets, 2, 2, 4, rows, weights)
    assert rows.tolist() == [[[0, 5], [-1, -1]], [[7, -1], [2, -1]]]
    assert_bit_equal(weights, expected)


def summed_per_rank(expert_rows: list[float], rows: list[int], weights: list[float], dtype: torch.dtype = torch.float32) -> float:
    out = poison(torch.empty(1, 1, dtype=dtype))
    expert_output = torch.tensor(expert_rows, dtype=torch.bfloat16).unsqueeze(1)
    reference.combine_per_rank(expert_output, torch.tensor([rows], dtype=torch.int32), torch.tensor([weights]), 2, out)
    return out.item()


def test_sums_of_a_rank_are_rounded_to_bfloat16_before_ranks_are_added():
    # rank 0 has 1 + 2**-8, which alone is a tie that goes to 1; rank 1 has 2**-8
    assert summed_per_rank([1.0, 2.0**-8, 2.0**-8, 0.0], [0, 1, 2], [1.0] * 3) == 1 + 2.0**-8
    assert combined([1.0, 2.0**-8, 2.0**-8, 0.0], [0, 1, 2], [1.0] * 3) == 1 + 2.0**-7


def test_ranks_are_added_in_their_order_and_absent_ones_are_skipped():
    # by k this would be 2**24 - 2**24 + 1
    assert summed_per_rank([2.0**24, 0.0, 1.0, 0.0, -(2.0**24), 0.0], [0, 4, 2], [1.0] * 3) == 0.0
    assert summed_per_rank([math.nan, 2.0, math.nan, math.nan], [-1, 1, -1], [math.nan, 2.0, 1.0]) == 4.0
    assert summed_per_rank([math.nan] * 4, [-1, -1, -1], [1.0] * 3) == 0.0


def test_combine_equals_float32_steps_in_numpy():
    expert_output, weights = torch.randn(20, 17).bfloat16(), torch.randn(6, 5).bfloat16()
    rows = torch.randint(-1, 20, (6, 5), dtype=torch.int32)
    expected = np.zeros((6, 17), np.float32)
    for t in range(6):
        for k in range(5):
            if rows[t, k] >= 0:
                product = np.float32(weights[t, k].item()) * expert_output[rows[t, k]].float().numpy()
                expected[t] = expected[t] + product
    out = poison(torch.empty(6, 17))
    reference.combine(expert_output, rows, weights, out)
    assert_bit_equal(out, torch.from_numpy(expected))


def test_rows_past_capacity_contribute_nothing_and_weights_are_not_renormalised():
    """Three tokens to one expert with room for two: the last in row order is dropped."""
    ids, x = torch.tensor([[0, 1], [0, 1], [0, -1]]), torch.tensor([[1.0], [2.0], [4.0]])
    rows_in_expert, rows = (torch.empty(3, 2, dtype=torch.int32) for _ in range(2))
    counts, num_tokens = (torch.empty(2, dtype=torch.int32) for _ in range(2))
    status = torch.zeros(2, dtype=torch.int64)
    values = poison(torch.empty(2, 2, 1, dtype=torch.bfloat16))
    reference.route(ids, rows_in_expert, counts, 2, num_tokens, status)
    reference.scatter(x, ids, rows_in_expert, values, rows=rows)
    assert rows.tolist() == [[0, 2], [1, 3], [-1, -1]] and num_tokens.tolist() == [2, 2] and status.tolist() == [0, 1]
    out = torch.empty(3, 1)
    reference.combine(values.flatten(0, 1) * torch.tensor([[1], [1], [10], [10]]), rows, torch.full((3, 2), 0.25), out)
    assert out.flatten().tolist() == [0.25 * 11, 0.25 * 22, 0.0]
