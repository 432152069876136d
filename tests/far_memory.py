"""Memory for tests of offsets that 32 bits don't hold. On a CPU only what is touched of it is given."""

from __future__ import annotations

import mmap
import tempfile

import pytest
import torch
from torch import Tensor


def reserved(count: int, dtype: torch.dtype, device: str) -> Tensor:
    """count numbers, whatever they are. On a CPU they are a file without blocks, which no limit of memory counts. Skips the test where a
    GPU has no room for them."""
    nbytes = count * dtype.itemsize
    if device != "cpu":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < nbytes + 2**30:
            pytest.skip(f"needs {nbytes / 2**30:.0f} GiB of free GPU memory")
        return torch.empty(count, dtype=dtype, device=device)
    with tempfile.TemporaryFile() as file:
        file.truncate(nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype)


def far(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A tensor of these element strides. On a CPU it lies behind other 2**31 numbers: where an offset wraps around in 32 bits there is
    memory, too, and the test fails, not the process."""
    before = 2**31 if device == "cpu" else 0
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return reserved(before + last + 1, dtype, device).as_strided(shape, strides, before)


def far_along(dim: int, x: Tensor) -> Tensor:
    """A copy of x, a few numbers, whose last index of dim lies 2**31 elements from the first."""
    stride = -(-(2**31) // (x.shape[dim] - 1))
    others = x.movedim(dim, 0).contiguous().movedim(0, dim)
    strides = [stride if i == dim else others.stride(i) for i in range(x.dim())]
    return far(tuple(x.shape), tuple(strides), x.dtype, x.device.type).copy_(x)
