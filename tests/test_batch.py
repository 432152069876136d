"""QuantizedTensor accepts the layouts it names and no other; ExpertBatch gives the GEMM's operand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from moequant import ExpertBatch, LayoutError, QuantizedTensor
from moequant.batch import ceil_div, empty_scales, empty_transposed_scales, scale_layout

VALUES = torch.zeros(2, 6, 300, dtype=torch.int8)


def transposed(experts: int = 2, rows: int = 6, groups: int = 3) -> torch.Tensor:
    return torch.ones(experts, groups, rows).transpose(1, 2)


@pytest.mark.parametrize("a, b, expected", [(0, 128, 0), (1, 128, 1), (128, 128, 1), (129, 128, 2), (2880, 128, 23)])
def test_ceil_div_rounds_up(a, b, expected):
    assert ceil_div(a, b) == expected


def test_transposed_scales_put_the_rows_of_a_group_side_by_side():
    scales = empty_transposed_scales(2, 6, 3, "cpu")
    assert scales.shape == (2, 6, 3) and scales.stride() == (18, 1, 6) and scales.dtype == torch.float32


@pytest.mark.parametrize(
    "scales, layout",
    [
        (transposed(), "transposed"),
        (torch.ones(2, 6, 3), "row"),
        (torch.ones(2, 1, 3), "transposed"),
        (torch.ones(2, 6, 1), "transposed"),
        (transposed(2, 8)[:, 1:7, ::2], "transposed"),
    ],
    ids=["transposed", "contiguous", "one row, both", "one group, both", "slice"],
)
def test_the_layout_of_scales_is_read_from_their_strides(scales, layout):
    assert scale_layout(scales) == layout


GOOD = {
    "row": (VALUES, torch.ones(2, 6, 3), {"layout": "row"}),
    "row of any dimensions": (VALUES[0], torch.ones(6, 3), {"layout": "row"}),
    "transposed": (VALUES, transposed(), {"layout": "transposed"}),
    "transposed slice of a larger buffer": (VALUES, transposed(4, 9, 5)[::2, 2:8, 1:4], {"layout": "transposed"}),
    "transposed with one row": (VALUES[:, :1], torch.ones(2, 1, 3), {"layout": "transposed"}),
    "block": (VALUES, torch.ones(2, 1, 3), {"layout": "block"}),
    "block in two segments": (VALUES, torch.ones(2, 2, 3), {"layout": "block", "segments": 2}),
    "block in segments with tails": (VALUES, torch.ones(2, 4, 150), {"layout": "block", "segments": 2, "group_size": 2}),
    "another group size": (VALUES, torch.ones(2, 6, 5), {"layout": "row", "group_size": 64}),
    "aligned": (VALUES, empty_scales(2, 6, 3, "tma_aligned", "cpu"), {"layout": "tma_aligned"}),
    "aligned without rows": (VALUES[:, :0], empty_scales(2, 0, 3, "tma_aligned", "cpu"), {"layout": "tma_aligned"}),
    "packed without rows": (
        torch.empty(2, 0, 600, dtype=torch.int8),
        empty_scales(2, 0, 5, "ue8m0_packed", "cpu"),
        {"layout": "ue8m0_packed", "recipe": "ue8m0"},
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_scales_as_the_layout_says_are_accepted(case):
    values, scales, options = GOOD[case]
    q = QuantizedTensor(values, scales, **options)
    assert q.shape == values.shape and q.device == values.device and q.values is values and q.scales is scales


BAD = {
    "too few groups": (VALUES, torch.ones(2, 6, 2), {"layout": "row"}, r"need scales of shape \(2, 6, 3\), got \(2, 6, 2\)"),
    "scales of the transposed shape": (VALUES, torch.ones(2, 3, 6), {"layout": "transposed"}, r"need scales of shape \(2, 6, 3\)"),
    "too few dimensions": (VALUES, torch.ones(6, 3), {"layout": "row"}, r"need scales of shape \(2, 6, 3\), got \(6, 3\)"),
    "blocks that ignore the segments": (
        VALUES,
        torch.ones(2, 1, 3),
        {"layout": "block", "segments": 2},
        r"segments=2 need .* \(2, 2, 3\)",
    ),
    "segments that don't divide the rows": (
        VALUES,
        torch.ones(2, 4, 3),
        {"layout": "block", "segments": 4},
        "divide the 6 rows .* segments=4",
    ),
    "no segments": (VALUES, torch.ones(2, 1, 3), {"layout": "block", "segments": 0}, "segments must divide the 6 rows"),
    "scales of float64": (
        VALUES,
        torch.ones(2, 6, 3).double(),
        {"layout": "row"},
        "needs scales of torch.float32, got torch.float64",
    ),
    "contiguous for transposed": (
        VALUES,
        torch.ones(2, 6, 3),
        {"layout": "transposed"},
        r"strides \(18, 3, 1\); .*empty_scales",
    ),
    "transposed for row": (
        VALUES,
        transposed(),
        {"layout": "row"},
        r'layout "row" needs contiguous scales, got strides \(18, 1, 6\)',
    ),
    "strided blocks": (
        VALUES,
        torch.ones(2, 2, 6)[..., ::2],
        {"layout": "block", "segments": 2},
        'layout "block" needs contiguous',
    ),
    "aligned groups 6 rows apart": (
        VALUES,
        transposed(),
        {"layout": "tma_aligned"},
        r'layout "tma_aligned" needs groups a multiple of 4 apart, got strides \(18, 1, 6\)',
    ),
    "packed groups 6 rows apart": (
        VALUES,
        torch.ones(2, 2, 6, dtype=torch.int32).transpose(1, 2),
        {"layout": "ue8m0_packed", "recipe": "ue8m0", "group_size": 64},
        r'layout "ue8m0_packed" needs groups a multiple of 4 apart, got strides \(12, 1, 6\)',
    ),
    "packed scales of another recipe": (
        VALUES,
        torch.ones(2, 6, 1, dtype=torch.int32),
        {"layout": "ue8m0_packed"},
        'needs recipe "ue8m0", got "default"',
    ),
    "packed scales of float32": (
        VALUES,
        torch.ones(2, 6, 1),
        {"layout": "ue8m0_packed", "recipe": "ue8m0"},
        "needs scales of torch.int32, got torch.float32",
    ),
    "packed scales in rows": (
        VALUES,
        torch.ones(2, 6, 3, dtype=torch.int32),
        {"layout": "ue8m0_packed", "recipe": "ue8m0", "group_size": 32},
        r"side by side .* got strides \(18, 3, 1\)",
    ),
    "an unknown layout": (
        VALUES,
        torch.ones(2, 6, 3),
        {"layout": "column"},
        """layout must be one of row, transposed, tma_aligned, transposed_flat, ue8m0_packed, block, got 'column'""",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_other_scales_are_a_layout_error_which_is_a_value_error(case):
    values, scales, options, message = BAD[case]
    with pytest.raises(LayoutError, match=message):
        QuantizedTensor(values, scales, **options)
    assert issubclass(LayoutError, ValueError)


@pytest.mark.parametrize("layout", ["tma_aligned", "ue8m0_packed"])
@pytest.mark.parametrize("rows, apart", [(0, 4), (1, 4), (4, 4), (6, 8)])
def test_aligned_groups_are_whole_pieces_of_four_rows_apart_even_without_rows(rows, apart, layout):
    scales = empty_scales(2, rows, 8, layout, "cpu")
    columns = 2 if layout == "ue8m0_packed" else 8
    assert scales.shape == (2, rows, columns) and scales.stride() == (columns * apart, 1, apart)


def test_packed_exponents_are_powers_of_two_and_0xff_is_nan():
    packed = torch.tensor([[[0x81FF7F01]], [[0x000000FE]]]).to(torch.int32)
    values = torch.ones(2, 1, 4 * 32, dtype=torch.int8)
    scales = QuantizedTensor(values, packed, "ue8m0_packed", "ue8m0", 32).scales_by_row()
    assert scales.isnan().flatten().tolist() == [False, False, True, False] + [False] * 4
    assert scales.nan_to_num(-1.0).flatten().tolist() == [2.0**-126, 1.0, -1.0, 4.0, 2.0**127, 0.0, 0.0, 0.0]


def expert_batch(scales: torch.Tensor | None) -> ExpertBatch:
    counts, sources = torch.tensor([3, 5], dtype=torch.int32), torch.arange(12).view(2, 6)
    return ExpertBatch(VALUES, scales, counts, sources, "ue8m0", 4, slot=1)


def test_a_batchs_activations_are_its_values_with_their_scales_and_recipe():
    scales = transposed()
    activations = expert_batch(scales).activations
    assert isinstance(activations, QuantizedTensor)
    assert activations.values is VALUES and activations.scales is scales
    assert (activations.layout, activations.recipe, activations.group_size) == ("transposed", "ue8m0", 128)


def test_a_batch_without_scales_has_plain_activations():
    assert expert_batch(None).activations is VALUES


@pytest.mark.parametrize("scales", [None, transposed()], ids=["plain", "quantized"])
def test_a_part_of_a_batch_is_a_view_of_its_experts_and_stays_what_it_was(scales):
    batch = expert_batch(scales)
    part = batch.part(1, 2)
    for name in ("values", "num_tokens", "sources"):
        mine, whole = getattr(part, name), getattr(batch, name)
        assert mine.data_ptr() == whole[1:].data_ptr() and mine.shape == whole[1:].shape and mine.stride() == whole.stride()
    assert (part.recipe, part.expected_rows, part.slot) == ("ue8m0", 4, 1)
    if scales is None:
        assert part.scales is None
    else:
        assert part.scales is not None and part.scales.data_ptr() == scales[1:].data_ptr()
        assert part.scales.stride() == scales.stride()


@pytest.mark.parametrize(
    "instance", [expert_batch(None), QuantizedTensor(VALUES, transposed(), "transposed")], ids=["batch", "tensor"]
)
def test_what_travels_between_the_steps_cannot_be_changed(instance):
    with pytest.raises(FrozenInstanceError):
        instance.values = VALUES
