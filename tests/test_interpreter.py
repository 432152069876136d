"""The corrected interpreter (tests/interpreter.py) rounds and multiplies as torch does."""

# a launch takes plain numbers for tl.constexpr
# pyright: reportArgumentType=false

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not in the interpreter")

SIZE = 1 << 16


@triton.jit
def cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, tl.load(x_ptr + index).to(y_ptr.dtype.element_ty))


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, tl.fma(tl.load(x_ptr + index), tl.load(y_ptr + index), tl.load(z_ptr + index)))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr):
    square = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + square, tl.dot(tl.load(x_ptr + square), tl.load(y_ptr + square)))


@triton.jit
def masked_kernel(x_ptr, limit_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(x_ptr + index, 1, mask=(index < 5) & (tl.program_id(0) < tl.load(limit_ptr)))


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)


def floats_and_ties() -> torch.Tensor:
    """Random bits, and for half of them the numbers midway between two bfloat16 or, in the last quarter, two e4m3."""
    bits = torch.randint(-(1 << 31), 1 << 31, (SIZE,)).to(torch.int32)
    bits[SIZE // 2 :] = bits[SIZE // 2 :] & ~0xFFFF | 0x8000
    bits[SIZE * 3 // 4 :] = bits[SIZE * 3 // 4 :] & ~0xFFFFF | 0x80000
    return bits.view(torch.float32)


@pytest.mark.parametrize("x", [every_bfloat16(), floats_and_ties()], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_equal_torch(x, dtype):
    y = torch.empty(SIZE, dtype=dtype)
    cast_kernel[(1,)](x, y, SIZE)
    expected = x
    if y.itemsize == 1:
        # the hardware's conversion saturates
        limit = torch.finfo(dtype).max
        expected = x.float().clamp(-limit, limit)
    expected = expected.to(dtype)
    number = ~expected.float().isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[y.itemsize]
    assert torch.equal(y.view(bits)[number], expected.view(bits)[number])
    assert y.float()[~number].isnan().all()


def test_fma_rounds_once():
    x = 1 + torch.randint(0, 1 << 23, (1024,)) * 2.0**-23
    rounded = x * x
    out = torch.empty(1024)
    fma_kernel[(1,)](x, x, -rounded, out, 1024)
    exact = x.double() * x.double() - rounded.double()
    assert torch.equal(out.double(), exact)
    assert exact.count_nonzero() > 900


def test_fma_is_not_rounded_to_float64_in_between():
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24 lies midway between two float32, and float64 has no room for the addend that decides
    x = torch.full((2,), 1 + 2.0**-12)
    z = torch.tensor([2.0**-60, -(2.0**-60)])
    out = torch.empty(2)
    fma_kernel[(1,)](x, x, z, out, 2)
    assert out.tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot_multiplies_numbers(dtype):
    x, y = (torch.randint(-4, 5, (32, 32)).float().to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out)
    assert torch.equal(out, x.float() @ y.float())


@triton.jit
def doubled(x):
    return tl.math.abs(x) * 2


@triton.jit
def doubling_kernel(x_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(x_ptr + index, doubled(tl.load(x_ptr + index)))


def test_device_functions_have_their_kernel_s_language_and_leave_the_language_as_it_was():
    x = torch.tensor([-1.0, 2.0])
    for _ in range(2):
        doubling_kernel[(1,)](x, SIZE=2)
        assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.math.abs) and tl.core.is_builtin(tl.tensor.to)
    assert x.tolist() == [4.0, 8.0]


@pytest.mark.parametrize("limit", [0, 1])
def test_one_truth_value_masks_a_block(limit):
    x = torch.zeros(8)
    masked_kernel[(1,)](x, torch.tensor(limit), 8)
    assert x.tolist() == [float(limit)] * 5 + [0.0] * 3


def value_of(dtype: tl.dtype, shape: tuple[int, ...]) -> tl.tensor:
    numbers = np.arange(1, 1 + np.prod(shape, dtype=int)).astype(interpreter._get_np_dtype(dtype)).reshape(shape or (1,))
    return tl.tensor(interpreter.TensorHandle(numbers, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def told(operand: Any) -> tuple:
    return (
        str(operand.type),
        operand.handle.data.dtype,
        operand.handle.data.shape,
        operand.handle.data.tolist(),
        operand.numel.value,
    )


def shipped(function: Any) -> Any:
    return function.__wrapped__


def outcome(function: Any, *arguments: Any) -> Any:
    """What a pair of operands become, or the error that they are."""
    try:
        return [told(operand) for operand in function(interpreter.interpreter_semantic, *arguments)]
    except Exception as error:
        return type(error), str(error)


# of +, -, *, /, & and fdiv
FLAGS = [(True, True), (True, False), (), (False, False, True, True), (False, False, False), (False, False, False, True)]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_what_is_known_of_operands_is_what_triton_finds(flags):
    types = [tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float8e4nv]
    types += [tl.pointer_type(tl.int32), tl.pointer_type(tl.float32)]
    values = [value_of(dtype, shape) for dtype in types for shape in ((), (4,), (2, 4), (2, 1))]
    values += [0, 3, -1, True, 1 << 31, -(1 << 40), 2.5]
    known = interpreter.TritonSemantic.binary_op_type_checking_impl
    for left, right in itertools.product(values, values):
        assert outcome(known, left, right, *flags) == outcome(shipped(known), left, right, *flags), (str(left), str(right))


def test_what_is_known_of_types_and_shapes_is_what_triton_finds():
    for element, shape in itertools.product((tl.int1, tl.float32, tl.pointer_type(tl.int64)), ([4], [2, 8], [2, tl.constexpr(8)])):
        for _ in range(2):
            known, found = (tl.block_type.__new__(tl.block_type) for _ in range(2))
            tl.block_type.__init__(known, element, shape)
            shipped(tl.block_type.__init__)(found, element, shape)
            assert known == found and vars(known).keys() == vars(found).keys()
            assert (known.name, known.numel, list(known.shape)) == (found.name, found.numel, list(found.shape))
            tensors = [tl.tensor.__new__(tl.tensor) for _ in range(2)]
            for tensor, make in zip(tensors, (tl.tensor.__init__, shipped(tl.tensor.__init__)), strict=True):
                make(tensor, "handle", known)
            assert vars(tensors[0]).keys() == vars(tensors[1]).keys() and tensors[0].type is known and tensors[0].handle == "handle"
            assert [str(x.shape) for x in tensors] == [str(tensors[0].shape)] * 2 and tensors[0].dtype == tensors[1].dtype
    known = interpreter.TritonSemantic.broadcast_impl_value
    values = [value_of(tl.int32, shape) for shape in ((), (4,), (4, 1), (1, 4), (4, 4))]
    for left, right in itertools.product(values, values):
        assert outcome(known, left, right) == outcome(shipped(known), left, right)
    constant = interpreter.TritonSemantic.scalar_constant
    for number, dtype in itertools.product((0, 1, -1, True, 0.0, -0.0, 2.5), (tl.int1, tl.int32, tl.int64, tl.float32)):
        for _ in range(2):
            found = [told(f(interpreter.interpreter_semantic, number, dtype)) for f in (constant, shipped(constant))]
            assert str(found[0]) == str(found[1])
