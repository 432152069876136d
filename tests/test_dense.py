"""mm_fp8_blockscale: every layout of scales, tails, operands as pairs and as quantized tensors, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moequant import LayoutError, QuantizedTensor, grouped_gemm_blockscale, reference
from moequant.batch import ceil_div
from moequant.gemm import mm_fp8_blockscale
from moequant.testing import assert_bit_equal, poison, relative_error

E4M3 = torch.float8_e4m3fn
SHAPES = {
    "whole blocks": (64, 256, 256),
    "tails": (70, 200, 336),
    "one row": (1, 130, 300),
    "odd rows": (7, 129, 128),
    "one group": (5, 6, 100),
}
LAYOUTS = ("row", "transposed", "tma_aligned", "transposed_flat")
# fp8 tensor cores add with about 14 bits
PRODUCT_ERROR = 6e-4 if torch.cuda.is_available() else 1e-5
shapes = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
pytestmark = pytest.mark.usefixtures("both_paths")


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype = E4M3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """a with row scales, b with block scales; neighbouring scales lie far apart."""
    rows, columns, depth = shape
    x = torch.randn(rows, depth) * torch.exp2(torch.randint(-3, 4, (rows, 1))) * torch.exp2(torch.arange(depth) // 128 % 3)
    a, a_scales = reference.quantize_groups(x, 128, dtype, "default", None)
    b = reference.quantize_weight(torch.randn(columns, depth) * torch.exp2(torch.arange(columns) // 128 % 5)[:, None], dtype=dtype)
    return a, a_scales, b.values, b.scales


def assert_same(x: torch.Tensor, y: torch.Tensor) -> None:
    """On a GPU TMA's alignment decides which kernel multiplies, and so the last bits."""
    if x.is_cuda:
        assert relative_error(x, y) < PRODUCT_ERROR
    else:
        assert_bit_equal(x, y)


def laid_out(scales: torch.Tensor, layout: str) -> torch.Tensor:
    """Row scales (M, G) in another layout."""
    rows, groups = scales.shape
    if layout == "transposed":
        return scales.t().contiguous().t()
    if layout == "tma_aligned":
        return poison(torch.empty(groups, ceil_div(rows, 4) * 4)).t()[:rows].copy_(scales)
    return scales.t().contiguous().view(rows, groups) if layout == "transposed_flat" else scales


@shapes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_bits_of_the_grouped_gemm_of_one_group(layout, shape):
    a, a_scales, b, b_scales = operands(shape)
    left = QuantizedTensor(a[None], laid_out(a_scales, "transposed")[None], "transposed")
    expected = grouped_gemm_blockscale(left, QuantizedTensor(b[None], b_scales[None], "block"), out_dtype=torch.float32)[0]
    assert relative_error(expected, reference.mm_fp8_blockscale(a, a_scales, b, b_scales, torch.float32)) < PRODUCT_ERROR
    scales = laid_out(a_scales, layout)
    assert_same(mm_fp8_blockscale(a, scales, b, b_scales, torch.float32, scale_layout=layout), expected)
    quantized = QuantizedTensor(a, scales, layout), None, QuantizedTensor(b, b_scales, "block")
    assert_same(mm_fp8_blockscale(*quantized, out_dtype=torch.float32), expected)
    if layout != "transposed_flat":
        assert_same(mm_fp8_blockscale(a, scales, b, b_scales, torch.float32), expected)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 140), st.integers(1, 400), st.sampled_from(LAYOUTS), st.integers(0, 2**31))
def test_any_shape_in_any_layout_is_the_product_of_what_the_operands_stand_for(rows, columns, depth, layout, seed):
    torch.manual_seed(seed)
    a, a_scales, b, b_scales = operands((rows, columns, depth))
    out = mm_fp8_blockscale(a, laid_out(a_scales, layout), b, b_scales, torch.float32, scale_layout=layout)
    left = a.double() * a_scales.double().repeat_interleave(128, 1)[:, :depth]
    right = b.double() * b_scales.double().repeat_interleave(128, 0)[:columns].repeat_interleave(128, 1)[:, :depth]
    # the rounding error of few numbers scatters, and sums may cancel
    assert ((out.double() - left @ right.T).abs() <= 2 * PRODUCT_ERROR * (left.abs() @ right.abs().T)).all()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2], ids=str)
def test_the_float32_result_is_rounded_once_and_is_bfloat16_unless_asked(dtype, out_dtype):
    a, a_scales, b, b_scales = operands((9, 140, 260), dtype)
    wide = mm_fp8_blockscale(a, a_scales, b, b_scales, torch.float32)
    left = a.double() * a_scales.double().repeat_interleave(128, 1)[:, :260]
    right = b.double() * b_scales.double().repeat_interleave(128, 0)[:140].repeat_interleave(128, 1)[:, :260]
    assert relative_error(wide, left @ right.T) < PRODUCT_ERROR
    assert_same(mm_fp8_blockscale(a, a_scales, b, b_scales, out_dtype).float(), wide.to(out_dtype).float())
    assert mm_fp8_blockscale(a, a_scales, b, b_scales).dtype == torch.bfloat16


