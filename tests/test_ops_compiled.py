"""torch.compile traces through the public functions."""

from __future__ import annotations

import pytest
import torch

from moequant import (
    dequantize,
    grouped_gemm_blockscale,
    quantize_expert_batch,
    quantize_weight,
    reference,
    silu_mul,
    silu_mul_quantize,
)
from moequant.gemm import fp8_gemm, int8_addmm_quant, int8_gemm, mm_fp8_blockscale
from moequant.quantization import act_dequant, act_quant, dequantize_fp8, int8_gelu, quantize_fp8, weight_dequant, weight_quant
from moequant.testing import assert_bit_equal

FP8 = torch.float8_e4m3fn
COUNTS = torch.tensor([3, 0], dtype=torch.int32)


def linear(x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize, multiply, dequantize, between elementwise torch. w: plain, quantized before."""
    q = quantize_expert_batch(x * 2, counts, recipe="ue8m0")
    out = grouped_gemm_blockscale(q, quantize_weight(w), counts, out_dtype=torch.float32)
    return dequantize(q) + 1, out + 1, q.scales


def network(x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate_up = grouped_gemm_blockscale(x, w, counts)
    inner = silu_mul_quantize(gate_up, counts, dtype=torch.int8)
    return silu_mul(gate_up, counts) + 1, inner.values, inner.scales


def int8_network(x: torch.Tensor, w: torch.Tensor, counts: None) -> tuple[torch.Tensor, ...]:
    inner = int8_gelu(*int8_addmm_quant(*act_quant(x), *weight_quant(w[0]), w[0].sum(1)))
    return *inner, int8_gemm(*inner, *weight_quant(w[1].T)) + 1, act_dequant(*inner), weight_dequant(*weight_quant(w[0]))


def fp8_network(x: torch.Tensor, w: torch.Tensor, counts: None) -> tuple[torch.Tensor, ...]:
    a, b = reference.quantize_groups(x[0], 128, FP8, "default", None), quantize_weight(w[0])
    codes, scale = quantize_fp8(x, storage="uint8", encoding="offset")
    return mm_fp8_blockscale(*a, b) + 1, fp8_gemm(x[0], w[0]), dequantize_fp8(codes, scale, encoding="offset")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [linear, network, int8_network, fp8_network])
def test_compiled_functions_are_one_graph_with_the_bits_of_the_plain_ones(function, backend):
    torch._dynamo.reset()
    x, w = torch.randn(2, 4, 140).bfloat16(), torch.randn(2, 256, 140).bfloat16()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, expected in zip(compiled(x, w, None), function(x, w, None), strict=True):
        assert_bit_equal(got, expected)
        assert got.stride() == expected.stride()


def test_compiled_code_writes_into_given_outputs_and_leaves_uncounted_rows():
    torch._dynamo.reset()
    x, results = torch.randn(2, 4, 140), []

    def function(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return quantize_expert_batch(x, COUNTS, values=values, scales=scales, dtype=torch.int8).scales + 1

    for called in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        values, scales = torch.full((2, 4, 140), 5, dtype=torch.int8), torch.full((2, 2, 4), -7.0).transpose(1, 2)
        results.append((called(x, values, scales), values, scales))
    for got, expected in zip(*results, strict=True):
        assert_bit_equal(got, expected)
    assert (results[1][2][1] == -7).all() and (results[1][1][1] == 5).all() and not (results[1][2][0, :3] == -7).any()


def test_another_number_of_rows_does_not_break_a_dynamic_graph():
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    w = torch.randn(2, 130, 140)
    for rows in (4, 7, 5):
        x = torch.randn(2, rows, 140)
        for got, expected in zip(compiled(x, w, None), linear(x, w, None), strict=True):
            assert_bit_equal(got, expected)
