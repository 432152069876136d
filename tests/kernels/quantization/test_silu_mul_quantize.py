"""SwiGLU + quantize: within the design's tolerance of the reference (exp is not the same bits everywhere), and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from activation_cases import CASES
from compile_case import FNUZ, INT8, cases, counted, each_format, empty, quantized
from far_memory import far
from moequant import Activation, ops, reference
from moequant.batch import ceil_div, empty_transposed_scales
from moequant.formats import FORMATS
from moequant.testing import assert_bit_equal, assert_nearly_quantized, poison
from operation_case import COUNTS, quantize_outputs


def run(x, num_tokens, dtype, kernel: bool):
    experts, rows, doubled = x.shape
    values = torch.full((experts, rows, doubled // 2), 0x55, dtype=torch.uint8, device=x.device).view(dtype)
    scales = poison(empty_transposed_scales(experts, rows, ceil_div(doubled // 2, 128), x.device))
    if kernel:
        from moequant.kernels.quantization.silu_mul_quantize import silu_mul_quantize

        silu_mul_quantize(x, num_tokens, None, values, scales, ops.quant_spec(dtype, "default"))
    else:
        reference.quantize_rows(reference.swiglu(x), num_tokens, None, values, scales)
    return values, scales


def assert_close(x, num_tokens, dtype) -> None:
    assert_nearly_quantized(run(x, num_tokens, dtype, True), run(x, num_tokens, dtype, False))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("columns", [384, 200], ids=["I384", "I200"])
def test_counted_rows_match_the_reference(name, columns, device):
    x = torch.randn(3, 11, 2 * columns, dtype=torch.bfloat16).to(device) * 3
    assert_close(x, torch.tensor([11, 0, 5], dtype=torch.int32, device=device), FORMATS[name].dtype)


@pytest.mark.parametrize("gate", [-100.0, -88.5, -80.0, -20.0, 0.0, 20.0, 100.0])
def test_gates_of_any_size_stay_within_tolerance(gate, device):
    x = torch.randn(1, 16, 256, dtype=torch.float32)
    x[..., :128] = gate + 0.1 * x[..., :128]
    assert_close(x.to(device), None, torch.float8_e4m3fn)


def test_huge_negative_gates_count_as_zero(device):
    gates = [-88.5, -88.7228317, -88.7228394, -88.73, -150.0, -1e4, -(2.0**24), -1e30, torch.finfo(torch.float32).min]
    x = torch.ones(1, len(gates), 256, device=device)
    x[0, :, 5] = torch.tensor(gates)
    values, scales = run(x, None, torch.float8_e4m3fn, True)
    assert_nearly_quantized((values, scales), run(x, None, torch.float8_e4m3fn, False))
    assert (values.float()[..., 5] == 0).all()


def test_bad_numbers_come_out_as_nan_scales(device):
    x = torch.randn(1, 4, 256, dtype=torch.bfloat16)
    x[0, 0, 5], x[0, 1, 200], x[0, 2, 3] = float("nan"), float("inf"), float("-inf")
    values, scales = run(x.to(device), None, torch.float8_e4m3fn, True)
    assert scales.isnan().flatten().tolist() == [True, True, True, False]
    assert not values.view(torch.int8)[0, :3].any()


@pytest.mark.parametrize(
    "strided",
    [lambda x: x[:, 1:, 40:552], lambda x: x[:, :, :512:2], lambda x: x[:, :, :20].transpose(1, 2)],
    ids=["slice", "every second column", "columns first"],
)
def test_strided_input_gives_the_same_bits_as_its_copy(strided, device):
    x = strided(torch.randn(2, 10, 600, dtype=torch.bfloat16).to(device))
    strided, copied = run(x, None, torch.float8_e4m3fn, True), run(x.contiguous(), None, torch.float8_e4m3fn, True)
    assert_bit_equal(strided[0], copied[0])
    assert_bit_equal(strided[1], copied[1])


def test_a_gated_half_past_2_to_the_31_elements_is_found(device):
    x = torch.randn(2, 3, 4, device=device).bfloat16()
    apart = far((2, 3, 4), (3, 1, 2**30), x.dtype, device).copy_(x)
    for got, expected in zip(*(run(y, None, torch.float8_e4m3fn, True) for y in (apart, x)), strict=True):
        assert_bit_equal(got, expected)


def test_without_quantization_the_product_is_rounded_once(device):
    from moequant.kernels.quantization.silu_mul_quantize import silu_mul

    x = torch.randn(2, 9, 400, dtype=torch.bfloat16).to(device)
    num_tokens = torch.tensor([9, 4], dtype=torch.int32, device=device)
    out = poison(torch.empty(2, 9, 200, dtype=torch.bfloat16, device=device))
    silu_mul(x, num_tokens, None, out)
    expected = reference.silu_mul(x, num_tokens, out=poison(torch.empty_like(out)))
    assert_bit_equal(out.isnan(), expected.isnan())
    assert torch.allclose(out.float(), expected.float(), rtol=2**-8, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_a_large_batch_matches_the_reference_on_the_gpu():
    x = torch.randn(8, 500, 4096, dtype=torch.bfloat16, device="cuda") * 4
    assert_close(x, None, torch.float8_e4m3fn)


FP8 = torch.float8_e4m3fn


def call_silu_mul_quantize(dtype: torch.dtype, columns: int = 2048, recipe: str = "default", activation: str = "SwiGLU") -> None:
    kind = CASES[activation][0]
    x = empty(4, 256, columns * kind.width)
    values, scales = quantized(4, 256, columns, dtype)
    assert scales is not None
    bias = None if activation == "SwiGLU" else empty(4, x.shape[-1])
    ops.silu_mul_quantize(x, counted(x), None, values, scales, recipe=recipe, activation=kind.text, bias=bias)


def call_add_bias(columns: int) -> None:
    x = empty(4, 256, columns)
    ops.add_bias(x, counted(x), None, empty(4, columns))


COMPILE_CASES = [
    *cases(call_silu_mul_quantize, *each_format(), *each_format(recipe="ue8m0")),
    *cases(call_silu_mul_quantize, {"dtype": FNUZ}, anywhere=True),
    *cases(call_silu_mul_quantize, *({"dtype": INT8, "activation": name} for name in ("MiniMax-M3", "Inkling-2", "Nemotron-H"))),
    *cases(call_silu_mul_quantize, {"dtype": INT8, "activation": "gelu by erf"}),
    *cases(call_silu_mul_quantize, {"dtype": INT8, "activation": "gpt-oss"}, wide=False),
    *cases(call_add_bias, {"columns": 2048}),
    *cases(call_silu_mul_quantize, {"dtype": INT8, "columns": 1445}, {"dtype": INT8, "columns": 1}, wide=False, may_spill=True),
]


def silu_quantize_arguments(dtype: torch.dtype, counts: torch.Tensor | None) -> tuple:
    return torch.randn(2, 4, 280).bfloat16(), counts, None, *quantize_outputs(dtype), "default", "silu", None


OPERATION_CASES = {
    "silu_mul_quantize": {
        "int8, counted": lambda: silu_quantize_arguments(torch.int8, COUNTS),
        "fp8": lambda: silu_quantize_arguments(FP8, None),
        "another activation, bias": lambda: (
            *silu_quantize_arguments(FP8, None)[:-2],
            Activation(limit=1.0).text,
            torch.randn(2, 280),
        ),
    },
    "silu_mul": {"counted": lambda: (torch.randn(2, 4, 280), COUNTS, None, torch.zeros(2, 4, 140).bfloat16(), "gelu", None)},
    "add_bias": {"counted": lambda: (torch.randn(2, 4, 140).bfloat16(), COUNTS, None, torch.ones(2, 140))},
}
