"""Per-tensor fp8: scales as multipliers, storage and encodings, overflow handling, the product. Kernels are tested in tests/kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moequant import ops
from moequant.errors import NumericalOverflowError
from moequant.gemm import fp8_gemm
from moequant.ops import dense
from moequant.quantization import FP8Format, dequantize_fp8, quantize_fp8, quantize_fp8_with_overflow_handling
from moequant.testing import assert_bit_equal, relative_error

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
E4M3 = torch.float8_e4m3fn
# fp8 tensor cores add with about 14 bits
PRODUCT_ERROR = 6e-4 if torch.cuda.is_available() else 1e-5
pytestmark = pytest.mark.usefixtures("both_paths")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 40), (2, 3, 4, 5)], ids=str)
def test_the_scale_is_448_over_the_maximum_as_a_multiplier(shape, dtype):
    x = torch.randn(shape).to(dtype)
    values, scale = quantize_fp8(x)
    assert values.shape == shape and values.dtype == E4M3 and values.is_contiguous()
    assert scale.shape == () and scale.dtype == torch.float32
    assert scale == torch.tensor(448.0) / x.float().abs().max()
    assert_bit_equal(values, (x.float() * scale).clamp(-448, 448).to(E4M3))
    assert values.float().abs().max() == 448


def test_uint8_storage_holds_the_float8_bits():
    x = torch.randn(7, 9)
    values, scale = quantize_fp8(x)
    stored, same = quantize_fp8(x, storage="uint8")
    assert stored.dtype == torch.uint8 and scale == same
    assert_bit_equal(stored, values.view(torch.uint8))
    assert_bit_equal(dequantize_fp8(stored, scale), dequantize_fp8(values, scale))


def test_offset_codes_are_linear_around_128():
    x = torch.tensor([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0])
    codes, scale = quantize_fp8(x, storage="uint8", encoding="offset")
    assert codes.dtype == torch.uint8 and scale == 224
    assert codes.tolist() == [1, 64, 128, 128, 160, 192, 255]
    assert torch.allclose(dequantize_fp8(codes, scale, torch.float32, "offset"), x, atol=1 / 127)


@QUICK
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=60))
def test_any_numbers_come_back_within_half_a_step(numbers):
    x = torch.tensor(numbers)
    values, scale = quantize_fp8(x)
    assert scale > 0 and scale.isfinite()
    step = torch.maximum(x.abs() / 16, 2.0**-10 / scale)
    assert ((dequantize_fp8(values, scale, torch.float32) - x).abs() <= step * 1.001).all()
    codes, scale = quantize_fp8(x, storage="uint8", encoding="offset")
    assert codes.min() >= 1
    assert ((dequantize_fp8(codes, scale, torch.float32, "offset") - x).abs() <= 448 / 127 / scale * 0.501).all()


def test_zeros_and_nothing_have_scale_one_and_bad_numbers_a_nan_scale():
    for x in (torch.zeros(3, 3), torch.zeros(0, 3)):
        values, scale = quantize_fp8(x)
        assert scale == 1 and not values.float().any()
    for bad in (math.nan, math.inf, -math.inf):
        values, scale = quantize_fp8(torch.tensor([1.0, bad]))
        assert scale.isnan() and not values.view(torch.uint8).any()
        assert dequantize_fp8(values, scale).isnan().all()


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]]).double(), 2], ids=repr)
def test_a_given_scale_is_used_and_numbers_past_the_range_are_clamped(scale):
    x = torch.tensor([1.0, -300.0, 1000.0, math.inf, -math.inf, math.nan])
    values, used = quantize_fp8(x, scale)
    assert used.shape == () and used == 2
    assert values.float()[:5].tolist() == [2.0, -448.0, 448.0, 448.0, -448.0] and values.float()[5].isnan()
    codes, _ = quantize_fp8(x, scale, "uint8", "offset")
    assert codes.tolist() == [129, 1, 255, 255, 1, 128]


def test_a_strided_tensor_gives_the_bits_of_its_copy():
    x = torch.randn(6, 8, 10).permute(2, 0, 1)[::2]
    assert_bit_equal(quantize_fp8(x)[0], quantize_fp8(x.contiguous())[0])


def test_overflow_handling_halves_the_scale_until_it_fits():
    x = torch.tensor([100.0, -50.0])
    for given_scale, used in ((4.0, 4.0), (8.0, 4.0), (16.0, 4.0)):
        values, scale = quantize_fp8_with_overflow_handling(x, given_scale)
        assert scale == used and values.float().tolist() == [400 // 32 * 32, -192.0 if used == 4 else -200]
    with pytest.raises(NumericalOverflowError, match="100 leaves -448..448 with scale 32 and with its halves in 3 attempts"):
        quantize_fp8_with_overflow_handling(x, 32.0)
    assert quantize_fp8_with_overflow_handling(x, 32.0, max_attempts=4)[1] == 4


def test_overflow_handling_takes_a_computed_scale_as_it_is():
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(50)
        values, scale = quantize_fp8(x)
        for again in (quantize_fp8_with_overflow_handling(x), quantize_fp8_with_overflow_handling(x, scale)):
            assert again[1] == scale
            assert_bit_equal(again[0], values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_overflow_handling_refuses_inf_and_nan(bad, scale):
    with pytest.raises(NumericalOverflowError):
        quantize_fp8_with_overflow_handling(torch.tensor([1.0, bad]), scale)


def test_the_format_knows_its_range_and_scales():
    fmt = FP8Format()
    info = torch.finfo(E4M3)
    assert (fmt.max_value, fmt.min_normal) == (FP8Format.max_value, FP8Format.min_normal) == (info.max, info.smallest_normal)
    x = torch.tensor([[1.0, -4.0], [0.0, 0.0], [math.nan, 1.0]])
    assert fmt.compute_scale(x[:2]) == 112 and fmt.compute_scale(torch.zeros(2)) == 1 and fmt.compute_scale(x).isnan()
    assert fmt.compute_scale_per_channel(x)[:2].tolist() == [112, 1] and fmt.compute_scale_per_channel(x)[2].isnan()
    assert fmt.compute_scale_per_channel(x[:2], dim=1).tolist() == [448, 112]
    assert fmt.compute_scale_per_channel(x[:2], dim=-1).tolist() == [448, 112]
    assert fmt.compute_scale_per_channel(x[0]).tolist() == [448, 112]
    assert fmt.compute_scale(torch.empty(0)) == 1 and fmt.compute_scale_per_channel(torch.empty(3, 0)).tolist() == [1, 1, 1]
    assert fmt.is_in_range(torch.tensor([448.0, -448.0])) and not fmt.is_in_range(torch.tensor([449.0]))
    assert not fmt.is_in_range(x) and not fmt.is_in_range(torch.tensor([-math.inf]))
    assert FP8Format(57344.0, 2.0**-14).compute_scale(torch.tensor([2.0])) == 28672


def scaled(rows: int, depth: int, dim: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float8 values, their scale or scales, and what they stand for."""
    x = torch.randn(rows, depth) * torch.randn(rows, 1).exp()
    if dim is None:
        values, scale = quantize_fp8(x)
        return values, scale, values.double() / scale.double()
    scale = FP8Format().compute_scale_per_channel(x, dim)
    values = (x * scale[:, None]).clamp(-448, 448).to(E4M3)
    return values, scale, values.double() / scale.double()[:, None]


