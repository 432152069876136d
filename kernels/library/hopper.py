"""The host's side of the Hopper kernels: TMA descriptors, tile counters, and which device and tensors they take."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moequant.kernels.gemm.grouped_gemm import few_tiles
from moequant.kernels.library.common import MOST_EXPERTS, multiprocessors, runs_gluon
from moequant.kernels.library.launch import Address, current_stream

# Registers of a thread before warp specialization hands them out: the multiprocessor's 65536 among 384 threads.
REGISTERS = 168


@functools.lru_cache(maxsize=1024)
def descriptor(address: Address, shape: tuple[int, int], stride: int, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of a matrix in blocks. It follows from its arguments alone, so keeping it can't go wrong."""
    bits = address.dtype.itemsize * 8
    if block[0] == 1:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)
    else:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    return TensorDescriptor(address, list(shape), [stride, 1], list(block), layout)


def matrix(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of a contiguous (L, rows, columns) or (R, columns) as one matrix (L * rows, columns)."""
    *there, width = x.shape
    return descriptor(Address(x.data_ptr(), x.dtype), (math.prod(there), width), width, (rows, columns))


def scale_matrix(a_scales: Tensor) -> tuple[TensorDescriptor, int]:
    """The descriptor of scales (L, M, G) of strides (any, 1, any) as one matrix of groups by rows, in blocks of (1, 64), and how many of
    its rows lie from one expert to the next; of ragged ones (R, G) of strides (1, any) none do."""
    if a_scales.dim() == 2:
        rows, groups = a_scales.shape
        return descriptor(Address(a_scales.data_ptr(), torch.float32), (groups, rows), a_scales.stride(1), (1, 64)), 0
    experts, rows, groups = a_scales.shape
    scale_rows = a_scales.stride(0) // a_scales.stride(2)
    shape = ((experts - 1) * scale_rows + groups, rows)
    return descriptor(Address(a_scales.data_ptr(), torch.float32), shape, a_scales.stride(2), (1, 64)), scale_rows


class TileCounters:
    """Pairs of zeros in device memory: one for each stream, and one for each launch that is captured.

    A kernel leaves its pair at zero, so the launches of one stream share one. A captured launch may be replayed on any stream, beside
    others: its pair is its own, and is not handed out again.
    """

    def __init__(self) -> None:
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self.unused: dict[torch.device, list[Tensor]] = {}
        # graphs hold bare pointers: no pair's memory is ever freed
        self.chunks: list[Tensor] = []

    def get(self, device: torch.device) -> Tensor:
        """The pair for a launch on the current stream."""
        if device.type != "cuda":
            return torch.zeros(2, dtype=torch.int32, device=device)
        unused = self.unused.setdefault(device, [])
        if torch.cuda.is_current_stream_capturing():
            # memory that is made during a capture belongs to its graph, which zeroes it at each replay
            return unused.pop() if unused else torch.zeros(2, dtype=torch.int32, device=device)
        key = (device, current_stream(device.index))
        if not unused:
            # 16 bytes apart, as Triton compiles anew for pointers that are aligned otherwise
            self.chunks.append(torch.zeros(4096, 4, dtype=torch.int32, device=device))
            pairs = self.chunks[-1].unbind()
            # the zeros are there before another stream draws from them, and before another thread finds them
            torch.cuda.current_stream(device).synchronize()
            unused.extend(pairs)
        if key not in self.of_stream:
            self.of_stream[key] = unused.pop()
        return self.of_stream[key]


counters = TileCounters()


def supports(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, out: Tensor | None, *, segments: int = 1
) -> bool:
    """Whether `grouped_gemm_blockscale_hopper` takes these arguments, with out None for rows that go to addresses of their own. What it
    refuses is for `kernels/gemm/grouped_gemm.py`."""
    return runs_gluon(a.device) and takes(a, a_scales, b, b_scales, out, segments)


def too_small(experts: int, rows: int, columns: int, expected_rows: int, device: torch.device) -> bool:
    """Whether a problem has so few tiles that the plain kernel, several programs of which share a multiprocessor or a tile, loads the
    weights faster: measured with 1 to 6 experts of 2112 to 7168 columns on an H200 (benchmarks/results)."""
    column_tiles, sms = -(-columns // 128), multiprocessors(device)
    return few_tiles(experts, rows, column_tiles, sms) or (expected_rows <= 64 and experts * column_tiles < 2.6 * sms)


def takes(a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, out: Tensor | None, segments: int) -> bool:
    """`supports`, but for the device: formats, and what TMA can address."""
    if not takes_rows(a, b, out, segments) or a_scales is None or b_scales is None:
        return False
    experts, columns, _ = b.shape
    rows = a.shape[-2]
    if experts * rows * columns == 0:
        return False
    # int32 coordinates
    matrices = experts if a.dim() == 3 else 1
    if experts > MOST_EXPERTS or max(matrices * rows, experts * columns) >= 2**31:
        return False
    *expert_strides, row_stride, group_stride = a_scales.stride()
    return (
        all(x.data_ptr() % 16 == 0 for x in (a, b, a_scales, out) if x is not None)
        and group_stride % 4 == 0
        and row_stride == 1
        and group_stride >= rows
        and all(stride % group_stride == 0 for stride in expert_strides)
    )


def takes_rows(a: Tensor, b: Tensor, out: Tensor | None, segments: int) -> bool:
    """What `takes` asks of types and of the lengths of rows: nothing of how many there are, nor of where they lie."""
    _, columns, depth = b.shape
    return (
        a.dtype in (torch.float8_e4m3fn, torch.int8)
        and depth > 0
        and depth % 16 == 0
        and columns * (2 if out is None else out.element_size()) % 16 == 0
        and (segments == 1 or columns // segments % 128 == 0)
    )
