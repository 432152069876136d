"""Who takes part in a dispatcher, where its tensors live, and that all ranks mean the same settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from moequant.config import DispatcherConfig
from moequant.errors import ConfigMismatchError


def membership(group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, int, int]:
    """The group, this process's rank in it, and its size; a single rank where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("a group was given, but torch.distributed is not initialised; call init_process_group first")
        return None, 0, 1
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of the group; only members may build a dispatcher on it")
    return group, dist.get_rank(group), dist.get_world_size(group)


def choose_device(group: dist.ProcessGroup | None, device: torch.device | str | None) -> torch.device:
    """The device asked for; by default the current GPU, or the CPU without one or with a group that has no NCCL."""
    if device is None:
        on_gpu = torch.cuda.is_available() and (group is None or "nccl" in str(dist.get_backend_config(group)))
        device = "cuda" if on_gpu else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be a "cuda" device or "cpu", got {device!r}') from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f'device must be a "cuda" device or "cpu", got {str(device)!r}')
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise ValueError(
            f"device must be one of this machine's, got {str(device)!r}, and torch finds {torch.cuda.device_count()} GPUs"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def attempt(settings: Callable[[], DispatcherConfig], alone: bool) -> DispatcherConfig | str:
    """This rank's settings, or, where others wait for it, what is wrong with them, whatever it is."""
    try:
        return settings()
    except Exception as error:
        if alone:
            raise
        return str(error)


def agree(mine: DispatcherConfig | str, group: dist.ProcessGroup | None, rank: int, world_size: int) -> DispatcherConfig:
    """This rank's settings, after all ranks have shown each other theirs. A rank whose settings are wrong tells the others, which would
    otherwise wait for it."""
    if world_size > 1:
        everyone: list[DispatcherConfig | str] = [""] * world_size
        dist.all_gather_object(everyone, mine, group=group)
        for other, theirs in enumerate(everyone):
            if isinstance(mine, str):
                raise ValueError(mine)
            if isinstance(theirs, str):
                raise ConfigMismatchError(f"rank {other} of the group has wrong settings: {theirs}")
            if mine != theirs:
                raise ConfigMismatchError(
                    f"ranks {rank} and {other} of the group disagree on {mine.difference(theirs)}; give all ranks the same settings"
                )
    assert isinstance(mine, DispatcherConfig)
    return mine
