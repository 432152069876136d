"""The corrected interpreter (tests/interpreter.py) rounds and multiplies as torch does."""

# a launch takes plain numbers for tl.constexpr
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

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
