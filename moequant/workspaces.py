"""What passes between the steps of experts. L local experts, M rows of an expert's buffer, R rows of all experts together, H hidden size,
I intermediate size."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.batch import Owner, QuantizedTensor, empty_scales_of
from moequant.weights import dtype_of

if TYPE_CHECKING:
    from moequant.experts import GroupedExperts


# slot, rows of a batch, (L, M) or (R,), and the span of experts; None: of all
Key = tuple[int, tuple[int, ...], tuple[int, int] | None]


class Workspaces:
    """Workspaces by slot, rows and span of experts, for each owner of batches, as long as it lives."""

    def __init__(self) -> None:
        self._default = Owner()
        self._by_owner: weakref.WeakKeyDictionary[Owner, dict[Key, Workspace]] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return sum(map(len, self._by_owner.values()))

    def of(self, owner: Owner | None) -> dict[Key, Workspace]:
        """Those of an owner.

        Args:
            owner: of batches, or None for the batches that have none.

        Returns:
            Its workspaces, by slot, rows and span, to be looked at and added to.
        """
        return self._by_owner.setdefault(self._default if owner is None else owner, {})


class Workspace:
    """What passes between the steps for batches of so many rows.

    Args:
        experts: whose.
        rows: (L, M), ragged (R,).

    Attributes:
        inner: SwiGLU's output, (L, M, I), ragged (R, I).
    """

    def __init__(self, experts: GroupedExperts, rows: tuple[int, ...]) -> None:
        self.shape = rows
        self.device = experts.w13.device
        self.gate_up_columns = 2 * experts.intermediate_size
        self.hidden_size = experts.hidden_size
        self.inner: QuantizedTensor | Tensor = torch.empty(
            *self.shape, experts.intermediate_size, dtype=dtype_of(experts.w2), device=self.device
        )
        if isinstance(experts.w2, QuantizedTensor):
            scales = empty_scales_of(self.inner.shape, 128, self.device)
            self.inner = QuantizedTensor(self.inner, scales, "transposed")

    @functools.cached_property
    def output(self) -> Tensor:
        """GEMM 2's output, (L, M, H), ragged (R, H), made when it is first asked for."""
        with torch.inference_mode(False):
            return torch.empty(*self.shape, self.hidden_size, dtype=torch.bfloat16, device=self.device)

    @functools.cached_property
    def gate_up(self) -> Tensor:
        """Gate and up, (L, M, 2I), ragged (R, 2I), made when they are first asked for."""
        with torch.inference_mode(False):
            return torch.empty(*self.shape, self.gate_up_columns, dtype=torch.bfloat16, device=self.device)
