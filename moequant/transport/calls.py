"""What a call says of itself to the other ranks, so that unlike calls are noticed where their words meet.

A call travels as two int32: how many dispatches its slot has seen, which is counted in device memory, so that a captured graph counts on
when it is replayed, and `Call.word`, which a graph keeps from its capture.
"""

from __future__ import annotations

from typing import NamedTuple

# The word's lowest bits: the layer, of which 0 says nothing (`kernels/library/common.py` has the same number).
LAYER_BITS = 10
LAYERS = (1 << LAYER_BITS) - 1


class Call(NamedTuple):
    """One step of a dispatcher, the same on all ranks that are in step.

    dispatcher: which of those that were built on the group. slot: of the buffers. first_experts: of a dispatch in waves, otherwise 0.
    layer: from 1 on, or 0 for one that was not said, which goes with any. combines: whether it is a combine, and not a dispatch; of that
    float16: whether its rows are, and pushed: whether they were stored at `destinations`.
    """

    dispatcher: int
    slot: int
    first_experts: int = 0
    layer: int = 0
    combines: bool = False
    float16: bool = False
    pushed: bool = False

    @property
    def way(self) -> int:
        """How rows come back, in two bits."""
        return self.pushed << 1 | self.float16

    @property
    def word(self) -> int:
        """All of it in 31 bits: from the highest on 9 of the dispatcher's number, 1 of the slot, 1 for a combine, 2 of the way, 8 of
        first_experts, 10 of the layer."""
        word = self.dispatcher % 2**9 << 1 | self.slot
        word = (word << 1 | self.combines) << 2 | self.way
        return (word << 8 | self.first_experts % 2**8) << LAYER_BITS | self.layer

    @staticmethod
    def of(word: int) -> Call:
        """The call of a word."""
        way, first_experts = word >> 18 & 3, word >> LAYER_BITS & 0xFF
        return Call(word >> 22, word >> 21 & 1, first_experts, word & LAYERS, bool(word >> 20 & 1), bool(way & 1), bool(way & 2))

    def __str__(self) -> str:
        rows = ("bfloat16", "float16")[self.float16] + (" rows that were pushed" if self.pushed else " rows")
        what = f"combine of {rows}" if self.combines else "dispatch"
        waves = f" of the first {self.first_experts} experts" if self.first_experts else ""
        layer = f" of layer {self.layer - 1}" if self.layer else ""
        return f"{what}{waves}{layer} in slot {self.slot} of dispatcher {self.dispatcher}"


def unlike(mine: int, theirs: int) -> bool:
    """Whether two words are of calls that don't belong together.

    Example: dispatcher 1 with layer 3 goes with dispatcher 1 and no layer; not with dispatcher 1 and layer 4, nor with dispatcher 2.
    """
    layers = mine & LAYERS, theirs & LAYERS
    return mine >> LAYER_BITS != theirs >> LAYER_BITS or (all(layers) and layers[0] != layers[1])
