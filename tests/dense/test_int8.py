"""The public int8 operations: shapes, round trips, products against whole numbers, properties, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from moequant import LayoutError
from moequant.gemm import int8_addmm, int8_addmm_quant, int8_gemm, int8_gemm_quant
from moequant.quantization import act_dequant, act_quant, int8_gelu, weight_dequant, weight_quant
from moequant.testing import assert_bit_equal, cosine_difference, relative_error

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
FLOOR = (torch.tensor(1e-10) / torch.tensor(127.0)).item()
LEADING = [(), (1,), (0,), (7,), (2, 3), (2, 1, 3)]
pytestmark = pytest.mark.usefixtures("both_paths")


def operands(rows: int = 5, columns: int = 200, depth: int = 300):
    """a, a_s, b, b_s, and what they stand for in float64."""
    a, a_s = act_quant(torch.randn(rows, depth) * torch.randn(rows, 1).exp())
    b, b_s = weight_quant(torch.randn(columns, depth))
    left = a.double() * a_s.double().repeat_interleave(128, 1)[:, :depth]
    right = b.double() * b_s.double().repeat_interleave(128, 0)[:columns].repeat_interleave(128, 1)[:, :depth]
    return (a, a_s, b, b_s), left @ right.T


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("columns, block_size", [(300, 128), (128, 32), (1, 64), (257, 256)])
def test_activations_of_any_leading_dimensions_come_back_within_half_a_step(leading, columns, block_size):
    x = torch.randn(*leading, columns)
    values, scales = act_quant(x, block_size)
    assert values.shape == x.shape and values.dtype == torch.int8 and values.is_contiguous()
    assert scales.shape == (*leading, math.ceil(columns / block_size)) and scales.dtype == torch.float32 and scales.is_contiguous()
    back = act_dequant(values, scales, block_size, torch.float32)
    steps = scales.repeat_interleave(block_size, -1)[..., :columns]
    assert back.shape == x.shape and ((back - x).abs() <= steps * 0.5001).all()
    assert_bit_equal(act_dequant(values, scales, block_size), back.half())


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("rows, columns, block_size", [(130, 260, 128), (64, 64, 32), (1, 5, 128)])
def test_weights_come_back_within_half_a_step(leading, rows, columns, block_size):
    w = torch.randn(*leading, rows, columns).bfloat16()
    values, scales = weight_quant(w, block_size)
    assert scales.shape == (*leading, math.ceil(rows / block_size), math.ceil(columns / block_size)) and scales.is_contiguous()
    back = weight_dequant(values, scales, block_size, torch.float32)
    assert (back - w.float()).abs().max() <= scales.max() * 0.5001
    assert weight_dequant(values, scales, block_size).dtype == torch.float16


def test_strided_activations_give_the_bits_of_their_copies():
    x = torch.randn(4, 300, 6).transpose(1, 2)[:, ::2]
    for got, expected in zip(act_quant(x), act_quant(x.contiguous()), strict=True):
        assert_bit_equal(got, expected)


def every_second(x: torch.Tensor) -> torch.Tensor:
    """x, its numbers two apart, with NaN between them."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("strided", [every_second, lambda s: s.mT.contiguous().mT], ids=["every second", "columns first"])
def test_strided_scales_give_the_bits_of_their_copies(strided):
    a, b = (torch.randint(-127, 128, (rows, 200), dtype=torch.int8) for rows in (3, 130))
    a_s, b_s, bias = torch.rand(3, 2), torch.rand(2, 2), torch.randn(130)
    assert not strided(a_s).is_contiguous() and not strided(b_s).is_contiguous()
    both = (a, a_s, b, b_s), (a, strided(a_s), b, strided(b_s))
    functions = {
        "int8_gemm": lambda a, a_s, b, b_s: (int8_gemm(a, a_s, b, b_s),),
        "int8_addmm": lambda a, a_s, b, b_s: (int8_addmm(a, a_s, b, b_s, bias),),
        "int8_gemm_quant": int8_gemm_quant,
        "int8_gelu": lambda a, a_s, *_: int8_gelu(a, a_s),
        "act_dequant": lambda a, a_s, *_: (act_dequant(a, a_s),),
        "weight_dequant": lambda _a, _s, b, b_s: (weight_dequant(b, b_s),),
    }
    for name, function in functions.items():
        for expected, got in zip(*(function(*arguments) for arguments in both), strict=True):
            assert_bit_equal(got, expected, name)


def test_values_are_rounded_to_nearest_even():
    x = torch.arange(-4, 4).float() + 0.5
    values, scales = act_quant(torch.cat([x, torch.tensor([127.0])]))
    assert scales.item() == 1 and values.tolist() == [-4, -2, -2, 0, 0, 2, 2, 4, 127]


