"""The per-tensor way back gives the reference's bits for every code."""

from __future__ import annotations

import pytest
import torch

from compile_case import BF16, E4M3, cases, empty
from moequant import ops, reference
from moequant.kernels.dense.dequantize_tensor import dequantize_tensor
from moequant.reference.dense import E4M3_MAX
from moequant.testing import assert_bit_equal, poison


def assert_same(values: torch.Tensor, scale: float, output_dtype: torch.dtype) -> None:
    factor = torch.full((), scale, device=values.device)
    out = poison(torch.empty(values.shape, dtype=output_dtype, device=values.device))
    dequantize_tensor(values, factor, out, max_value=E4M3_MAX)
    expected = reference.dequantize_fp8(values, factor, output_dtype)
    assert_bit_equal(out.isnan(), expected.isnan())
    assert_bit_equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=["e4m3", "offset"])
@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-30, 1.2e38, float("nan")])
def test_every_code_matches_the_reference_bit_for_bit(scale, dtype, output_dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(17)
    assert_same(codes.view(dtype), scale, output_dtype)


def test_no_codes_are_no_work(device):
    assert_same(torch.empty(0, dtype=torch.uint8, device=device), 1.0, torch.float32)


@pytest.mark.gpu
def test_codes_past_2_to_the_31_on_the_gpu():
    values = torch.full((2**31 + 5000,), 128, dtype=torch.uint8, device="cuda")
    values[-1] = 255
    out = torch.empty(values.shape, dtype=torch.bfloat16, device="cuda")
    dequantize_tensor(values, torch.ones((), device="cuda"), out, max_value=E4M3_MAX)
    assert out[-1] == 448 and out[2**31] == 0


FP8 = torch.float8_e4m3fn


def call_dequantize_tensor(dtype: torch.dtype, output_dtype: torch.dtype = BF16) -> None:
    ops.dequantize_fp8(empty(2**20, dtype=dtype), empty(dtype=torch.float32), empty(2**20, dtype=output_dtype))


COMPILE_CASES = cases(
    call_dequantize_tensor, {"dtype": E4M3}, {"dtype": torch.uint8}, {"dtype": E4M3, "output_dtype": torch.float32}
)


OPERATION_CASES = {
    "dequantize_fp8": {
        "e4m3": lambda: (torch.randn(9).to(FP8), torch.full((), 20.0), torch.zeros(9)),
        "offset": lambda: (torch.arange(9).to(torch.uint8), torch.full((), 20.0), torch.zeros(9).half()),
    },
}
