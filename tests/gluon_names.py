"""Names for the Hopper kernels' source on a CPU: `gluon_on_cpu.py` runs it with them.

Tensors are torch's, partitions are threads, mbarriers count as the hardware's do, TMA copies blocks and cuts them off at a matrix's
edges. Layouts mean nothing. Every address is looked up among the tensors that the kernel was given: one outside is an error, and
`Memory.stored` keeps what was written, element by element.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TYPES = {
    gl.int8: torch.int8,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.uint32: torch.uint32,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.float32: torch.float32,
    gl.float8e4nv: torch.float8_e4m3fn,
}
NAMES = {value: key for key, value in TYPES.items()}
# of a wait that nobody ends
SECONDS = 60.0


class Pointer:
    """Addresses of elements of one type. contiguous: how many neighbours were promised to begin at a multiple of 16 bytes."""

    def __init__(self, addresses: Tensor, dtype: torch.dtype, contiguous: int = 1) -> None:
        self.addresses, self.dtype, self.contiguous = addresses, dtype, contiguous

    def __add__(self, elements: Any) -> Pointer:
        steps = elements.to(torch.int64) if isinstance(elements, Tensor) else int(elements)
        return Pointer(self.addresses + steps * self.dtype.itemsize, self.dtype)

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.addresses[index], self.dtype)


class Memory:
    """The tensors that a kernel may touch. stored: the address of each element that was stored, in the order of the stores."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = list(tensors)
        self.stored: list[Tensor] = []

    def _places(self, pointer: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
        """The mask, and the addresses that it leaves."""
        mask = torch.as_tensor(True if mask is None else mask)
        shape = torch.broadcast_shapes(mask.shape, pointer.addresses.shape)
        mask = mask.expand(shape)
        return mask, pointer.addresses.expand(shape)[mask]

    def _views(self, addresses: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each tensor that holds some of the addresses: itself as one row of dtype, which addresses, and their indices."""
        found, left = [], torch.ones(addresses.shape, dtype=torch.bool)
        for tensor in self.tensors:
            begin, nbytes = tensor.data_ptr(), span(tensor)
            inside = left & (addresses >= begin) & (addresses < begin + nbytes)
            if inside.any():
                found.append((at_address(begin, nbytes).view(dtype), inside, (addresses[inside] - begin) // dtype.itemsize))
                left = left & ~inside
        if left.any():
            raise IndexError(f"{int(left.sum())} of {left.numel()} addresses lie in no tensor of the kernel's")
        return found

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
        mask, addresses = self._places(pointer, mask)
        loaded = torch.empty(addresses.shape, dtype=pointer.dtype)
        for row, which, index in self._views(addresses, pointer.dtype):
            loaded[which] = row[index]
        result = torch.full(mask.shape, other, dtype=pointer.dtype)
        result[mask] = loaded
        return result

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        everywhere, addresses = self._places(pointer, mask)
        if pointer.contiguous > 1:
            first = self._places(
                Pointer(pointer.addresses[..., :: pointer.contiguous], pointer.dtype), everywhere[..., :: pointer.contiguous]
            )
            if (first[1] % 16).any():
                raise IndexError("a store of 16 bytes was promised to begin at a multiple of 16, and does not")
        value = torch.as_tensor(value, dtype=pointer.dtype).expand(everywhere.shape)[everywhere]
        for row, which, index in self._views(addresses, pointer.dtype):
            row[index] = value[which]
        self.stored.append(addresses)


def span(tensor: Tensor) -> int:
    """Bytes from the first to the last element of a tensor."""
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def at_address(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


class Matrix:
    """What a kernel sees of a TMA descriptor."""

    def __init__(self, descriptor: TensorDescriptor) -> None:
        dtype = descriptor.base.dtype
        (rows, columns), stride = descriptor.shape, descriptor.strides[0]
        nbytes = ((rows - 1) * stride + columns) * dtype.itemsize
        flat = at_address(descriptor.base.data_ptr(), nbytes).view(dtype)
        self.whole = flat.as_strided((rows, columns), (stride, 1))
        self.dtype, self.layout, self.block_shape = NAMES[dtype], descriptor.layout, descriptor.block_shape

    def block(self, coordinates: Any, shape: tuple[int, ...]) -> Tensor:
        """The part of a block that lies inside."""
        row, column = map(int, coordinates)
        assert row >= 0 and column >= 0 and list(shape) == list(self.block_shape), f"{shape} at {row}, {column}"
        return self.whole[row : row + shape[0], column : column + shape[1]]


class Shared:
    """Shared memory. view: in blocks of up to 64 columns, as one swizzled row of 128 bytes holds them; shape: as the kernel sees it."""

    def __init__(self, view: Tensor, shape: tuple[int, ...], layout: Any) -> None:
        self.view, self.shape, self.layout = view, shape, layout

    @property
    def dtype(self) -> Any:
        return NAMES[self.view.dtype]

    def index(self, index: Any) -> Shared:
        index = int(index)
        assert 0 <= index < self.shape[0], f"{index} of {self.shape}"
        return Shared(self.view[index], self.shape[1:], self.layout)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert dim == 0
        return Shared(self.view.narrow(0, start, length), (length, *self.shape[1:]), self.layout)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.view.permute(order), tuple(self.shape[axis] for axis in order), self.layout)

    def reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        assert TYPES[dtype] == self.view.dtype
        wider = shape[-1] // self.shape[-1] if len(shape) == 3 and shape[1] == self.shape[1] else 1
        if wider > 1:
            # blocks that follow each other are side by side
            view = self.view.view(shape[0], wider, shape[1], self.shape[-1]).transpose(1, 2)
        else:
            view = self.view.view(shape)
        return Shared(view, tuple(shape), layout)

    def load(self, layout: Any = None) -> Tensor:
        return self.view.reshape(self.shape).clone()

    def store(self, value: Tensor) -> None:
        assert tuple(value.shape) == tuple(self.shape), f"{tuple(value.shape)} into {self.shape}"
        self.view.copy_(value.reshape(self.view.shape))


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def wait(self, phase: Any) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != int(phase), SECONDS):
                raise TimeoutError("a barrier's phase never ended")

    def add(self, arrivals: int, nbytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += nbytes
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.pending = self.count
                self.phase ^= 1
                self.changed.notify_all()


class Barriers:
    def __init__(self, count: int) -> None:
        self.shape = [count, 1]
        self.all = [Barrier() for _ in range(count)]

    def index(self, index: Any) -> Barrier:
        return self.all[int(index)]


def convert(x: Any, dtype: Any, bitcast: bool = False) -> Any:
    """`x.to(dtype)`, of numbers too."""
    if isinstance(dtype, gl.pointer_type):
        return Pointer(x, TYPES[dtype.element_ty])
    x = torch.as_tensor(x)
    if bitcast:
        return x.view(TYPES[dtype])
    # the hardware saturates
    return (x.clamp(-448, 448) if dtype == gl.float8e4nv else x).to(TYPES[dtype])


def number(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int32 if isinstance(x, int) else torch.float32)


def product(a: Shared, b: Shared, t: Tensor, use_acc: bool, is_async: bool) -> Tensor:
    assert not use_acc and is_async
    # float64 holds every sum of these
    return (a.load().double() @ b.load().double()).to(t.dtype)


class Language:
    """The functions of `gl` in torch; its types and layouts are its own."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.program, self.programs = memory, 0, 1
        self.load, self.store = memory.load, memory.store
        self.static_range = range
        self.minimum = lambda x, y: torch.minimum(number(x), number(y))
        self.maximum = lambda x, y: torch.maximum(number(x), number(y))
        self.exp2, self.abs, self.reshape = torch.exp2, torch.abs, torch.reshape
        self.expand_dims = torch.unsqueeze
        self.sum = lambda x, axis: x.sum(axis, dtype=x.dtype)
        self.max = lambda x, axis: x.amax(axis)
        # of magnitudes, the largest, or a NaN, which has no sign
        self.reduce = lambda x, axis, combine: x.amax(axis).abs()
        self.div_rn = lambda x, y: x / y
        self.fma = lambda x, y, z: (number(x).double() * number(y).double() + number(z).double()).float()

    def __getattr__(self, name: str) -> Any:
        value = getattr(gl, name)
        assert isinstance(value, (type, gl.dtype)), f"gl.{name} has no stand-in"
        return value

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.program, dtype=torch.int32)

    def num_programs(self, axis: int) -> Tensor:
        return torch.tensor(self.programs, dtype=torch.int32)

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    def zeros(self, shape: tuple[int, ...], dtype: Any, layout: Any) -> Tensor:
        return torch.zeros(shape, dtype=TYPES[dtype])

    def full(self, shape: list[int], value: Any, dtype: Any, layout: Any) -> Tensor:
        return torch.full(shape, int(value), dtype=TYPES[dtype])

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return torch.where(torch.as_tensor(condition), number(x), number(y))

    def convert_layout(self, x: Tensor, layout: Any) -> Tensor:
        return x

    def associative_scan(self, x: Tensor, axis: int, combine: Any) -> Tensor:
        return x.cumsum(axis, dtype=x.dtype)

    def multiple_of(self, x: Any, values: Any) -> Any:
        return x

    def max_contiguous(self, x: Pointer, values: tuple[int, ...]) -> Pointer:
        return Pointer(x.addresses, x.dtype, values[-1])

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        before = self.memory.load(pointer)
        self.memory.store(pointer, before + value)
        return before

    def inline_asm_elementwise(self, asm: str, constraints: str, args: list[Any], **settings: Any) -> Any:
        if "prefetch" in asm:
            return self.memory.load(args[0]).int()
        if "rcp.approx" in asm:
            return 1.0 / args[0]
        if "cvt.rn.satfinite.e4m3x2" in asm:
            return torch.where(number(args[1]) == 0, 0.0, args[0].clamp(-448, 448)).to(torch.float8_e4m3fn)
        assert "cvt.rn.bf16x2" in asm, f"no stand-in for {asm}"
        return args[0].bfloat16().float()

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if isinstance(layout, type(mbarrier.MBarrierLayout())):
            return Barriers(shape[0])
        return Shared(torch.zeros(shape, dtype=TYPES[dtype]), tuple(shape), layout)

    def warp_specialize(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        errors: list[BaseException] = []

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(0.05)
        if errors:
            raise errors[0]


def hopper_names(memory: Memory) -> dict[str, Any]:
    """The stand-ins for what the kernels import from `gluon.language.nvidia.hopper` and `kernels/library/gluon.py`."""

    def load_block(matrix: Matrix, at: Any, barrier: Barrier, result: Shared, pred: Any = True) -> None:
        if pred:
            inside = matrix.block(at, result.shape)
            result.view.view(torch.uint8).zero_()
            result.view[: inside.shape[0], : inside.shape[1]] = inside
            barrier.add(0, -result.view.numel() * result.view.itemsize)

    def store_block(matrix: Matrix, at: Any, source: Shared) -> None:
        inside = matrix.block(at, source.shape)
        inside.copy_(source.load()[: inside.shape[0], : inside.shape[1]])
        rows, columns = (torch.arange(extent) * stride for extent, stride in zip(inside.shape, inside.stride(), strict=True))
        memory.stored.append(((rows[:, None] + columns).flatten() * inside.itemsize) + inside.data_ptr())

    return {
        "mbarrier": SimpleNamespace(
            MBarrierLayout=mbarrier.MBarrierLayout,
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, phase: barrier.wait(phase),
            arrive=lambda barrier, count, pred=True: barrier.add(count, 0) if pred else None,
            expect=lambda barrier, nbytes, pred=True: barrier.add(1, nbytes) if pred else None,
        ),
        "tma": SimpleNamespace(store_wait=lambda pendings: None),
        "load_block": load_block,
        "store_block": store_block,
        # a partition is one thread
        "barrier": lambda: None,
        "reinterpret": Shared.reinterpret,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": product,
        "warpgroup_mma_wait": lambda pendings, deps: deps[0],
        "convert": convert,
    }
