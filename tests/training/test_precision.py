"""Sums over rows, and which rows there are, in both layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant import ExpertBatch, QuantizedTensor
from moequant.quantization import dequantize
from moequant.testing import assert_bit_equal, relative_error
from moequant.training.functions import sums
from moequant.training.precision import Precision
from moequant.training.rows import Rows

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
COUNTS = [5, 0, 16, 1, 0]


def rows_of(layout: str, device: str, counts: list[int], columns: int = 8) -> tuple[Rows, list[Tensor]]:
    """A batch's rows, NaN where there is none, and the row numbers of each expert."""
    extents = [160 if layout == "padded" else -(-count // 16) * 16 for count in counts]
    begins = [sum(extents[:expert]) for expert in range(len(counts))]
    total = sum(extents) + (0 if layout == "padded" else 32)
    places = [torch.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]
    values = torch.full((total, columns), torch.nan)
    for place in places:
        values[place] = torch.randn(len(place), columns)
    shape = (len(counts), 160) if layout == "padded" else (total,)
    values, sources = values.bfloat16().view(*shape, columns), torch.full(shape, 2**62)
    starts = None if layout == "padded" else torch.tensor(begins, dtype=torch.int32, device=device)
    counted = torch.tensor(counts, dtype=torch.int32, device=device)
    batch = ExpertBatch(values.to(device), None, counted, sources.to(device), "default", 4, expert_start=starts)
    return Rows.of(batch), places


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0], [16, 0, 3]], ids=str)
def test_rows_are_those_of_their_experts_and_nan_elsewhere_is_zero(layout, device, counts):
    rows, places = rows_of(layout, device, counts)
    valid, experts = rows.valid.squeeze(1).cpu(), rows.experts.cpu()
    assert torch.equal(valid.nonzero().flatten(), torch.cat(places))
    for expert, place in enumerate(places):
        assert (experts[place] == expert).all()
    assert isinstance(rows.values, Tensor)
    plain, flat = rows.plain().cpu(), rows.values.flatten(0, -2).cpu()
    assert_bit_equal(plain[valid], flat[valid])
    assert not plain[~valid].any()


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [(48, 24), (7, 9)], ids=str)
def test_weight_gradients_are_the_sums_over_valid_rows_and_zeros_without_any(layout, device, dtype, columns):
    rows, places = rows_of(layout, device, COUNTS)
    left, right = (rows.only(torch.randn(rows.valid.shape[0], n, device=device).bfloat16()) for n in columns)
    made = Precision().weight_gradient(left, right, rows, dtype)
    assert made.dtype == dtype and made.shape == (len(COUNTS), *columns)
    for expert, place in enumerate(places):
        a, b = (x.cpu()[place].double() for x in (left, right))
        # the sums in float32, rounded to bfloat16 at most once
        assert relative_error(made[expert].cpu(), a.T @ b) < 3e-3
    assert not made[torch.tensor(COUNTS) == 0].any()
    assert_bit_equal(Precision().weight_gradient(left, right, rows, dtype), made)


@DEVICES
@LAYOUTS
def test_sums_of_rows_are_those_of_their_experts(layout, device):
    rows, places = rows_of(layout, device, COUNTS)
    x = rows.only(torch.randn(rows.valid.shape[0], 24, device=device))
    expected = torch.stack([x.cpu()[place].double().sum(0) for place in places])
    assert relative_error(sums(x, rows).cpu(), expected) < 1e-6


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [(144, 136), (7, 9)], ids=str)
def test_weight_gradients_of_fp8_are_products_along_the_tokens(layout, device, dtype, columns):
    """Of rows that are quantized, and of plain ones; NaN where there is none."""
    rows, places = rows_of(layout, device, [5, 0, 144, 1, 0])
    how = Precision("fp8_e4m3fn", "ue8m0")
    left, right = (torch.randn(rows.valid.shape[0], n, device=device).bfloat16() for n in columns)
    operand = how.operand(left, rows)
    assert how.columnwise and isinstance(operand, QuantizedTensor)
    as_multiplied = rows.only(dequantize(operand, torch.float32))
    right[~rows.valid.squeeze(1)] = torch.nan
    made = how.weight_gradient(operand, right, rows, dtype)
    assert made.dtype == dtype and made.shape == (5, *columns)
    for expert, place in enumerate(places):
        if len(place) == 0:
            assert_bit_equal(made[expert], torch.zeros_like(made[expert]))
        else:
            place = place.to(device)
            assert relative_error(made[expert], as_multiplied[place].T @ right[place].float()) < 0.04
    assert_bit_equal(how.weight_gradient(operand, right, rows, dtype), made)


def test_other_recipes_have_weight_gradients_in_bfloat16():
    assert not Precision("fp8_e4m3fn", "default").columnwise and not Precision("none").columnwise
