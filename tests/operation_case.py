"""What the cases of registered operations are made of. Each kernel's test has them in its OPERATION_CASES: of each operation, by what
its arguments are, how to make them anew. `test_ops.py` has what is asked of all."""

from __future__ import annotations

from typing import Any

import torch

from moequant.batch import empty_transposed_scales

COUNTS = torch.tensor([3, 0], dtype=torch.int32)


def integers(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def small_counts(size: int = 2) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


def quantize_outputs(dtype: torch.dtype = torch.int8, columns: int = 140) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, columns).to(dtype), empty_transposed_scales(2, 4, 2, "cpu").zero_()
