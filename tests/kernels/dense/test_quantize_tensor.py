"""The per-tensor quantizer gives the reference's bits, for computed scales and given ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from compile_case import BF16, E4M3, cases, empty
from moequant import ops, reference
from moequant.kernels.dense.quantize_tensor import quantize_tensor
from moequant.reference.dense import E4M3_MAX, MIN_AMAX
from moequant.testing import assert_bit_equal, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=["e4m3", "offset"])


def run(x: torch.Tensor, scale: float | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.full(x.shape, 0x55, dtype=torch.uint8, device=x.device).view(dtype)
    factor = torch.full((), torch.nan if scale is None else scale, device=x.device)
    quantize_tensor(x, factor, values, computed=scale is None, floor=MIN_AMAX, max_value=E4M3_MAX)
    return values, factor


def assert_same(x: torch.Tensor, scale: float | None, dtype: torch.dtype) -> None:
    values, factor = run(x, scale, dtype)
    given_scale = None if scale is None else torch.full((), scale, device=x.device)
    expected_values, expected_factor = reference.quantize_fp8(x, given_scale, dtype)
    assert_bit_equal(values, expected_values, "values")
    assert_bit_equal(factor, expected_factor, "scale")


@dtypes
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 100, 4096, 9001, 70_001])
@pytest.mark.parametrize("scale", [None, 100.0])
def test_values_and_scale_match_the_reference_bit_for_bit(count, input_dtype, scale, dtype, device):
    assert_same((torch.randn(count) * 3).to(device, input_dtype), scale, dtype)


SPECIAL = {
    "zeros": [0.0, -0.0],
    "subnormals": [1e-40, -3e-42],
    "smaller than the floor": [2.0**-119, 1e-37],
    "the largest finite": [torch.finfo(torch.float32).max, -1.0],
    "one NaN": [1.0, float("nan"), -2.0],
    "a negative NaN": [1.0, -float("nan"), -2.0],
    "Inf": [1.0, float("inf"), -2.0],
    "-Inf": [1.0, float("-inf"), -2.0],
}


@dtypes
@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("scale", [None, 1.0, 1e30, 1e-30])
def test_special_numbers_match_the_reference_bit_for_bit(case, scale, dtype, device):
    assert_same(torch.tensor(SPECIAL[case] * 3, device=device), scale, dtype)


@dtypes
def test_products_at_ties_and_at_the_clamp_match_the_reference(dtype, device):
    """Every middle between two codes, and one bit to either side of it."""
    if dtype == torch.uint8:
        middles = (torch.arange(-128, 128) + 0.5) * (448 / 127)
    else:
        grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        middles = torch.cat([(grid[1:] + grid[:-1]) / 2, torch.tensor([448.0, 464.0, 480.0, 1e9])])
    middles = torch.cat([middles, -middles]).view(torch.int32)
    numbers = torch.cat([middles - 1, middles, middles + 1]).view(torch.float32).to(device)
    assert_same(numbers, 1.0, dtype)
    assert_same(numbers * 0.5, 2.0, dtype)


@dtypes
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.none() | st.floats(2.0**-60, 2.0**60, width=32))
def test_any_numbers_match_the_reference_bit_for_bit(dtype, numbers, scale):
    assert_same(torch.tensor(numbers, device=DEVICE), scale, dtype)


def test_nothing_to_quantize_has_scale_one(device):
    values, factor = run(torch.empty(0, device=device), None, torch.uint8)
    assert factor == 1 and values.numel() == 0


def test_a_number_past_the_last_block_is_not_written(device):
    values = torch.full((200,), 7, dtype=torch.uint8, device=device)
    scale = poison(torch.empty((), device=device))
    quantize_tensor(torch.ones(100, device=device), scale, values[:100], computed=True, floor=MIN_AMAX, max_value=E4M3_MAX)
    assert scale == 448 and (values[:100] == 255).all() and (values[100:] == 7).all()


@pytest.mark.gpu
@dtypes
def test_a_large_tensor_matches_the_reference_on_the_gpu(dtype):
    assert_same(torch.randn(2**26 + 5, device="cuda"), None, dtype)


@pytest.mark.gpu
def test_numbers_past_2_to_the_31_count_on_the_gpu():
    x = torch.zeros(2**31 + 4100, dtype=torch.bfloat16, device="cuda")
    x[-1], x[0] = -4.0, 1.0
    values, factor = run(x, None, torch.float8_e4m3fn)
    assert factor == 112 and values[-1].float() == -448 and values[0].float() == 112


FP8 = torch.float8_e4m3fn


def call_quantize_tensor(dtype: torch.dtype, input_dtype: torch.dtype = BF16, computed: bool = True, count: int = 2**20) -> None:
    ops.quantize_fp8(empty(count, dtype=input_dtype), empty(count, dtype=dtype), empty(dtype=torch.float32), computed)


COMPILE_CASES = [
    *cases(call_quantize_tensor, *({"dtype": dtype, "computed": False} for dtype in (E4M3, torch.uint8))),
    *cases(call_quantize_tensor, {"dtype": E4M3, "computed": False, "input_dtype": torch.float32}),
    # a maximum is one number
    *cases(call_quantize_tensor, {"dtype": E4M3}, {"dtype": torch.uint8}, wide=False),
    *cases(call_quantize_tensor, *({"dtype": dtype, "count": 7168} for dtype in (E4M3, torch.uint8))),
]


OPERATION_CASES = {
    "quantize_fp8": {
        "computed": lambda: (torch.randn(9).half(), torch.zeros(9).to(FP8), torch.zeros(()), True),
        "given": lambda: (torch.randn(9), torch.zeros(9, dtype=torch.uint8), torch.full((), 20.0), False),
    },
}
