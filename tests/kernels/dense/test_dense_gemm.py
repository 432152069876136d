"""The dense GEMM kernel: whole numbers against int64, everything else against the reference, int8 results against their quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compile_case import E4M3, FNUZ, INT8, cases, empty
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.kernels.dense.dense_gemm import Requantize, dense_gemm
from moequant.kernels.gemm.grouped_gemm import LARGE_TILES, SMALL_TILES
from moequant.ops import quant_spec
from moequant.quantization import act_quant, weight_quant
from moequant.testing import assert_bit_equal, poison, relative_error
from product_calls import call_int8_addmm

PATHS = {"tma": SMALL_TILES, "pointers": SMALL_TILES._replace(tma=False), "large tiles": LARGE_TILES}
SHAPES = {
    "whole blocks": (64, 128, 256),
    "tails": (70, 200, 336),
    "one row": (1, 130, 128),
    "rows TMA can't read": (3, 129, 131),
    "bands": (1100, 130, 16),
}
SPEC = quant_spec(torch.int8, "default")
FP8 = torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn


def by_name(table: dict) -> list:
    return [pytest.param(value, id=name) for name, value in table.items()]


def operands(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random int8 a, its scales, b, its scales; scales of neighbours lie far apart, so that a wrong one shows."""
    rows, columns, depth = shape
    a, b = (torch.randint(-127, 128, size, dtype=torch.int8, device=device) for size in ((rows, depth), (columns, depth)))
    groups = ceil_div(depth, 128)
    a_scales = torch.exp2(torch.randint(-3, 4, (rows, groups), device=device)) * 0.37
    b_scales = (
        torch.exp2(torch.arange(ceil_div(columns, 128) * groups, device=device) % 5).view(ceil_div(columns, 128), groups) * 0.19
    )
    return a, a_scales, b, b_scales


def int64_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """The product in float64, of sums inside blocks in int64 (on the CPU: CUDA has no integer products)."""
    a, a_scales, b, b_scales = (x.cpu() for x in (a, a_scales, b, b_scales))
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for group in range(a_scales.shape[1]):
        part = slice(group * 128, (group + 1) * 128)
        sums = a[:, part].long() @ b[:, part].long().T
        scales = a_scales[:, group, None].double() * b_scales[:, group].repeat_interleave(128)[: b.shape[0]].double()
        out += sums.double() * scales
    return out


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("shape", by_name(SHAPES))
def test_the_scaled_product_is_within_1e_6_of_int64_sums(shape, config, device):
    pair = operands(shape, device)
    out = poison(torch.empty(shape[:2], device=device))
    dense_gemm(*pair, None, out, config=config)
    assert relative_error(out.cpu(), int64_product(*pair)) < 1e-6


@pytest.mark.parametrize("value", [127, -127])
def test_sums_of_the_largest_products_are_exact(value, device):
    """With scales of 1 every sum is a whole number below 2**24, so that a single wrong unit shows."""
    a, b = (
        torch.full((2, 1024), value, dtype=torch.int8, device=device),
        torch.full((3, 1024), 127, dtype=torch.int8, device=device),
    )
    a[1, ::3], b[2, 5:] = -127, 1
    out = torch.empty(2, 3, device=device)
    dense_gemm(a, torch.ones(2, 8, device=device), b, torch.ones(1, 8, device=device), None, out)
    assert torch.equal(out.cpu().long(), a.cpu().long() @ b.cpu().long().T)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bias_is_added_before_the_only_rounding(out_dtype, bias_dtype, device):
    pair = operands((5, 140, 260), device)
    bias = torch.randn(140, device=device).to(bias_dtype) * 50
    wide, out = torch.empty(5, 140, device=device), torch.empty(5, 140, dtype=out_dtype, device=device)
    scaled = pair[0], pair[1] / 200, *pair[2:]
    dense_gemm(*scaled, bias, wide)
    dense_gemm(*scaled, bias, out)
    assert relative_error(wide.cpu(), int64_product(*scaled) + bias.cpu().double()) < 1e-6
    assert_bit_equal(out, wide.to(out_dtype))


@pytest.mark.parametrize("order", ["row", "transposed", "slice"])
def test_scales_of_any_strides_are_read_where_they_lie(order, device):
    a, a_scales, b, b_scales = operands((9, 130, 300), device)
    expected, out = torch.empty(9, 130, device=device), torch.empty(9, 130, device=device)
    dense_gemm(a, a_scales, b, b_scales, None, expected)
    if order == "transposed":
        a_scales = a_scales.t().contiguous().t()
    elif order == "slice":
        buffer = poison(torch.empty(20, 8, device=device))[::2, 1:7:2][:9]
        a_scales = buffer.copy_(a_scales)
    dense_gemm(a, a_scales, b, b_scales, None, out)
    assert_bit_equal(out, expected)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", by_name(SHAPES))
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_quantized_result_is_the_float32_result_quantized(shape, group, with_bias, device):
    rows, columns, _ = shape
    pair = operands(shape, device)
    bias = torch.randn(columns, device=device) * 1000 if with_bias else None
    wide = torch.empty(rows, columns, device=device)
    dense_gemm(*pair, bias, wide)
    values = torch.full((rows, columns), 0x55, dtype=torch.int8, device=device)
    scales = poison(torch.empty(rows, ceil_div(columns, group), device=device))
    dense_gemm(*pair, bias, values, Requantize(scales, group, SPEC))
    expected_values, expected_scales = reference.quantize_groups(wide, group, torch.int8, "default", None)
    assert_bit_equal(values, expected_values, "values")
    assert_bit_equal(scales, expected_scales, "scales")


