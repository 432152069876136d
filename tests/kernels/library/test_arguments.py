"""Kernels read what travels together by name: tensors, numbers and constants, and tensors that aren't there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import Rows, Strided, quant_spec, rows_of, strided


@triton.jit
def scaled_kernel(x, more, out_ptr, spec, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    number = tl.load(x.pointer + x.matrix + 2 * x.row + lane * x.column)
    if more.pointer is not None:
        number += tl.load(more.pointer + more.stride + lane)
    HALF: tl.constexpr = spec.max_value * 0.5
    if spec.power_of_two:
        number = number * HALF
    tl.store(out_ptr + lane, number + spec.eps)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("with_more", [True, False])
def test_members_of_arguments_are_read_by_name(with_more, power_of_two, device):
    x = torch.randn(2, 8, 3, device=device).transpose(1, 2)
    more = torch.randn(2, 10, device=device)[:, :8] if with_more else None
    out = torch.full((8,), torch.nan, device=device)
    constants: dict[str, Any] = {"BLOCK": 8}
    scaled_kernel[(1,)](strided(x), rows_of(more), out, quant_spec(4.0, 0.25, power_of_two, False), **constants)
    expected = x[1, 2] + (0.0 if more is None else more[1])
    assert (out - (expected * (2.0 if power_of_two else 1.0) + 0.25)).abs().max() < 1e-6


def test_a_tensor_that_is_not_there_has_no_strides():
    assert rows_of(None) == Rows(None, 0) and strided(None) == Strided(None, 0, 0, 0)
