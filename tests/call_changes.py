"""Other values in place of valid arguments: wrong, odd, and merely unusual ones."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layer_calls import dispatcher, tokens
from moequant import DispatchHandle

DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


class Unhashable(list):
    """Neither hashable nor of any use."""


# what no argument is, but the one that has it in `MAY_BE`
STRANGE: dict[str, Callable[[], Any]] = {
    "text": lambda: "text",
    "empty text": lambda: "",
    "list": lambda: [1, 2],
    "dict": lambda: {"a": 1},
    "set": lambda: {1},
    "unhashable": Unhashable,
    "bytes": lambda: b"bytes",
    "complex": lambda: 1j,
    "array": lambda: np.ones((2, 3), dtype=np.float32),
    "array of a number": lambda: np.array(1),
    "number of NumPy": lambda: np.int64(1),
    "module": lambda: math,
    "function": lambda: len,
    "type": lambda: int,
    "object": object,
    "slice": lambda: slice(None),
    "exception": lambda: ValueError("an argument"),
    "network": lambda: torch.nn.Linear(2, 2),
    "size": lambda: torch.Size((2, 3)),
    "tensor": lambda: torch.ones(2, 3),
    "dtype": lambda: torch.int16,
    "device": lambda: torch.device("meta"),
    "None": lambda: None,
}
NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 7, 64, 128, 2**31 - 1, 2**31, 2**63, 2**70, 1.5, 128.0, 0.0, -1.0, 1e-300, 1e300, True, False]
NUMBERS += [math.nan, math.inf, -math.inf, 10**400]
CHOICES = [
    "",
    "default",
    "DEFAULT",
    "ue8m0",
    "row",
    "transposed",
    "tma_aligned",
    "transposed_flat",
    "block",
    "ue8m0_packed",
    "none",
]
CHOICES += [
    "float8",
    "uint8",
    "e4m3",
    "offset",
    "int8",
    "local",
    "collective",
    "symmetric",
    "auto",
    "padded",
    "per_rank",
    "silu",
    "cuda",
]
CHOICES += ["fp8_e4m3fn", "meta", "uniform", "one-hot", "zipf:-1", "zipf:x", "cpu", "cuda:99", "fp32"]


def changes_of_tensors(x: Tensor, rng: random.Random) -> Any:
    """A tensor like x but for one thing."""
    wide = x.float() if x.dtype.itemsize == 1 and x.is_floating_point() else x
    options: list[Callable[[], Any]] = [
        lambda: x[:0],
        lambda: x[..., :0],
        lambda: x[None],
        lambda: x.reshape(-1),
        lambda: x[..., :1],
        lambda: x[:1],
        lambda: x.reshape(-1)[0],
        lambda: x.transpose(0, -1),
        lambda: torch.cat([x, x]),
        lambda: x.repeat_interleave(2, -1)[..., ::2],
        lambda: x.mT.contiguous().mT,
        lambda: x[..., :1].expand(x.shape),
        lambda: x.reshape(-1)[:1].expand(x.numel()).view(x.shape),
        lambda: x.clone().requires_grad_(),
        lambda: torch.nn.Parameter(x, requires_grad=False),
        lambda: wide.to(rng.choice(DTYPES)),
        lambda: wide.to(rng.choice(DTYPES)),
        lambda: x.to("meta"),
        lambda: wide.to_sparse(),
        lambda: wide.reshape(-1, x.shape[-1]).to_sparse_csr(),
        lambda: wide.float().to_mkldnn(),
        lambda: torch.nested.nested_tensor([wide.reshape(-1), wide.reshape(-1)]),
        lambda: torch.nested.nested_tensor([wide.reshape(-1), wide.reshape(-1)], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(wide.float(), 0.1, 0, torch.qint8),
        lambda: torch.complex(torch.zeros_like(x), -x).conj().imag,
        lambda: torch.full_like(wide, math.nan).to(x.dtype),
        lambda: torch.full_like(wide, math.inf).to(x.dtype),
        lambda: torch.full_like(wide, -1).to(x.dtype),
        lambda: torch.full_like(wide, 100).to(x.dtype),
        lambda: torch.zeros_like(x),
        lambda: x.numpy(),
        lambda: x.tolist(),
        lambda: (x, x),
    ]
    return _first_that_works(options, rng)


def _first_that_works(options: list[Callable[[], Any]], rng: random.Random) -> Any:
    """Not every type of tensor has every form."""
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return rng.choice(options)()
        except (RuntimeError, TypeError, NotImplementedError, IndexError):
            continue


def changed(value: Any, rng: random.Random) -> Callable[[], Any]:
    """How another value in place of a valid one is made; a QuantizedTensor or a batch of wrong parts raises when it is made."""
    if rng.random() < 0.25:
        return STRANGE[rng.choice(list(STRANGE))]
    if isinstance(value, Tensor):
        other = changes_of_tensors(value, rng)
        return lambda: other
    if isinstance(value, DispatchHandle):
        # opaque: nobody makes one, but it may be another's, or an old one
        return lambda: dispatcher().dispatch(*tokens())[1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        field = rng.choice(dataclasses.fields(value)).name
        part = changed(getattr(value, field), rng)
        return lambda: dataclasses.replace(value, **{field: part()})
    if isinstance(value, (bool, int, float)) or (value is None and rng.random() < 0.5):
        number = rng.choice(NUMBERS)
        return lambda: number
    if isinstance(value, str) or (value is None and rng.random() < 0.5):
        text = rng.choice(CHOICES)
        return lambda: text
    if isinstance(value, torch.dtype):
        dtype = rng.choice(DTYPES)
        return lambda: dtype
    if isinstance(value, (tuple, list)) and value:
        index = rng.randrange(len(value))
        part = changed(value[index], rng)
        return lambda: type(value)(part() if i == index else x for i, x in enumerate(value))
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        part = changed(value[key], rng)
        return lambda: {**value, key: part()}
    return STRANGE[rng.choice(list(STRANGE))]