@pytest.mark.parametrize("a_dim", [None, 0])
@pytest.mark.parametrize("b_dim", [None, 0])
@pytest.mark.parametrize("shape", [(5, 200, 300), (1, 1, 1), (70, 30, 128)], ids=str)
def test_the_product_takes_scalar_and_per_channel_scales(shape, a_dim, b_dim):
    rows, columns, depth = shape
    (a, a_scale, left), (b, b_scale, right) = scaled(rows, depth, a_dim), scaled(columns, depth, b_dim)
    bias = torch.randn(columns)
    out = fp8_gemm(a, b, a_scale, b_scale, out_dtype=torch.float32)
    assert relative_error(out, left @ right.T) < PRODUCT_ERROR
    assert_bit_equal(fp8_gemm(a, b, a_scale, b_scale), out.half())
    assert_bit_equal(fp8_gemm(a, b, a_scale, b_scale, torch.bfloat16), out.bfloat16())
    assert relative_error(fp8_gemm(a, b, a_scale, b_scale, torch.float32, bias), left @ right.T + bias.double()) < PRODUCT_ERROR
    if b_dim == 0:
        assert_bit_equal(fp8_gemm(a, b, a_scale, b_scale[:, None], out_dtype=torch.float32), out)


def test_the_product_quantizes_on_its_own():
    x, w = torch.randn(6, 256).bfloat16(), torch.randn(64, 256)
    out = fp8_gemm(x, w, out_dtype=torch.float32)
    (a, a_scale), (b, b_scale) = quantize_fp8(x), quantize_fp8(w)
    assert_bit_equal(out, fp8_gemm(a, b, a_scale, b_scale, out_dtype=torch.float32))
    assert_bit_equal(fp8_gemm(x, b, None, b_scale, out_dtype=torch.float32), out)
    assert_bit_equal(
        fp8_gemm(x, w, 10.0, out_dtype=torch.float32), fp8_gemm(quantize_fp8(x, 10.0)[0], w, 10.0, out_dtype=torch.float32)
    )
    assert relative_error(out, x.double() @ w.double().T) < 0.06


