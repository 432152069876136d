"""The public grouped GEMM on ragged rows: the bits of padded ones, on a CPU and by the kernels, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guarded import Guarded
from moequant import LayoutError, QuantizedTensor, quantize_expert_batch, quantize_weight
from moequant.gemm import grouped_gemm_blockscale
from moequant.testing import assert_bit_equal
from ragged_rows import ragged

# an expert with none, one that fills its last row, a negative count, and one whose rows end inside a tile
COUNTS = [5, 0, 32, -3, 70, 1]
M = 80


def operand(shape: tuple[int, ...], dtype: torch.dtype, weight: bool = False) -> QuantizedTensor | torch.Tensor:
    x = torch.randn(shape).bfloat16()
    if dtype == torch.bfloat16:
        return x
    return quantize_weight(x, dtype=dtype) if weight else quantize_expert_batch(x, dtype=dtype)


def check(counts: list[int], dtype: torch.dtype, columns: int, depth: int, out_dtype: torch.dtype, **where: int) -> None:
    """Compares with the padded product, where rows of no expert must stay."""
    device = torch.get_default_device()
    rows = ragged(counts, str(device), **where)
    a, b = operand((len(counts), M, depth), dtype), operand((len(counts), columns, depth), dtype, weight=True)
    expected = grouped_gemm_blockscale(a, b, rows.num_tokens, out_dtype=out_dtype)
    out = Guarded(rows.rows, columns, dtype=out_dtype, device=device)
    given = rows.operand(a), b, rows.num_tokens, rows.expert_start
    assert grouped_gemm_blockscale(*given, out=out.tensor) is out.tensor
    out.assert_only(rows.mask().unsqueeze(1))
    made = grouped_gemm_blockscale(*given, out_dtype=out_dtype)
    assert made.shape == out.tensor.shape
    for expert, (start, count) in enumerate(rows.spans()):
        for result in (out.tensor, made):
            assert_bit_equal(result[start : start + count], expected[expert, :count], f"expert {expert}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(136, 256), (100, 140)], ids=str)
@pytest.mark.usefixtures("both_paths")
def test_ragged_rows_have_the_bits_of_padded_ones_and_no_other_row_is_written(dtype, columns, depth):
    check(COUNTS, dtype, columns, depth, torch.bfloat16, spare=16)


@pytest.mark.usefixtures("both_paths")
def test_no_row_past_the_buffer_counts():
    """Counts that reach past R, of an expert that begins inside it and of one that begins at its end."""
    check([40, 70, 20], torch.int8, 72, 128, torch.float32, cut=96)
    check([40, 2**31 - 1], torch.int8, 72, 128, torch.float32, cut=80)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("counts", [[0, 0], [64, 0, 0], [0, 0, 80], [16, 16]], ids=str)
def test_experts_without_rows_and_one_with_all(counts):
    check(counts, torch.int8, 40, 64, torch.bfloat16)


def test_nothing_is_done_without_rows_experts_or_columns():
    counts = torch.zeros(2, dtype=torch.int32)
    for experts, rows, columns in ((2, 0, 8), (0, 4, 8), (2, 4, 0)):
        a, b = torch.zeros(rows, 64).bfloat16(), torch.zeros(experts, columns, 64).bfloat16()
        assert grouped_gemm_blockscale(a, b, counts[:experts], counts[:experts]).shape == (rows, columns)


A, B = torch.zeros(32, 128).bfloat16(), torch.zeros(2, 8, 128).bfloat16()
COUNT, START = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no counts": ({"num_tokens": None}, "num_tokens how many there are: give both, got None"),
    "padded rows": ({"a": A.unsqueeze(0)}, r"a must have 2 dimensions, got shape \(1, 32, 128\)"),
    "no starts": ({"expert_start": None}, r"a must have 3 dimensions, got shape \(32, 128\)"),
    "starts of int64": ({"expert_start": START.long()}, "expert_start must be torch.int32, got torch.int64"),
    "too few starts": ({"expert_start": START[:1]}, r"expert_start must have shape \(2,\), got \(1,\)"),
    "strided starts": ({"expert_start": START.repeat(2)[::2]}, r"expert_start must be contiguous, got strides \(2,\)"),
    "starts on another device": ({"expert_start": START.to("meta")}, "expert_start must be on cpu, got meta"),
    "too many counts": ({"num_tokens": COUNT.repeat(2)}, r"num_tokens must have shape \(2,\), got \(4,\)"),
    "a padded output": ({"out": torch.zeros(2, 16, 8)}, r"out must have shape \(32, 8\), got \(2, 16, 8\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_raise_a_value_error(case):
    changed, message = BAD[case]
    arguments: dict[str, Any] = {"a": A, "b": B, "num_tokens": COUNT, "expert_start": START} | changed
    with pytest.raises(ValueError, match=message):
        grouped_gemm_blockscale(**arguments)


def test_scales_of_rows_one_after_the_other_are_a_layout_error():
    scales = torch.ones(32, 1)
    row = QuantizedTensor(A.to(torch.float8_e4m3fn), scales, "row")
    with pytest.raises(LayoutError, match='a must have layout "transposed" and group size 128, got layout "row"'):
        grouped_gemm_blockscale(row, quantize_weight(B), COUNT, START)
