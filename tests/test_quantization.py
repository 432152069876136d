"""The public quantization functions: shapes, strides, given outputs, properties of the round trip, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import moequant
from moequant import (
    LayoutError,
    QuantizedTensor,
    dequantize,
    quantize_expert_batch,
    quantize_weight,
    reference,
    silu_mul,
    silu_mul_quantize,
)
from moequant.formats import FORMATS, RECIPES
from moequant.testing import assert_bit_equal, poison

# explicit digits of the mantissa, and the exponent of the smallest normal number
PRECISION = {"fp8_e4m3fn": (3, -6), "fp8_e4m3fnuz": (3, -7), "fp8_e5m2": (2, -14)}
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
COUNTS = torch.tensor([3, 0], dtype=torch.int32)


def quantize_gated(x, *args, **kwargs):
    """silu_mul_quantize on an input whose last dimension doubles x's: the same output shape as quantize_expert_batch on x."""
    return silu_mul_quantize(torch.cat([x, x], -1), *args, **kwargs)


quantizers = pytest.mark.parametrize(
    "quantize", [quantize_expert_batch, quantize_gated], ids=["quantize_expert_batch", "silu_mul_quantize"]
)


@quantizers
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(2, 5, 300), (1, 1, 1), (3, 4, 128), (2, 0, 64), (0, 3, 64)], ids=str)
def test_outputs_have_the_contracts_shapes_types_and_strides(shape, name, quantize):
    experts, rows, columns = shape
    groups = math.ceil(columns / 128)
    q = quantize(torch.randn(shape), dtype=FORMATS[name].dtype, recipe="ue8m0")
    assert q.values.shape == q.shape == shape and q.values.dtype == FORMATS[name].dtype and q.values.is_contiguous()
    assert q.scales.shape == (experts, rows, groups) and q.scales.dtype == torch.float32
    if experts * rows:
        assert q.scales.stride() == (rows * groups, 1, rows)
    assert (q.layout, q.recipe, q.group_size, q.segments) == ("transposed", "ue8m0", 128, 1)


@pytest.mark.parametrize("group_size, groups", [(32, 10), (64, 5), (128, 3), (256, 2)])
def test_the_group_size_decides_the_number_of_scales(group_size, groups):
    q = quantize_expert_batch(torch.randn(2, 3, 300), group_size=group_size)
    assert q.scales.shape == (2, 3, groups) and q.group_size == group_size


@quantizers
@pytest.mark.parametrize("layout", ["transposed", "row", "slice of a larger buffer"])
def test_given_outputs_are_written_and_returned_whatever_their_strides(layout, quantize):
    x = torch.randn(2, 5, 300)
    expected = quantize(x)
    values = torch.empty(2, 300, 5, dtype=torch.float8_e4m3fn).transpose(1, 2)
    if layout == "row":
        scales = poison(torch.empty(2, 5, 3))
    elif layout == "transposed":
        scales = poison(torch.empty(2, 3, 5)).transpose(1, 2)
    else:
        scales = poison(torch.empty(4, 6, 8)).transpose(1, 2)[::2, 2:7, ::2]
    q = quantize(x, values=values, scales=scales)
    assert q.values is values and q.scales is scales
    assert q.layout == ("row" if layout == "row" else "transposed")
    assert_bit_equal(values, expected.values)
    assert_bit_equal(scales, expected.scales)


