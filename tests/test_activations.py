"""Activations as values: in the public functions on a CPU and by the kernels against their formulas, biases, and errors."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from activation_cases import CASES, formula
from guarded import Guarded
from moequant import Activation, ops, reference
from moequant.activations import FUNCTIONS, activation_of, parsed
from moequant.quantization import silu_mul, silu_mul_quantize
from moequant.testing import assert_bit_equal, assert_nearly_quantized, poison
from ragged_rows import ragged

COUNTS = [5, 0, 7]
M, INNER = 16, 140


def device() -> str:
    return str(torch.get_default_device())


def counted() -> torch.Tensor:
    return torch.tensor(COUNTS, dtype=torch.int32)


def drawn(activation: Activation, wide: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (L, M, columns) bfloat16 and a bias for it, in bfloat16 too."""
    columns = INNER * activation.width
    return (torch.randn(len(COUNTS), M, columns) * wide).bfloat16(), torch.randn(len(COUNTS), columns).bfloat16()


def valid(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[expert, :count] for expert, count in enumerate(COUNTS)])


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("both_paths")
def test_an_activation_is_its_formula_in_float32(name, biased):
    activation = CASES[name][0]
    x, bias = drawn(activation)
    out = Guarded(len(COUNTS), M, INNER, dtype=torch.float32, device=device())
    silu_mul(x, counted(), activation=activation, bias=bias if biased else None, out=out.tensor)
    out.assert_only(reference.counted_rows(counted(), x).unsqueeze(2))
    expected = formula(name, x.float() + bias.float().unsqueeze(1) if biased else x)
    # exp takes the error of its argument many times, and an offset cancels
    assert torch.allclose(valid(out.tensor).double(), valid(expected), rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("both_paths")
def test_an_activation_is_quantized_as_the_reference_does(name):
    activation, _, exact = CASES[name]
    x, bias = drawn(activation)
    found = silu_mul_quantize(x, counted(), activation=activation, bias=bias, dtype=torch.int8)
    expected = reference.silu_mul_quantize(x, counted(), activation=activation, bias=bias, dtype=torch.int8)
    pairs = [(valid(q.values), valid(q.scales)) for q in (found, expected)]
    assert_nearly_quantized(*pairs)
    if exact:
        for left, right in zip(*pairs, strict=True):
            assert_bit_equal(left, right)


@pytest.mark.parametrize("name", ["SwiGLU", "gpt-oss", "Nemotron-H"])
@pytest.mark.usefixtures("both_paths")
def test_ragged_rows_have_the_bits_of_padded_ones(name):
    activation = CASES[name][0]
    rows = ragged(COUNTS, device(), spare=16)
    x, bias = drawn(activation)
    given = rows.pack(x), rows.num_tokens, rows.expert_start
    expected = silu_mul(x, rows.num_tokens, activation=activation, bias=bias)
    out = Guarded(rows.rows, INNER, dtype=torch.bfloat16, device=device())
    silu_mul(*given, activation=activation, bias=bias, out=out.tensor)
    out.assert_only(rows.mask().unsqueeze(1))
    assert_bit_equal(rows.pack(expected)[rows.mask()], out.tensor[rows.mask()])
    padded = silu_mul_quantize(x, rows.num_tokens, activation=activation, bias=bias)
    packed = silu_mul_quantize(*given, activation=activation, bias=bias)
    for expert, (start, count) in enumerate(rows.spans()):
        assert_bit_equal(packed.values[start : start + count], padded.values[expert, :count])
        assert_bit_equal(packed.scales[start : start + count], padded.scales[expert, :count])


@pytest.mark.usefixtures("both_paths")
def test_interleaved_columns_of_any_strides_are_found():
    activation = Activation(interleaved=True)
    x, bias = drawn(activation)
    apart = torch.empty(len(COUNTS), M, 4 * INNER + 6).bfloat16()[:, :, 3 : 4 * INNER + 3 : 2].copy_(x)
    halves = torch.cat((x[..., ::2], x[..., 1::2]), -1), torch.cat((bias[:, ::2], bias[:, 1::2]), -1)
    expected = silu_mul(halves[0], counted(), bias=halves[1])
    for strided in (x, apart, x.mT.contiguous().mT):
        assert_bit_equal(valid(silu_mul(strided, counted(), activation=activation, bias=bias)), valid(expected))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("both_paths")
def test_a_nan_stays_one_whatever_cuts_the_numbers(name):
    activation = CASES[name][0]
    x = torch.ones(1, 3, 4 * activation.width)
    x[0, 0, 1] = x[0, 1, 4 * activation.width - 1] = torch.nan
    out = silu_mul(x, activation=activation)
    assert out.isnan().sum((0, 2)).tolist() == [1, 1, 0]


@pytest.mark.usefixtures("both_paths")
def test_large_numbers_reach_the_limits():
    x = torch.tensor([[[torch.inf, -torch.inf, 1e30, -1e30, torch.inf, -torch.inf, 1e30, -1e30]]])
    out = silu_mul(x, activation=Activation("relu", limit=3.0, offset=1.0), out=torch.empty(1, 1, 4))
    assert out.tolist() == [[[12.0, 0.0, 12.0, 0.0]]]
    capped = silu_mul(x[..., [0, 2, 1, 3]], activation=Activation(gate_softcap=3.0, up_softcap=2.0), out=torch.empty(1, 1, 2))
    assert capped.tolist() == [[[-6.0, -6.0]]]
    for function in FUNCTIONS:
        ones = torch.tensor([[[1e30, -1e30, 60.0, -200.0]]])
        out = silu_mul(ones, activation=Activation(function, gated=False, limit=60.0, limit_after=True), out=torch.empty(1, 1, 4))
        assert out.flatten().tolist() == pytest.approx([60.0, 0.0, 60.0, 0.0], rel=0, abs=1e-15), function


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("both_paths")
def test_a_bias_is_added_to_the_rows_of_its_expert_alone(dtype):
    rows, bias = ragged(COUNTS, device(), spare=16), torch.randn(len(COUNTS), INNER).to(dtype)
    x = torch.randn(len(COUNTS), M, INNER).bfloat16()
    padded, packed = Guarded(*x.shape, dtype=x.dtype, device=device()), Guarded(rows.rows, INNER, dtype=x.dtype, device=device())
    expected = (x.float() + bias.float().unsqueeze(1)).bfloat16()
    mask = reference.counted_rows(rows.num_tokens, x)
    padded.tensor[mask], packed.tensor[rows.mask()] = x[mask], rows.pack(x)[rows.mask()]
    ops.add_bias(padded.tensor, rows.num_tokens, None, bias)
    ops.add_bias(packed.tensor, rows.num_tokens, rows.expert_start, bias)
    padded.assert_only(mask.unsqueeze(2))
    packed.assert_only(rows.mask().unsqueeze(1))
    assert_bit_equal(padded.tensor[mask], expected[mask])
    assert_bit_equal(packed.tensor[rows.mask()], rows.pack(expected)[rows.mask()])


def test_no_rows_need_no_bias():
    x, bias = drawn(Activation())
    none, start = torch.zeros(len(COUNTS), dtype=torch.int32), torch.zeros(len(COUNTS), dtype=torch.int32)
    out = poison(torch.empty(M, INNER))
    assert silu_mul(x[0], none, start, bias=bias, out=out).isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_whole_activation(name):
    activation = CASES[name][0]
    assert parsed(activation.text) == activation == pickle.loads(pickle.dumps(activation)) == dataclasses.replace(activation)
    assert hash(parsed(activation.text)) == hash(activation)
    assert activation.plain == (activation == Activation())


def test_names_are_gated_functions():
    for name in FUNCTIONS:
        assert activation_of(name) == Activation(name) and activation_of(name).text == name
    assert Activation(limit=7) == Activation(limit=7.0) and Activation(limit=7).text == Activation(limit=7.0).text


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown function": ({"function": "swish"}, "function must be one of silu, gelu, .*, got 'swish'"),
    "no limit": ({"limit": 0}, "limit must be above 0, got 0.0"),
    "an infinite limit": ({"limit": float("inf")}, "limit must be finite in float32, got inf"),
    "NaN": ({"offset": float("nan")}, "offset must be finite"),
    "a truth": ({"alpha": True}, "alpha must be a number, got bool"),
    "no number": ({"gate_softcap": "3"}, "gate_softcap must be a number or None, got str"),
    "a number for a truth": ({"gated": 1}, "gated must be bool, got int"),
    "alpha of another function": ({"function": "gelu", "alpha": 2.0}, 'function "silu" alone'),
    "up without a gate": ({"gated": False, "offset": 1.0}, "gated=False"),
    "columns of nothing": ({"gated": False, "interleaved": True}, "gated=False"),
    "nothing to limit": ({"limit_after": True}, "give limit, got None"),
}


@pytest.mark.parametrize("case", BAD)
def test_activations_that_are_none_raise_a_value_error(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Activation(**settings)


X, BIAS = torch.zeros(2, 3, 8), torch.zeros(2, 8)
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"activation": "tanh"}, "activation must be an Activation or one of 'silu', .*, got 'tanh'"),
    "no name": ({"activation": 3}, "activation must be an Activation or one of .*, got 3"),
    "bias of the result": ({"bias": BIAS[:, :4]}, r"bias must have shape \(2, 8\), got \(2, 4\)"),
    "bias of integers": ({"bias": BIAS.int()}, "bias must be torch.bfloat16"),
    "a bias apart": ({"bias": torch.zeros(8, 2).T}, "bias must be contiguous"),
    "another device": ({"bias": BIAS.to("meta")}, "bias must be on cpu"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_arguments_raise_a_value_error(case):
    settings, message = BAD_CALLS[case]
    for function in (silu_mul, silu_mul_quantize):
        with pytest.raises(ValueError, match=message):
            function(X, **settings)


def test_a_bias_that_requires_grad_is_refused():
    with pytest.raises(RuntimeError, match="bias requires grad"):
        silu_mul(X, bias=BIAS.clone().requires_grad_())