def test_scales_under_the_wrong_name_are_scrambled():
    """Otherwise the layouts' test would prove nothing."""
    a, a_scales, b, b_scales = operands((70, 200, 336))
    expected = mm_fp8_blockscale(a, a_scales, b, b_scales)
    assert relative_error(mm_fp8_blockscale(a, laid_out(a_scales, "transposed_flat"), b, b_scales), expected) > 0.1


def test_segments_of_a_weight_are_blocked_apart():
    a, a_scales, _, _ = operands((5, 1, 200))
    w = torch.randn(2 * 100, 200)
    q = reference.quantize_weight(w, segments=2)
    out = mm_fp8_blockscale(a, a_scales, q, out_dtype=torch.float32)
    left = reference.dequantize(QuantizedTensor(a, a_scales, "row"))
    assert relative_error(out, left @ reference.dequantize(q).T) < PRODUCT_ERROR


@pytest.mark.parametrize("shape", [(0, 5, 8), (4, 0, 8)], ids=str)
def test_empty_operands_give_empty_results(shape):
    assert mm_fp8_blockscale(*operands(shape)).shape == shape[:2]


A, A_SCALES, B, B_SCALES = operands((6, 200, 300))
QUANTIZED = QuantizedTensor(A, A_SCALES, "row")
LAYOUT_ERRORS = {
    "a scale too few": (lambda: mm_fp8_blockscale(A, A_SCALES[:, :2], B, B_SCALES), r"need scales of shape \(6, 3\)"),
    "the name of another layout": (
        lambda: mm_fp8_blockscale(A, A_SCALES, B, B_SCALES, scale_layout="transposed"),
        'layout "transposed" needs the rows of one group side by side',
    ),
    "blocks for a": (
        lambda: mm_fp8_blockscale(QuantizedTensor(B, B_SCALES, "block"), None, B, B_SCALES),
        "a must have layout row or",
    ),
    "rows for b": (
        lambda: mm_fp8_blockscale(A, A_SCALES, QUANTIZED),
        "b must have layout block and group size 128, got layout row",
    ),
    "another group size": (
        lambda: mm_fp8_blockscale(QuantizedTensor(A, torch.ones(6, 5), "row", group_size=64), None, B, B_SCALES),
        "a must have .* and group size 128, got layout row and group size 64",
    ),
    "scales of another weight": (
        lambda: mm_fp8_blockscale(A, A_SCALES, B, B_SCALES.t().contiguous()),
        r"need scales of shape \(2, 3\)",
    ),
}
VALUE_ERRORS = {
    "bare a without scales": (lambda: mm_fp8_blockscale(A, None, B, B_SCALES), "a is a bare tensor: a_scales must be given"),
    "bare b without scales": (lambda: mm_fp8_blockscale(A, A_SCALES, B), "b is a bare tensor: b_scales must be given"),
    "scales twice": (lambda: mm_fp8_blockscale(QUANTIZED, A_SCALES, B, B_SCALES), "a is a QuantizedTensor, which knows its scales"),
    "layout twice": (lambda: mm_fp8_blockscale(QUANTIZED, None, B, B_SCALES, scale_layout="row"), "give neither beside it"),
    "another depth": (
        lambda: mm_fp8_blockscale(QUANTIZED, None, B[:, :200].contiguous(), B_SCALES[:, :2].contiguous()),
        "b must have shape",
    ),
    "another format": (
        lambda: mm_fp8_blockscale(QUANTIZED, None, B.to(torch.float8_e5m2), B_SCALES),
        "b must be torch.float8_e4m3fn",
    ),
    "int8": (
        lambda: mm_fp8_blockscale(A.view(torch.int8), A_SCALES, B.view(torch.int8), B_SCALES),
        "must be torch.float8_e4m3fn or",
    ),
    "three dimensions": (lambda: mm_fp8_blockscale(A[None], A_SCALES, B, B_SCALES), "a must have 2 dimensions"),
    "strided b": (lambda: mm_fp8_blockscale(A, A_SCALES, B.t().contiguous().t(), B_SCALES), "the values of b must be contiguous"),
    "int8 output": (lambda: mm_fp8_blockscale(A, A_SCALES, B, B_SCALES, torch.int8), "out_dtype must be one of"),
}


@pytest.mark.parametrize("case", LAYOUT_ERRORS)
def test_scales_that_lie_otherwise_are_a_layout_error(case):
    call, message = LAYOUT_ERRORS[case]
    with pytest.raises(LayoutError, match=message):
        call()


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_wrong_calls_raise_a_value_error_that_says_what_came(case):
    call, message = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_scales_that_require_grad_raise_under_grad_mode():
    with pytest.raises(RuntimeError, match="a_scales requires grad"):
        mm_fp8_blockscale(replace(QUANTIZED, scales=A_SCALES.clone().requires_grad_()), None, B, B_SCALES)
