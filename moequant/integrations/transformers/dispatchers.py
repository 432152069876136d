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
from moequant.integrations.transformers.settings import Settings

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


class _Alone:
    """Stands for the group of a process without torch.distributed."""


_ALONE = _Alone()
# by group: what a group's ranks agreed on ends with it
_DISPATCHERS: weakref.WeakKeyDictionary[object, dict[tuple[Sizes, int, Settings], MoEQuantDispatcher]] = weakref.WeakKeyDictionary()
_GROUPS_OF_ONE: weakref.WeakKeyDictionary[object, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def dispatcher_of(group: dist.ProcessGroup | None, sizes: Sizes, tokens: int, settings: Settings) -> MoEQuantDispatcher:
    """A dispatcher with room for some tokens. Collective where it has not been there before.

    Args:
        group: of the ranks that share the experts; None: this rank alone.
        sizes: of the layer.
        tokens: the most of any rank, the same on all, up to settings.max_tokens.
        settings: as the user has them.

    Returns:
        It, whose batches are ragged, and hold all rows even where tokens name an expert twice.
    """
    group = _group_of_one() if group is None else group
    room = room_for(tokens, settings)
    known = _DISPATCHERS.setdefault(_ALONE if group is None else group, {})
    key = sizes, room, settings
    if key not in known:
        ranks = 1 if group is None else dist.get_world_size(group)
        known[key] = MoEQuantDispatcher(
            group,
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden_size,
            max_tokens_per_rank=room,
            quant=sizes.quant,
            transport="auto" if ranks == 1 else settings.transport,
            layout="ragged",
            rank_capacity=ranks * room * sizes.top_k + ROW_ALIGNMENT * (sizes.num_experts // ranks),
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


def _group_of_one() -> dist.ProcessGroup | None:
    """This rank's own group, where torch.distributed is initialised: a dispatcher takes all ranks otherwise."""
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is None:
        return None
    if world not in _GROUPS_OF_ONE:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        _GROUPS_OF_ONE[world] = group
    return _GROUPS_OF_ONE[world]
