"""The int8 GELU kernel: within the design's tolerance of exact arithmetic, for tails, tiny, huge and negative numbers alike."""

from __future__ import annotations

import pytest
import torch

from compile_case import INT8, cases, empty
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.kernels.dense.int8_gelu import int8_gelu
from moequant.ops import quant_spec
from moequant.quantization import act_quant
from moequant.testing import poison


def run(x: torch.Tensor, x_scales: torch.Tensor, block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = torch.full_like(x, 0x55), poison(torch.empty_like(x_scales))
    int8_gelu(x, x_scales, values, scales, quant_spec(torch.int8, "default"), group_size=block_size)
    return values, scales


def assert_close(x: torch.Tensor, x_scales: torch.Tensor, block_size: int = 128) -> None:
    values, scales = run(x, x_scales, block_size)
    expected_values, expected_scales = reference.int8_gelu(x, x_scales, block_size)
    assert torch.equal(scales.isnan(), expected_scales.isnan())
    finite = ~scales.isnan()
    ulps = (scales[finite].view(torch.int32) - expected_scales[finite].view(torch.int32)).abs()
    assert not ulps.numel() or ulps.max() <= 4, f"scales {int(ulps.max())} ulp apart"
    steps = (values.int() - expected_values.int()).abs()
    assert steps.max() <= 1
    # most values are equal, or the tolerance would hide a wrong formula
    assert (steps == 0).float().mean() > 0.99


def codes(rows: int, columns: int, device: str, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, device=device)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(9, 512), (3, 200), (1, 1), (17, 129)], ids=str)
def test_tails_and_block_sizes_stay_within_tolerance(shape, block_size, device):
    scales = torch.rand(shape[0], ceil_div(shape[1], block_size), device=device) * 0.05 + 1e-3
    assert_close(codes(shape[0], shape[1], device), scales, block_size)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 0.01, 0.03, 0.05, 0.3, 10.0, 1e30])
@pytest.mark.parametrize("low, high", [(-127, 127), (-127, -1), (-127, -60), (1, 127)], ids=str)
def test_numbers_of_any_size_and_sign_stay_within_tolerance(scale, low, high, device):
    """All below zero is where 1 + erf would cancel."""
    spread = torch.linspace(0.5, 1.5, 16, device=device).view(8, 2)
    assert_close(codes(8, 256, device, low, high), scale * spread)


def test_every_code_of_many_scales_stays_within_tolerance(device):
    x = torch.arange(-128, 128, device=device).to(torch.int8).repeat(64, 1)
    assert_close(x, torch.logspace(-4, 1, 128, device=device).view(64, 2))


def test_zeros_get_the_floor_and_bad_scales_come_out_as_nan(device):
    x = codes(4, 128, device)
    x[0] = 0
    scales = torch.tensor([[0.1], [float("nan")], [float("inf")], [0.1]], device=device)
    x[2] = -5
    values, new_scales = run(x, scales)
    assert new_scales[0].item() == (torch.tensor(1e-10) / torch.tensor(127.0)).item() and not values[0].any()
    assert new_scales.isnan().flatten().tolist() == [False, True, True, False]
    assert not values[1:3].any()


def test_no_rows_are_no_work(device):
    run(codes(0, 128, device), torch.empty(0, 1, device=device))


@pytest.mark.gpu
def test_past_2_to_the_31_elements_on_the_gpu():
    x = torch.randint(-127, 128, (2**19 + 8, 4096), dtype=torch.int8, device="cuda")
    scales = torch.full((2**19 + 8, 32), 0.02, device="cuda")
    values, new_scales = run(x, scales)
    last = slice(2**19, None)
    expected_values, expected_scales = reference.int8_gelu(x[last], scales[last])
    assert (values[last].int() - expected_values.int()).abs().max() <= 1
    assert (new_scales[last].view(torch.int32) - expected_scales.view(torch.int32)).abs().max() <= 4


def call_int8_gelu(block_size: int = 128, columns: int = 4096, rows: int = 256) -> None:
    x, scales = empty(rows, columns, dtype=INT8), empty(rows, ceil_div(columns, block_size), dtype=torch.float32)
    ops.int8_gelu(x, scales, torch.empty_like(x), torch.empty_like(scales), block_size)


COMPILE_CASES = [
    # a few rows: small tiles
    *cases(call_int8_gelu, {}, {"block_size": 32}, {"rows": 4, "columns": 2048}),
    *cases(call_int8_gelu, {"columns": 1445}, {"columns": 1, "rows": 1}, wide=False, may_spill=True),
]


OPERATION_CASES = {
    "int8_gelu": {
        "with a tail": lambda: (*act_quant(torch.randn(3, 140), 64), torch.zeros(3, 140, dtype=torch.int8), torch.zeros(3, 3), 64)
    },
}
