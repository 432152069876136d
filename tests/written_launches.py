"""A kernel and a driver that only write down what they are asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import driver


class Kernel:
    """Compiles, as Triton does, when it is launched by its own way, and says what then was started: the number of what was compiled, the
    grid, and the values of the parameters."""

    def __init__(self, *names: str, **defaults: Any) -> None:
        self.params = [
            SimpleNamespace(name=name, is_constexpr=False, has_default=name in defaults, default=defaults.get(name))
            for name in names
        ]
        self.compiled = 0
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*arguments: Any, **named: Any) -> Any:
            self.compiled += 1
            number = self.compiled
            return SimpleNamespace(
                function=number, packed_metadata="packed", run=lambda *given: self.started.append((number, *given[:3], given[9:]))
            )

        return first


def install_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that is not there: `current` is the current device's number, `stream` the current stream."""
    active = SimpleNamespace(current=0, stream=7, get_current_device=lambda: active.current)
    active.get_current_stream = lambda device: active.stream
    monkeypatch.setattr(type(driver), "active", property(lambda self: active))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", active.get_current_stream, raising=False)
    return active
