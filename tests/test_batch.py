"""QuantizedTensor accepts the layouts it names and no other; ExpertBatch gives the GEMM's operand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any, get_args

import pytest
import torch

from moequant import ExpertBatch, LayoutError, QuantizedTensor, dequantize
from moequant.batch import Owner, ScaleLayout, ceil_div, empty_scales, empty_transposed_scales, scale_layout

VALUES = torch.zeros(2, 6, 300, dtype=torch.int8)
WIDE = VALUES.bfloat16()


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
    return ExpertBatch(WIDE if scales is None else VALUES, scales, counts, sources, "ue8m0", 4, slot=1)


def test_a_batchs_activations_are_its_values_with_their_scales_and_recipe():
    scales = transposed()
    activations = expert_batch(scales).activations
    assert isinstance(activations, QuantizedTensor)
    assert activations.values is VALUES and activations.scales is scales
    assert (activations.layout, activations.recipe, activations.group_size) == ("transposed", "ue8m0", 128)


def test_a_batch_without_scales_has_plain_activations():
    assert expert_batch(None).activations is WIDE


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


WRONG: dict[str, tuple[Any, torch.Tensor, dict[str, Any], str]] = {
    "scales that were never loaded": (VALUES, torch.ones(2, 6, 3, device="meta"), {}, "scales must be on cpu, got meta"),
    "values that were never loaded": (VALUES.to("meta"), torch.ones(2, 6, 3), {}, "scales must be on meta, got cpu"),
    "another recipe": (VALUES, torch.ones(2, 6, 3), {"recipe": "DEFAULT"}, "recipe must be one of default, deepgemm"),
    "no recipe": (VALUES, torch.ones(2, 6, 3), {"recipe": None}, "recipe must be one of .*, got None"),
    "a list of recipes": (VALUES, torch.ones(2, 6, 3), {"recipe": []}, r"recipe must be one of .*, got \[\]"),
    "bfloat16 values": (VALUES.bfloat16(), torch.ones(2, 6, 3), {}, "values must be torch.float8_e4m3fn or .*, got torch.bfloat16"),
    "no group size": (VALUES, torch.ones(2, 6, 3), {"group_size": 0}, "group_size must be at least 1, got 0"),
    "a group size that is no integer": (
        VALUES,
        torch.ones(2, 6, 3),
        {"group_size": 128.0},
        "group_size must be an integer, got 128.0",
    ),
    "a vector": (VALUES[0, 0], torch.ones(3), {}, r"values must be \(..., rows, columns\), got shape \(300,\)"),
    "a list": ([1, 2], torch.ones(3), {}, "values must be a tensor, got list"),
    "segments of rows": (VALUES, torch.ones(2, 6, 3), {"segments": 2}, 'segments are of layout "block" alone'),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_tensors_recipes_and_numbers_are_refused_in_words(case):
    values, scales, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(values, scales, "row", **options)


@pytest.mark.parametrize("layout", get_args(ScaleLayout))
@pytest.mark.parametrize("shape", [(2, 0, 300), (2, 6, 0), (0, 6, 300)], ids=str)
def test_scales_without_elements_lie_in_any_layout(shape, layout):
    experts, rows, columns = shape
    groups = ceil_div(columns, 128 if layout != "ue8m0_packed" else 512)
    scales = torch.empty(experts, ceil_div(rows, 128) if layout == "block" else rows, groups)
    packed: dict[str, Any] = {"recipe": "ue8m0"} if layout == "ue8m0_packed" else {}
    q = QuantizedTensor(VALUES.new_empty(shape), scales.int() if packed else scales, layout, **packed)
    assert dequantize(q).shape == shape


def test_a_batch_of_other_tensors_is_refused_in_words():
    batch = expert_batch(transposed())
    for field, value, message in (
        ("values", WIDE, "values must be torch.float8_e4m3fn or"),
        ("scales", None, "values must be torch.bfloat16 or torch.float16, got torch.int8"),
        ("scales", transposed(2, 5), r"scales must have shape \(2, 6, 3\)"),
        ("num_tokens", batch.num_tokens.long(), "num_tokens must be torch.int32"),
        ("sources", batch.sources.to("meta"), "sources must be on cpu, got meta"),
        ("recipe", "none", "recipe must be one of"),
        ("expected_rows", -1, "expected_rows must be at least 0, got -1"),
        ("slot", True, "slot must be an integer, got True"),
        ("owner", object(), "owner must be Owner, got object"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, **{field: value})


def ragged_batch(scales: bool = True) -> ExpertBatch:
    """Two experts of 3 and 5 rows in a buffer of 32."""
    values = torch.arange(32 * 300).view(32, 300).to(torch.int8 if scales else torch.bfloat16)
    counts, starts = torch.tensor([3, 5], dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32)
    rows = torch.ones(3, 32).t() if scales else None
    return ExpertBatch(values, rows, counts, torch.arange(32), "default", 4, expert_start=starts)


def test_a_ragged_batch_of_other_tensors_is_refused_in_words():
    batch = ragged_batch()
    assert batch.ragged and not expert_batch(None).ragged
    for field, value, message in (
        ("values", VALUES, "values must have 2 dimensions"),
        ("scales", torch.ones(31, 3), r"scales must have shape \(32, 3\)"),
        ("num_tokens", batch.num_tokens[:1], r"expert_start must have shape \(1,\)"),
        ("num_tokens", batch.num_tokens[0], "num_tokens must have 1 dimensions"),
        ("expert_start", batch.num_tokens.long(), "expert_start must be torch.int32"),
        ("expert_start", batch.num_tokens.to("meta"), "expert_start must be on cpu, got meta"),
        ("expert_start", None, "values must have 3 dimensions"),
        ("sources", batch.sources.view(2, 16), r"sources must have shape \(32,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, **{field: value})


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "quantized"])
def test_a_part_of_a_ragged_batch_has_all_rows_and_its_experts_starts(scales):
    batch = ragged_batch(scales)
    part = batch.part(1, 2)
    assert part.values is batch.values and part.scales is batch.scales and part.sources is batch.sources
    assert part.num_tokens.tolist() == [5] and part.expert_start is not None and part.expert_start.tolist() == [16]
    assert part.rows_of(part.sources, 0).tolist() == [16, 17, 18, 19, 20]
    assert batch.part(1, 2) is part


def test_the_rows_of_an_expert_are_views_in_both_layouts():
    padded, ragged = expert_batch(None), ragged_batch()
    assert padded.rows_of(padded.sources, 1).tolist() == [6, 7, 8, 9, 10]
    assert ragged.rows_of(ragged.sources, 1).tolist() == [16, 17, 18, 19, 20]
    for batch in (padded, ragged):
        for expert, count in enumerate((3, 5)):
            rows = batch.rows_of(batch.values, expert)
            assert rows.shape == (count, 300)
            assert rows.untyped_storage().data_ptr() == batch.values.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="expert must be in 0..1, got 2"):
        ragged.rows_of(ragged.values, 2)
    with pytest.raises(ValueError, match=r"x must have the batch's rows, \(32,\) .* got shape \(31, 300\)"):
        ragged.rows_of(ragged.values[1:], 0)


def test_every_row_has_an_expert_in_both_layouts():
    assert expert_batch(None).experts_of_rows().tolist() == [[0], [1]]
    assert ragged_batch().experts_of_rows().tolist() == [0] * 16 + [1] * 16
    # experts without rows begin where the next one does, or at the end
    starts = torch.tensor([0, 0, 16, 16, 32], dtype=torch.int32)
    batch = replace(ragged_batch(), num_tokens=torch.tensor([0, 7, 0, 16, 0], dtype=torch.int32), expert_start=starts)
    assert batch.experts_of_rows().tolist() == [1] * 16 + [3] * 16


def test_a_part_of_a_batch_has_its_owner():
    batch = replace(expert_batch(transposed()), owner=Owner())
    assert batch.part(0, 1).owner is batch.owner