def test_zero_rows_get_the_floor_and_bad_scales_a_nan_scale(device):
    a, a_scales, b, b_scales = operands((4, 128, 256), device)
    a[1] = 0
    a_scales[2, 1], b_scales[0, 0] = float("nan"), 1.0
    values, scales = torch.empty(4, 128, dtype=torch.int8, device=device), torch.empty(4, 1, device=device)
    dense_gemm(a, a_scales, b, b_scales, None, values, Requantize(scales, 128, SPEC))
    floor = (torch.tensor(1e-10) / torch.tensor(127.0)).item()
    assert scales[1].item() == floor and not values[1].any()
    assert scales.isnan().flatten().tolist() == [False, False, True, False] and not values[2].any()


@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8)], ids=str)
def test_nothing_is_written_to_empty_results(shape, device):
    dense_gemm(*operands(shape, device), None, torch.empty(shape[:2], device=device))


def test_no_depth_leaves_the_bias(device):
    bias = torch.randn(20, device=device)
    out = poison(torch.empty(3, 20, device=device))
    dense_gemm(*operands((3, 20, 0), device), bias, out)
    assert_bit_equal(out, bias.expand(3, 20))


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("with_bias", [False, True])
def test_float8_products_are_scaled_by_rows_and_columns(config, with_bias, device):
    a, b = torch.randn(70, 336, device=device).to(FP8), torch.randn(130, 336, device=device).to(FP8)
    a_factors, b_factors = torch.rand(70, device=device) + 0.5, (torch.rand(1, device=device) + 0.5).expand(130)
    bias = torch.randn(130, device=device) if with_bias else None
    out = poison(torch.empty(70, 130, device=device))
    dense_gemm(a, a_factors, b, b_factors, bias, out, config=config)
    # fp8 tensor cores add with about 14 bits
    limit = 6e-4 if torch.cuda.is_available() else 1e-5
    assert relative_error(out, reference.fp8_gemm(a, a_factors, b, b_factors, bias)) < limit


@pytest.mark.gpu
def test_a_large_product_matches_the_reference_on_the_gpu():
    pair = operands((4096, 4096, 4096), "cuda")
    out = torch.empty(4096, 4096, device="cuda")
    dense_gemm(*pair, None, out)
    assert relative_error(out, reference.int8_addmm(*pair)) < 1e-6


@pytest.mark.gpu
def test_outputs_past_2_to_the_31_elements_are_addressed_on_the_gpu():
    rows, columns, depth = 2**19 + 64, 4096, 128
    a, a_scales, b, b_scales = operands((rows, columns, depth), "cuda")
    out = torch.empty(rows, columns, dtype=torch.float16, device="cuda")
    dense_gemm(a, a_scales / 1000, b, b_scales, None, out)
    last = slice(rows - 64, rows)
    expected = reference.int8_addmm(a[last], a_scales[last] / 1000, b, b_scales)
    assert_bit_equal(out[last], expected.half())


FP8 = torch.float8_e4m3fn


def call_fp8_gemm(dtype: torch.dtype, bias: bool = False) -> None:
    a, b = empty(1024, 7168, dtype=dtype), empty(4096, 7168, dtype=dtype)
    factors = empty(1024, dtype=torch.float32), empty(dtype=torch.float32).expand(4096)
    ops.fp8_gemm(a, factors[0], b, factors[1], empty(4096) if bias else None, empty(1024, 4096))


COMPILE_CASES = [
    *cases(call_int8_addmm, {}, {"bias": False, "out_dtype": torch.float32}, {"out_dtype": INT8}),
    *cases(call_int8_addmm, {"out_dtype": INT8, "out_block_size": 32}, {"out_dtype": INT8, "columns": 2880, "depth": 2880}),
    *cases(call_fp8_gemm, {"dtype": E4M3}, {"dtype": FNUZ}, {"dtype": E4M3, "bias": True}),
    # one row: sizes and strides of 1 are constants
    *cases(call_int8_addmm, {"rows": 1, "depth": 128}, {"rows": 1, "out_dtype": INT8}, wide=False),
    # rows that TMA cannot read
    *cases(call_int8_addmm, {"depth": 2890}, wide=False, may_spill=True),
]


def int8_arguments(bias: bool, out_dtype: torch.dtype) -> tuple:
    a, a_scales = act_quant(torch.randn(3, 140))
    b, b_scales = weight_quant(torch.randn(150, 140))
    arguments = a, a_scales, b, b_scales, torch.randn(150).half() if bias else None, torch.zeros(3, 150).to(out_dtype)
    return (*arguments, torch.zeros(3, 5), 32) if out_dtype == torch.int8 else arguments


def fp8_arguments(bias: bool) -> tuple:
    a, b = torch.randn(3, 140).to(FP8), torch.randn(6, 140).to(FP8)
    return a, torch.rand(3), b, torch.rand(()).expand(6), torch.randn(6) if bias else None, torch.zeros(3, 6)


OPERATION_CASES = {
    "int8_addmm": {
        "float16": lambda: int8_arguments(False, torch.float16),
        "quantized": lambda: int8_arguments(True, torch.int8),
    },
    "fp8_gemm": {"with bias": lambda: fp8_arguments(True), "without": lambda: fp8_arguments(False)},
}
