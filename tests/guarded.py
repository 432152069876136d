"""Buffers between guard bytes: what is written past an end, or where nothing may be, shows."""

from __future__ import annotations

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

    def assert_only(self, written: Tensor | None = None, name: str = "a buffer") -> None:
        """The guards are whole, and so is every element outside the mask `written`; None: all may be written."""
        for side, guard in (("before", self.memory[: self.begin]), ("behind", self.memory[self.begin + self.nbytes :])):
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
