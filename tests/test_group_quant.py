"""The float8 quantizers of matrices: bits, bytes and strides of every layout, properties, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from moequant import LayoutError, dequantize, grouped_gemm_blockscale, reference
from moequant.gemm import mm_fp8_blockscale
from moequant.quantization import (
    fused_flatten_fp8_group_quant,
    fused_rms_fp8_group_quant,
    per_block_quant_fp8,
    per_token_group_quant_fp8,
)
from moequant.testing import assert_bit_equal, assert_nearly_quantized

QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    # the path is the same for all of a test's examples
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FNUZ = torch.float8_e4m3fnuz
dtypes = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, FNUZ, torch.float8_e5m2], ids=str)
LAYOUTS: dict[str, Any] = {
    "row": {},
    "transposed": {"scale_layout": "transposed"},
    "tma_aligned": {"scale_layout": "tma_aligned"},
    "ue8m0_packed": {"recipe": "ue8m0", "scale_dtype": "ue8m0_packed"},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
both_paths = pytest.mark.usefixtures("both_paths")


def stored(x: torch.Tensor, count: int) -> torch.Tensor:
    """The first numbers of a view's memory, in their order there."""
    return torch.as_strided(x, (count,), (1,))


def assert_same(q, values, scales) -> None:
    assert_bit_equal(q.values, values, "values")
    assert_bit_equal(q.scales_by_row().contiguous(), scales, "scales")


@both_paths
@layouts
@dtypes
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 300), (0, 128), (2, 3, 130), (2, 1, 2, 1)], ids=str)
def test_every_layout_holds_the_reference_s_bits(shape, input_dtype, dtype, layout):
    x = (torch.randn(shape) * 3).to(input_dtype)
    q = per_token_group_quant_fp8(x, dtype=dtype, **LAYOUTS[layout])
    assert (q.layout, q.shape, q.values.is_contiguous(), q.group_size) == (layout, shape, True, 128)
    assert_same(q, *reference.quantize_groups(x, 128, dtype, q.recipe, None))
    assert_bit_equal(dequantize(q), q.values.float() * q.scales_by_row().repeat_interleave(128, -1)[..., : shape[-1]])


@both_paths
@pytest.mark.parametrize("recipe", ["default", "deepgemm", "ue8m0", "fnuz_224"])
@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_group_sizes_recipes_and_floors(group_size, recipe):
    x = torch.randn(5, 300) * 1e-3
    q = per_token_group_quant_fp8(x, group_size, FNUZ, recipe, eps=2e-3)
    assert_same(q, *reference.quantize_groups(x, group_size, FNUZ, recipe, 2e-3))
    assert q.recipe == recipe and q.group_size == group_size


@both_paths
def test_fnuz_224_ends_at_224_in_e4m3fnuz_alone():
    x = torch.full((1, 128), 448.0)
    q = per_token_group_quant_fp8(x, dtype=FNUZ, recipe="fnuz_224")
    assert (q.values.float() == 224).all() and q.scales == 2
    assert (per_token_group_quant_fp8(x, dtype=FNUZ).values.float() == 240).all()
    assert (per_token_group_quant_fp8(x, recipe="fnuz_224").values.float() == 448).all()


@both_paths
@layouts
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x[:, ::2, 1:],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(1, 0, 2),
        lambda x: x[0].T,
        lambda x: x[1, 2:3].expand(5, -1),
        lambda x: x[:, 0],
    ],
    ids=["sliced", "transposed", "permuted", "matrix", "expanded", "apart"],
)
def test_inputs_of_any_strides_give_the_bits_of_their_copies(strided, layout):
    x = strided(torch.randn(3, 10, 300))
    q, copied = (per_token_group_quant_fp8(y, **LAYOUTS[layout]) for y in (x, x.contiguous()))
    assert_bit_equal(q.values, copied.values)
    assert_bit_equal(q.scales, copied.scales)


