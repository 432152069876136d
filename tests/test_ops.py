"""Every operation is registered with torch.library as it should be."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from kernel_tests import operation_cases
from moequant import grouped_gemm_blockscale, ops, reference, silu_mul_quantize
from moequant.batch import QuantizedTensor
from moequant.testing import assert_bit_equal
from product_calls import gemm1_arguments, gemm_arguments

FP8 = torch.float8_e4m3fn
CASES = operation_cases()
ALL_CASES = [(name, case) for name, cases in CASES.items() for case in cases]
every_case = pytest.mark.parametrize("name, case", ALL_CASES, ids=[f"{name}, {case}" for name, case in ALL_CASES])


def operation(name: str) -> Any:
    return getattr(torch.ops.moequant, name).default


def arguments_of(name: str, case: str) -> tuple:
    """A case's arguments, with the plain function's defaults for the rest: the registered form has none."""
    arguments = CASES[name][case]()
    parameters = list(inspect.signature(getattr(ops, name)).parameters.values())
    return *arguments, *(parameter.default for parameter in parameters[len(arguments) :])


def test_every_registered_operation_has_cases():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moequant::")}
    # a whole layer, which `tests/test_traced.py` has, and layers of other libraries' models, if imported
    layers = {
        "moequant::layer",
        "moequant::layer_into",
        *(name for name in registered if name.startswith("moequant::transformers_")),
    }
    assert registered - layers == {f"moequant::{name}" for name in CASES}


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
    values, scales, weights, weight_scales, counts, starts, out, segments, _ = gemm_arguments(True)
    operation("grouped_gemm_blockscale")(values, scales, weights, weight_scales, counts, starts, out, segments, None, None)
    a, b = QuantizedTensor(values, scales, "transposed"), QuantizedTensor(weights, weight_scales, "block", segments=segments)
    assert_bit_equal(out, reference.grouped_gemm_blockscale(a, b, counts, out=torch.zeros_like(out)))


def test_gemm1_swiglu_is_the_gemm_and_then_swiglu_with_quantization():
    a, a_scales, w13, w13_scales, counts, starts, values, scales, recipe, _ = gemm1_arguments(FP8)
    operation("gemm1_swiglu")(a, a_scales, w13, w13_scales, counts, starts, values, scales, recipe, 2, None)
    left, right = QuantizedTensor(a, a_scales, "transposed"), QuantizedTensor(w13, w13_scales, "block", segments=2)
    gate_up = grouped_gemm_blockscale(left, right, counts)
    expected = silu_mul_quantize(gate_up, counts, recipe=recipe)
    assert_bit_equal(values[0, :3], expected.values[0, :3])
    assert_bit_equal(scales[0, :3], expected.scales[0, :3])
    assert not values.view(torch.int8)[1].any()
