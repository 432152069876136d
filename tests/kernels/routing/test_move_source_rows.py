"""Rows move between padded and merged buffers as in the reference, both ways, and nothing else is written."""

from __future__ import annotations

import pytest
import torch

from compile_case import BF16, cases, each_format, empty, quantized
from moequant import ops, reference
from moequant.batch import empty_transposed_scales
from moequant.testing import assert_bit_equal, poison
from operation_case import integers


def kernel(*args):
    from moequant.kernels.routing.move_source_rows import move_source_rows

    move_source_rows(*args)


def both(arguments, written):
    """Runs kernel and reference on copies and compares the tensors at the written positions."""
    results = []
    for function in (kernel, reference.move_source_rows):
        copies = list(arguments)
        for position in written:
            copies[position] = arguments[position].clone(memory_format=torch.preserve_format)
        function(*copies)
        results.append([copies[position] for position in written])
    for result, expected in zip(*results, strict=True):
        assert_bit_equal(result, expected)
    return results[0]


@pytest.mark.parametrize(
    ("ranks", "experts", "limit", "capacity", "columns"),
    [(1, 1, 1, 1, 8), (2, 3, 16, 32, 300), (4, 2, 20, 48, 128), (3, 2, 32, 40, 50)],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_both_directions_match_the_reference(ranks, experts, limit, capacity, columns, dtype, layout, device):
    ragged = layout == "ragged"
    counts = torch.randint(0, limit + 5, (ranks, ranks * experts), dtype=torch.int32, device=device)
    offsets, num_tokens = torch.empty_like(counts), torch.empty(experts, dtype=torch.int32, device=device)
    first = (ranks - 1) * experts
    # of all experts together, with room for some of the rows
    capacity = (capacity * experts // 32 + 1) * 16 if ragged else capacity
    shape = (capacity,) if ragged else (experts, capacity)
    starts = torch.empty_like(num_tokens) if ragged else None
    reference.expert_offsets(counts, first, capacity, limit, offsets, num_tokens, None, starts)
    groups = 3
    padded = torch.randn(ranks, experts, limit, columns, device=device).to(dtype)
    merged = poison(torch.empty(*shape, columns, dtype=dtype, device=device))
    meta = torch.randint(0, 2**30, (ranks, experts, groups + 1, limit), dtype=torch.int32, device=device)
    scales = meta[:, :, :-1].view(torch.float32).transpose(2, 3)
    merged_scales = poison(torch.empty(*shape[:-1], groups, capacity, device=device).mT)
    sources = poison(torch.empty(shape, dtype=torch.int64, device=device))
    # of this rank's experts
    offsets, counts = offsets[:, first:], counts[:, first:]
    moved = both((padded, merged, offsets, counts, True, scales, merged_scales, meta[:, :, -1], sources), written=(1, 6, 8))
    written = torch.zeros(shape, dtype=torch.bool, device=device)
    for expert, count in enumerate(num_tokens.tolist()):
        if starts is None:
            written[expert, :count] = True
        else:
            written[starts[expert] : starts[expert] + count] = True
    assert ((moved[2] != sources) == written).all()
    back = poison(torch.empty_like(padded))
    both((back, moved[0], offsets, counts, False, None, None, None, None), written=(0,))


@pytest.mark.parametrize("limit", [1, 20, 32])
def test_a_source_that_has_more_rows_than_its_part_moves_what_the_part_holds(limit, device):
    """The parts lie side by side: a row more would be the next source's first, or nobody's."""
    ranks, experts, columns = 2, 2, 8
    counts = torch.full((ranks, experts), limit + 7, dtype=torch.int32, device=device)
    offsets = torch.arange(0, ranks * limit, limit, dtype=torch.int32, device=device)[:, None].repeat(1, experts)
    padded = torch.randn(ranks, experts, limit, columns, device=device)
    merged = poison(torch.empty(experts, ranks * limit + 40, columns, device=device))
    moved = both((padded, merged, offsets, counts, True, None, None, None, None), written=(1,))[0]
    assert_bit_equal(moved[:, : ranks * limit], padded.transpose(0, 1).flatten(1, 2))
    assert moved[:, ranks * limit :].isnan().all()
    more = poison(torch.empty(ranks * experts + 1, limit, columns, device=device))
    kernel(more[:-1].view_as(padded), moved, offsets, counts, False, None, None, None, None)
    assert_bit_equal(more[:-1].view_as(padded), padded)
    assert more[-1].isnan().all()


def test_the_stride_of_a_single_local_expert_does_not_matter(device):
    """Torch versions differ in the stride that they give a dimension of one element."""
    counts = torch.tensor([[2], [2]], dtype=torch.int32, device=device)
    offsets = torch.tensor([[0], [2]], dtype=torch.int32, device=device)
    scales = torch.randn(2, 1, 3, 2, device=device)
    sources = torch.arange(4, dtype=torch.int32, device=device).view(2, 1, 2)
    results = []
    for stride in (6, 1):
        merged_scales = poison(empty_transposed_scales(1, 16, 3, device))
        merged_sources = poison(torch.empty(1, 16, dtype=torch.int64, device=device))
        odd_scales = scales.as_strided((2, 1, 2, 3), (6, stride, 1, 2))
        odd_sources = sources.as_strided((2, 1, 2), (2, stride, 1))
        rows = torch.ones(2, 1, 2, 8, device=device), torch.zeros(1, 16, 8, device=device)
        kernel(*rows, offsets, counts, True, odd_scales, merged_scales, odd_sources, merged_sources)
        results.append((merged_scales, merged_sources))
    for result, expected in zip(*results, strict=True):
        assert_bit_equal(result, expected)
    assert results[0][1][0, :4].tolist() == [0, 1, (1 << 32) + 2, (1 << 32) + 3]


def test_the_worked_example(device):
    counts = torch.tensor([[1], [2]], dtype=torch.int32, device=device)
    offsets = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    padded = torch.tensor([[[[1.0], [9.0]]], [[[2.0], [3.0]]]], device=device)
    merged = torch.zeros(1, 4, 1, device=device)
    for function in (kernel, reference.move_source_rows):
        merged.zero_()
        function(padded, merged, offsets, counts, True, None, None, None, None)
        assert merged.flatten().tolist() == [1.0, 2.0, 3.0, 0.0]


def call_move_source_rows(dtype: torch.dtype, to_merged: bool = True, ragged: bool = False) -> None:
    padded, (merged, merged_scales) = empty(8, 32, 128, 7168, dtype=dtype), quantized(32, 1024, 7168, dtype)
    if ragged:
        merged, merged_scales = merged[0], None if merged_scales is None else merged_scales[0]
    offsets, counts = empty(8, 256, dtype=torch.int32)[:, 32:64], empty(8, 257, dtype=torch.int32)[:, 32:64]
    if not to_merged:
        ops.move_source_rows(padded, merged, offsets, counts, False)
        return
    padded_scales = None if merged_scales is None else empty(8, 32, 128, 56, dtype=torch.float32)
    sources, merged_sources = empty(8, 32, 128, dtype=torch.int32), empty(32, 1024, dtype=torch.int64)
    ops.move_source_rows(padded, merged, offsets, counts, True, padded_scales, merged_scales, sources, merged_sources)


COMPILE_CASES = [
    *cases(call_move_source_rows, *each_format(BF16), {"dtype": BF16, "to_merged": False}, anywhere=True),
    *cases(call_move_source_rows, *each_format(BF16, ragged=True), {"dtype": BF16, "to_merged": False, "ragged": True}),
]


def move_arguments(to_merged: bool) -> tuple:
    padded, merged = torch.randn(2, 1, 3, 5), torch.randn(1, 4, 5)
    arguments = padded, merged, integers([0], [2]), integers([2], [3]), to_merged
    if not to_merged:
        return arguments
    scales = torch.randn(2, 1, 1, 3).transpose(2, 3), torch.zeros(1, 1, 4).transpose(1, 2)
    return *arguments, *scales, torch.ones(2, 1, 3, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int64)


OPERATION_CASES = {
    "move_source_rows": {"to merged": lambda: move_arguments(True), "to padded": lambda: move_arguments(False)},
}
