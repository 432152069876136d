"""Comparisons of tensors, and poison."""

from __future__ import annotations

import math

import pytest
import torch

from moequant.testing import assert_bit_equal, cosine_difference, poison, relative_error

ALL_DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
]


def test_relative_error_and_cosine_difference():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0 == cosine_difference(reference, reference)
    # 1 - 2 * 2 * 25 / (25 + 100)
    assert cosine_difference(2 * reference, reference) == pytest.approx(0.2)
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), reference))
    assert math.isnan(cosine_difference(torch.tensor([math.nan, 4.0]), reference))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.empty(0), torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_assert_bit_equal_takes_every_dtype_and_any_strides(dtype):
    x = (torch.arange(12).view(3, 4) % 5).to(dtype)
    assert_bit_equal(x, x.t().contiguous().t())
    changed = x.clone()
    changed.view(torch.uint8).view(3, 4, -1)[1, 2, 0] ^= 1
    with pytest.raises(AssertionError, match=r"1 of 12 elements, first at \[1, 2\]"):
        assert_bit_equal(changed, x)


def test_assert_bit_equal_compares_bits_not_numbers():
    nan = torch.tensor([math.nan, 1.0])
    assert_bit_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match=r"first at \[0\]: -0.0 \(0x80000000\) against 0.0 \(0x00000000\)"):
        assert_bit_equal(torch.tensor([-0.0]), torch.tensor([0.0]))
    with pytest.raises(AssertionError, match="scales differ: torch.float32"):
        assert_bit_equal(torch.ones(2), torch.ones(2, dtype=torch.bfloat16), "scales")
    with pytest.raises(AssertionError, match=r"\(2,\) against .*\(1, 2\)"):
        assert_bit_equal(torch.ones(2), torch.ones(1, 2))
    assert_bit_equal(torch.tensor(1.0), torch.tensor(1.0))
    assert_bit_equal(torch.empty(0, 3), torch.empty(0, 3))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_poison_fills_in_place_with_what_shows(dtype):
    x = torch.zeros(3, 4, dtype=dtype).t()
    assert poison(x) is x
    if dtype.is_floating_point:
        assert x.float().isnan().all()
    else:
        assert (x.contiguous().view(torch.uint8) == (1 if dtype == torch.bool else 0x7F)).all()


def test_comparisons_refuse_other_shapes_which_would_be_broadcast():
    for compare in (relative_error, cosine_difference):
        for shape in ((4,), (1, 4), (3, 1), ()):
            with pytest.raises(ValueError, match=r"x must have shape \(3, 4\), got"):
                compare(torch.ones(shape), torch.ones(3, 4))