@both_paths
def test_layouts_by_stride_and_by_byte():
    x = torch.randn(2, 6, 300)
    row, transposed, aligned, packed = (
        per_token_group_quant_fp8(x, **{"recipe": "ue8m0"} | options) for options in LAYOUTS.values()
    )
    assert row.scales.is_contiguous() and row.scales.shape == (2, 6, 3)
    assert transposed.scales.stride() == (18, 1, 6)
    assert_bit_equal(stored(transposed.scales, 36), row.scales.transpose(1, 2).flatten())
    assert aligned.scales.stride() == (24, 1, 8)
    assert_bit_equal(stored(aligned.scales, 48).view(2, 3, 8)[..., :6], row.scales.transpose(1, 2).contiguous())
    assert (packed.scales.shape, packed.scales.stride()) == ((2, 6, 1), (8, 1, 8))
    exponents = stored(packed.scales, 16).view(torch.uint8).view(2, 8, 4)[:, :6]
    assert_bit_equal((exponents[..., :3].int() << 23).view(torch.float32), row.scales)
    assert not exponents[..., 3].any()


@both_paths
def test_a_bad_group_is_nan_in_floats_and_0xff_in_exponents():
    x = torch.randn(3, 640)
    x[0, 5], x[1, 200], x[2, 639] = math.nan, math.inf, -math.inf
    plain = per_token_group_quant_fp8(x)
    packed = per_token_group_quant_fp8(x, **LAYOUTS["ue8m0_packed"])
    bad = [[0, 0], [1, 1], [2, 4]]
    assert plain.scales.isnan().nonzero().tolist() == bad
    exponents = packed.scales.contiguous().view(torch.uint8)
    assert (exponents == 0xFF).nonzero().tolist() == bad and not exponents[:, 5:].any()
    for q in (plain, packed):
        assert dequantize(q).isnan().sum() == 3 * 128 and not q.values.view(torch.uint8)[0, :128].any()


