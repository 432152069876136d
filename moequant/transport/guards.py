"""Buffers in one block of memory, with guard bytes between them where no kernel may store: whether one did can be asked.

They are written once and cost nothing afterwards. With MOEQUANT_CHECK_GUARDS=1 in the environment `check()` and `close()` of a dispatcher
look at them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from moequant.config import round_up
from moequant.errors import GuardError
from moequant.transport.buffers import BufferSpec

# at least so many before and behind each buffer
GUARD_BYTES = 256
GUARD = 0xA5


def wanted() -> bool:
    """Whether guards are to be looked at."""
    return os.environ.get("MOEQUANT_CHECK_GUARDS") == "1"


def offsets_of(specs: Mapping[str, BufferSpec]) -> tuple[dict[str, int], int]:
    """Where each buffer begins in a block of memory, a multiple of 256, and the block's bytes, guards at both its ends included."""
    offsets, end = {}, GUARD_BYTES
    for name, spec in specs.items():
        offsets[name] = end
        end += round_up(spec.nbytes, 256) + GUARD_BYTES
    return offsets, end


class Guards:
    """What belongs to no buffer in memory that has a block of buffers for each slot, and behind them the abort word."""

    def __init__(self, memory: Tensor, specs: Mapping[str, BufferSpec], slots: int) -> None:
        """Fills it. memory: (nbytes,) uint8. specs: of a slot's buffers."""
        offsets, block = offsets_of(specs)
        buffers = [
            (slot * block + begin, slot * block + begin + specs[name].nbytes, f'"{name}" of slot {slot}')
            for slot in range(slots)
            for name, begin in offsets.items()
        ]
        buffers += [(slots * block, slots * block + 4, "the abort word"), (len(memory), len(memory), "the end")]
        # of each gap its begin and end, and what lies before and behind it
        self.gaps: list[tuple[int, int, str, str]] = []
        begin, before = 0, "the beginning"
        for first, end, name in buffers:
            self.gaps.append((begin, first, before, name))
            memory[begin:first].fill_(GUARD)
            begin, before = end, name

    def check(self, memory: Tensor, rank: int) -> None:
        """Waits for the device. Raises GuardError for the first gap in which something was stored."""
        for begin, end, before, behind in self.gaps:
            touched = (memory[begin:end] != GUARD).nonzero().flatten()
            if len(touched):
                first, last = int(touched[0]), int(touched[-1])
                raise GuardError(
                    f"rank {rank}: {len(touched)} bytes between {before} and {behind} were overwritten, from {first} bytes behind "
                    f"{before} to {end - begin - last} bytes before {behind}: a kernel stored outside its rows, and results may be "
                    "wrong; report it with the dispatcher's settings"
                )
