"""Launches at a fraction of what Triton's own take of the host's time.

Triton asks each argument of each launch what the kernel is to be compiled for, makes a text of the answers, and looks that up. What is
asked here is little, and looked up as it is: of a tensor its type and whether its address is a multiple of 16, of all else the value. The
first launch of each kind is Triton's, and so is every launch that is interpreted, profiled or compiled without a GPU.

No address is part of what is looked up: it is read from the tensor at each launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# What is looked up as it is.
PLAIN = frozenset((int, float, bool, type(None), str))
# A product and a sum are one operation where the launch says so: what is left unsaid is fused up to Triton 3.9, and not from 3.10 on.
UNSAID = {"enable_fp_fusion": False}
# Kinds of launches that a kernel remembers. One number more or less of tokens makes another kind, of the same compiled kernel.
MOST_KINDS = 4096


class Prepared(NamedTuple):
    """A compiled kernel: how it is started, and its parameters behind the positional ones, in order."""

    run: Callable[..., None]
    function: int
    metadata: Any
    named: tuple[str, ...]
    defaults: dict[str, Any]


class Launch(NamedTuple):
    """A launch that can be made again.

    values: of the kernel's parameters, with addresses in place of tensors. arguments: what they were made of, in the same order.
    """

    prepared: Prepared
    grid: tuple[int, int, int]
    values: list[Any]
    arguments: tuple[Any, ...]


class Recording(threading.local):
    """The launches of a thread, while somebody wants them; None for one that can't be repeated."""

    launches: list[Any] | None = None


recording = Recording()


@contextmanager
def record() -> Iterator[list[Any]]:
    """The launches that are made meanwhile, in order, with None for those that can't be repeated."""
    before, recording.launches = recording.launches, []
    try:
        yield recording.launches
    finally:
        recording.launches = before


def current_stream(device: int) -> int:
    return driver.active.get_current_stream(device)


def start(launch: Launch, values: list[Any], stream: int) -> None:
    """Makes a launch again, with these values, on a stream of the current device."""
    prepared = launch.prepared
    prepared.run(*launch.grid, stream, prepared.function, prepared.metadata, None, None, None, *values)


def described(value: Any) -> Any:
    """What tells apart the kernels that are compiled for a tensor, a tuple or a TMA descriptor, and other values themselves."""
    kind = type(value)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if isinstance(value, tuple):
        return kind, *map(described, value)
    if hasattr(value, "block_shape"):
        # nobody changes a descriptor
        known = value.__dict__.get("described")
        if known is None:
            layout = getattr(value, "layout", None)
            known = value.described = str((kind, value.base.dtype, value.block_shape, layout, value.padding))
        return known
    return value


class Launchable:
    """A jitted kernel that is launched as Triton's are: kernel[grid](*arguments, **constants_and_options)."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.prepared: dict[tuple[Any, ...], Prepared] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **named: self.launch(grid, arguments, named)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        runtime = knobs.runtime
        if runtime.launch_enter_hook is not None and runtime.launch_enter_hook.calls:
            return self.kernel[grid](*arguments, **{**UNSAID, **named})
        device = driver.active.get_current_device()
        key, values = [device, *named], []
        for value in arguments:
            kind = type(value)
            if kind is Tensor:
                # the address itself: Triton's launcher would ask the tensor, and then the driver whose it is
                address = value.data_ptr()
                key.append(value.dtype)
                key.append(address & 15 == 0)
                values.append(address)
            else:
                key.append(value if kind in PLAIN else described(value))
                values.append(value)
        for value in named.values():
            key.append(value if type(value) in PLAIN else described(value))
        prepared = self.prepared.get(tuple(key))
        if prepared is None:
            return self._first(tuple(key), grid, arguments, named)
        for name in prepared.named:
            value = named[name] if name in named else prepared.defaults[name]
            values.append(value.data_ptr() if type(value) is Tensor else value)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        prepared.run(x, y, z, current_stream(device), prepared.function, prepared.metadata, None, None, None, *values)
        if recording.launches is not None:
            behind = (named.get(name) for name in prepared.named)
            recording.launches.append(Launch(prepared, (x, y, z), values, (*arguments, *behind)))
        return None

    def _first(self, key: tuple[Any, ...], grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A launch of a new kind, by Triton."""
        compiled = self.kernel[grid](*arguments, **{**UNSAID, **named})
        if recording.launches is not None:
            recording.launches.append(None)
        # a stand-in for the driver, by which tests compile without a GPU, starts nothing
        if getattr(compiled, "function", None) is not None:
            behind = self.kernel.params[len(arguments) :]
            defaults = {parameter.name: parameter.default for parameter in behind if parameter.has_default}
            if len(self.prepared) >= MOST_KINDS:
                self.prepared.clear()
            self.prepared[key] = Prepared(
                compiled.run, compiled.function, compiled.packed_metadata, tuple(p.name for p in behind), defaults
            )
        return compiled


def launchable(kernel: Any) -> Any:
    """A jitted kernel as a `Launchable`; what is interpreted stays as it is."""
    return Launchable(kernel) if isinstance(kernel, JITFunction) else kernel