@both_paths
@QUICK
@given(data=st.data(), dtype=st.sampled_from([torch.float8_e4m3fn, FNUZ, torch.float8_e5m2]), layout=st.sampled_from(list(LAYOUTS)))
def test_any_numbers_in_any_layout_match_the_reference(data, dtype, layout):
    rows, columns = data.draw(st.integers(1, 9), "rows"), data.draw(st.integers(1, 300), "columns")
    chosen = data.draw(st.lists(st.floats(width=32), min_size=1, max_size=30), "numbers")
    x = torch.tensor(chosen).repeat(-(-rows * columns // len(chosen)))[: rows * columns].view(rows, columns)
    q = per_token_group_quant_fp8(x, 64, dtype, **LAYOUTS[layout])
    assert_same(q, *reference.quantize_groups(x, 64, dtype, q.recipe, None))


@both_paths
@dtypes
@pytest.mark.parametrize("shape", [(130, 200), (2, 128, 140), (2, 1, 5, 33), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("size", [32, 128])
def test_blocks_hold_the_reference_s_bits(size, shape, dtype):
    w = torch.randn(shape).bfloat16()
    q = per_block_quant_fp8(w, (size, size), dtype, "ue8m0")
    assert (q.layout, q.recipe, q.group_size, q.segments, q.shape) == ("block", "ue8m0", size, 1, shape)
    expected = reference.quantize_weight(w, dtype=dtype, recipe="ue8m0", group_size=size)
    assert_same(q, expected.values, expected.scales)
    assert_bit_equal(dequantize(q), dequantize(expected))


@both_paths
def test_weights_of_any_strides_give_the_bits_of_their_copies():
    w = torch.randn(3, 150, 70).transpose(1, 2)[1:, ::2]
    assert_same(per_block_quant_fp8(w), *(lambda q: (q.values, q.scales))(per_block_quant_fp8(w.contiguous())))


@pytest.mark.parametrize(
    "w, options, message",
    [
        (torch.randn(4), {}, r"w must be \(..., N, K_dim\), got shape \(4,\)"),
        (torch.randn(4, 4), {"block": (128, 64)}, r"block must be one of \(32, 32\), \(64, 64\), \(128, 128\), got \(128, 64\)"),
        (torch.randn(4, 4), {"dtype": torch.int8}, "dtype must be one of"),
        (torch.randn(4, 4), {"recipe": "mx"}, "recipe must be one of"),
        (torch.randn(4, 4).double(), {}, "w must be torch.bfloat16 or"),
    ],
    ids=["dimensions", "block", "dtype", "recipe", "dtype of w"],
)
def test_bad_weights_raise_a_value_error(w, options, message):
    with pytest.raises(ValueError, match=message):
        per_block_quant_fp8(w, **options)


def scrambled(scales: torch.Tensor) -> torch.Tensor:
    """What transpose_scale=True makes of scales (M, G)."""
    return scales.transpose(0, 1).contiguous().view(scales.shape)


@both_paths
@dtypes
@pytest.mark.parametrize("transpose_scale", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 40), (1, 2, 128), (4, 4, 64), (0, 2, 64), (3, 1, 1)], ids=str)
def test_flatten_holds_the_reference_s_bits(shape, transpose_scale, dtype):
    x = torch.randn(shape).bfloat16()
    q = fused_flatten_fp8_group_quant(x, 64, dtype, transpose_scale)
    values, scales = reference.quantize_groups(x.flatten(1), 64, dtype, "default", None)
    assert_same(q, values, scales)
    assert q.scales.is_contiguous() and q.scales.shape == scales.shape
    assert_bit_equal(q.scales, scrambled(scales) if transpose_scale else scales)
    assert q.layout == ("transposed_flat" if transpose_scale else "row")


@both_paths
@pytest.mark.parametrize("transpose_scale", [False, True])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2],
        lambda x: x[:, :, :64],
        lambda x: x[:, :, 1::2],
        lambda x: x[:, :, :40],
        lambda x: x[:1].expand(4, -1, -1),
    ],
    ids=["outer first", "inner first", "every second", "whole groups", "stepped", "crossing groups", "expanded"],
)
def test_flatten_of_any_strides_gives_the_bits_of_the_copy(strided, transpose_scale):
    x = strided(torch.randn(4, 6, 128))
    q, copied = (fused_flatten_fp8_group_quant(y, 32, transpose_scale=transpose_scale) for y in (x, x.contiguous()))
    assert_bit_equal(q.values, copied.values)
    assert_bit_equal(q.scales, copied.scales)


@both_paths
@QUICK
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 70), st.booleans())
def test_flatten_is_group_quantization_of_the_flat_matrix(rows, outer, inner, outer_first):
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(outer, rows, inner, generator=generator, device="cpu").to(torch.empty(0).device).transpose(0, 1)
    q = fused_flatten_fp8_group_quant(x if outer_first else x.contiguous(), 32)
    assert_same(q, *reference.quantize_groups(x.flatten(1), 32, q.values.dtype, "default", None))


@both_paths
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 300), (1, 128), (0, 64), (9, 1)], ids=str)
def test_rms_norm_is_within_tolerance_of_the_reference(shape, residual, gate):
    x, added, gates = (torch.randn(shape).bfloat16() for _ in range(3))
    weight = torch.randn(shape[1]).bfloat16()
    options: dict[str, Any] = {"residual": added if residual else None, "gate": gates if gate else None}
    q, total = fused_rms_fp8_group_quant(x, weight, 1e-5, 64, **options)
    normed, summed = reference.rms_norm(x, weight, 1e-5, **options)
    assert_nearly_quantized((q.values, q.scales), reference.quantize_groups(normed, 64, q.values.dtype, "default", None))
    assert q.layout == "row" and q.group_size == 64
    if residual:
        assert total is not None
        assert_bit_equal(total, summed.bfloat16())
    else:
        assert total is None
    transposed, _ = fused_rms_fp8_group_quant(x, weight, 1e-5, 64, transpose_scale=True, **options)
    assert_bit_equal(transposed.values, q.values)
    assert_bit_equal(transposed.scales, scrambled(q.scales))
    assert_bit_equal(dequantize(transposed), dequantize(q))
    assert transposed.layout == "transposed_flat" and transposed.scales.is_contiguous()


