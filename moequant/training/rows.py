"""The rows of a rank's experts in a backward. L local experts, M rows of an expert's buffer, R rows of a rank's (padded: L * M), H hidden
size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch, QuantizedTensor
from moequant.config import ROW_ALIGNMENT
from moequant.group_quant import dequantize


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that a dispatch has brought, in either layout: what is made of them one after the other is flat, (R, ...).

    Attributes:
        values: (L, M, H), ragged (R, H): quantized, or plain.
        num_tokens: (L,) int32.
        expert_start: (L,) int32, ragged, or None.
        sources: (L, M), ragged (R,), int64: `source_rank << 32 | token * top_k + k`.
        expected_rows: a guess of the mean of num_tokens, as `ExpertBatch` has it.
        batch_invariant: as `ExpertBatch` has it.
    """

    values: QuantizedTensor | Tensor
    num_tokens: Tensor
    expert_start: Tensor | None
    sources: Tensor
    expected_rows: int | None = None
    batch_invariant: bool = False

    @classmethod
    def of(cls, batch: ExpertBatch) -> Rows:
        """A batch's rows, with views of it.

        Args:
            batch: of `MoEQuantDispatcher.dispatch`.

        Returns:
            Them.
        """
        hints = batch.expected_rows, batch.batch_invariant
        return cls(batch.activations, batch.num_tokens, batch.expert_start, batch.sources, *hints)

    @functools.cached_property
    def experts(self) -> Tensor:
        """(R,) int64: each row's expert, and some expert for rows that belong to none."""
        if self.expert_start is None:
            return torch.arange(self.sources.shape[0], device=self.sources.device).repeat_interleave(self.sources.shape[1])
        rows = torch.arange(self.sources.shape[0], dtype=torch.int32, device=self.sources.device)
        return (torch.searchsorted(self.expert_start, rows, right=True) - 1).clamp_min(0)

    @functools.cached_property
    def ends(self) -> Tensor:
        """(L,) int32, ragged: the row behind each expert's last one, and behind the zeros that `contracted` has there."""
        assert self.expert_start is not None
        extents = (self.num_tokens + (ROW_ALIGNMENT - 1)) // ROW_ALIGNMENT * ROW_ALIGNMENT
        return (self.expert_start + extents).to(torch.int32)

    @functools.cached_property
    def valid(self) -> Tensor:
        """(R, 1) bool: which rows belong to an expert. No sync with the host."""
        if self.expert_start is None:
            places = torch.arange(self.sources.shape[1], device=self.sources.device).expand(self.sources.shape).flatten()
        else:
            places = torch.arange(self.sources.shape[0], device=self.sources.device) - self.expert_start[self.experts]
        return (places < self.num_tokens[self.experts]).unsqueeze(1)

    def only(self, x: Tensor) -> Tensor:
        """Something of each row, with zeros for rows that belong to no expert, whatever these hold.

        Args:
            x: (L, M, ...) or (R, ...), of the same number of dimensions as values.

        Returns:
            (R, ...), a copy.
        """
        return torch.where(self.valid, x.flatten(0, -2), 0)

    def plain(self) -> Tensor:
        """The values as they were multiplied.

        Returns:
            (R, H), bfloat16 of quantized ones, with zeros for rows that belong to no expert.
        """
        values = self.values
        return self.only(dequantize(values, torch.bfloat16) if isinstance(values, QuantizedTensor) else values)

    def contracted(self) -> Tensor:
        """The values as they were multiplied, for a product that contracts an expert's rows: with zeros in those behind its last one that
        come in whole steps of ROW_ALIGNMENT, or, padded, in all of its buffer. What other rows hold is undefined.

        Returns:
            (R, H): bfloat16 of quantized values, which are copied; plain ones are views, whose zeros the buffer gets.
        """
        given, counts = self.values, (self.num_tokens, self.expert_start)
        if not ops.uses_kernels(self.num_tokens) or (isinstance(given, Tensor) and not given.is_contiguous()):
            return self.plain()
        if isinstance(given, Tensor):
            ops.plain_rows(given, *counts)
            return given.flatten(0, -2)
        out = torch.empty(given.shape, dtype=torch.bfloat16, device=given.values.device)
        ops.plain_rows(out, *counts, given.values, given.scales)
        return out.flatten(0, -2)

    def shaped(self, x: Tensor) -> Tensor:
        """Something of each row in the layout's shape.

        Args:
            x: (R, N).

        Returns:
            (L, M, N), ragged (R, N), a view.
        """
        return x.view(*self.sources.shape, x.shape[-1])
