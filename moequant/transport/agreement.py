"""Who takes part in a dispatcher, where its tensors live, and that all ranks mean the same settings."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from moequant.config import DispatcherConfig
from moequant.errors import ConfigMismatchError
from moequant.transport.rendezvous import exchange

# how many dispatchers were built on a group
_BUILT: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def membership(group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, int, int]:
    """The group, this process's rank in it, and its size; a single rank where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("a group was given, but torch.distributed is not initialised; call init_process_group first")
        return None, 0, 1
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must be a process group of torch.distributed, or None for the default one, got {group!r}")
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of the group; only members may build a dispatcher on it")
    return group, dist.get_rank(group), dist.get_world_size(group)


def choose_device(group: dist.ProcessGroup | None, device: torch.device | str | None) -> torch.device:
    """The device asked for; by default the current GPU, or the CPU without one or with a group that has no NCCL."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        device = "cuda" if gpus and (group is None or "nccl" in str(dist.get_backend_config(group))) else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "cpu"):
        raise ValueError(f'device must be a "cuda" device or "cpu", got {device!r}')
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise ValueError(f"device must be one of this machine's, got {str(chosen)!r}, and torch finds {gpus} GPUs")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def attempt(settings: Callable[[], DispatcherConfig], alone: bool) -> DispatcherConfig | str:
    """This rank's settings, or, where others wait for it, what is wrong with them, whatever it is."""
    try:
        return settings()
    except Exception as error:
        if alone:
            raise
        return str(error)


def agree(
    mine: DispatcherConfig | str, device: torch.device, group: dist.ProcessGroup | None, rank: int, world_size: int
) -> tuple[DispatcherConfig, int]:
    """This rank's settings, and a number for one more dispatcher of the group, after all ranks have shown each other theirs. A rank whose
    settings are wrong tells the others, which would otherwise wait for it, and does not wait itself.

    Raises PeerTimeoutError if a rank does not come within the time limit that the settings have, and names it.
    """
    if group is None or world_size == 1:
        assert isinstance(mine, DispatcherConfig)
        return mine, 0
    wrong = isinstance(mine, str)
    built = _BUILT.get(group, 0)
    place = "the dispatcher's constructor"
    everyone = exchange(group, (mine, device.type, built), 0.0 if wrong else mine.first_limit, place, wait=not wrong)
    if wrong:
        raise ValueError(mine)
    for other, (theirs, kind, _) in enumerate(everyone):
        if isinstance(theirs, str):
            raise ConfigMismatchError(f"rank {other} of the group has wrong settings: {theirs}")
        difference = mine.difference(theirs) or (f"device: {device.type!r} and {kind!r}" if kind != device.type else "")
        if difference:
            raise ConfigMismatchError(
                f"ranks {rank} and {other} of the group disagree on {difference}; give all ranks the same settings"
            )
    # equal on all ranks, also behind constructors that not all of them came to
    number = max(count for _, _, count in everyone)
    _BUILT[group] = number + 1
    return mine, number