@pytest.mark.parametrize("scale", [torch.tensor([10.0]), torch.tensor([[10.0]]), torch.tensor([10.0]).double()], ids=repr)
def test_the_scale_of_a_single_row_is_a_scalar(scale):
    x, w = torch.randn(1, 256), torch.randn(64, 256)
    expected = fp8_gemm(x, w, 10.0)
    assert_bit_equal(fp8_gemm(x, w, scale), expected)
    assert_bit_equal(fp8_gemm(quantize_fp8(x, 10.0)[0], w, scale), expected)


def test_a_product_of_bad_numbers_is_nan():
    assert fp8_gemm(torch.tensor([[math.inf, 1.0]]), torch.ones(3, 2)).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)], ids=str)
def test_empty_products_are_empty(shape):
    rows, columns, depth = shape
    assert fp8_gemm(torch.zeros(rows, depth), torch.zeros(columns, depth)).shape == (rows, columns)


def test_arguments_come_in_the_order_and_with_the_defaults_of_the_public_originals():
    x = torch.randn(4, 40)
    values, scale = quantize_fp8(x)
    assert dequantize_fp8(values, scale).dtype == fp8_gemm(values, values, scale, scale).dtype == torch.float16
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_bit_equal(dequantize_fp8(values, scale, dtype), (values.float() * (1 / scale)).to(dtype))
        assert_bit_equal(fp8_gemm(values, values, scale, scale, dtype), fp8_gemm(values, values, scale, scale, out_dtype=dtype))
    assert FP8Format().is_in_range(x, scale) and not FP8Format().is_in_range(x, 2 * scale)
    assert FP8Format().is_in_range(x, float(scale)) and not FP8Format().is_in_range(torch.tensor([math.nan]), 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scales_are_float32_whatever_the_tensors_and_the_default_type(dtype):
    torch.set_default_dtype(torch.float64)
    try:
        for x in (torch.empty(0, 3, dtype=dtype), torch.empty(3, 0, dtype=dtype), torch.ones(2, 3, dtype=dtype)):
            assert FP8Format().compute_scale(x).dtype == torch.float32
            assert FP8Format().compute_scale_per_channel(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


X, V = torch.ones(2, 3), torch.ones(2, 3).to(E4M3)
WRONG = {
    "integers": (lambda: quantize_fp8(X.int()), "x must be torch.bfloat16 or"),
    "a scale of zero": (lambda: quantize_fp8(X, 0.0), "scale must be a positive scalar, got 0.0"),
    "a negative scale": (lambda: quantize_fp8(X, torch.tensor(-1.0, device=X.device)), "scale must be a positive scalar, got -1.0"),
    "an infinite scale": (lambda: quantize_fp8(X, math.inf), "scale must be a positive scalar, got inf"),
    "a NaN scale": (lambda: quantize_fp8(X, math.nan), "scale must be a positive scalar, got nan"),
    "several scales": (
        lambda: quantize_fp8(X, torch.ones(2)),
        r"scale must be a positive scalar, got torch.float32 of shape \(2,\)",
    ),
    "an integer tensor as a scale": (lambda: quantize_fp8(X, torch.tensor(1)), "scale must be a positive scalar, got torch.int64"),
    "a scale that float32 has no room for": (
        lambda: quantize_fp8(X, 1e300),
        "scale must be a number that float32 can hold, got 1e",
    ),
    "a scale that float32 rounds to zero": (
        lambda: quantize_fp8(X, 1e-50),
        "scale must be a positive scalar, got 1e-50 which float32",
    ),
    "a word as a scale": (lambda: quantize_fp8(X, "2"), "scale must be a number, got '2'"),  # pyright: ignore
    "a scale of a product": (lambda: fp8_gemm(X, X, -1.0), "a_scale must be a positive scalar, got -1.0"),
    "a scale on another device": (lambda: quantize_fp8(X, torch.ones((), device="meta")), "scale must be on .*, got meta"),
    "scales of integers": (lambda: FP8Format().compute_scale(X.char()), "tensor must be torch.bfloat16 or"),
    "channels that are not there": (lambda: FP8Format().compute_scale_per_channel(X, 5), "dim must be in -2..1, got 5"),
    "channels of a number": (lambda: FP8Format().compute_scale_per_channel(X[0, 0]), "tensor must have at least 1 dimension"),
    "another storage": (lambda: quantize_fp8(X, storage="int8"), "storage must be one of float8, uint8, got 'int8'"),  # pyright: ignore
    "another encoding": (lambda: quantize_fp8(X, encoding="e5m2"), "encoding must be one of e4m3, offset, got 'e5m2'"),  # pyright: ignore
    "offset in float8": (lambda: quantize_fp8(X, encoding="offset"), 'pass storage="uint8"'),
    "offset from float8": (lambda: dequantize_fp8(V, 1.0, encoding="offset"), 'must be torch.uint8 with encoding "offset"'),
    "floats to dequantize": (lambda: dequantize_fp8(X, 1.0), "values must be torch.float8_e4m3fn or torch.uint8"),
    "back to integers": (lambda: dequantize_fp8(V, 1.0, output_dtype=torch.int32), "output_dtype must be one of"),
    "no attempts": (lambda: quantize_fp8_with_overflow_handling(X, max_attempts=0), "max_attempts must be at least 1, got 0"),
    "another depth": (lambda: fp8_gemm(X, torch.ones(4, 2)), r"b must have shape \(4, 3\), got \(4, 2\)"),
    "int8 operands": (lambda: fp8_gemm(X.char(), X.char()), "a must be torch.float8_e4m3fn or"),
    "one scale for each row of floats": (lambda: fp8_gemm(X, X, torch.ones(2)), "a_scale must be a positive scalar or None"),
    "scales of other rows": (lambda: fp8_gemm(V, V, torch.ones(5)), r"a_scale must be a positive scalar, got .* \(5,\)"),
    "another bias": (lambda: fp8_gemm(V, V, bias=torch.ones(3)), r"bias must have shape \(2,\), got \(3,\)"),
    "strided float8": (lambda: fp8_gemm(V[:, ::2], V[:, :2].contiguous()), "a must be contiguous"),
    "int8 output": (lambda: fp8_gemm(X, X, out_dtype=torch.int8), "out_dtype must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_raise_a_value_error_that_says_what_came(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_kernels_ask_the_device_for_float8_and_for_nothing_else(monkeypatch):
    asked, x = [], torch.ones(2)
    monkeypatch.setattr(dense, "check_format", lambda quant, device: asked.append(quant))
    dequantize_fp8(*quantize_fp8(x, storage="uint8", encoding="offset"), encoding="offset")
    assert not asked
    quantize_fp8(x)
    assert asked == (["fp8_e4m3fn"] if ops.uses_kernels(x) else [])


GRAD = {
    "x": lambda grad: quantize_fp8(grad(X)),
    "a": lambda grad: fp8_gemm(grad(X), V),
    "bias": lambda grad: fp8_gemm(V, V, bias=grad(torch.ones(2, device=V.device))),
    "a_scale": lambda grad: fp8_gemm(V, V, grad(torch.ones(2, device=V.device))),
    "b_scale": lambda grad: fp8_gemm(V, V, None, grad(torch.ones(2, 1, device=V.device))),
}


@pytest.mark.parametrize("name", GRAD)
def test_tensors_that_require_grad_raise_under_grad_mode_only(name):
    def grad(x: torch.Tensor) -> torch.Tensor:
        return x.clone().requires_grad_()

    # what a floating-point operand is quantized by calls it x
    with pytest.raises(RuntimeError, match=f"({name}|x) requires grad"):
        GRAD[name](grad)
    with torch.no_grad():
        GRAD[name](grad)
