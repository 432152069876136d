"""Public functions give strided tensors the result of their copies, or refuse them in words: by the reference and by kernels."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moequant import QuantizedTensor
from moequant.testing import assert_bit_equal
from public_calls import CALLS, Call, tensors_of, valid_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreted kernels run on a machine without a GPU")


def every_other(x: Tensor) -> Tensor:
    """The same numbers with others between them."""
    wide = x.repeat_interleave(2, -1)
    wide[..., 1::2] = 7
    return wide[..., ::2]


def inside(x: Tensor) -> Tensor:
    """Part of a larger tensor, which begins in the middle of its memory."""
    larger = torch.full([extent + 2 for extent in x.shape], 7).to(x.dtype)
    part = larger[tuple(slice(1, -1) for _ in x.shape)]
    return part.copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else every_other(x)


def one_column(x: Tensor) -> Tensor:
    """The numbers of a tensor in a column of a matrix."""
    matrix = torch.full((x.numel(), 3), 7).to(x.dtype)
    matrix[:, 1] = x.reshape(-1)
    return matrix[:, 1].unflatten(0, x.shape) if x.dim() else matrix[0, 1]


def rows_repeated(x: Tensor) -> Tensor:
    """Every row is the first one, which is there once."""
    return x[..., :1, :].expand(x.shape) if x.dim() > 1 else x[:1].expand(x.shape)


def one_number(x: Tensor) -> Tensor:
    """Every number is the first one, which is there once."""
    return x.reshape(-1)[:1].view([1] * x.dim()).expand(x.shape)


def later(x: Tensor) -> Tensor:
    """Begins one element into its memory."""
    return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)


View = Callable[[Tensor], Tensor]
VIEWS: list[View] = [every_other, inside, transposed, one_column, rows_repeated, one_number, later]


def tensors(call: Call) -> list[str]:
    """Names of the arguments that are tensors with numbers to read; `a.scales` is the scales of a QuantizedTensor."""
    names = []
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            names.append(name)
        elif isinstance(value, QuantizedTensor):
            names += [f"{name}.values", f"{name}.scales"]
    return names


def changed(arguments: dict[str, Any], path: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    name, _, field = path.partition(".")
    value = arguments[name]
    new = dataclasses.replace(value, **{field: change(getattr(value, field))}) if field else change(value)
    return {**arguments, name: new}


def results(call: Call, arguments: dict[str, Any]) -> list[Tensor]:
    return tensors_of(call.function(**arguments), valid_rows(arguments))


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Within the last places of what goes through exp, which torch computes otherwise for strided tensors, and one step of codes."""
    if a.dtype.itemsize == 1:
        return bool(((a.view(torch.int8).int() - b.view(torch.int8).int()).abs() <= 1).all())
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=2e-2 if a.dtype.itemsize == 2 else 1e-5, atol=1e-6)


SKIPPED = ("GroupedExperts.share", "GroupedExperts.push", "GroupedExperts.gemm2_push", "ExpertBatch", "QuantizedTensor", "record")
NAMES = [name for name in CALLS if not name.startswith(SKIPPED) and tensors(CALLS[name]())]
REFUSED = "contiguous", "layout", "overlap", "side by side", "only transport"


def copied(view: View) -> View:
    """The same numbers in memory of their own, in the order that the argument was made with."""

    def copy(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(view(x))

    return copy


def run(name: str, arguments: list[str], view: View, kernels: bool = False) -> list[Tensor]:
    """What a call gives with a view in place of some of its arguments, which the reference has made."""
    torch.manual_seed(0)
    call = CALLS[name]()
    changes = call.arguments
    for argument in arguments:
        changes = changed(changes, argument, view)
    with mock.patch.dict(os.environ, MOEQUANT_CPU_KERNELS="1" if kernels else "0"):
        return results(call, changes)


@functools.cache
def accepted(name: str) -> dict[View, list[str]]:
    """Which arguments of a call may be which views; the others are refused in words."""
    found: dict[View, list[str]] = {view: [] for view in VIEWS}
    for view in VIEWS:
        for argument in tensors(CALLS[name]()):
            try:
                run(name, [argument], view)
            except (ValueError, RuntimeError) as error:
                if not any(word in str(error) for word in REFUSED):
                    raise
            else:
                found[view].append(argument)
    return found


def check(name: str, view: View, arguments: list[str], got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        if CALLS[name]().exact:
            assert_bit_equal(a, b, f"{name} of {view.__name__} {arguments}")
        else:
            assert nearly_equal(a, b), f"{name} of {view.__name__} {arguments}"


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_views_the_bits_of_their_copies(name):
    for view, arguments in accepted(name).items():
        for argument in arguments:
            check(name, view, [argument], run(name, [argument], view), run(name, [argument], copied(view)))


@pytest.mark.parametrize("name", NAMES)
def test_kernels_give_views_the_bits_of_their_copies(name):
    """All arguments that may be views are ones at once. What is exact is compared with the reference, the rest with the kernels."""
    views = accepted(name)
    # copies of most views are the same numbers, and so is what they give
    seen: dict[tuple[str, ...], list[Tensor]] = {}
    for view, arguments in views.items():
        if not arguments:
            continue
        numbers = *arguments, view.__name__ if view in (rows_repeated, one_number) else ""
        if numbers not in seen:
            seen[numbers] = run(name, arguments, copied(view), kernels=not CALLS[name]().exact)
        check(name, view, arguments, run(name, arguments, view, kernels=True), seen[numbers])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_whose_elements_share_memory_are_refused(name):
    reads = "dequantize" in name or name == "CheckpointWeight"
    arguments = [x for x in tensors(CALLS[name]()) if x in ("out", "values", "scales") and not reads]
    for view in (rows_repeated, one_number):
        assert not set(arguments) & set(accepted(name)[view])