@quantizers
def test_rows_past_the_counts_are_neither_read_nor_written(quantize):
    x = torch.randn(2, 4, 140)
    expected = quantize(x)
    poison_past(x, COUNTS)
    values = torch.full(x.shape, 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((2, 4, 2), -7.0)
    quantize(x, COUNTS, values=values, scales=scales)
    assert_bit_equal(values[0, :3], expected.values[0, :3])
    assert_bit_equal(scales[0, :3], expected.scales[0, :3])
    untouched = torch.cat([values.view(torch.uint8)[0, 3:], values.view(torch.uint8)[1]])
    assert (untouched == 0x55).all() and (scales[0, 3:] == -7).all() and (scales[1] == -7).all()


def test_silu_mul_leaves_rows_past_the_counts_and_takes_any_output_strides():
    x = torch.randn(2, 4, 2 * 70)
    expected = silu_mul(x)
    assert expected.shape == (2, 4, 70) and expected.dtype == torch.bfloat16
    out = torch.full((4, 70, 2), -7.0, dtype=torch.bfloat16).permute(2, 0, 1)
    assert silu_mul(poison_past(x, COUNTS), COUNTS, out=out) is out
    assert_bit_equal(out[0, :3], expected[0, :3])
    assert (out[0, 3:] == -7).all() and (out[1] == -7).all()


def poison_past(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    for expert, count in enumerate(counts.tolist()):
        poison(x[expert, count:])
    return x


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_silu_mul_rounds_the_float32_product_once(out_dtype):
    x = torch.randn(1, 3, 2 * 40).bfloat16()
    gate, up = x.double().chunk(2, -1)
    exact = gate / (1 + (-gate).exp()) * up
    out = silu_mul(x, out=torch.empty(1, 3, 40, dtype=out_dtype))
    error = (out.double() - exact).abs()
    assert (error <= (torch.finfo(out_dtype).eps / 2 + 1e-6) * exact.abs() + torch.finfo(out_dtype).smallest_normal).all()


@pytest.mark.parametrize("function", [quantize_expert_batch, silu_mul_quantize], ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_inputs_of_any_strides_give_the_bits_of_their_copies(order, function):
    x = torch.randn(4, 600, 16).bfloat16().permute(order)[:, 1:, ::2]
    strided, copied = function(x), function(x.contiguous())
    assert_bit_equal(strided.values, copied.values)
    assert_bit_equal(strided.scales, copied.scales)


@pytest.mark.parametrize("options", [{}, {"recipe": "ue8m0"}, {"recipe": "deepgemm"}], ids=str)
def test_silu_mul_quantize_equals_its_two_steps(options):
    x = torch.randn(2, 3, 2 * 200).bfloat16()
    fused = silu_mul_quantize(x, dtype=torch.int8, **options)
    apart = quantize_expert_batch(silu_mul(x, out=torch.empty(2, 3, 200)), dtype=torch.int8, **options)
    assert_bit_equal(fused.values, apart.values)
    assert_bit_equal(fused.scales, apart.scales)


def test_the_floor_that_is_given_is_that_of_the_scales():
    x = torch.randn(2, 5, 300).clamp(-0.9, 0.9)
    x[1, 2, 150] = 1000.0
    scales = quantize_expert_batch(x, eps=1.0).scales
    assert (scales == torch.tensor(1.0) / 448).flatten().tolist().count(False) == 1 and scales[1, 2, 1] > 1


@pytest.mark.parametrize("name", ["quantize_expert_batch", "silu_mul_quantize", "silu_mul", "quantize_weight"])
def test_the_public_functions_give_the_reference_s_bits(name):
    x = torch.randn(2, 130, 2 * 150)
    public, specified = getattr(moequant, name)(x), getattr(reference, name)(x)
    pairs = [(public, specified)] if name == "silu_mul" else [(public.values, specified.values), (public.scales, specified.scales)]
    for got, expected in pairs:
        assert_bit_equal(got, expected)


def test_meta_tensors_give_shapes_without_computing():
    q = quantize_expert_batch(torch.empty(2, 5, 300, device="meta"), torch.empty(2, dtype=torch.int32, device="meta"))
    assert q.values.is_meta and q.values.shape == (2, 5, 300) and q.scales.stride() == (15, 1, 5)
    assert silu_mul(torch.empty(2, 5, 300, device="meta")).shape == (2, 5, 150)


@pytest.mark.parametrize("shape", [(200, 140), (3, 200, 140), (2, 3, 200, 140)], ids=str)
@pytest.mark.parametrize("segments", [1, 2])
def test_weights_of_any_number_of_dimensions_are_blocked_alike(segments, shape):
    w = torch.randn(shape).bfloat16()
    q = quantize_weight(w, segments=segments)
    assert q.values.shape == shape and q.scales.shape == (*shape[:-2], 2, 2) and q.segments == segments
    assert q.values.is_contiguous() and q.scales.is_contiguous()
    last = quantize_weight(w.flatten(0, -3)[-1] if w.dim() > 2 else w, segments=segments)
    assert_bit_equal(q.values.view(-1, *shape[-2:])[-1], last.values)
    assert_bit_equal(q.scales.view(-1, 2, 2)[-1], last.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize_is_contiguous_of_the_dtype_and_near_the_input(dtype):
    x = torch.randn(2, 5, 300)
    y = dequantize(quantize_expert_batch(x), dtype)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == x.shape
    w = torch.randn(260, 300)
    z = dequantize(quantize_weight(w, segments=2), dtype)
    assert z.dtype == dtype and z.is_contiguous()
    for got, expected in ((y, x), (z, w)):
        assert (got.float() - expected).abs().max() <= expected.abs().max() / 16


def half_steps(quotient: torch.Tensor, name: str) -> torch.Tensor:
    """Half the distance between the neighbours of a number in a format, in float64."""
    if name == "int8":
        return torch.full_like(quotient, 0.5)
    digits, smallest = PRECISION[name]
    exponent = torch.frexp(quotient)[1].clamp_min(smallest + 1) - 1
    return torch.ldexp(torch.ones_like(quotient), exponent - digits - 1)


numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
rows = st.lists(numbers | st.floats(-4, 4, width=32, allow_subnormal=False), min_size=1, max_size=140)
formats = st.sampled_from(list(FORMATS))
recipes = st.sampled_from(list(RECIPES))


@QUICK
@given(row=rows, name=formats, recipe=recipes)
def test_the_round_trip_is_within_half_a_step_of_every_number(row, name, recipe):
    x = torch.tensor([[row]])
    q = quantize_expert_batch(x, dtype=FORMATS[name].dtype, recipe=recipe)
    assert (q.scales > 0).all() and q.scales.isfinite().all()
    scales = q.scales.double().repeat_interleave(128, 2)[..., : len(row)]
    quotient = x.double() / scales
    # what float32 adds: the roundings of the scale's reciprocal, the quotient and the product
    slack = 2.0**-22 * quotient.abs() + 1e-40 / scales
    assert ((dequantize(q).double() / scales - quotient).abs() <= half_steps(quotient, name) + slack).all()
    assert (q.values.float().abs() <= FORMATS[name].max).all()


@QUICK
@given(
    row=st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=140),
    name=formats,
    recipe=recipes,
    power=st.integers(0, 40),
)
def test_a_power_of_two_moves_into_the_scales_alone(row, name, recipe, power):
    x = torch.tensor([[row]])
    q, scaled = (quantize_expert_batch(y, dtype=FORMATS[name].dtype, recipe=recipe) for y in (x, x * 2.0**power))
    assert_bit_equal(q.values, scaled.values)
    assert_bit_equal(q.scales * 2.0**power, scaled.scales)


@QUICK
@given(data=st.data(), name=formats, recipe=recipes, bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_bad_number_comes_back_as_nan_in_its_group_only(data, name, recipe, bad):
    columns = data.draw(st.integers(1, 400), "columns")
    column = data.draw(st.integers(0, columns - 1), "column")
    x = torch.randn(1, 2, columns, generator=torch.Generator().manual_seed(columns))
    x[0, 1, column] = bad
    q = quantize_expert_batch(x, dtype=FORMATS[name].dtype, recipe=recipe)
    expected = torch.zeros(x.shape, dtype=torch.bool)
    expected[0, 1, column // 128 * 128 : column // 128 * 128 + 128] = True
    assert torch.equal(dequantize(q).isnan(), expected)


@QUICK
@given(row=rows, name=formats)
def test_ue8m0_scales_are_powers_of_two_from_one_to_two_times_the_default_ones(row, name):
    x = torch.tensor([[row]])
    default, power = (quantize_expert_batch(x, dtype=FORMATS[name].dtype, recipe=recipe).scales for recipe in ("default", "ue8m0"))
    assert (torch.frexp(power)[0] == 0.5).all()
    assert (default <= power).all() and (power < 2 * default).all()


X = torch.randn(2, 4, 256)
BAD_ARGUMENTS = {
    "not a tensor": (([1.0],), {}, "x must be a tensor, got list"),
    "two dimensions": ((X[0],), {}, r"x must have 3 dimensions, got shape \(4, 256\)"),
    "float64": ((X.double(),), {}, "x must be torch.bfloat16 or torch.float16 or torch.float32, got torch.float64; convert it"),
    "counts of int64": ((X, torch.tensor([1, 2])), {}, "num_tokens must be torch.int32, got torch.int64"),
    "too few counts": ((X, COUNTS[:1]), {}, r"num_tokens must have shape \(2,\), got \(1,\)"),
    "counts of two dimensions": ((X, COUNTS[None]), {}, r"num_tokens must have shape \(2,\), got \(1, 2\)"),
    "strided counts": ((X, COUNTS.repeat(2)[::2]), {}, r"num_tokens must be contiguous, got strides \(2,\)"),
    "counts on another device": ((X, COUNTS.to("meta")), {}, "num_tokens must be on cpu, got meta; move it with"),
    "an unknown recipe": ((X,), {"recipe": "mx"}, "recipe must be one of default, deepgemm, ue8m0, fnuz_224, got 'mx'"),
    "a type without recipes": ((X,), {"dtype": torch.bfloat16}, "dtype must be one of torch.float8_e4m3fn, .* got torch.bfloat16"),
}
BAD_FLOORS = {
    "a reciprocal that overflows": (9e-21, "eps must be at least 1e-20 and below 1e30 .* got 9e-21"),
    "zero": (0.0, "eps must be at least 1e-20 and below 1e30 .* got 0.0"),
    "NaN": (math.nan, "eps must be .* got nan"),
    "infinity": (math.inf, "eps must be .* got inf"),
}
OUTPUTS = {
    "values of another shape": (
        {"values": torch.empty(2, 4, 127, dtype=torch.float8_e4m3fn)},
        r"values must have shape .* \(2, 4, 127\)",
    ),
    "values of another type": (
        {"values": torch.empty(2, 4, 128, dtype=torch.int8)},
        "values must be torch.float8_e4m3fn, got torch.int8",
    ),
    "values on another device": (
        {"values": torch.empty(2, 4, 128, dtype=torch.float8_e4m3fn, device="meta")},
        "values must be on cpu, got",
    ),
    "scales of another shape": ({"scales": torch.empty(2, 4, 2)}, r"scales must have shape \(2, 4, 1\), got \(2, 4, 2\)"),
    "scales of another type": ({"scales": torch.empty(2, 4, 1).half()}, "scales must be torch.float32, got torch.float16"),
    "scales on another device": ({"scales": torch.empty(2, 4, 1, device="meta")}, "scales must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD_FLOORS)
def test_floors_that_are_none_raise_a_value_error(case):
    eps, message = BAD_FLOORS[case]
    with pytest.raises(ValueError, match=message):
        quantize_expert_batch(X, eps=eps)


@pytest.mark.parametrize("function", [quantize_expert_batch, silu_mul_quantize], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_raise_a_value_error_that_says_what_to_do(case, function):
    arguments, options, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


@quantizers
@pytest.mark.parametrize("case", OUTPUTS)
def test_bad_outputs_raise_a_value_error(case, quantize):
    options, message = OUTPUTS[case]
    with pytest.raises(ValueError, match=message):
        quantize(X[..., :128], **options)


def test_scales_that_no_layout_describes_are_refused():
    with pytest.raises(LayoutError, match='layout "row" needs contiguous scales'):
        quantize_expert_batch(X, scales=torch.empty(2, 4, 4)[..., ::2])


@pytest.mark.parametrize("group_size", [0, 16, 100, 512, -128])
def test_other_group_sizes_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size must be one of 32, 64, 128, 256, got {group_size}"):
        quantize_expert_batch(X, group_size=group_size)


@pytest.mark.parametrize("function", [silu_mul, silu_mul_quantize], ids=lambda f: f.__name__)
def test_an_odd_number_of_columns_has_no_halves(function):
    with pytest.raises(ValueError, match=r"gate first then up: its last dimension must be even, got shape \(2, 4, 255\)"):
        function(X[..., 1:])


@pytest.mark.parametrize(
    "arguments, out, message",
    [
        ((X[0],), None, "x must have 3 dimensions"),
        ((X, COUNTS.long()), None, "num_tokens must be torch.int32"),
        ((X,), torch.empty(2, 4, 256), r"out must have shape \(2, 4, 128\), got \(2, 4, 256\)"),
        ((X,), torch.empty(2, 4, 128).double(), "out must be torch.bfloat16 or .* got torch.float64"),
        ((X,), torch.empty(2, 4, 128, device="meta"), "out must be on cpu, got meta"),
    ],
    ids=["dimensions", "counts", "shape of out", "dtype of out", "device of out"],
)
def test_silu_mul_raises_a_value_error(arguments, out, message):
    with pytest.raises(ValueError, match=message):
        silu_mul(*arguments, out=out)


@pytest.mark.parametrize(
    "w, options, message",
    [
        (X[0, 0], {}, r"w must be \(..., N, K_dim\), got shape \(256,\)"),
        (X.double(), {}, "w must be torch.bfloat16 or .* got torch.float64"),
        (X, {"segments": 3}, "segments must divide N = 4, got 3"),
        (X, {"segments": 0}, "segments must divide N = 4, got 0"),
        (X, {"recipe": "none"}, "recipe must be one of"),
        (X, {"dtype": torch.uint8}, "dtype must be one of .* got torch.uint8"),
    ],
    ids=["dimensions", "dtype of w", "segments", "no segments", "recipe", "dtype"],
)
def test_bad_weights_raise_a_value_error(w, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w, **options)


@quantizers
@pytest.mark.parametrize("name", ["values", "scales"])
def test_given_outputs_that_require_grad_raise_under_grad_mode_only(name, quantize):
    given = {"values": torch.empty(2, 4, 128).to(torch.float8_e4m3fn), "scales": torch.empty(2, 4, 1)}[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires grad, and this call has no backward"):
        quantize(X[..., :128], **{name: given})
    with torch.no_grad():
        assert getattr(quantize(X[..., :128], **{name: given}), name) is given


def test_an_output_of_silu_mul_that_requires_grad_raises():
    with pytest.raises(RuntimeError, match="out requires grad"):
        silu_mul(X, out=torch.empty(2, 4, 128).requires_grad_())


@pytest.mark.parametrize(
    "function", [quantize_expert_batch, silu_mul_quantize, silu_mul, quantize_weight], ids=lambda f: f.__name__
)
def test_inputs_that_require_grad_raise_under_grad_mode_only(function):
    x = torch.randn(2, 4, 256).requires_grad_()
    with pytest.raises(RuntimeError, match=r"(x|w) requires grad, and this call has no backward; call under torch.no_grad\(\)"):
        function(x)
    expected = function(x.detach())
    with torch.no_grad():
        result = function(x)
    if isinstance(result, QuantizedTensor):
        result, expected = result.values, expected.values
    assert_bit_equal(result, expected)
