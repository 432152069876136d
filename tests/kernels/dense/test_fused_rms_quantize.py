"""RMSNorm + quantize: within the design's tolerance of the reference (rsqrt and exp are not the same bits everywhere)."""

from __future__ import annotations

import pytest
import torch

from compile_case import E4M3, E5M2, FNUZ, cases, empty
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.formats import FORMATS
from moequant.kernels.dense.fused_rms_quantize import fused_rms_quantize
from moequant.testing import assert_bit_equal, assert_nearly_quantized, poison


def run(x, weight, residual, gate, dtype, recipe="default", group_size=128):
    """The kernel on poisoned outputs. Returns values, scales and the sum, of x itself without a residual."""
    values = torch.full(x.shape, 0x55, dtype=torch.uint8, device=x.device).view(dtype)
    scales = poison(torch.empty(ceil_div(x.shape[1], group_size), x.shape[0], device=x.device)).T
    summed = None if residual is None else poison(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    spec = ops.quant_spec(dtype, recipe)
    fused_rms_quantize(x, weight, residual, gate, (summed, values, scales), spec, norm_eps=1e-6, group_size=group_size)
    return values, scales, x if summed is None else summed


def assert_close(x, weight, residual, gate, dtype, recipe="default", group_size=128) -> None:
    values, scales, summed = run(x, weight, residual, gate, dtype, recipe, group_size)
    normed, expected_sum = reference.rms_norm(x, weight, 1e-6, residual, gate)
    assert_nearly_quantized((values, scales), reference.quantize_groups(normed, group_size, dtype, recipe, None))
    assert_bit_equal(summed, expected_sum.to(x.dtype), "sum")


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("optional", [(False, False), (True, False), (True, True)], ids=["plain", "residual", "residual, gate"])
def test_rows_with_tails_match_the_reference(name, input_dtype, optional, device):
    x, residual, gate = (torch.randn(7, 300).to(device, input_dtype) * 3 for _ in range(3))
    weight = torch.randn(300).to(device, input_dtype)
    assert_close(x, weight, residual if optional[0] else None, gate if optional[1] else None, FORMATS[name].dtype)


@pytest.mark.parametrize("group_size", [32, 64, 256])
@pytest.mark.parametrize("recipe", ["deepgemm", "fnuz_224"])
def test_other_groups_and_recipes_match_the_reference(group_size, recipe, device):
    x = torch.randn(3, 700, device=device)
    assert_close(x, torch.randn(700, device=device), None, x, torch.float8_e4m3fnuz, recipe, group_size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7168), (200, 40), (3, 9000), (2, 20000)], ids=str)
def test_tiles_of_many_rows_and_of_one_match_the_reference(shape, device):
    x = torch.randn(shape, device=device).bfloat16()
    assert_close(x, torch.randn(shape[1], device=device), x, None, torch.float8_e4m3fn)


def test_rows_of_a_wider_buffer_are_read_where_they_lie(device):
    x, residual = torch.randn(6, 400, device=device)[::2, 8:300], torch.randn(3, 500, device=device)[:, :292]
    weight = torch.randn(292, device=device)
    strided, copied = (run(y, weight, z, y, torch.int8) for y, z in ((x, residual), (x.contiguous(), residual.contiguous())))
    # another order of the loads may be another order of the sum
    assert_nearly_quantized(strided[:2], copied[:2])
    assert_bit_equal(strided[2], copied[2])


@pytest.mark.parametrize("gated", [False, True])
def test_zeros_stay_zeros_and_a_bad_number_spoils_its_row_alone(gated, device):
    x = torch.randn(4, 256, device=device)
    x[0], x[1, 3], x[2, 200] = 0.0, float("nan"), float("inf")
    gate = torch.randn(4, 256, device=device) if gated else None
    values, scales, _ = run(x, torch.ones(256, device=device), None, gate, torch.float8_e4m3fn)
    # Inf * rsqrt(Inf) is NaN, and the row's other numbers become zeros
    assert scales.isnan().tolist() == [[False, False], [True, True], [False, True], [False, False]]
    assert not (values[:3].view(torch.uint8) & 0x7F).any()


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1536, 7168, 16384, 32768])
def test_large_matrices_match_the_reference_on_the_gpu(columns):
    x, residual, gate = (torch.randn(2000, columns, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert_close(x, torch.randn(columns, device="cuda"), residual, gate, torch.float8_e4m3fn)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_count_on_the_gpu():
    x = torch.ones(300_000, 7168, dtype=torch.bfloat16, device="cuda")
    x[-1, 0] = -4.0
    values, scales, summed = run(x, torch.ones(7168, device="cuda"), x, None, torch.float8_e4m3fn)
    assert summed[-1, 0] == -8 and summed[-1, 1] == 2 and values[-1, 0].float() == -448 and (scales[0] == scales[-2]).all()
    assert scales[-1, 0] > 3.9 * scales[0, 0] and (values.view(torch.uint8)[:-1] == 0x7E).all()


FP8 = torch.float8_e4m3fn


def call_fused_rms(dtype: torch.dtype, columns: int = 7168, residual: bool = False, gate: bool = False, rows: int = 256) -> None:
    x, scales = empty(rows, columns), empty(rows, ceil_div(columns, 128), dtype=torch.float32)
    optional = x if residual else None, x if gate else None, x if residual else None
    ops.fused_rms_quantize(x, empty(columns), *optional, empty(rows, columns, dtype=dtype), scales)


COMPILE_CASES = [
    *cases(call_fused_rms, {"dtype": E4M3}, {"dtype": FNUZ}, {"dtype": E5M2, "columns": 1536, "residual": True}),
    *cases(call_fused_rms, *({"dtype": dtype, "residual": True, "gate": True} for dtype in (E4M3, FNUZ))),
    *cases(call_fused_rms, {"dtype": E4M3, "columns": 16384, "residual": True}),
    *cases(call_fused_rms, {"dtype": FNUZ}, anywhere=True),
    *cases(call_fused_rms, *({"dtype": E4M3, "columns": columns} for columns in (2890, 32768, 1)), wide=False, may_spill=True),
    *cases(call_fused_rms, {"dtype": E4M3, "rows": 1, "residual": True}),
]


OPERATION_CASES = {
    "fused_rms_quantize": {
        "all inputs": lambda: (
            torch.randn(4, 140).bfloat16(),
            torch.randn(140),
            torch.randn(4, 140).bfloat16(),
            torch.randn(4, 140),
            torch.zeros(4, 140).bfloat16(),
            torch.zeros(4, 140).to(FP8),
            torch.zeros(2, 4).T,
        ),
        "norm alone": lambda: (
            torch.randn(4, 140),
            torch.randn(140),
            None,
            None,
            None,
            torch.zeros(4, 140, dtype=torch.int8),
            torch.zeros(4, 5),
            1e-5,
            32,
            "ue8m0",
        ),
    },
}
