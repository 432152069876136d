"""Launches of an earlier call, made again with new addresses: what a step costs the host when it comes as it came before.

A step of a layer syncs with nothing and depends on no counter of the host, so that a CUDA graph can hold it. So its launches follow from
its settings and from how its tensors are made up, and where those come again, all that leads to the launches, the checks, the choice of
kernels and tiles, Triton's lookups, has one result. A graph keeps addresses too; here those of the step's inputs are put in anew.

Example: a combine of y, weights and out launches one kernel with the arguments (y, rows, weights, out, 2048, ..). Recorded are the
compiled kernel and the values (0x100, 0x900, 0x200, 0x300, 2048, ..), and that places 0, 2 and 3 are the inputs 0, 1 and 2. The next call
of the same make-up has its inputs at 0x500, 0x600 and 0x700, and launches with (0x500, 0x900, 0x600, 0x700, 2048, ..).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moequant import ops

if TYPE_CHECKING:
    from moequant.kernels.library.launch import Descriptor, Launch

Result = TypeVar("Result")

# Steps that are kept: by stream, number of tokens, layer. More come from nothing that repeats.
MOST_STEPS = 1024
# What a step may ask of torch, and have a recording that is all of it: views and questions. No memory: a recording would keep it.
HARMLESS = frozenset(
    (
        *("__get__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_contiguous", "is_floating_point", "is_neg"),
        *("numel", "size", "storage_offset", "stride", "untyped_storage"),
        *("__getitem__", "expand", "flatten", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    )
)
UNKNOWN: Any = object()
# What a step may do once: workspaces that it keeps are made when they are first needed.
MEMORY = frozenset(("empty", "empty_like", "new_empty"))


class Repeated(NamedTuple):
    """A launch, its values, and which of them are addresses of which inputs: (place, input). in_tuples: (place, which member, input).
    descriptors: (place, TMA descriptor, input)."""

    launch: Launch
    places: tuple[tuple[int, int], ...]
    in_tuples: tuple[tuple[int, int, int], ...]
    descriptors: tuple[tuple[int, Descriptor, int], ...]


class Watch(TorchFunctionMode):
    """Notices whether torch itself does something to tensors, which no recording of launches has."""

    harmless, took_memory = True, False

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.took_memory |= name in MEMORY
        self.harmless &= name in HARMLESS or name in MEMORY
        return function(*arguments, **(named or {}))


class Recording(threading.local):
    """Whether this thread records a step."""

    on = False


recording = Recording()


class Repeats:
    """What was recorded of some steps. It goes with what owns the tensors that are not inputs: launches hold those."""

    def __init__(self) -> None:
        # None for a step that can't be repeated
        self._steps: dict[tuple[Any, ...], tuple[list[Repeated], Any] | None] = {}
        # those that took memory when they first came
        self._took_memory: set[tuple[Any, ...]] = set()
        # of kernels/library/launch.py, which is imported when something is recorded
        self._is_watched: Callable[[], bool] = lambda: False

    def run(self, x: Tensor, inputs: tuple[Tensor, ...], settings: tuple[Any, ...], call: Callable[[], Result]) -> Result:
        """The result of a step: by the step itself, or by repeating its launches, and then it is the recorded step's result.

        x: a tensor on the step's device. inputs: the tensors that are not the same ones each time. settings: all else that the step
        depends on and that may change. call: the step. It allocates no result.
        """
        device = self.device(x)
        # what is part of a step that is being recorded is launched as it is
        if device is None or recording.on:
            return call()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(x, inputs, settings, call)
        stream = torch._C._cuda_getCurrentRawStream(device)
        addresses = [tensor.data_ptr() for tensor in inputs]
        key: list[Any] = [stream, *settings]
        for tensor, address in zip(inputs, addresses, strict=True):
            key += tensor.dtype, tensor.shape, tensor.stride(), address & 15 == 0, tensor.requires_grad, tensor.get_device()
            # a view whose numbers are not those that lie there
            key.append(tensor.is_neg())
        found = tuple(key)
        step = self._steps.get(found, UNKNOWN)
        if step is UNKNOWN:
            return self._first(found, inputs, addresses, call)
        if step is None or self._is_watched():
            return call()
        launches, result = step
        for (start, grid, values, *_), places, in_tuples, descriptors in launches:
            if places or in_tuples or descriptors:
                values = values.copy()
                for place, number in places:
                    values[place] = addresses[number]
                for place, member, number in in_tuples:
                    members = values[place]
                    values[place] = (*members[:member], addresses[number], *members[member + 1 :])
                for place, descriptor, number in descriptors:
                    values[place] = descriptor.at(addresses[number])
            start(*grid, stream, *values)
        return result

    def call(self, operation: Callable[..., None], *arguments: Any) -> None:
        """operation(*arguments), of `moequant.ops`, which has no tensors but those: each is an input. Arguments may be tuples of them."""
        inputs: list[Tensor] = []
        settings: list[Any] = [operation]
        numbers: dict[int, int] = {}
        for argument in arguments:
            for part in argument if isinstance(argument, tuple) else (argument,):
                if not isinstance(part, Tensor):
                    settings.append(part)
                    continue
                # one that is given twice is one input
                number = numbers.setdefault(id(part), len(inputs))
                settings.append((number,))
                if number == len(inputs):
                    inputs.append(part)
        self.run(inputs[0], tuple(inputs), tuple(settings), lambda: operation(*arguments))

    def device(self, x: Tensor) -> int | None:
        """The GPU on which launches of a step on x may be repeated, None where they are not: a graph, which is captured, draws tile
        counters of its own."""
        if not x.is_cuda or ops.is_traced(x) or torch.cuda.is_current_stream_capturing():
            return None
        return x.get_device()

    def _first(self, key: tuple[Any, ...], inputs: tuple[Tensor, ...], addresses: list[int], call: Callable[[], Result]) -> Result:
        """The step itself, recorded if its launches are all that it does."""
        from moequant.kernels.library.launch import is_watched, record

        self._is_watched = is_watched
        recording.on = True
        try:
            with record() as launches, Watch() as watch:
                result = call()
        finally:
            recording.on = False
        # a kernel's first launch of a kind is Triton's, and workspaces may be made: the next time, then
        if watch.took_memory and key not in self._took_memory:
            if len(self._took_memory) >= MOST_STEPS:
                self._took_memory.clear()
            self._took_memory.add(key)
        elif None not in launches:
            repeated = [placed(launch, inputs, addresses) for launch in launches]
            # of two inputs in one place nothing says which is meant; those without elements are at 0
            given = [address for address in addresses if address]
            harmless = watch.harmless and not watch.took_memory
            whole = harmless and launches and None not in repeated and len({*given}) == len(given)
            if len(self._steps) >= MOST_STEPS:
                self._steps.clear()
            self._steps[key] = ([step for step in repeated if step is not None], result) if whole else None
        return result


def placed(launch: Launch, inputs: tuple[Tensor, ...], addresses: list[int]) -> Repeated | None:
    """A launch, and where the inputs' addresses stand in it; it holds the other tensors. None if it has parts of inputs."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    places, in_tuples, descriptors, held = [], [], [], {}
    for place, argument in launch.arguments.items():
        kept = []
        if place in launch.descriptors and argument.base.data_ptr() in addresses:
            descriptors.append((place, launch.descriptors[place], addresses.index(argument.base.data_ptr())))
            continue
        for member, part in enumerate(argument if isinstance(argument, tuple) else (argument,)):
            if isinstance(part, Tensor) and part.data_ptr() in addresses:
                number = addresses.index(part.data_ptr())
                if isinstance(argument, tuple):
                    in_tuples.append((place, member, number))
                else:
                    places.append((place, number))
                continue
            for inner in members_of(part):
                # a TMA descriptor has an address as well
                base = getattr(inner, "base", inner)
                if hasattr(base, "data_ptr") and is_of(base, inputs, storages):
                    return None
            kept.append(part)
        held[place] = tuple(kept)
    values = launch.values.copy()
    for place, *_ in descriptors:
        # it would keep the input, and another one stands here each time
        values[place] = None
    rest = launch._replace(values=values, arguments=held, descriptors={})
    return Repeated(rest, tuple(places), tuple(in_tuples), tuple(descriptors))


def members_of(argument: Any) -> Iterator[Any]:
    """An argument, or what is in a tuple, and in tuples in it."""
    if not isinstance(argument, tuple):
        yield argument
        return
    for part in argument:
        yield from members_of(part)


def is_of(base: Any, inputs: tuple[Tensor, ...], storages: set[int]) -> bool:
    """Whether an address lies in the memory of an input."""
    if isinstance(base, Tensor):
        return base.numel() > 0 and base.untyped_storage().data_ptr() in storages
    for tensor in inputs:
        storage = tensor.untyped_storage()
        if storage.data_ptr() <= base.data_ptr() < storage.data_ptr() + storage.nbytes():
            return True
    return False
