"""Objects by number, so that a compiled graph, which can hold numbers but no objects, can name them."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class Numbered:
    """Gives each object a number, for as long as the object lives; a number is never given twice.

    Dispatchers and `GroupedExperts` keep theirs, which a compiler can read and guard; other objects are looked up.
    """

    def __init__(self) -> None:
        self._next = itertools.count()
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, value: object) -> int:
        number = next(self._next)
        self._objects[number] = value
        return number

    def number(self, value: object) -> int:
        for number, known in self._objects.items():
            if known is value:
                return number
        return self.add(value)

    def __getitem__(self, number: int) -> Any:
        if number not in self._objects:
            raise RuntimeError("a compiled graph calls a dispatcher or experts that are gone; keep them as long as the graph")
        return self._objects[number]


numbered = Numbered()


def refuse_export() -> None:
    """Raises RuntimeError inside torch.export: numbers say nothing in the process that loads the graph, or something else."""
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "a layer of moequant can't be exported: the graph would name its dispatcher and experts by numbers of this process; use "
            "torch.compile"
        )


def untraced(function: Function) -> Function:
    """The function as a graph break for torch.compile, which calls it as it is."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        # what makes graph breaks takes seconds to import, and a microsecond for each call
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = cast(Callable[..., Any], torch.compiler.disable(function))
        return disabled(*args, **kwargs)

    return cast(Function, run)
