"""Rows of an expert batch in one buffer, layout "ragged", beside the padded ones that have the same numbers.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from moequant.batch import QuantizedTensor, empty_scales_of
from moequant.config import ROW_ALIGNMENT, round_up


class Ragged(NamedTuple):
    """num_tokens, expert_start: (L,) int32. rows: R. valid: of each expert the rows that count."""

    num_tokens: Tensor
    expert_start: Tensor
    rows: int
    valid: list[int]

    def pack(self, padded: Tensor) -> Tensor:
        """(L, M, ...) to (R, ...). Rows of no expert are bytes of 0xFF: NaN, but -1 in integers."""
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[padded.itemsize]
        packed = torch.full((self.rows, *padded.shape[2:]), -1, dtype=bits, device=padded.device).view(padded.dtype)
        for expert, (start, count) in enumerate(self.spans()):
            packed[start : start + count] = padded[expert, :count]
        return packed

    @overload
    def operand(self, x: QuantizedTensor) -> QuantizedTensor: ...

    @overload
    def operand(self, x: Tensor) -> Tensor: ...

    def operand(self, x: QuantizedTensor | Tensor) -> QuantizedTensor | Tensor:
        """An operand of a GEMM, packed. Scales of one group lie side by side."""
        if isinstance(x, Tensor):
            return self.pack(x)
        values = self.pack(x.values)
        scales = empty_scales_of(values.shape, x.group_size, values.device).copy_(self.pack(x.scales))
        return QuantizedTensor(values, scales, "transposed", x.recipe, x.group_size)

    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.expert_start.tolist(), self.valid, strict=True))

    def mask(self) -> Tensor:
        """(R,): which rows are an expert's."""
        mask = torch.zeros(self.rows, dtype=torch.bool)
        for start, count in self.spans():
            mask[start : start + count] = True
        return mask.to(self.num_tokens.device)


def ragged(counts: list[int], device: str = "cpu", *, spare: int = 0, cut: int | None = None) -> Ragged:
    """Rows of experts one behind the other, each expert's from a multiple of ROW_ALIGNMENT on, negative counts being none.

    spare: rows behind the last. cut: R, past which no row of an expert counts though num_tokens still says so.
    """
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += round_up(max(count, 0), ROW_ALIGNMENT)
    rows = end + spare if cut is None else cut
    starts = [min(start, rows) for start in starts]
    valid = [min(max(count, 0), rows - start) for start, count in zip(starts, counts, strict=True)]
    num_tokens, expert_start = (torch.tensor(x, dtype=torch.int32, device=device) for x in (counts, starts))
    return Ragged(num_tokens, expert_start, rows, valid)
