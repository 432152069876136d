"""Buffers between guard bytes: what is written past an end, or where nothing may be, shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# a multiple of 16, so that a buffer is aligned like its memory; wider than any chunk that a program stores at once
GUARD_BYTES = 4096
GUARD, POISON = 0x5A, 0xFF


class GuardTouchedError(AssertionError):
    """Something was written outside a buffer, or to an element that was not to be written."""


class Guarded:
    """A contiguous buffer with GUARD_BYTES before and behind it. All its bytes are 0xFF: NaN, or -1.

    skew: elements by which it is moved from a multiple of 16 bytes.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", skew: int = 0) -> None:
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.begin = GUARD_BYTES + skew * dtype.itemsize
        self.memory = torch.full((self.begin + self.nbytes + GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        self.memory[self.begin :][: self.nbytes] = POISON
        self.tensor = self.memory[self.begin :][: self.nbytes].view(dtype).view(shape)

    @classmethod
    def of(cls, x: Tensor, device: torch.device | str = "cpu") -> Guarded:
        """With a copy of x."""
        made = cls(*x.shape, dtype=x.dtype, device=device)
        made.tensor.copy_(x)
        return made

    def guards(self) -> tuple[Tensor, Tensor]:
        """The bytes before and behind."""
        return self.memory[: self.begin], self.memory[self.begin + self.nbytes :]

    def assert_only(self, written: Tensor | None = None, name: str = "a buffer") -> None:
        """The guards are whole, and so is every element outside the mask `written`; None: all may be written."""
        for side, guard in zip(("before", "behind"), self.guards(), strict=True):
            touched = (guard != GUARD).nonzero()
            if len(touched):
                far = int(touched[-1]) if side == "before" else int(touched[0])
                raise GuardTouchedError(f"{len(touched)} bytes {side} {name} {tuple(self.tensor.shape)} were written, one at {far}")
        if written is None or self.nbytes == 0:
            return
        mine = self.memory[self.begin :][: self.nbytes].view(-1, self.tensor.itemsize)
        wrong = (mine != POISON).any(1).view(self.tensor.shape) & ~written.expand(self.tensor.shape)
        if wrong.any():
            first = wrong.nonzero()[:4].tolist()
            raise GuardTouchedError(
                f"{int(wrong.sum())} elements of {name} {tuple(self.tensor.shape)} were written, from {first} on"
            )


class Buffers:
    """What `guarded_buffers` has given. Those of the first calls are kept, as many as fit into some memory: workspaces come back."""

    MOST = 2**27

    def __init__(self) -> None:
        self.given: list[Guarded] = []

    def check(self) -> None:
        """The guards of all are whole."""
        guards = [(part != GUARD).any() for buffer in self.given for part in buffer.guards()]
        # one wait for the device
        if guards and bool(torch.stack(guards).any()):
            for buffer in self.given:
                buffer.assert_only(name=f"a buffer of {buffer.tensor.dtype}")
        room = self.MOST
        for number, buffer in enumerate(self.given):
            room -= buffer.memory.numel()
            if room < 0:
                del self.given[number:]
                break


@contextlib.contextmanager
def guarded_buffers(device: str, buffers: Buffers | None = None) -> Iterator[Buffers]:
    """While it lasts, what is asked of torch.empty and torch.empty_like on a device, in any thread, is `Guarded`: NaN between guards. It
    gives the buffers, which are added to those that are given."""
    buffers, kind, empty = buffers or Buffers(), torch.device(device).type, torch.empty

    def guarded(shape: Any, dtype: torch.dtype) -> Tensor:
        # a mode that watches what torch is asked for sees an allocation, as it would have
        empty(0, device="cpu")
        with torch._C.DisableTorchFunction():
            buffers.given.append(Guarded(*shape, dtype=dtype, device=device))
        # no view, as a buffer is none
        return buffers.given[-1].tensor.detach()

    def any_empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != kind or options:
            return empty(*shape, dtype=dtype, device=device, **options)
        return guarded(shape[0] if shape and not isinstance(shape[0], int) else shape, dtype or torch.get_default_dtype())

    def any_like(x: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if x.device.type != kind or options or not x.is_contiguous():
            return empty_like(x, dtype=dtype, **options)
        return guarded(x.shape, dtype or x.dtype)

    empty_like = torch.empty_like
    with mock.patch.object(torch, "empty", any_empty), mock.patch.object(torch, "empty_like", any_like):
        yield buffers
