"""A valid call of every public quantizer and product, small enough for the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import moequant
from moequant import MoEQuantDispatcher, QuantizedTensor, gemm, quantization, quantize_expert_batch, quantize_weight
from moequant.quantization import FP8Format, act_quant, quantize_fp8, weight_quant

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
NARROW = (*FLOAT8, torch.int8)


class Call(NamedTuple):
    """function: takes `arguments` by keyword. exact: kernels have the reference's bits. dtypes: of the arguments that are data types,
    the documented ones. owner: the dispatcher that the call is made on."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    exact: bool = True
    dtypes: dict[str, tuple[torch.dtype, ...]] = {}  # noqa: RUF012 (never written)
    owner: MoEQuantDispatcher | None = None


def counts(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def quantizer(dtypes: tuple[torch.dtype, ...] = FLOAT8) -> dict[str, Any]:
    return {"dtypes": {"dtype": dtypes}}


FUNCTIONS: dict[str, Callable[[], Call]] = {
    "quantize_expert_batch": lambda: Call(
        quantize_expert_batch,
        {
            "x": torch.randn(2, 4, 140),
            "num_tokens": counts(3, 4),
            "group_size": 64,
            "dtype": torch.int8,
            "recipe": "ue8m0",
            "eps": 1e-4,
            "values": torch.zeros(2, 4, 140, dtype=torch.int8),
            "scales": torch.zeros(2, 4, 3),
        },
        **quantizer(NARROW),
    ),
    "silu_mul_quantize": lambda: Call(
        moequant.silu_mul_quantize,
        {
            "x": torch.randn(2, 4, 280),
            "num_tokens": counts(3, 4),
            "activation": "gelu",
            "bias": torch.randn(2, 280),
            "dtype": torch.int8,
            "recipe": "default",
            "values": torch.zeros(2, 4, 140, dtype=torch.int8),
            "scales": torch.zeros(2, 4, 2),
        },
        exact=False,
        **quantizer(NARROW),
    ),
    "silu_mul": lambda: Call(
        moequant.silu_mul,
        {
            "x": torch.randn(2, 4, 80),
            "num_tokens": counts(3, 4),
            "activation": moequant.Activation(limit=7.0, alpha=1.702, offset=1.0, interleaved=True),
            "bias": torch.randn(2, 80),
            "out": torch.zeros(2, 4, 40),
        },
        exact=False,
    ),
    "quantize_weight": lambda: Call(
        quantize_weight, {"w": torch.randn(2, 6, 140), "dtype": E4M3, "recipe": "default", "segments": 2}, **quantizer(NARROW)
    ),
    "dequantize": lambda: Call(
        moequant.dequantize,
        {"q": quantize_expert_batch(torch.randn(2, 4, 140)), "dtype": torch.float32},
        **quantizer((*FLOATS, torch.float64)),
    ),
    "dequantize of a weight": lambda: Call(
        moequant.dequantize,
        {"q": quantize_weight(torch.randn(6, 140)), "dtype": torch.float16},
        **quantizer((*FLOATS, torch.float64)),
    ),
    "grouped_gemm_blockscale": lambda: Call(
        moequant.grouped_gemm_blockscale,
        {
            "a": quantize_expert_batch(torch.randn(2, 4, 140)),
            "b": quantize_weight(torch.randn(2, 6, 140)),
            "num_tokens": counts(3, 4),
            "out": torch.zeros(2, 4, 6, dtype=torch.bfloat16),
            "out_dtype": torch.bfloat16,
            "expected_rows": 3,
            "batch_invariant": True,
            "num_sms": None,
        },
        exact=False,
        dtypes={"out_dtype": FLOATS},
    ),
    "grouped_gemm_blockscale of bfloat16": lambda: Call(
        moequant.grouped_gemm_blockscale,
        {"a": torch.randn(2, 4, 40).bfloat16(), "b": torch.randn(2, 6, 40).bfloat16(), "out_dtype": torch.float32, "num_sms": 2},
        exact=False,
        dtypes={"out_dtype": FLOATS},
    ),
    "per_token_group_quant_fp8": lambda: Call(
        quantization.per_token_group_quant_fp8,
        {
            "x": torch.randn(2, 3, 140),
            "group_size": 64,
            "dtype": E4M3,
            "recipe": "ue8m0",
            "eps": None,
            "scale_layout": "tma_aligned",
            "scale_dtype": "ue8m0_packed",
        },
        **quantizer(),
    ),
    "per_block_quant_fp8": lambda: Call(
        quantization.per_block_quant_fp8,
        {"w": torch.randn(3, 70), "block": (64, 64), "dtype": E4M3, "recipe": "default"},
        **quantizer(),
    ),
    "fused_rms_fp8_group_quant": lambda: Call(
        quantization.fused_rms_fp8_group_quant,
        {
            "x": torch.randn(3, 140),
            "weight": torch.randn(140),
            "eps": 1e-6,
            "group_size": 128,
            "residual": torch.randn(3, 140),
            "gate": torch.randn(3, 140),
            "dtype": E4M3,
            "recipe": "default",
            "transpose_scale": False,
        },
        exact=False,
        **quantizer(),
    ),
    "fused_flatten_fp8_group_quant": lambda: Call(
        quantization.fused_flatten_fp8_group_quant,
        {"x": torch.randn(3, 2, 64), "group_size": 64, "dtype": E4M3, "transpose_scale": True, "recipe": "default"},
        **quantizer(),
    ),
    "act_quant": lambda: Call(quantization.act_quant, {"x": torch.randn(2, 3, 140), "block_size": 64}),
    "act_dequant": lambda: Call(
        quantization.act_dequant,
        dict(zip(("x", "s"), act_quant(torch.randn(3, 140)), strict=True)) | {"block_size": 128, "output_dtype": torch.float16},
        dtypes={"output_dtype": FLOATS},
    ),
    "weight_quant": lambda: Call(quantization.weight_quant, {"x": torch.randn(2, 40, 70), "block_size": 32}),
    "weight_dequant": lambda: Call(
        quantization.weight_dequant,
        dict(zip(("x", "s"), weight_quant(torch.randn(40, 70)), strict=True)) | {"block_size": 128, "output_dtype": torch.float16},
        dtypes={"output_dtype": FLOATS},
    ),
    "int8_gelu": lambda: Call(
        quantization.int8_gelu,
        dict(zip(("x", "s_x"), act_quant(torch.randn(3, 140)), strict=True)) | {"block_size": 128},
        exact=False,
    ),
    **{name: lambda name=name: int8_product(name) for name in ("int8_gemm", "int8_addmm", "int8_gemm_quant", "int8_addmm_quant")},
    "quantize_fp8": lambda: Call(
        quantize_fp8, {"x": torch.randn(4, 6, 3), "scale": None, "storage": "uint8", "encoding": "offset"}
    ),
    "quantize_fp8 by a scale": lambda: Call(quantize_fp8, {"x": torch.randn(4, 6), "scale": torch.tensor(3.0)}),
    "dequantize_fp8": lambda: Call(
        quantization.dequantize_fp8,
        {"values": quantize_fp8(torch.randn(4, 6))[0], "scale": 2.0, "output_dtype": torch.float16, "encoding": "e4m3"},
        dtypes={"output_dtype": FLOATS},
    ),
    "dequantize_fp8 of codes": lambda: Call(
        quantization.dequantize_fp8,
        {"values": torch.randint(0, 255, (4, 6), dtype=torch.uint8), "scale": torch.tensor([2.0]), "encoding": "offset"},
    ),
    "quantize_fp8_with_overflow_handling": lambda: Call(
        quantization.quantize_fp8_with_overflow_handling, {"x": torch.randn(4, 6), "scale": 200.0, "max_attempts": 5}
    ),
    "fp8_gemm": lambda: Call(
        gemm.fp8_gemm,
        {
            "a": torch.randn(4, 40),
            "b": torch.randn(6, 40).to(E4M3),
            "a_scale": 20.0,
            "b_scale": torch.rand(6, 1),
            "out_dtype": torch.float32,
            "bias": torch.randn(6),
        },
        exact=False,
        dtypes={"out_dtype": FLOATS},
    ),
    "mm_fp8_blockscale": lambda: Call(
        gemm.mm_fp8_blockscale,
        {
            "a": quantize_expert_batch(torch.randn(1, 4, 140)).values[0],
            "a_scales": torch.rand(4, 2),
            "b": quantize_weight(torch.randn(6, 140)),
            "b_scales": None,
            "out_dtype": torch.float32,
            "scale_layout": None,
        },
        exact=False,
        dtypes={"out_dtype": FLOATS},
    ),
    "FP8Format": lambda: Call(FP8Format, {"max_value": 448.0, "min_normal": 2.0**-6}),
    "FP8Format.compute_scale": lambda: Call(FP8Format().compute_scale, {"tensor": torch.randn(3, 4)}),
    "FP8Format.compute_scale_per_channel": lambda: Call(
        FP8Format().compute_scale_per_channel, {"tensor": torch.randn(3, 4), "dim": 1}
    ),
    "FP8Format.is_in_range": lambda: Call(FP8Format().is_in_range, {"tensor": torch.randn(3, 4), "scale": torch.tensor(2.0)}),
    "QuantizedTensor": lambda: Call(
        QuantizedTensor,
        {
            "values": torch.zeros(2, 4, 140, dtype=torch.int8),
            "scales": torch.ones(2, 4, 3),
            "layout": "row",
            "recipe": "default",
            "group_size": 64,
            "segments": 1,
        },
    ),
    "QuantizedTensor.scales_by_row": lambda: Call(quantize_weight(torch.randn(6, 140)).scales_by_row, {}),
}


def int8_product(name: str) -> Call:
    arguments: dict[str, Any] = dict(zip(("a", "a_s"), act_quant(torch.randn(3, 140)), strict=True))
    arguments |= dict(zip(("b", "b_s"), weight_quant(torch.randn(5, 140)), strict=True))
    if "addmm" in name:
        arguments["bias"] = torch.randn(5)
    last: dict[str, Any] = {"out_block_size": 64} if "quant" in name else {"out_dtype": torch.float32}
    return Call(getattr(gemm, name), arguments | last, exact=False, dtypes={"out_dtype": FLOATS})