@both_paths
@pytest.mark.parametrize("strided", [lambda x: x[:, ::2], lambda x: x[::2, 6:], lambda x: x.T, lambda x: x[:1].expand(4, -1)])
def test_rms_norm_of_any_strides_gives_the_bits_of_the_copy(strided):
    x = strided(torch.randn(20, 140))
    weight = torch.randn(x.shape[1], 3)[:, 1]
    (q, total), (copied, expected) = (
        fused_rms_fp8_group_quant(y, w, residual=y, gate=y, recipe="ue8m0")
        for y, w in ((x, weight), (x.contiguous(), weight.contiguous()))
    )
    assert_bit_equal(q.values, copied.values)
    assert_bit_equal(q.scales, copied.scales)
    assert total is not None and expected is not None
    assert_bit_equal(total, expected)


def test_mm_takes_scrambled_scales_and_other_products_refuse_them():
    x, w = torch.randn(6, 2, 128).bfloat16(), per_block_quant_fp8(torch.randn(40, 256))
    plain, flat = (fused_flatten_fp8_group_quant(x, transpose_scale=transposed) for transposed in (False, True))
    assert_bit_equal(mm_fp8_blockscale(flat, None, w), mm_fp8_blockscale(plain, None, w))
    with pytest.raises(LayoutError, match='got layout "transposed_flat"'):
        grouped_gemm_blockscale(flat, w)


RMS: dict[str, Any] = {
    "a weight of another size": (lambda x: (x, x[0, 1:]), {}, r"weight must have shape \(256,\), got \(255,\)"),
    "a residual of another shape": (lambda x: (x, x[0]), {"residual": torch.ones(1, 256)}, r"residual must have shape \(4, 256\)"),
    "a gate of integers": (lambda x: (x, x[0]), {"gate": torch.ones(4, 256, dtype=torch.int32)}, "gate must be torch.bfloat16"),
    "three dimensions": (lambda x: (x[None], x[0]), {}, "x must have 2 dimensions"),
    "a negative eps": (lambda x: (x, x[0], -1.0), {}, "eps must be at least 0 and finite, got -1.0"),
    "an eps of NaN": (lambda x: (x, x[0], math.nan), {}, "eps must be at least 0 and finite, got nan"),
    "an infinite eps": (lambda x: (x, x[0], math.inf), {}, "eps must be at least 0 and finite, got inf"),
    "a weight on another device": (lambda x: (x, x[0].to("meta")), {}, "weight must be on cpu, got meta"),
    "a residual on another device": (
        lambda x: (x, x[0]),
        {"residual": torch.ones(4, 256, device="meta")},
        "residual must be on cpu, got meta",
    ),
    "a gate on another device": (lambda x: (x, x[0]), {"gate": torch.ones(4, 256, device="meta")}, "gate must be on cpu, got meta"),
    "too wide": (lambda x: (x[:, :1].expand(4, 40000), x[0]), {}, "x must have at most 32768 columns, .* got 40000"),
}


@pytest.mark.parametrize("case", RMS)
def test_bad_norms_raise_a_value_error(case):
    arguments, options, message = RMS[case]
    with pytest.raises(ValueError, match=message):
        fused_rms_fp8_group_quant(*arguments(torch.randn(4, 256)), **options)


def test_flatten_needs_three_dimensions():
    with pytest.raises(ValueError, match="x must have 3 dimensions"):
        fused_flatten_fp8_group_quant(torch.randn(4, 4))


