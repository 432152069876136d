"""Every operation is registered with torch.library as it should be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moequant import (
    grouped_gemm_blockscale,
    ops,
    quantize_expert_batch,
    quantize_weight,
    reference,
    silu_mul_quantize,
)
from moequant.batch import QuantizedTensor, empty_scales, empty_transposed_scales
from moequant.quantization import act_quant, weight_quant
from moequant.testing import assert_bit_equal

FP8 = torch.float8_e4m3fn
COUNTS = torch.tensor([3, 0], dtype=torch.int32)


def integers(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def quantize_outputs(dtype: torch.dtype = torch.int8, columns: int = 140) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, columns).to(dtype), empty_transposed_scales(2, 4, 2, "cpu").zero_()


def quantize_arguments(dtype: torch.dtype, counts: torch.Tensor | None) -> tuple:
    return torch.randn(2, 4, 140), counts, *quantize_outputs(dtype), 128, "ue8m0", 1e-4


def silu_quantize_arguments(dtype: torch.dtype, counts: torch.Tensor | None) -> tuple:
    return torch.randn(2, 4, 280).bfloat16(), counts, *quantize_outputs(dtype), "default", None


def gemm_arguments(quantized: bool) -> tuple:
    a, b, out = torch.randn(2, 4, 140).bfloat16(), torch.randn(2, 6, 140).bfloat16(), torch.zeros(2, 4, 6)
    if not quantized:
        return a, None, b, None, None, out, 1, 7
    qa, qb = quantize_expert_batch(a, dtype=torch.int8), quantize_weight(b, dtype=torch.int8, segments=2)
    return qa.values, qa.scales, qb.values, qb.scales, COUNTS, out, 2, None


def gemm1_arguments(dtype: torch.dtype) -> tuple:
    a, w13 = torch.randn(2, 4, 140).bfloat16(), torch.randn(2, 2 * 140, 140).bfloat16()
    qa, qw = quantize_expert_batch(a, dtype=dtype), quantize_weight(w13, dtype=dtype, segments=2)
    return qa.values, qa.scales, qw.values, qw.scales, COUNTS, *quantize_outputs(dtype), "ue8m0", 2


def int8_arguments(bias: bool, out_dtype: torch.dtype) -> tuple:
    a, a_scales = act_quant(torch.randn(3, 140))
    b, b_scales = weight_quant(torch.randn(150, 140))
    arguments = a, a_scales, b, b_scales, torch.randn(150).half() if bias else None, torch.zeros(3, 150).to(out_dtype)
    return (*arguments, torch.zeros(3, 5), 32) if out_dtype == torch.int8 else arguments


def fp8_arguments(bias: bool) -> tuple:
    a, b = torch.randn(3, 140).to(FP8), torch.randn(6, 140).to(FP8)
    return a, torch.rand(3), b, torch.rand(()).expand(6), torch.randn(6) if bias else None, torch.zeros(3, 6)


def route_arguments(*optional: Any) -> tuple:
    return integers([1, 0], [-1, 1], [9, 0]), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), *optional


def scatter_arguments(quantized: bool) -> tuple:
    x, ids, slots = torch.randn(3, 140), integers([1, 0], [-1, 1], [2, 0]), integers([0, 0], [-1, 1], [0, 1])
    if not quantized:
        return x, ids, slots, torch.zeros(2, 4, 140).bfloat16()
    rows, sources = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int64)
    options = torch.arange(3), integers(0, 1, 0), 4, "deepgemm"
    return x, ids, slots, *quantize_outputs(), None, rows, sources, *options


def move_arguments(to_merged: bool) -> tuple:
    padded, merged = torch.randn(2, 1, 3, 5), torch.randn(1, 4, 5)
    arguments = padded, merged, integers([0], [2]), integers([2], [3]), to_merged
    if not to_merged:
        return arguments
    scales = torch.randn(2, 1, 1, 3).transpose(2, 3), torch.zeros(1, 1, 4).transpose(1, 2)
    return *arguments, *scales, torch.ones(2, 1, 3, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int64)


def small_counts(size: int = 2) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


# for each operation, by what its arguments are, how to make them anew
CASES: dict[str, dict[str, Callable[[], tuple]]] = {
    "quantize_expert_batch": {
        "int8, counted": lambda: quantize_arguments(torch.int8, COUNTS),
        "fp8": lambda: quantize_arguments(FP8, None),
        "packed exponents": lambda: (
            torch.randn(2, 4, 140),
            COUNTS,
            quantize_outputs(FP8)[0],
            empty_scales(2, 4, 2, "ue8m0_packed", "cpu").zero_(),
            128,
            "ue8m0",
            None,
        ),
    },
    "silu_mul_quantize": {
        "int8, counted": lambda: silu_quantize_arguments(torch.int8, COUNTS),
        "fp8": lambda: silu_quantize_arguments(FP8, None),
    },
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
    "quantize_weight": {
        "int8, two segments": lambda: (
            torch.randn(2, 6, 140).half(),
            torch.zeros(2, 6, 140, dtype=torch.int8),
            torch.zeros(2, 2, 2),
            "ue8m0",
            2,
            128,
        ),
        "fp8 in small blocks": lambda: (
            torch.randn(1, 40, 70),
            torch.zeros(1, 40, 70).to(FP8),
            torch.zeros(1, 2, 3),
            "default",
            1,
            32,
        ),
    },
    "dequantize_blocks": {
        "int8, groups": lambda: (
            torch.ones(2, 3, 140, dtype=torch.int8),
            empty_transposed_scales(2, 3, 2, "cpu").fill_(2.0),
            torch.zeros(2, 3, 140),
        ),
        "fp8, blocks": lambda: (torch.ones(1, 40, 70).to(FP8), torch.rand(1, 2, 3), torch.zeros(1, 40, 70).half(), 32, 32),
    },
    "silu_mul": {"counted": lambda: (torch.randn(2, 4, 280), COUNTS, torch.zeros(2, 4, 140).bfloat16())},
    "grouped_gemm_blockscale": {"int8, counted": lambda: gemm_arguments(True), "bfloat16": lambda: gemm_arguments(False)},
    "gemm1_swiglu": {"int8": lambda: gemm1_arguments(torch.int8), "fp8": lambda: gemm1_arguments(FP8)},
    "int8_addmm": {
        "float16": lambda: int8_arguments(False, torch.float16),
        "quantized": lambda: int8_arguments(True, torch.int8),
    },
    "int8_gelu": {
        "with a tail": lambda: (*act_quant(torch.randn(3, 140), 64), torch.zeros(3, 140, dtype=torch.int8), torch.zeros(3, 3), 64)
    },
    "quantize_fp8": {
        "computed": lambda: (torch.randn(9).half(), torch.zeros(9).to(FP8), torch.zeros(()), True),
        "given": lambda: (torch.randn(9), torch.zeros(9, dtype=torch.uint8), torch.full((), 20.0), False),
    },
    "dequantize_fp8": {
        "e4m3": lambda: (torch.randn(9).to(FP8), torch.full((), 20.0), torch.zeros(9)),
        "offset": lambda: (torch.arange(9).to(torch.uint8), torch.full((), 20.0), torch.zeros(9).half()),
    },
    "fp8_gemm": {"with bias": lambda: fp8_arguments(True), "without": lambda: fp8_arguments(False)},
    "route": {
        "all outputs": lambda: route_arguments(1, small_counts(), torch.zeros(2, dtype=torch.int64)),
        "slots and counts": route_arguments,
    },
    "expert_offsets": {
        "with status": lambda: (
            integers([3, 1], [6, 0]),
            0,
            5,
            4,
            integers([0, 0], [0, 0]),
            small_counts(),
            torch.zeros(2, dtype=torch.int64),
        ),
        "without status": lambda: (integers([3, 1], [6, 0]), 1, 5, 4, integers([0, 0], [0, 0]), small_counts(1)),
    },
    "count_strangers": {
        "one": lambda: (integers([4, 9], [5, 9], [4, 9]), 0, torch.zeros(3, dtype=torch.int64)),
        "another layer": lambda: (integers([4, 9], [4, 8]), 1, torch.zeros(3, dtype=torch.int64)),
    },
    "plan_sends": {
        "one rank's list is empty": lambda: (
            integers([0, 1], [3, -1], [1, 2]),
            2,
            torch.zeros(3, 4, dtype=torch.int32),
            small_counts(3),
        )
    },
    "plan_returns": {
        "without room for one": lambda: (
            integers([0, 1], [3, 1]),
            integers([0, 0], [0, 1]),
            small_counts(4),
            1,
            2,
            torch.tensor([0, 2], dtype=torch.int32),
            integers([9, 9], [9, 9]),
        )
    },
    "plan_partials": {
        "by rank": lambda: (integers([0, 1], [3, -1]), integers([0, -1], [7, -1]), 2, 5, integers([9, 9], [9, 9])),
        "listed": lambda: (integers([0, 1], [3, 2]), integers([0, -1], [7, 1]), 2, 0, integers([9, 9], [9, 9]), small_counts()),
    },
    "locate_entries": {
        "of one rank": lambda: (
            integers([[[0, 1]], [[0, 0]], [[3, 4]]]),
            integers([1]),
            0,
            2,
            3,
            integers([[9, 9]]),
            torch.full((1, 1, 2), 9.0),
        )
    },
    "presum": {
        "of one token": lambda: (
            torch.randn(4, 5).bfloat16(),
            integers([0, 3], [-1, -1]),
            torch.rand(2, 2),
            torch.zeros(2, 5).bfloat16(),
        )
    },
    "scatter": {"quantizing": lambda: scatter_arguments(True), "converting": lambda: scatter_arguments(False)},
    "move_source_rows": {"to merged": lambda: move_arguments(True), "to padded": lambda: move_arguments(False)},
    "combine": {
        "with absent entries": lambda: (
            torch.randn(4, 5).bfloat16(),
            integers([0, 3], [-1, 1]),
            torch.rand(2, 2),
            torch.zeros(2, 5).bfloat16(),
        ),
        "without weights": lambda: (torch.randn(4, 5).bfloat16(), integers([0, 3]), None, torch.zeros(1, 5)),
    },
}
ALL_CASES = [(name, case) for name, cases in CASES.items() for case in cases]
every_case = pytest.mark.parametrize("name, case", ALL_CASES, ids=[f"{name}, {case}" for name, case in ALL_CASES])


def operation(name: str) -> Any:
    return getattr(torch.ops.moequant, name).default


def arguments_of(name: str, case: str) -> tuple:
    """A case's arguments, with the plain function's defaults for the rest: the registered form has none."""
    arguments = CASES[name][case]()
    parameters = list(inspect.signature(getattr(ops, name)).parameters.values())
    return *arguments, *(parameter.default for parameter in parameters[len(arguments) :])


def test_every_registered_operation_is_tested_here():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moequant::")}
    assert registered == {f"moequant::{name}" for name in CASES}


@every_case
def test_opcheck_finds_schema_fake_and_tracing_right(name, case):
    arguments = arguments_of(name, case)
    # the schema's test compares the arguments with torch.allclose, which knows no float8
    float8 = any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 and x.is_floating_point() for x in arguments)
    utilities = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic", "test_schema"]
    torch.library.opcheck(operation(name), arguments, test_utils=utilities[: 3 if float8 else 4])


@every_case
def test_the_fake_takes_meta_tensors_and_returns_nothing(name, case):
    arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments_of(name, case)]
    assert operation(name)(*arguments) is None


@every_case
def test_the_schema_names_what_is_written_and_nothing_else_changes(name, case):
    arguments = arguments_of(name, case)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    operation(name)(*arguments)
    written = []
    for parameter, value, old in zip(operation(name)._schema.arguments, arguments, before, strict=False):
        if isinstance(value, torch.Tensor):
            changed = not torch.equal(value.double(), old.double())
            mutable = parameter.alias_info is not None and parameter.alias_info.is_write
            assert mutable or not changed, parameter.name
            written += [parameter.name] * changed
    assert written


@every_case
def test_the_plain_function_writes_the_operations_bits(name, case):
    torch.manual_seed(1)
    first = arguments_of(name, case)
    second = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in first)
    operation(name)(*first)
    getattr(ops, name)(*second)
    for left, right in zip(first, second, strict=True):
        if isinstance(left, torch.Tensor):
            assert_bit_equal(left, right)


def test_a_quant_spec_has_the_formats_and_recipes_numbers():
    def numbers(*arguments) -> list[Any]:
        return [getattr(number, "value", number) for number in ops.quant_spec(torch.float8_e5m2, *arguments)]

    assert numbers("ue8m0") == [57344.0, 1e-10, True, False]
    assert numbers("deepgemm", 0.5) == [57344.0, 0.5, False, True]


def test_the_gemm_operation_takes_bare_tensors_for_the_quantized_operands():
    values, scales, weights, weight_scales, counts, out, segments, _ = gemm_arguments(True)
    operation("grouped_gemm_blockscale")(values, scales, weights, weight_scales, counts, out, segments, None, None)
    a, b = QuantizedTensor(values, scales, "transposed"), QuantizedTensor(weights, weight_scales, "block", segments=segments)
    assert_bit_equal(out, reference.grouped_gemm_blockscale(a, b, counts, out=torch.zeros_like(out)))


def test_gemm1_swiglu_is_the_gemm_and_then_swiglu_with_quantization():
    a, a_scales, w13, w13_scales, counts, values, scales, recipe, _ = gemm1_arguments(FP8)
    operation("gemm1_swiglu")(a, a_scales, w13, w13_scales, counts, values, scales, recipe, 2, None)
    left, right = QuantizedTensor(a, a_scales, "transposed"), QuantizedTensor(w13, w13_scales, "block", segments=2)
    gate_up = grouped_gemm_blockscale(left, right, counts)
    expected = silu_mul_quantize(gate_up, counts, recipe=recipe)
    assert_bit_equal(values[0, :3], expected.values[0, :3])
    assert_bit_equal(scales[0, :3], expected.scales[0, :3])
    assert not values.view(torch.int8)[1].any()