def test_blocks_of_zeros_have_the_floor_and_bad_blocks_a_nan_scale():
    x = torch.zeros(3, 256)
    x[1, 5], x[2, 200] = float("inf"), float("nan")
    values, scales = act_quant(x)
    assert not values.any() and scales[0].tolist() == [FLOOR, FLOOR]
    assert scales.isnan().tolist() == [[False, False], [True, False], [False, True]]
    assert weight_quant(torch.zeros(2, 2))[1].item() == FLOOR
    assert int8_gelu(*act_quant(torch.zeros(5)))[1].item() == FLOOR


@QUICK
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300), st.sampled_from([32, 64, 128, 256]))
def test_any_numbers_come_back_within_half_a_step(numbers, block_size):
    x = torch.tensor(numbers)
    values, scales = act_quant(x, block_size)
    back = act_dequant(values, scales, block_size, torch.float32)
    assert (values.abs() <= 127).all() and (scales > 0).all()
    assert ((back - x).abs() <= scales.repeat_interleave(block_size)[: len(numbers)] * 0.5001).all()


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("columns, depth", [(200, 300), (128, 128), (1, 1)])
def test_products_are_within_1e_6_whatever_the_leading_dimensions(leading, columns, depth):
    (a, a_s, b, b_s), expected = operands(math.prod(leading), columns, depth)
    a, a_s = a.view(*leading, depth), a_s.view(*leading, -1) if a_s.numel() else a_s.view(*leading, a_s.shape[-1])
    out = int8_gemm(a, a_s, b, b_s, torch.float32)
    assert out.shape == (*leading, columns)
    assert relative_error(out.view(expected.shape), expected) < 1e-6
    assert_bit_equal(int8_gemm(a, a_s, b, b_s), out.half())
    assert_bit_equal(int8_addmm(a, a_s, b, b_s), out.half())
    assert_bit_equal(int8_addmm(a, a_s, b, b_s, out_dtype=torch.bfloat16), out.bfloat16())


@QUICK
@given(st.integers(1, 40), st.integers(1, 140), st.integers(1, 400), st.integers(0, 2**31))
def test_products_of_any_shape_and_of_unit_scales_are_exact(rows, columns, depth, seed):
    torch.manual_seed(seed)
    a, b = (torch.randint(-128, 128, (n, depth), dtype=torch.int8) for n in (rows, columns))
    groups = math.ceil(depth / 128)
    out = int8_gemm(a, torch.ones(rows, groups), b, torch.ones(math.ceil(columns / 128), groups), torch.float32)
    # whole numbers far below 2**53: exact, and CUDA has no products of int64
    assert torch.equal(out.double(), a.double() @ b.double().T)


def test_the_product_is_near_the_unquantized_one():
    x, w = torch.randn(16, 512), torch.randn(128, 512)
    assert cosine_difference(int8_gemm(*act_quant(x), *weight_quant(w)), x @ w.T) < 1e-3


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bias_is_added_in_float32(bias_dtype):
    arguments, expected = operands()
    bias = (torch.randn(200) * 100).to(bias_dtype)
    assert relative_error(int8_addmm(*arguments, bias, torch.float32), expected + bias.double()) < 1e-6


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_quantized_product_is_the_next_ones_activations(block_size, with_bias):
    arguments, _ = operands()
    bias = torch.randn(200) if with_bias else None
    values, scales = int8_addmm_quant(*arguments, bias, block_size)
    expected_values, expected_scales = act_quant(int8_addmm(*arguments, bias, torch.float32), block_size)
    assert_bit_equal(values, expected_values)
    assert_bit_equal(scales, expected_scales)
    if not with_bias and block_size == 128:
        assert_bit_equal(int8_gemm_quant(*arguments)[0], values)
        w = weight_quant(torch.randn(64, 200))
        assert int8_gemm(values, scales, *w).shape == (5, 64)


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_gelu_is_torchs_within_the_quantizations_step(leading):
    x, s = act_quant(torch.randn(*leading, 300) * 2)
    values, scales = int8_gelu(x, s)
    assert values.shape == x.shape and scales.shape == s.shape
    expected = F.gelu(act_dequant(x, s, output_dtype=torch.float32).double())
    back = act_dequant(values, scales, output_dtype=torch.float32).double()
    assert ((back - expected).abs() <= scales.repeat_interleave(128, -1)[..., :300] * 0.501).all()


@QUICK
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=200), st.floats(2.0**-40, 2.0**20, width=32))
def test_gelu_of_any_codes_and_scale_is_within_its_step(codes, scale):
    x, s = torch.tensor(codes, dtype=torch.int8), torch.full((math.ceil(len(codes) / 128),), scale)
    values, scales = int8_gelu(x, s)
    expected = F.gelu(x.double() * s.double().repeat_interleave(128)[: len(codes)])
    back = values.double() * scales.double().repeat_interleave(128)[: len(codes)]
    assert ((back - expected).abs() <= scales.repeat_interleave(128)[: len(codes)] * 0.501).all()


