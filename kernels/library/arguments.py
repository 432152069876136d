"""What travels together to kernels, as one argument each: Triton takes a NamedTuple of pointers, numbers and constants.

A kernel specializes on each member as it does on an argument of its own: None, 1, multiples of 16. Whether a tensor is there it says by
`x.pointer is not None`. What decides how a kernel is compiled, sizes of tiles above all, comes as one `tl.constexpr`, a NamedTuple of
plain numbers that stands in the kernel's file. Triton's own tuple has `values` and `type`, and its constants have `value`: no member is
called so.

Tensors that a step of a layer is given, and that may be others in its next call, are arguments of their own, and no tensor lies in a
tuple inside a tuple: so whoever repeats a launch finds the addresses to replace.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor of rows, each contiguous, and the elements from one row to the next."""

    pointer: Tensor | None
    stride: int


def rows_of(x: Tensor | None) -> Rows:
    return Rows(None, 0) if x is None else Rows(x, x.stride(0))


class Strided(NamedTuple):
    """A tensor of three dimensions, and the elements from one to the next of each: matrices (experts), rows, columns (groups). Of two
    dimensions: each row begins a matrix, as expert_start counts rows."""

    pointer: Tensor | None
    matrix: int
    row: int
    column: int


def strided(x: Tensor | None) -> Strided:
    if x is None:
        return Strided(None, 0, 0, 0)
    return Strided(x, *x.stride()) if x.dim() == 3 else Strided(x, x.stride(0), *x.stride())


class Shape(NamedTuple):
    """Of an expert batch: experts, rows of an expert's buffer, columns."""

    experts: int
    rows: int
    columns: int


class Valid(NamedTuple):
    """Which rows are there: num_tokens (L,) of each expert, or None for all, from expert_start (L,) on, or None if padded."""

    num_tokens: Tensor | None
    expert_start: Tensor | None


class Experts(NamedTuple):
    """How many there are, and which of them are this rank's: `local` from `first` on."""

    all: int
    local: int
    first: int


class QuantSpec(NamedTuple):
    """A format and a recipe as the numbers that kernels take (`moequant.formats`); all but eps are constants. `quant_spec` makes it."""

    max_value: tl.constexpr
    eps: float
    power_of_two: tl.constexpr
    reciprocal: tl.constexpr


def quant_spec(max_value: float, eps: float, power_of_two: bool, reciprocal: bool) -> QuantSpec:
    return QuantSpec(tl.constexpr(max_value), eps, tl.constexpr(power_of_two), tl.constexpr(reciprocal))
