"""The way back from groups and blocks gives the reference's bits."""

from __future__ import annotations

import pytest
import torch

from compile_case import BF16, E4M3, INT8, cases, empty
from far_memory import far_along
from moequant import ops, reference
from moequant.batch import ceil_div, empty_transposed_scales
from moequant.kernels.quantization.dequantize_blocks import dequantize_blocks
from moequant.testing import assert_bit_equal, poison


def codes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(dtype)


def assert_same(values: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype, group_rows: int, group_size: int) -> None:
    # more numbers, which nobody may write
    padded = poison(torch.empty(values.numel() + 512, dtype=output_dtype, device=values.device))
    before, out = padded.clone(), padded[: values.numel()].view(values.shape)
    dequantize_blocks(values, scales, out, group_rows=group_rows, group_size=group_size)
    expected = reference.dequantize_blocks(values, scales, group_rows, group_size, output_dtype)
    assert_bit_equal(out.isnan(), expected.isnan())
    assert_bit_equal(out.nan_to_num(), expected.nan_to_num())
    assert_bit_equal(padded[values.numel() :].view(torch.uint8), before[values.numel() :].view(torch.uint8))


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("group_rows", [1, 32])
def test_groups_and_blocks_with_tails_match_the_reference_bit_for_bit(group_rows, dtype, output_dtype, device):
    values = codes((3, 41, 100), dtype, device)
    scales = torch.randn(3, ceil_div(41, group_rows), 4, device=device).exp()
    scales[0, 0, 1], scales[2, 1, 3] = torch.nan, torch.inf
    assert_same(values, scales, output_dtype, group_rows, 32)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 512), (1, 3, 700), (5, 1, 257), (2, 5, 256), (1, 3, 1280)], ids=str)
def test_other_sizes_and_transposed_scales_match_the_reference(shape, group_size, device):
    scales = empty_transposed_scales(shape[0], shape[1], ceil_div(shape[2], group_size), device).uniform_()
    assert_same(codes(shape, torch.int8, device), scales, torch.bfloat16, 1, group_size)
    scales = torch.rand(shape[0], ceil_div(shape[1], group_size), ceil_div(shape[2], group_size), device=device)
    assert_same(codes(shape, torch.int8, device), scales, torch.bfloat16, group_size, group_size)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_scales_of_any_strides_past_2_to_the_31_match_the_reference(dim, device):
    scales = far_along(dim, torch.rand(3, 3, 3, device=device))
    assert_same(codes((3, 3, 96), torch.int8, device), scales, torch.float32, 1, 32)


@pytest.mark.parametrize("shape", [(0, 4, 128), (2, 0, 128), (2, 3, 0)], ids=str)
def test_no_numbers_are_no_work(shape, device):
    scales = torch.empty(shape[0], shape[1], ceil_div(shape[2], 128), device=device)
    assert_same(codes(shape, torch.int8, device), scales, torch.float16, 1, 128)


@pytest.mark.gpu
def test_numbers_past_2_to_the_31_on_the_gpu():
    values = torch.zeros(1, 300_000, 7168, dtype=torch.int8, device="cuda")
    values[0, -1] = -100
    scales = empty_transposed_scales(1, 300_000, 56, "cuda").fill_(0.5)
    out = torch.empty(values.shape, dtype=torch.bfloat16, device="cuda")
    dequantize_blocks(values, scales, out, group_rows=1, group_size=128)
    assert values.numel() > 2**31 and (out[0, -1] == -50).all() and not out[0, :-1].any()


FP8 = torch.float8_e4m3fn


def call_dequantize_blocks(
    dtype: torch.dtype, output_dtype: torch.dtype = BF16, group: int = 128, weight: bool = False, columns: int = 7168
) -> None:
    rows = group if weight else 1
    values, scales = empty(4, 256, columns, dtype=dtype), empty(4, 256 // rows, ceil_div(columns, group), dtype=torch.float32)
    ops.dequantize_blocks(values, scales, empty(4, 256, columns, dtype=output_dtype), rows, group)


COMPILE_CASES = [
    *cases(call_dequantize_blocks, {"dtype": INT8}, {"dtype": INT8, "weight": True}, {"dtype": E4M3, "group": 32}),
    *cases(call_dequantize_blocks, {"dtype": INT8, "output_dtype": torch.float32}),
    *cases(call_dequantize_blocks, *({"dtype": INT8, "columns": columns} for columns in (2890, 1)), wide=False),
]


OPERATION_CASES = {
    "dequantize_blocks": {
        "int8, groups": lambda: (
            torch.ones(2, 3, 140, dtype=torch.int8),
            empty_transposed_scales(2, 3, 2, "cpu").fill_(2.0),
            torch.zeros(2, 3, 140),
        ),
        "fp8, blocks": lambda: (torch.ones(1, 40, 70).to(FP8), torch.rand(1, 2, 3), torch.zeros(1, 40, 70).half(), 32, 32),
    },
}
