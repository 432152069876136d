"""Comparisons of tensors, and poison for what must not be read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moequant.checks import check_has_numbers, check_no_grad, check_output, check_tensor
from moequant.formats import FLOAT_DTYPES, FORMAT_OF_DTYPE

# What `relative_error` and `cosine_difference` compare, in float64.
COMPARABLE = (*FLOAT_DTYPES, torch.float64, *FORMAT_OF_DTYPE, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_comparable(x: Tensor, reference: Tensor) -> None:
    """Refuses what can't be compared: tensors of other shapes would be broadcast, and a wrong shape pass for right.

    Args:
        x: any dtype but bool, on reference's device.
        reference: of the same shape.

    Raises:
        ValueError: they are not tensors of one shape, or on two devices.
    """
    check_tensor("reference", reference, dtypes=COMPARABLE)
    check_tensor("x", x, shape=tuple(reference.shape), dtypes=COMPARABLE, device=reference.device)
    for name, tensor in (("x", x), ("reference", reference)):
        check_has_numbers(name, tensor)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """The Frobenius norm of x - reference over that of reference, in float64.

    Args:
        x: any dtype but bool, on reference's device.
        reference: of the same shape.

    Returns:
        The error: 0 where both are empty or zero; NaN if x has a NaN.

    Raises:
        ValueError: they have not one shape.
    """
    check_comparable(x, reference)
    error = torch.linalg.vector_norm((x.double() - reference.double()).flatten()).item()
    norm = torch.linalg.vector_norm(reference.double().flatten()).item()
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def cosine_difference(x: Tensor, reference: Tensor) -> float:
    """1 - 2 * sum(x * reference) / sum(x**2 + reference**2), in float64: sensitive to angle and length both.

    Args:
        x: any dtype but bool, on reference's device.
        reference: of the same shape.

    Returns:
        The difference: 0 for equal tensors.

    Raises:
        ValueError: they have not one shape.
    """
    check_comparable(x, reference)
    x, reference = x.double().flatten(), reference.double().flatten()
    denominator = (x.square() + reference.square()).sum().item()
    return 1.0 - 2.0 * torch.dot(x, reference).item() / denominator if denominator else 0.0


def assert_bit_equal(a: Tensor, b: Tensor, name: str = "tensors") -> None:
    """Asserts the same dtype, shape and bits: 0.0 differs from -0.0, a NaN equals the same NaN. Strides and devices may differ.

    Args:
        a: a tensor of any dtype.
        b: another.
        name: what the message calls them.

    Raises:
        AssertionError: they differ; it says where first, and how many elements.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise AssertionError(f"{name} differ: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
    # a copy: a tensor of one element counts as contiguous whatever its stride, and then has no bytes to view
    left, right = (x.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format) for x in (a, b))
    size = a.element_size()
    different = (left.view(torch.uint8).view(-1, size) != right.view(torch.uint8).view(-1, size)).any(1)
    if not different.any():
        return
    first = int(different.nonzero()[0])
    index, rest = [], first
    for extent in reversed(a.shape):
        rest, position = divmod(rest, extent)
        index.insert(0, position)
    shown = [f"{x[first].item()} (0x{x[first : first + 1].view(torch.uint8).numpy()[::-1].tobytes().hex()})" for x in (left, right)]
    raise AssertionError(
        f"{name} differ in {int(different.sum())} of {different.numel()} elements, first at {index}: {shown[0]} against {shown[1]} "
        f"({a.dtype}, shape {tuple(a.shape)})"
    )


def assert_nearly_quantized(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Asserts the tolerance of what goes through exp, erf or rsqrt: scales at most 4 units in the last place apart, values one step.

    More than 98% of the values have to be equal, or the tolerance would hide a wrong formula.

    Args:
        result: values, of a narrow type, and scales, float32.
        expected: the same of the reference.

    Raises:
        AssertionError: they are further apart, or differ in dtype or shape.
    """

    def codes(values: Tensor) -> Tensor:
        """Narrow numbers as integers of which neighbours differ by 1."""
        bits = values.view(torch.int8).int()
        return bits if values.dtype == torch.int8 else torch.where(bits < 0, -(bits & 0x7F), bits)

    (values, scales), (expected_values, expected_scales) = result, expected
    assert_bit_equal(scales.isnan(), expected_scales.isnan(), "bad groups")
    if values.dtype != expected_values.dtype or values.shape != expected_values.shape:
        raise AssertionError(
            f"values differ: {values.dtype} {values.shape} against {expected_values.dtype} {expected_values.shape}"
        )
    if values.numel() == 0:
        return
    ulps = int((scales.contiguous().view(torch.int32) - expected_scales.contiguous().view(torch.int32)).abs().max())
    steps = (codes(values) - codes(expected_values)).abs()
    equal = float((steps == 0).float().mean())
    if ulps > 4 or steps.max() > 1 or equal <= 0.98:
        raise AssertionError(
            f"scales {ulps} units in the last place apart (at most 4), values {int(steps.max())} steps (at most 1), {equal:.1%} equal"
        )


def poison(tensor: Tensor) -> Tensor:
    """Fills a tensor with what must not be read: NaN, or bytes of 0x7f for integers (True for bool).

    Args:
        tensor: any dtype, any strides by which no two elements share memory.

    Returns:
        The same tensor.

    Raises:
        ValueError: another dtype, or elements that share memory.
        RuntimeError: it requires grad under grad mode.
    """
    check_tensor("tensor", tensor, dtypes=(*COMPARABLE, torch.bool))
    check_no_grad(tensor=tensor)
    check_output("tensor", tensor)
    if tensor.is_floating_point():
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else int.from_bytes(b"\x7f" * tensor.element_size(), "little"))
