"""A call whose launches are compiled ahead of time. Each kernel's test lists them in its COMPILE_CASES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moequant.batch import ceil_div, empty_scales_of, empty_transposed_scales

BF16, INT8 = torch.bfloat16, torch.int8
E4M3, FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
# without scales
PLAIN = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A call whose launches are compiled.

    arguments: of the call. One that is a float8 format limits the case to the targets that have it (`anywhere`: it does not).
    may_spill: no registers are promised, as for rows that have to be read element by element.
    hopper: for sm_90 alone: compiling a Hopper kernel for another target aborts.
    nvidia: for NVIDIA GPUs alone.
    wide: rows lie on 16-byte boundaries, and NVIDIA GPUs must move them in 16-byte loads and stores.
    """

    call: Callable[..., None]
    arguments: dict[str, Any]
    wide: bool = True
    anywhere: bool = False
    may_spill: bool = False
    hopper: bool = False
    nvidia: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in self.arguments.items())


def cases(call: Callable[..., None], *arguments: dict[str, Any], **settings: bool) -> list[Case]:
    return [Case(call, case, **settings) for case in arguments]


def each_format(*plain: torch.dtype, **arguments: Any) -> list[dict[str, Any]]:
    return [{"dtype": dtype, **arguments} for dtype in (E4M3, FNUZ, INT8, *plain)]


def counted(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.int32)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def ragged(experts: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Values (R, H) of experts * rows rows and their transposed scales, or no scales for a plain type."""
    values = empty(experts * rows, columns, dtype=dtype)
    return values, None if dtype in PLAIN else empty_scales_of(values.shape, 128, "cpu")


def quantized(experts: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Values (L, M, H) and their transposed scales, or no scales for a plain type."""
    scales = None if dtype in PLAIN else empty_transposed_scales(experts, rows, ceil_div(columns, 128), "cpu")
    return empty(experts, rows, columns, dtype=dtype), scales