def network(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every quantizer, between elementwise torch. x: (M, H)."""
    normed, total = fused_rms_fp8_group_quant(x * 2, weight, residual=x, gate=x, transpose_scale=True)
    assert total is not None
    flat = fused_flatten_fp8_group_quant(total.unflatten(1, (2, -1)), 32, transpose_scale=True)
    packed = per_token_group_quant_fp8(total, **LAYOUTS["ue8m0_packed"])
    aligned = per_token_group_quant_fp8(total, scale_layout="tma_aligned")
    product = mm_fp8_blockscale(aligned, None, per_block_quant_fp8(weight * total))
    return dequantize(normed), dequantize(flat), dequantize(packed) + 1, product


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_quantizers_are_one_graph_with_the_bits_of_the_plain_ones(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    weight = torch.randn(192)
    for rows in (5, 8):
        x = torch.randn(rows, 192).bfloat16()
        for got, expected in zip(compiled(x, weight), network(x, weight), strict=True):
            assert_bit_equal(got, expected)


def test_products_refuse_packed_scales():
    packed = per_token_group_quant_fp8(torch.randn(1, 6, 256), **LAYOUTS["ue8m0_packed"])
    with pytest.raises(LayoutError, match='layout "transposed" .* got layout "ue8m0_packed"'):
        grouped_gemm_blockscale(packed, packed)


X = torch.randn(4, 256)
BAD: dict[str, Any] = {
    "one dimension": (X[0], {}, r"x must be \(..., M, H\), got shape \(256,\)"),
    "float64": (X.double(), {}, "x must be torch.bfloat16 or .* got torch.float64"),
    "a group of 100": (X, {"group_size": 100}, "group_size must be one of 32, 64, 128, 256, got 100"),
    "int8": (X, {"dtype": torch.int8}, "dtype must be one of torch.float8_e4m3fn, .* got torch.int8"),
    "recipe": (X, {"recipe": "mx"}, "recipe must be one of"),
    "eps": (X, {"eps": 0.0}, "eps must be at least 1e-20"),
    "layout": (X, {"scale_layout": "block"}, "scale_layout must be one of row, transposed, tma_aligned, got 'block'"),
    "scale_dtype": (X, {"scale_dtype": "int32"}, "scale_dtype must be one of fp32, ue8m0_packed, got 'int32'"),
    "packed by default": (X, {"scale_dtype": "ue8m0_packed"}, "pass recipe=\"ue8m0\", got 'default'"),
    "packed, transposed": (X, LAYOUTS["ue8m0_packed"] | {"scale_layout": "transposed"}, "leave scale_layout out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise_a_value_error(case):
    x, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        per_token_group_quant_fp8(x, **options)


def test_inputs_that_require_grad_raise():
    with pytest.raises(RuntimeError, match="x requires grad"):
        per_token_group_quant_fp8(X.clone().requires_grad_())


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("shape", [(0, 7168), (0, 600), (0, 3, 256), (3, 0, 600), (4, 0), (2, 3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_and_no_columns_give_a_tensor_without_elements(layout, shape):
    q = per_token_group_quant_fp8(torch.zeros(shape), **LAYOUTS[layout])
    assert q.shape == shape and q.scales.shape[:-1] == shape[:-1] and q.scales.numel() == 0
    assert dequantize(q).shape == shape
    # of one matrix the strides are there for those who ask for them
    if layout in ("tma_aligned", "ue8m0_packed") and len(shape) == 2 and shape[0] == 0:
        assert q.scales.stride(0) == 1 and q.scales.stride(1) % 4 == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.int32, "float32", None, [], 4], ids=str)
def test_dequantize_takes_four_types_alone(dtype):
    q = per_token_group_quant_fp8(X)
    with pytest.raises(ValueError, match="dtype must be one of torch.bfloat16, torch.float16, torch.float32, torch.float64, got"):
        dequantize(q, dtype)


def test_dequantize_of_bare_values_is_refused_in_words():
    bare: Any = per_token_group_quant_fp8(X).values
    with pytest.raises(ValueError, match="q must be QuantizedTensor, got Tensor; quantizers return one"):
        dequantize(bare)
