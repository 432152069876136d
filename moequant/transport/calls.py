"""What a call says of itself to the other ranks, so that unlike calls are noticed where their words meet.

A call travels as two int32: how many dispatches its slot has seen, which is counted in device memory, so that a captured graph counts on
when it is replayed, and `Call.word`, which a graph keeps from its capture.
"""

from __future__ import annotations

from typing import NamedTuple

# The word's lowest bits: the layer, of which 0 says nothing (`kernels/library/common.py` has the same number).
LAYER_BITS = 10
LAYERS = (1 << LAYER_BITS) - 1
# What a backward may make beside what it always makes, each with an exchange of its own behind that of the gradients; a bit each.
MADE = "hidden states", "routing weights", "w13", "bias2"


class Call(NamedTuple):
    """One step of a dispatcher, the same on all ranks that are in step.

    dispatcher: which of those that were built on the group. slot: of the buffers. first_experts: of a dispatch in waves, otherwise 0.
    layer: from 1 on, or 0 for one that was not said, which goes with any. combines: whether it is a combine, and not a dispatch; of that
    float16: whether its rows are, and pushed: whether they were stored at `destinations`. Of a dispatch gradients: whether it brings a
    backward those of the output, and makes: which of MADE follow, in bits, which take the place of first_experts; again: whether it
    brings a backward the tokens.
    """

    dispatcher: int
    slot: int
    first_experts: int = 0
    layer: int = 0
    combines: bool = False
    float16: bool = False
    pushed: bool = False
    gradients: bool = False
    again: bool = False
    makes: int = 0

    @property
    def way(self) -> int:
        """How rows come back, or for what they are sent, in two bits."""
        return (self.pushed | self.again) << 1 | (self.float16 | self.gradients)

    @property
    def what(self) -> int:
        """Which rows are sent, in eight bits."""
        return self.makes if self.gradients else self.first_experts % 2**8

    def combine(self, *, float16: bool = False, pushed: bool = False) -> Call:
        """The combine that answers this dispatch."""
        return Call(self.dispatcher, self.slot, 0, self.layer, True, float16, pushed)

    @property
    def word(self) -> int:
        """All of it in 31 bits: from the highest on 9 of the dispatcher's number, 1 of the slot, 1 for a combine, 2 of the way, 8 of
        what is sent, 10 of the layer."""
        word = self.dispatcher % 2**9 << 1 | self.slot
        word = (word << 1 | self.combines) << 2 | self.way
        return (word << 8 | self.what) << LAYER_BITS | self.layer

    @staticmethod
    def of(word: int) -> Call:
        """The call of a word."""
        way, what, layer = word >> 18 & 3, word >> LAYER_BITS & 0xFF, word & LAYERS
        call, first, second = Call(word >> 22, word >> 21 & 1, layer=layer), bool(way & 1), bool(way & 2)
        if word >> 20 & 1:
            return call.combine(float16=first, pushed=second)
        return call._replace(gradients=first, again=second, **{"makes" if first else "first_experts": what})

    def __str__(self) -> str:
        rows = ("bfloat16", "float16")[self.float16] + (" rows that were pushed" if self.pushed else " rows")
        what = f"combine of {rows}" if self.combines else "dispatch"
        what += " of gradients" if self.gradients else " of tokens once more for a backward" if self.again else ""
        waves = f" of the first {self.first_experts} experts" if self.first_experts else ""
        made = " and ".join(name for bit, name in enumerate(MADE) if self.makes >> bit & 1)
        layer = f" of layer {self.layer - 1}" if self.layer else ""
        wanted = f" that makes those of {made}" if made else ""
        return f"{what}{waves}{layer}{wanted} in slot {self.slot} of dispatcher {self.dispatcher}"


def unlike(mine: int, theirs: int) -> bool:
    """Whether two words are of calls that don't belong together.

    Example: dispatcher 1 with layer 3 goes with dispatcher 1 and no layer; not with dispatcher 1 and layer 4, nor with dispatcher 2.
    """
    layers = mine & LAYERS, theirs & LAYERS
    return mine >> LAYER_BITS != theirs >> LAYER_BITS or (all(layers) and layers[0] != layers[1])
