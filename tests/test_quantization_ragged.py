"""Quantization and SwiGLU of ragged rows: the bits of padded ones, on a CPU and by the kernels, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from guarded import Guarded
from moequant import QuantizedTensor, dequantize, quantize_expert_batch
from moequant.batch import ceil_div
from moequant.quantization import silu_mul, silu_mul_quantize
from moequant.testing import assert_bit_equal
from ragged_rows import Ragged, ragged

COUNTS = [5, 0, 32, -3, 40, 1]
M = 48


def check_quantized(rows: Ragged, columns: int, quantize: Callable[..., QuantizedTensor], wide: int = 1, **settings: Any) -> None:
    """Compares values and scales with those of padded rows. Rows of no expert must stay."""
    device = torch.get_default_device()
    x = torch.randn(len(rows.valid), M, wide * columns).bfloat16() * 3
    # a row with a NaN, and one of zeros
    x[0, 1, 3], x[2, 5] = torch.nan, 0.0
    padded = quantize(x, rows.num_tokens, **settings)
    groups = ceil_div(columns, padded.group_size)
    values = Guarded(rows.rows, columns, dtype=padded.values.dtype, device=device)
    scales = Guarded(groups, rows.rows, dtype=torch.float32, device=device)
    given = rows.pack(x), rows.num_tokens, rows.expert_start
    found = quantize(*given, values=values.tensor, scales=scales.tensor.mT, **settings)
    values.assert_only(rows.mask().unsqueeze(1), "values")
    scales.assert_only(rows.mask(), "scales")
    made = quantize(*given, **settings)
    assert made.layout == "transposed" and made.scales.stride() == (1, rows.rows)
    for expert, (start, count) in enumerate(rows.spans()):
        for q in (found, made):
            assert_bit_equal(q.values[start : start + count], padded.values[expert, :count], f"values of expert {expert}")
            assert_bit_equal(q.scales[start : start + count], padded.scales[expert, :count], f"scales of expert {expert}")


def device() -> str:
    return str(torch.get_default_device())


@pytest.mark.parametrize("settings", [{}, {"dtype": torch.int8, "group_size": 64}, {"recipe": "ue8m0"}], ids=str)
@pytest.mark.parametrize("columns", [256, 150])
@pytest.mark.usefixtures("both_paths")
def test_quantized_ragged_rows_have_the_bits_of_padded_ones(columns, settings):
    check_quantized(ragged(COUNTS, device(), spare=16), columns, quantize_expert_batch, **settings)


@pytest.mark.parametrize("settings", [{}, {"dtype": torch.int8}], ids=str)
@pytest.mark.parametrize("columns", [256, 150])
@pytest.mark.usefixtures("both_paths")
def test_swiglu_of_ragged_rows_has_the_bits_of_padded_ones(columns, settings):
    check_quantized(ragged(COUNTS, device()), columns, silu_mul_quantize, wide=2, **settings)


@pytest.mark.usefixtures("both_paths")
def test_swiglu_without_quantization_too():
    rows, x = ragged(COUNTS, device(), spare=32), torch.randn(len(COUNTS), M, 300).bfloat16()
    expected = silu_mul(x, rows.num_tokens)
    out = Guarded(rows.rows, 150, dtype=torch.bfloat16, device=device())
    silu_mul(rows.pack(x), rows.num_tokens, rows.expert_start, out=out.tensor)
    out.assert_only(rows.mask().unsqueeze(1))
    for expert, (start, count) in enumerate(rows.spans()):
        assert_bit_equal(out.tensor[start : start + count], expected[expert, :count])
    assert silu_mul(rows.pack(x), rows.num_tokens, rows.expert_start).shape == (rows.rows, 150)


@pytest.mark.usefixtures("both_paths")
def test_no_row_past_the_buffer_counts():
    """Counts that reach past R, of an expert that begins inside it and of one that begins at its end."""
    for counts, cut in (([40, 48, 20], 64), ([40, 2**31 - 1, 5], 48)):
        check_quantized(ragged(counts, device(), cut=cut), 140, quantize_expert_batch, dtype=torch.int8)


@pytest.mark.usefixtures("both_paths")
def test_rows_of_any_strides_have_the_same_bits():
    rows = ragged([9, 3], device())
    x = rows.pack(torch.randn(2, M, 256).bfloat16())
    expected = quantize_expert_batch(x, rows.num_tokens, rows.expert_start)
    apart = torch.empty(rows.rows, 520).bfloat16()[:, ::2][:, 2:258].copy_(x)
    scales = torch.full((rows.rows, 2), torch.nan)
    found = quantize_expert_batch(apart, rows.num_tokens, rows.expert_start, scales=scales)
    assert found.layout == "row"
    mask = rows.mask()
    assert_bit_equal(found.values.view(torch.int8)[mask], expected.values.view(torch.int8)[mask])
    assert_bit_equal(found.scales[mask], expected.scales[mask])


@pytest.mark.usefixtures("both_paths")
def test_ragged_rows_are_dequantized_as_they_lie():
    rows = ragged([9, 3], device())
    q = quantize_expert_batch(torch.ones(rows.rows, 200).bfloat16(), rows.num_tokens, rows.expert_start)
    assert (dequantize(q)[rows.mask()] == 1).all()


X = torch.zeros(32, 256)
COUNT, START = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no counts": ((X, None, START), {}, "num_tokens how many there are: give both, got None"),
    "counts of two dimensions": ((X, COUNT[None], START), {}, r"num_tokens must have 1 dimensions, got shape \(1, 2\)"),
    "padded rows": ((X[None], COUNT, START), {}, r"x must have 2 dimensions, got shape \(1, 32, 256\)"),
    "too few starts": ((X, COUNT, START[:1]), {}, r"expert_start must have shape \(2,\), got \(1,\)"),
    "starts of int64": ((X, COUNT, START.long()), {}, "expert_start must be torch.int32, got torch.int64"),
    "padded values": (
        (X, COUNT, START),
        {"values": torch.zeros(2, 16, 256).to(torch.float8_e4m3fn)},
        r"values must have shape \(32, 256\)",
    ),
    "padded scales": ((X, COUNT, START), {"scales": torch.zeros(2, 16, 2)}, r"scales must have shape \(32, 2\), got \(2, 16, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_raise_a_value_error(case):
    arguments, settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        quantize_expert_batch(*arguments, **settings)


def test_an_odd_number_of_columns_has_no_halves():
    with pytest.raises(
        ValueError, match=r"must be \(L, M, 2 \* I\), ragged \(R, 2 \* I\), gate first then up.* got shape \(32, 255\)"
    ):
        silu_mul_quantize(X[:, 1:], COUNT, START)
