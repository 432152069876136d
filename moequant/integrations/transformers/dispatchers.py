"""The dispatchers that all models of this process share.

T tokens of a rank, K top-k, E experts, W ranks, L = E / W local experts, H hidden size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moequant.config import ROW_ALIGNMENT
from moequant.dispatcher import MoEQuantDispatcher
from moequant.integrations.groups import ByGroup
from moequant.integrations.transformers.settings import Settings
from moequant.transport.peer_memory import why_unreachable

# Rooms for tokens: each is so many times the one before. A graph that was captured with few tokens keeps its dispatcher when more come.
SMALLEST, FACTOR = 16, 4


@dataclass(frozen=True)
class Sizes:
    """Of the layers that share a dispatcher.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: H.
        quant: as a dispatcher takes it.
        device: where the tokens are.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    quant: str
    device: torch.device


@dataclass(frozen=True, eq=False)
class Place:
    """Whose experts a layer has.

    Attributes:
        group: of the ranks that share them; None: this rank alone.
        shared: all these ranks hold the same tokens.
        absent: ids beyond the range are nobody's here, and not wrong.
    """

    group: dist.ProcessGroup | None = None
    shared: bool = False
    absent: bool = False


Key = tuple[bool, bool, Sizes, int, Settings]
_DISPATCHERS: ByGroup[Key, MoEQuantDispatcher] = ByGroup()
_SYMMETRIC: weakref.WeakKeyDictionary[dist.ProcessGroup, bool] = weakref.WeakKeyDictionary()


def sends_nothing(group: dist.ProcessGroup, device: torch.device, settings: Settings) -> bool:
    """Whether ranks that hold the same tokens go without sending them to the experts. Where kernels store to the other ranks' memory, a
    slice of the tokens each is less that comes back.

    Args:
        group: of the ranks. Collective when it first comes.
        device: where the tokens are.
        settings: as the user has them.

    Returns:
        The answer, the same on all ranks.
    """
    if device.type == "cpu" or settings.transport != "auto":
        return settings.transport != "symmetric"
    if group not in _SYMMETRIC:
        _SYMMETRIC[group] = why_unreachable(group, device, settings.timeout) is None
    return not _SYMMETRIC[group]


def dispatcher_of(place: Place, sizes: Sizes, tokens: int, settings: Settings) -> MoEQuantDispatcher:
    """A dispatcher with room for some tokens. Collective where it has not been there before.

    Args:
        place: of the layer's experts.
        sizes: of the layer.
        tokens: the most of any rank, the same on all, up to settings.max_tokens.
        settings: as the user has them.

    Returns:
        It, whose batches are ragged, and hold all rows.
    """
    group, room = place.group, room_for(tokens, settings)
    known = _DISPATCHERS.of(group)
    key = place.shared, place.absent, sizes, room, settings
    if key not in known:
        ranks = 1 if group is None else dist.get_world_size(group)
        # all rows that can come, even where tokens name an expert twice
        rows = ranks * room * sizes.top_k + ROW_ALIGNMENT * (sizes.num_experts // ranks)
        known[key] = MoEQuantDispatcher(
            group,
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden_size,
            max_tokens_per_rank=room,
            quant=sizes.quant,
            transport="local" if group is None else "auto" if ranks == 1 or place.shared else settings.transport,
            layout="ragged",
            rank_capacity=None if place.shared else rows,
            shared_batch=place.shared,
            on_invalid_id="absent" if place.absent else "error",
            reduce=settings.reduce,
            timeout=settings.timeout,
            device=sizes.device,
        )
    return known[key]


def room_for(tokens: int, settings: Settings) -> int:
    """The room of the dispatcher that takes some tokens.

    Args:
        tokens: up to settings.max_tokens.
        settings: as the user has them.

    Returns:
        It.
    """
    room = SMALLEST
    while room < tokens:
        room *= FACTOR
    return min(room, settings.max_tokens)
