"""The public grouped GEMM on a CPU: results, outputs, errors. Its kernel is tested in tests/kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moequant import LayoutError, QuantizedTensor, grouped_gemm_blockscale, quantize_expert_batch, quantize_weight, reference
from moequant.formats import FORMATS
from moequant.testing import assert_bit_equal, cosine_difference, poison, relative_error

EXPERTS, ROWS, COLUMNS, DEPTH = 3, 6, 140, 200
COUNTS = torch.tensor([6, 0, 2], dtype=torch.int32)
QUANTS = [*FORMATS, "none"]


def operands(quant: str = "fp8_e4m3fn", segments: int = 1):
    """a, b as the GEMM takes them, and in float64 what each element of them stands for."""
    a, b = torch.randn(EXPERTS, ROWS, DEPTH).bfloat16(), torch.randn(EXPERTS, COLUMNS, DEPTH).bfloat16()
    if quant == "none":
        return a, b, a.double(), b.double()
    dtype = FORMATS[quant].dtype
    qa, qb = quantize_expert_batch(a, dtype=dtype), quantize_weight(b, dtype=dtype, segments=segments)
    group = torch.arange(DEPTH) // 128
    block = torch.arange(COLUMNS) // 128 if segments == 1 else torch.arange(COLUMNS) // (COLUMNS // segments)
    return (
        qa,
        qb,
        qa.values.double() * qa.scales.double()[..., group],
        qb.values.double() * qb.scales.double()[:, block][..., group],
    )


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("quant", QUANTS)
def test_the_product_is_within_1e_5_of_the_dequantized_operands_product(quant, segments):
    a, b, left, right = operands(quant, segments)
    out = grouped_gemm_blockscale(a, b, out_dtype=torch.float32)
    assert relative_error(out, left @ right.transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8"])
def test_the_quantized_product_is_near_the_unquantized_one(quant):
    a, b = torch.randn(2, 16, 512), torch.randn(2, 128, 512)
    dtype = FORMATS[quant].dtype
    out = grouped_gemm_blockscale(quantize_expert_batch(a, dtype=dtype), quantize_weight(b, dtype=dtype))
    assert cosine_difference(out, a @ b.transpose(1, 2)) < 1e-3


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_output_type_rounds_the_float32_result_once(out_dtype):
    a, b, _, _ = operands()
    wide = grouped_gemm_blockscale(a, b, out_dtype=torch.float32)
    out = grouped_gemm_blockscale(a, b, out_dtype=out_dtype)
    assert out.shape == (EXPERTS, ROWS, COLUMNS) and out.is_contiguous()
    assert_bit_equal(out, wide.to(out_dtype))


def test_the_output_is_bfloat16_unless_another_type_is_asked_for():
    a, b, _, _ = operands()
    assert grouped_gemm_blockscale(a, b).dtype == torch.bfloat16
    given = torch.empty(EXPERTS, ROWS, COLUMNS, dtype=torch.float16)
    assert grouped_gemm_blockscale(a, b, out=given, out_dtype=torch.float32) is given


@pytest.mark.parametrize("quant", QUANTS)
def test_rows_past_the_counts_are_not_written_and_have_no_influence(quant):
    a, b, _, _ = operands(quant)
    expected = grouped_gemm_blockscale(a, b, COUNTS)
    for expert, count in enumerate(COUNTS.tolist()):
        poison((a if isinstance(a, torch.Tensor) else a.scales)[expert, count:])
    out = torch.full((EXPERTS, ROWS, COLUMNS), -7.0, dtype=torch.bfloat16)
    assert grouped_gemm_blockscale(a, b, COUNTS, out=out) is out
    for expert, count in enumerate(COUNTS.tolist()):
        assert_bit_equal(out[expert, :count], expected[expert, :count])
        assert (out[expert, count:] == -7).all()


def test_no_counts_mean_all_rows():
    a, b, _, _ = operands()
    everything = torch.full((EXPERTS,), ROWS, dtype=torch.int32)
    assert_bit_equal(grouped_gemm_blockscale(a, b), grouped_gemm_blockscale(a, b, everything))


def test_the_hint_of_expected_rows_changes_nothing_on_a_cpu():
    a, b, _, _ = operands()
    for hint in (0, 1, 10**6):
        assert_bit_equal(grouped_gemm_blockscale(a, b, expected_rows=hint), grouped_gemm_blockscale(a, b))


def test_a_nan_group_spoils_its_row_alone():
    a = torch.ones(1, 3, 256)
    a[0, 1, 200] = float("inf")
    out = grouped_gemm_blockscale(quantize_expert_batch(a), quantize_weight(torch.ones(1, 5, 256)))
    assert out.isnan().any(2).tolist() == [[False, True, False]] and out[0, 1].isnan().all()


def test_scales_in_a_slice_of_a_larger_buffer_are_read_where_they_lie():
    a, b, _, _ = operands()
    assert isinstance(a, QuantizedTensor)
    buffer = poison(torch.empty(EXPERTS, 5, ROWS + 3))
    scales = buffer.transpose(1, 2)[:, 1 : ROWS + 1, 2:4]
    scales.copy_(a.scales)
    assert_bit_equal(grouped_gemm_blockscale(replace(a, scales=scales), b), grouped_gemm_blockscale(a, b))


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)], ids=str)
def test_empty_operands_give_empty_results(shape):
    experts, rows, columns, depth = shape
    out = grouped_gemm_blockscale(torch.zeros(experts, rows, depth).bfloat16(), torch.zeros(experts, columns, depth).bfloat16())
    assert out.shape == (experts, rows, columns)


def test_it_gives_the_bits_of_the_reference():
    a, b, _, _ = operands()
    assert_bit_equal(grouped_gemm_blockscale(a, b), reference.grouped_gemm_blockscale(a, b))


def row_scaled(a):
    return quantize_expert_batch(torch.randn(EXPERTS, ROWS, DEPTH), scales=torch.empty(EXPERTS, ROWS, 2))


LAYOUTS = {
    "row scales of a": (lambda a, b: (row_scaled(a), b), 'a must have layout "transposed" and group size 128, got layout "row"'),
    "another group size of a": (
        lambda a, b: (quantize_expert_batch(torch.randn(EXPERTS, ROWS, DEPTH), group_size=64), b),
        "a must have .* group size 128, got layout .* and group size 64",
    ),
    "blocks of another size": (
        lambda a, b: (a, reference.quantize_weight(torch.randn(EXPERTS, COLUMNS, DEPTH), group_size=64)),
        'b must have layout "block" and group size 128, got layout "block" and group size 64',
    ),
    "operands exchanged": (lambda a, b: (b, a), 'a must have layout "transposed" .* got layout "block"'),
    "activations for b": (lambda a, b: (a, a), 'b must have layout "block" .* got layout "transposed"'),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_scales_that_it_cannot_read_are_a_layout_error(case):
    change, message = LAYOUTS[case]
    a, b, _, _ = operands()
    with pytest.raises(LayoutError, match=message):
        grouped_gemm_blockscale(*change(a, b))


A, B = torch.zeros(2, 4, 8).bfloat16(), torch.zeros(2, 5, 8).bfloat16()
OPERANDS = {
    "quantized and plain": (
        quantize_expert_batch(A),
        B,
        "a and b must have the same dtype, got torch.float8_e4m3fn and torch.bfloat16",
    ),
    "plain and quantized": (A, quantize_weight(B), "a and b must have the same dtype, got torch.bfloat16 and torch.float8_e4m3fn"),
    "two formats": (
        quantize_expert_batch(A),
        quantize_weight(B, dtype=torch.int8),
        "same dtype.* torch.int8; quantize both to one format",
    ),
    "plain float32": (A.float(), B, "a must be torch.bfloat16 or torch.float16, got torch.float32"),
    "plain values of a quantized type": (
        quantize_expert_batch(A).values,
        B,
        "a must be torch.bfloat16 or torch.float16, got torch.float8_e4m3fn",
    ),
    "two dimensions of a": (A[0], B, r"a must have 3 dimensions, got shape \(4, 8\)"),
    "two dimensions of quantized b": (quantize_expert_batch(A), quantize_weight(B[0]), "the values of b must have 3 dimensions"),
    "another number of experts": (A[:1], B, r"b must have shape \(1, 5, 8\), got \(2, 5, 8\)"),
    "another depth": (A[..., :6].contiguous(), B, r"b must have shape \(2, 5, 6\), got \(2, 5, 8\)"),
    "operands on two devices": (A, B.to("meta"), "b must be on cpu, got meta"),
    "strided a": (A[:, ::2], B, r"the values of a must be contiguous, got strides \(32, 16, 1\); call .contiguous\(\)"),
    "strided b": (A, B.transpose(1, 2).contiguous().transpose(1, 2), "the values of b must be contiguous"),
}


@pytest.mark.parametrize("case", OPERANDS)
def test_operands_that_do_not_fit_raise_a_value_error(case):
    a, b, message = OPERANDS[case]
    with pytest.raises(ValueError, match=message):
        grouped_gemm_blockscale(a, b)


COUNT = torch.tensor([1, 2], dtype=torch.int32)
OPTIONS = {
    "counts of int64": ({"num_tokens": COUNT.long()}, "num_tokens must be torch.int32, got torch.int64"),
    "too many counts": ({"num_tokens": COUNT.repeat(2)}, r"num_tokens must have shape \(2,\), got \(4,\)"),
    "counts on another device": ({"num_tokens": COUNT.to("meta")}, "num_tokens must be on cpu, got meta"),
    "out of another shape": ({"out": torch.empty(2, 5, 4)}, r"out must have shape \(2, 4, 5\), got \(2, 5, 4\)"),
    "out of another type": ({"out": torch.empty(2, 4, 5).double()}, "out must be torch.bfloat16 or .* got torch.float64"),
    "out on another device": ({"out": torch.empty(2, 4, 5, device="meta")}, "out must be on cpu, got meta"),
    "strided out": ({"out": torch.empty(2, 5, 4).transpose(1, 2)}, r"out must be contiguous, got strides \(20, 1, 4\)"),
    "no multiprocessors": ({"num_sms": 0}, "num_sms must be at least 1, or None for all, got 0"),
    "an output type that is none": ({"out_dtype": torch.int8}, "out_dtype must be one of torch.bfloat16, .* got torch.int8"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_raise_a_value_error(case):
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        grouped_gemm_blockscale(A, B, **options)


def test_an_output_that_requires_grad_raises_under_grad_mode_only():
    out = torch.ones(2, 4, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="out requires grad, and this call has no backward"):
        grouped_gemm_blockscale(A, B, out=out)
    with torch.no_grad():
        assert grouped_gemm_blockscale(A, B, out=out) is out and not out.any()


@pytest.mark.parametrize("name", ["a", "b"])
def test_operands_that_require_grad_raise_under_grad_mode_only(name):
    a, b = (operand.clone().requires_grad_(name == own) for own, operand in (("a", A), ("b", B)))
    with pytest.raises(RuntimeError, match=f"{name} requires grad, and this call has no backward"):
        grouped_gemm_blockscale(a, b)
    with torch.no_grad():
        assert not grouped_gemm_blockscale(a, b).any()
