"""Where an operation runs, and how torch.library gets to know it."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "is_traced",
    "registered",
    "uses_kernels",
]

# operations live as long as it does
LIBRARY = torch.library.Library("moequant", "FRAGMENT")
Function = TypeVar("Function", bound=Callable[..., None])


def uses_kernels(x: Tensor) -> bool:
    """Whether operations on x run as Triton kernels. With Triton's interpreter they can on a CPU too; tests ask for it by setting
    MOEQUANT_CPU_KERNELS."""
    return x.is_cuda or os.environ.get("MOEQUANT_CPU_KERNELS") == "1"


def is_traced(x: Tensor) -> bool:
    """Whether somebody has to see an operation on x as one of torch's: a compiler, a mode, or a tensor that is more than its numbers, or
    less."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return not plain or x.is_meta or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def registered(mutates: tuple[str, ...]) -> Callable[[Function], Function]:
    """Registers a function that only writes into its arguments as `torch.ops.moequant.<its name>`.

    Returns what calls the registered form, which has no defaults, while something compiles or traces, and otherwise the function itself:
    torch.library takes longer for a call than the host for a launch. Kernels are launched on the device of the first argument, whichever
    is current.
    """

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def on_device(x: Tensor, *args: Any, **kwargs: Any) -> None:
            # a context of torch.cuda costs more than the question
            if not x.is_cuda or x.get_device() == torch.cuda.current_device():
                function(x, *args, **kwargs)
                return
            with torch.cuda.device_of(x):
                function(x, *args, **kwargs)

        # torch 2.11 leaves out trailing arguments that equal their defaults, and then misses those that are written
        schema = re.sub(r"=[^,)]+", "", torch.library.infer_schema(function, mutates_args=mutates))
        # not `custom_op`, whose wrappers in Python take longer than the host for a launch
        LIBRARY.define(function.__name__ + schema)
        LIBRARY.impl(function.__name__, on_device, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moequant::{function.__name__}", lambda *args, **kwargs: None, lib=LIBRARY)
        operation = getattr(torch.ops.moequant, function.__name__).default
        parameters = inspect.signature(function)

        @functools.wraps(function)
        def call(x: Tensor, *args: Any, **kwargs: Any) -> None:
            if is_traced(x):
                bound = parameters.bind(x, *args, **kwargs)
                bound.apply_defaults()
                operation(*bound.args)
            else:
                on_device(x, *args, **kwargs)

        return cast(Function, call)

    return register
