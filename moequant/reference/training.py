"""The layer that is trained, in any float type: one rank, plain torch, no rounding that the type doesn't have. With float64,
`torch.autograd.gradcheck` proves the steps of `moequant.training.functions`. Letters as in `moequant.reference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.activations import Activation
from moequant.config import ROW_ALIGNMENT, round_up
from moequant.reference.quantization import expert_places
from moequant.training.precision import Operand, Precision, sums_of_products
from moequant.training.routes import TOKENS, Kind, Routes
from moequant.training.rows import Rows
from moequant.training.slopes import activated_with_slopes


class LocalRoutes(Routes):
    """The ways of one rank with E experts. The rows that belong to no expert are NaN.

    Args:
        num_experts: E.
        capacity: M, padded: an expert's rows past it are dropped; ragged with None: as many rows as come.
    """

    def __init__(self, num_experts: int, capacity: int | None) -> None:
        self.num_experts, self.capacity = num_experts, capacity
        self._weights, self._rows = torch.empty(0, device="cpu"), torch.empty(0, device="cpu")
        self._unweighted = False

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor | None = None, kind: Kind = TOKENS) -> Rows:
        """Rows of an expert in the order of the tokens' entries."""
        places, flat = torch.full((ids.numel(),), -1, device=ids.device), ids.flatten()
        entries = [(flat == expert).nonzero().flatten()[: self.capacity] for expert in range(self.num_experts)]
        counts = [len(of_expert) for of_expert in entries]
        if self.capacity is None:
            extents = [round_up(count, ROW_ALIGNMENT) for count in counts]
            shape: tuple[int, ...] = (sum(extents) + ROW_ALIGNMENT,)
        else:
            extents, shape = [self.capacity] * self.num_experts, (self.num_experts, self.capacity)
        begins = [sum(extents[:expert]) for expert in range(self.num_experts)]
        values = x.new_full((sum(extents) + (ROW_ALIGNMENT if self.capacity is None else 0), x.shape[1]), torch.nan)
        sources = torch.full(values.shape[:1], 1 << 40, device=x.device)
        for begin, of_expert in zip(begins, entries, strict=True):
            own = torch.arange(begin, begin + len(of_expert), device=x.device)
            places[of_expert], sources[own], values[own] = own, of_expert, x[of_expert // ids.shape[1]]
        self._rows, self._unweighted = places.view(ids.shape), weights is None
        self._weights = torch.ones(ids.shape, dtype=x.dtype, device=x.device) if weights is None else weights
        starts = None if self.capacity is not None else torch.tensor(begins, dtype=torch.int32, device=x.device)
        counted = torch.tensor(counts, dtype=torch.int32, device=x.device)
        return Rows(values.view(*shape, -1), counted, starts, sources.view(shape))

    def run(self, tokens: tuple[Tensor, Tensor, Tensor], experts: Callable[[Rows], Tensor]) -> Tensor:
        """Dispatch, experts, sum."""
        return self.sum(experts(self.dispatch(*tokens)))

    def sum(self, rows: Tensor) -> Tensor:
        """Over k in order; entries without a row add nothing."""
        flat, total = rows.flatten(0, -2), rows.new_zeros(len(self._rows), rows.shape[-1])
        for places, weights in zip(self._rows.T, self._weights.T, strict=True):
            total += torch.where((places >= 0)[:, None], weights[:, None] * flat[places.clamp_min(0)], 0)
        return total

    def return_sum(self, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The ways back are those of the ids alone."""
        if not self._unweighted:
            self.dispatch(rows.new_zeros(len(ids), rows.shape[-1]), ids)
        return self.sum(rows).to(dtype)

    def at_rows(self, weights: Tensor, rows: Rows) -> Tensor:
        """(R,), 0 where there is no row."""
        valid = rows.valid.squeeze(1)
        return torch.where(valid, weights.flatten()[torch.where(valid, rows.sources.flatten(), 0)], 0)

    def to_entries(self, x: Tensor, rows: Rows, ids: Tensor) -> Tensor:
        """(T, K), 0 where there is no row."""
        valid = rows.valid.squeeze(1)
        return x.new_zeros(ids.numel()).index_copy_(0, rows.sources.flatten()[valid], x[valid]).view(ids.shape)


@dataclass(frozen=True)
class Exact(Precision):
    """Products in the operands' own type, into tensors filled with NaN."""

    def operand(self, x: Tensor, rows: Rows) -> Tensor:
        """As it is."""
        return rows.shaped(x)

    def product(self, a: Operand, w: Operand, rows: Rows, segments: int = 1) -> Tensor:
        """One expert after the other."""
        del segments
        assert isinstance(a, Tensor) and isinstance(w, Tensor)
        out = a.new_full((*a.shape[:-1], w.shape[1]), torch.nan)
        for expert, place in enumerate(expert_places(out, rows.num_tokens, rows.expert_start)):
            out[place] = a[place] @ w[expert].T
        return out

    def activation(self, x: Tensor, rows: Rows, kind: Activation, bias: Tensor | None) -> Tensor:
        """Of all rows, of which those that belong to no expert stay NaN."""
        x = x.flatten(0, -2) if bias is None else x.flatten(0, -2) + bias[rows.experts]
        return rows.shaped(activated_with_slopes(x, kind, x[..., : x.shape[-1] // kind.width])[0])

    def experts(
        self, w13: Operand, w2: Operand, bias13: Tensor | None, bias2: Tensor | None, kind: Activation
    ) -> Callable[[Rows], Tensor]:
        """From rows to their experts' output."""

        def run(rows: Rows) -> Tensor:
            output = self.product(self.activation(self.product(rows.values, w13, rows), rows, kind, bias13), w2, rows)
            if bias2 is not None:
                self.add_bias(output, rows, bias2)
            return output

        return run

    def add_bias(self, x: Tensor, rows: Rows, bias: Tensor) -> None:
        """To all rows."""
        x += bias[rows.experts].view(x.shape)

    def weight_gradient(self, a: Operand, b: Operand, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One expert after the other."""
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return sums_of_products(a, b, rows, dtype)
