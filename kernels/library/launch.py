"""Launches at a fraction of what Triton's own take of the host's time.

Triton asks each argument of each launch what the kernel is to be compiled for, makes a text of the answers, and looks that up. What is
asked here is little, and looked up as it is: of a tensor its type and whether its address is a multiple of 16, of all else the value. The
first launch of each kind is Triton's, and so is every launch that is interpreted, profiled or compiled without a GPU.

No address is part of what is looked up: it is read from the tensor at each launch.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moequant.kernels.library.triton_versions import minor

# What is looked up as it is.
PLAIN = frozenset((int, float, bool, type(None), str))
# A product and a sum are one operation where the launch says so: what is left unsaid is fused up to Triton 3.9, and not from 3.10 on.
UNSAID = {"enable_fp_fusion": False}
# Kinds of launches that a kernel remembers. One number more or less of tokens makes another kind, of the same compiled kernel.
MOST_KINDS = 4096
# Addresses at which a repeated launch remembers a TMA descriptor. Each layer of a model has tensors of its own, and torch's allocator
# gives them the same addresses again and again.
MOST_ADDRESSES = 1024


class Address(NamedTuple):
    """What a TMA descriptor needs of a tensor. It doesn't keep the memory, so a descriptor can be kept when the tensor is gone."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


class Prepared(NamedTuple):
    """A compiled kernel, which start(*grid, stream, *before, *values) launches.

    named: its parameters behind the positional ones, in order, with their defaults where there are some. encodings: of the parameters
    that are TMA descriptors, by number, how they are encoded, where that is not left to `start`.
    """

    start: Callable[..., None]
    before: tuple[Any, ...]
    function: int
    named: tuple[str, ...]
    defaults: dict[str, Any]
    encodings: dict[int, Any]


class Launch(NamedTuple):
    """A launch that can be made again, on a stream of the current device: start(*grid, stream, *values).

    arguments: the kernel's, by their places among the values, where tensors are addresses. descriptors: the TMA descriptors among them,
    by place.
    """

    start: Callable[..., None]
    grid: tuple[int, int, int]
    values: list[Any]
    arguments: dict[int, Any]
    descriptors: dict[int, Descriptor]


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


def is_watched() -> bool:
    """Whether somebody, a profiler mostly, asks Triton for all launches, so that they have to be Triton's own."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(hook.calls)


def current_stream(device: int) -> int:
    return driver.active.get_current_stream(device)


def prepare(compiled: Any, behind: list[Any]) -> Prepared:
    """A compiled kernel and its parameters behind the positional ones.

    It is started by Triton's launcher, or, where nothing is left to do in between, by the C function behind it: Triton 3.6's launcher
    allocates scratch memory, which none of these kernels has, and encodes the TMA descriptors anew for each launch.
    """
    run = compiled.run
    start, before, encodings = run, (compiled.function, compiled.packed_metadata, None, None, None), {}
    scratch = getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0)
    if minor(triton.__version__) == (3, 6) and type(run).__name__ == "CudaLauncher" and not scratch:
        start, encodings = run.launch, {}
        if isinstance(start, FunctionType):
            known = inspect.getclosurevars(start).nonlocals
            start = known["launcher"]
            encodings = dict(zip(sorted(known["tensordesc_indices"]), known["tensordesc_meta"], strict=True))
        before = (before[0], run.launch_cooperative_grid, run.launch_pdl, None, None, *before[1:])
    defaults = {parameter.name: parameter.default for parameter in behind if parameter.has_default}
    return Prepared(start, before, compiled.function, tuple(parameter.name for parameter in behind), defaults, encodings)


def encoded(descriptor: Any, prepared: Prepared, encoding: Any) -> list[Any]:
    """What a TMA descriptor is to Triton 3.6's C function. It is kept with the descriptor, which nobody changes."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    known = descriptor.__dict__.setdefault("encoded", {})
    if prepared.function not in known:
        known[prepared.function] = make_tensordesc_arg(descriptor, encoding)
    return known[prepared.function]


class Descriptor:
    """A TMA descriptor of a launch, for matrices at other addresses.

    Args:
        descriptor: the launch's.
        prepared: the kernel.
        number: of the parameter.
    """

    def __init__(self, descriptor: Any, prepared: Prepared, number: int) -> None:
        self.descriptor, self.prepared = without_memory(descriptor), prepared
        self.is_encoded, self.encoding = number in prepared.encodings, prepared.encodings.get(number)
        self.known: dict[int, Any] = {}

    def at(self, address: int) -> Any:
        """What stands at the descriptor's place for a matrix at an address: the descriptor, or the first of what `encoded` makes of it.
        The others are sizes."""
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= MOST_ADDRESSES:
                self.known.clear()
            found = without_memory(self.descriptor, address)
            if self.is_encoded:
                found = encoded(found, self.prepared, self.encoding)[0]
            self.known[address] = found
        return found


