"""What passes between the steps of experts. L local experts, M rows of an expert's buffer, R rows of all experts together, H hidden size,
I intermediate size.

They belong to the batches' owner, a dispatcher. Layers of a model run one after the other, so that all experts of the same sizes work in
the same memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from moequant.batch import Owner, QuantizedTensor, empty_scales_of


class Sizes(NamedTuple):
    """What a workspace is made for.

    Attributes:
        slot: of the batch.
        span: the experts of a part of a padded batch, which has rows of its own; None: all.
        rows: (L, M), ragged (R,).
        hidden_size: H.
        intermediate_size: I.
        product_size: columns of GEMM 1's output, 2I, or I where nothing is gated.
        dtype: of the activation's output.
        quantized: whether that has scales.
        wide: the type of what isn't quantized.
        device: where.
    """

    slot: int
    span: tuple[int, int] | None
    rows: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    product_size: int
    dtype: torch.dtype
    quantized: bool
    wide: torch.dtype
    device: torch.device


class Workspace:
    """What passes between the steps for batches of so many rows.

    Args:
        sizes: what it is made for.

    Attributes:
        inner: the activation's output, (L, M, I), ragged (R, I).
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.inner: QuantizedTensor | Tensor = self._empty(sizes.intermediate_size, sizes.dtype)
        if sizes.quantized:
            self.inner = QuantizedTensor(self.inner, empty_scales_of(self.inner.shape, 128, sizes.device), "transposed")

    @functools.cached_property
    def output(self) -> Tensor:
        """GEMM 2's output, (L, M, H), ragged (R, H), made when it is first asked for."""
        return self._empty(self.sizes.hidden_size, self.sizes.wide)

    @functools.cached_property
    def gate_up(self) -> Tensor:
        """Gate and up, (L, M, 2I), ragged (R, 2I), made when they are first asked for. Not gated: I."""
        return self._empty(self.sizes.product_size, self.sizes.wide)

    def _empty(self, columns: int, dtype: torch.dtype) -> Tensor:
        # whatever mode the first batch comes in: torch refuses to write into what inference_mode has made outside it
        with torch.inference_mode(False):
            return torch.empty(*self.sizes.rows, columns, dtype=dtype, device=self.sizes.device)


def workspace_of(owner: Owner, sizes: Sizes) -> Workspace:
    """An owner's workspace. It is kept: a captured graph may hold it.

    Args:
        owner: of batches.
        sizes: what it is for.

    Returns:
        The same one for the same sizes.
    """
    found = owner.workspaces.get(sizes)
    if found is None:
        with torch.inference_mode(False):
            found = owner.workspaces[sizes] = Workspace(sizes)
    return found
