"""The memory of several ranks on one device, so that a single process can test what one rank's kernel does to all of them."""

from __future__ import annotations

import copy

import torch

from moequant.config import round_up
from moequant.kernels.library.symmetric import Peers
from moequant.testing import assert_bit_equal

NO_FAULT = 0x7FFFFFFF
# limits of waits, in units of 2**20 ns: for what is there already, and for what will never come
LONG, SHORT = 10**5, 1
# epochs before a call: the first, any, the last before the wrap to negative numbers, the last negative one
EPOCHS = [0, 6, 2**31 - 1, -1]


def in_int32(number: int) -> int:
    """number as int32 arithmetic has it."""
    return (number + 2**31) % 2**32 - 2**31


def following(epoch: int) -> int:
    """The next epoch, in int32."""
    return in_int32(epoch + 1)


def output_flag(epoch: int, way: int = 0) -> int:
    """What says that outputs are there, and how."""
    return in_int32(4 * epoch + way)


def fault_word(epoch: int, phase: int, rank: int) -> int:
    """What an abort word says when `rank` did not come."""
    return (epoch * 4 + phase) % 2**22 << 8 | rank


class PeerBlocks:
    """A block for each of W ranks, all bytes 0x55, with at least 256 bytes between the buffers.

    buffers: shape and dtype of each. Every block also has flags (W,), status (3,), and abort, epoch, calls, arrivals, fault and record
    (1,), as a transport that has seen no fault has them. blocks[name] is (W, *shape), a view. offsets: in bytes, of each buffer. peers:
    (W,) int64, addresses.
    """

    def __init__(self, ranks: int, device: str, **buffers: tuple[tuple[int, ...], torch.dtype]) -> None:
        words = dict.fromkeys(("abort", "epoch", "calls", "arrivals", "fault", "record"), ((1,), torch.int32))
        self.buffers = {"flags": ((ranks,), torch.int32), "status": ((3,), torch.int64), **words, **buffers}
        self.offsets: dict[str, int] = {}
        end = 256
        for name, (shape, dtype) in self.buffers.items():
            self.offsets[name] = end
            end += round_up(torch.Size(shape).numel() * dtype.itemsize, 256) + 256
        self.memory = torch.full((ranks, end), 0x55, dtype=torch.uint8, device=device)
        self.peers = self.memory.data_ptr() + end * torch.arange(ranks, device=device)
        for name in ("flags", "status", "epoch", "calls", "arrivals"):
            self[name].zero_()
        for name in ("abort", "fault", "record"):
            self[name].fill_(NO_FAULT)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, dtype = self.buffers[name]
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[:, self.offsets[name] :][:, :nbytes].view(dtype).view(len(self.memory), *shape)

    def peers_of(self, rank: int, limit: int = LONG, shift: int = 0) -> Peers:
        """What a kernel of that rank is told. shift: of all offsets."""
        words = (self[name][rank] for name in ("epoch", "arrivals", "fault", "record"))
        flags, abort = self.offsets["flags"] + shift, self.offsets["abort"] + shift
        return Peers(self.peers, *words, flags=flags, abort=abort, rank=rank, ranks=len(self.peers), wait_limit=limit)

    def snapshot(self) -> PeerBlocks:
        """The same bytes elsewhere, for a test to do to them what the kernel has to do to the original."""
        other = copy.copy(self)
        other.memory = self.memory.clone()
        return other

    def expect_fault(self, rank: int, fault: int, told: bool) -> None:
        """In a snapshot: what a wait leaves at rank, and, where it is the first to notice, at all ranks."""
        self["fault"][rank] = self["record"][rank] = fault
        if told:
            self["abort"].clamp_(max=fault)


def assert_same_blocks(blocks: PeerBlocks, expected: PeerBlocks) -> None:
    """Every byte: of the buffers, and of what lies between them."""
    for name in blocks.buffers:
        assert_bit_equal(blocks[name], expected[name], name)
    assert_bit_equal(blocks.memory, expected.memory, "what lies between the buffers")