def without_memory(descriptor: Any, address: int | None = None) -> Any:
    """A copy of a TMA descriptor that keeps no tensor, at its own address or at another one."""
    made = copy.copy(descriptor)
    made.__dict__.pop("encoded", None)
    made.base = Address(made.base.data_ptr() if address is None else address, made.base.dtype)
    return made


def unfolded(values: list[Any], prepared: Prepared) -> tuple[list[Any], list[int]]:
    """The values with TMA descriptors encoded, and the place of each among them."""
    flat: list[Any] = []
    places = []
    for number, value in enumerate(values):
        places.append(len(flat))
        if number in prepared.encodings:
            flat += encoded(value, prepared, prepared.encodings[number])
        else:
            flat.append(value)
    return flat, places


def taken(value: Any) -> tuple[Any, Any]:
    """What tells apart the kernels that are compiled for an argument, and the argument with addresses in place of tensors: of a tensor, a
    tuple, in which there may be some, or a TMA descriptor; of other values themselves."""
    if isinstance(value, Tensor):
        # the address itself: Triton's launcher would ask the tensor, and then the driver whose it is
        address = value.data_ptr()
        return (value.dtype, address & 15 == 0), address
    kind = type(value)
    if isinstance(value, tuple):
        described, parts, same = [kind], [], True
        for part in value:
            if type(part) in PLAIN:
                described.append(part)
                parts.append(part)
            else:
                what, given = taken(part)
                described.append(what)
                parts.append(given)
                same = same and given is part
        # the class's own constructor takes three times as long
        return tuple(described), value if same else tuple.__new__(kind, parts)
    if hasattr(value, "block_shape"):
        # nobody changes a descriptor
        known = value.__dict__.get("described")
        if known is None:
            layout = getattr(value, "layout", None)
            known = value.described = str((kind, value.base.dtype, value.block_shape, layout, value.padding))
        return known, value
    return value, value


class Launchable:
    """A jitted kernel that is launched as Triton's are: kernel[grid](*arguments, **constants_and_options)."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.prepared: dict[tuple[Any, ...], Prepared] = {}
        self.constants = frozenset(parameter.name for parameter in kernel.params if parameter.is_constexpr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **named: self.launch(grid, arguments, named)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if is_watched():
            if recording.launches is not None:
                recording.launches.append(None)
            return self.kernel[grid](*arguments, **{**UNSAID, **named})
        device = driver.active.get_current_device()
        key, values = [device, *named], []
        for value in arguments:
            if type(value) in PLAIN:
                key.append(value)
                values.append(value)
            else:
                what, given = taken(value)
                key.append(what)
                values.append(given)
        given_by_name = {}
        for name, value in named.items():
            # what it is compiled for is no tensor, and has no tensors in it
            what, given_by_name[name] = (value, value) if type(value) in PLAIN or name in self.constants else taken(value)
            key.append(what)
        prepared = self.prepared.get(tuple(key))
        if prepared is None:
            return self._first(tuple(key), grid, arguments, named)
        for name in prepared.named:
            values.append(given_by_name[name] if name in named else prepared.defaults[name])
        places: Sequence[int] = range(len(values))
        if prepared.encodings:
            values, places = unfolded(values, prepared)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        prepared.start(x, y, z, current_stream(device), *prepared.before, *values)
        if recording.launches is not None:
            given = (*arguments, *(named.get(name) for name in prepared.named))
            by_place, descriptors = {}, {}
            for number, (place, argument) in enumerate(zip(places, given, strict=True)):
                by_place[len(prepared.before) + place] = argument
                if hasattr(argument, "block_shape"):
                    descriptors[len(prepared.before) + place] = Descriptor(argument, prepared, number)
            values = [*prepared.before, *values]
            recording.launches.append(Launch(prepared.start, (x, y, z), values, by_place, descriptors))
        return None

    def _first(self, key: tuple[Any, ...], grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A launch of a new kind, by Triton."""
        compiled = self.kernel[grid](*arguments, **{**UNSAID, **named})
        if recording.launches is not None:
            recording.launches.append(None)
        # a stand-in for the driver, by which tests compile without a GPU, starts nothing
        if getattr(compiled, "function", None) is not None:
            if len(self.prepared) >= MOST_KINDS:
                self.prepared.clear()
            self.prepared[key] = prepare(compiled, self.kernel.params[len(arguments) :])
        return compiled


def launchable(kernel: Any) -> Any:
    """A jitted kernel as a `Launchable`; what is interpreted stays as it is."""
    return Launchable(kernel) if isinstance(kernel, JITFunction) else kernel
