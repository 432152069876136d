"""Checks of user input, apart from the functions that ask for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moequant import quantize_expert_batch, silu_mul
from moequant.checks import check_choice, check_int, check_number, check_output, check_tensor


@pytest.mark.parametrize("value", [0, 1, 2**31 - 1])
def test_integers_in_range_are_accepted(value):
    check_int("size", value)


@pytest.mark.parametrize("value", [-1, 2**31, 10**30, 1.0, "1", None, [], True, np.int64(1), np.ones(2), torch.ones(())], ids=repr)
def test_other_integers_are_refused(value):
    with pytest.raises(ValueError, match="size must be"):
        check_int("size", value)


@pytest.mark.parametrize("value", [10**400, 1e300, "1.0", None, True, 1j, np.ones(2)], ids=str)
def test_what_float32_can_not_hold_is_no_number(value):
    with pytest.raises(ValueError, match="scale must be a number"):
        check_number("scale", value)


@pytest.mark.parametrize("value", [128.0, True, "128", None, [], {}, np.ones(2), np.int64(128), torch.ones(2)], ids=repr)
def test_a_choice_is_of_the_choices_type(value):
    check_choice("block_size", 128, (1, 128))
    with pytest.raises(ValueError, match="block_size must be one of 1, 128, got"):
        check_choice("block_size", value, (1, 128))


STRANGE: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.ones(2, 3).to_sparse(), "layout torch.sparse_coo; call .to_dense"),
    "compressed": (lambda: torch.ones(2, 3).to_sparse_csr(), "layout torch.sparse_csr; call .to_dense"),
    "mkldnn": (lambda: torch.ones(2, 3).to_mkldnn(), "layout torch._mkldnn; call .to_dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor; call .to_padded_tensor"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "torch.qint8; call .dequantize"),
    "negated": (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "a view that torch negates; call .resolve_neg"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STRANGE)
def test_tensors_without_plain_memory_are_refused(case):
    make, message = STRANGE[case]
    with pytest.raises(ValueError, match=f"x must be a dense tensor of plain numbers, got {message}"):
        check_tensor("x", make())


def test_outputs_are_refused_if_and_only_if_elements_of_theirs_share_memory():
    storage = torch.zeros(200)
    seen = {True: 0, False: 0}
    for shape in itertools.product((1, 2, 3), (1, 3), (2, 4)):
        for strides in itertools.product((0, 1, 2, 4, 12), (0, 1, 3, 4), (0, 1, 6)):
            output = storage.as_strided(shape, strides)
            places = {sum(map(int.__mul__, index, strides)) for index in itertools.product(*map(range, shape))}
            apart, accepted = len(places) == output.numel(), True
            try:
                check_output("out", output)
            except ValueError:
                accepted = False
            # interleaved ones, as of strides (2, 3), may be refused although they don't
            assert apart or not accepted
            seen[accepted] += apart
    assert seen[True] > 5 * seen[False]


def test_overlapping_outputs_are_refused_by_the_functions_that_write_them():
    x, row = torch.randn(2, 4, 80), torch.zeros(40)
    for call, name in (
        (lambda: silu_mul(x, out=row.expand(2, 4, 40)), "out"),
        (lambda: quantize_expert_batch(x, values=torch.zeros(80, dtype=torch.float8_e4m3fn).expand(2, 4, 80)), "values"),
        (lambda: quantize_expert_batch(x, scales=torch.zeros(4, 1).expand(2, 4, 1)), "scales"),
    ):
        with pytest.raises(ValueError, match=f"elements of {name} must not overlap"):
            call()


def test_arrays_as_outputs_are_refused_in_words():
    x: Any = torch.randn(2, 4, 80)
    array: Any = np.zeros((2, 4, 40))
    with pytest.raises(ValueError, match="out must be a tensor, got ndarray"):
        silu_mul(x, out=array)
    with pytest.raises(ValueError, match="values must be a tensor, got ndarray"):
        quantize_expert_batch(x, values=array)