A, A_S, B, B_S = (
    torch.zeros(2, 3, 300, dtype=torch.int8),
    torch.ones(2, 3, 3),
    torch.zeros(200, 300, dtype=torch.int8),
    torch.ones(2, 3),
)
WRONG = {
    "float a": (lambda: int8_gemm(A.float(), A_S, B, B_S), "a must be torch.int8, got torch.float32; act_quant makes it, and"),
    "float b": (lambda: int8_gemm(A, A_S, B.float(), B_S), "b must be torch.int8, got torch.float32; weight_quant makes it, and"),
    "strided a": (lambda: int8_gemm(A[:, ::2], A_S[:, ::2], B, B_S), "a must be contiguous"),
    "a scale too few": (lambda: int8_gemm(A, A_S[..., :2], B, B_S), r"a_s must have shape \(2, 3, 3\), .* got \(2, 3, 2\)"),
    "another depth of b": (lambda: int8_gemm(A, A_S, B[:, :200], B_S), r"b must have shape \(200, 300\), got \(200, 200\)"),
    "b scales of another shape": (lambda: int8_gemm(A, A_S, B, B_S.t()), r"b_s must have shape \(2, 3\), .* got \(3, 2\)"),
    "half scales": (lambda: int8_gemm(A, A_S.half(), B, B_S), "a_s must be torch.float32"),
    "strided b": (lambda: int8_gemm(A, A_S, torch.zeros(300, 200, dtype=torch.int8).t(), B_S), "b must be contiguous"),
    "a strided bias": (lambda: int8_addmm(A, A_S, B, B_S, torch.ones(400)[::2]), "bias must be contiguous"),
    "b on another device": (lambda: int8_gemm(A, A_S, B.to("meta"), B_S), "b must be on cpu, got meta"),
    "b of three dimensions": (lambda: int8_gemm(A, A_S, B[None], B_S), "b must have 2 dimensions"),
    "int8 output": (lambda: int8_gemm(A, A_S, B, B_S, torch.int8), "out_dtype must be one of torch.bfloat16"),
    "another bias": (lambda: int8_addmm(A, A_S, B, B_S, torch.ones(300)), r"bias must have shape \(200,\), got \(300,\)"),
    "another output block": (lambda: int8_gemm_quant(A, A_S, B, B_S, 100), "out_block_size must be one of 32, 64, 128, got 100"),
    "integers to quantize": (lambda: act_quant(A), "x must be torch.bfloat16 or"),
    "a scalar to quantize": (lambda: act_quant(torch.ones(())), "x must have at least 1 dimensions"),
    "another block": (lambda: act_quant(A.float(), 100), "block_size must be one of 32, 64, 128, 256, got 100"),
    "a vector for a weight": (lambda: weight_quant(torch.ones(5)), "x must have at least 2 dimensions"),
    "no block": (lambda: weight_quant(torch.ones(5, 5), 0), "block_size must be at least 1, got 0"),
    "scales of other activations": (lambda: act_dequant(A, A_S[:1]), "s must have shape"),
    "scales of another weight": (lambda: weight_dequant(B, A_S[0]), "s must have shape"),
    "back to integers": (lambda: act_dequant(A, A_S, output_dtype=torch.int8), "output_dtype must be one of"),
    "gelu of other scales": (lambda: int8_gelu(A, A_S[..., 0]), "s_x must have shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_raise_a_value_error_that_says_what_came(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_scales_of_another_shape_are_a_layout_error():
    with pytest.raises(LayoutError):
        int8_gemm(A, A_S[..., :2], B, B_S)


GRAD = {
    "x": lambda grad: act_quant(grad(torch.ones(3, 5))),
    "a_s": lambda grad: int8_gemm(A, grad(A_S), B, B_S),
    "b_s": lambda grad: int8_gemm_quant(A, A_S, B, grad(B_S)),
    "s_x": lambda grad: int8_gelu(A, grad(A_S)),
    "bias": lambda grad: int8_addmm(A, A_S, B, B_S, grad(torch.ones(200))),
    "s": lambda grad: act_dequant(A, grad(A_S)),
}


@pytest.mark.parametrize("name", GRAD)
def test_tensors_that_require_grad_raise_under_grad_mode_only(name):
    def grad(x: torch.Tensor) -> torch.Tensor:
        return x.clone().requires_grad_()

    with torch.device("cpu"):
        with pytest.raises(RuntimeError, match=f"{name} requires grad"):
            GRAD[name](grad)
        with torch.no_grad():
            GRAD[name](grad)


@pytest.mark.usefixtures("both_paths")
def test_a_block_larger_than_a_weight_is_one_block():
    x = torch.randn(2, 40, 70)
    values, scales = weight_quant(x, 2**31 - 1)
    assert scales.shape == (2, 1, 1)
    expected_values, expected_scales = weight_quant(x, 128)
    assert_bit_equal(values, expected_values)
    assert_bit_equal(scales, expected_scales)
    assert_bit_equal(weight_dequant(values, scales, 2**31 - 1), weight_dequant(values, scales, 128))
