"""The rows of a rank's experts in a backward. L local experts, M rows of an expert's buffer, R rows of a rank's (padded: L * M), H hidden
size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.batch import ExpertBatch, QuantizedTensor
from moequant.group_quant import dequantize


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that a dispatch has brought, in either layout: what is made of them one after the other is flat, (R, ...).

    Attributes:
        values: (L, M, H), ragged (R, H): quantized, or plain.
        num_tokens: (L,) int32.
        expert_start: (L,) int32, ragged, or None.
        sources: (L, M), ragged (R,), int64: `source_rank << 32 | token * top_k + k`.
        experts: (R,) int64, each row's expert, and some expert for rows that belong to none.
        expected_rows: a guess of the mean of num_tokens, as `ExpertBatch` has it.
        batch_invariant: as `ExpertBatch` has it.
    """

    values: QuantizedTensor | Tensor
    num_tokens: Tensor
    expert_start: Tensor | None
    sources: Tensor
    experts: Tensor
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
        experts = batch.experts_of_rows().expand(batch.sources.shape).flatten()
        hints = batch.expected_rows, batch.batch_invariant
        return cls(batch.activations, batch.num_tokens, batch.expert_start, batch.sources, experts, *hints)

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

    def shaped(self, x: Tensor) -> Tensor:
        """Something of each row in the layout's shape.

        Args:
            x: (R, N).

        Returns:
            (L, M, N), ragged (R, N), a view.
        """
        return x.view(*self.sources.shape, x.shape[-1])
