"""Which transport serves a dispatcher."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.config import DispatcherConfig
from moequant.errors import UnreachableError
from moequant.peer_memory import why_unreachable
from moequant.transport.base import Transport
from moequant.transport.collective import CollectiveTransport, PackedTransport, PaddedTransport, choose_exchange
from moequant.transport.local import LocalTransport
from moequant.transport.symmetric import SymmetricTransport


def resolve(config: DispatcherConfig, group: dist.ProcessGroup | None, device: torch.device) -> DispatcherConfig:
    """config with the transport that "auto" means here. Collective, with the same answer on all ranks.

    "auto" does not take "symmetric" before that has passed its replay tests on four GPUs.
    Raises UnreachableError for "symmetric" where ranks can't address each other's memory.
    """
    if config.transport == "auto":
        return dataclasses.replace(config, transport="local" if config.world_size == 1 else "collective")
    if config.transport == "symmetric":
        if group is None:
            raise ValueError('transport "symmetric" needs torch.distributed; call init_process_group first, or use "auto"')
        reason = why_unreachable(group, device)
        if reason is not None:
            raise UnreachableError(f'transport "symmetric" can\'t be used here: {reason}; use "collective" or "auto"')
    return config


def transport_class(config: DispatcherConfig) -> type[Transport]:
    """The class for settings whose transport is resolved."""
    if config.transport == "local":
        return LocalTransport
    if config.transport == "symmetric":
        return SymmetricTransport
    return PaddedTransport if choose_exchange(config) == "padded" else PackedTransport


def make_transport(
    config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup | None
) -> Transport:
    kind = transport_class(config)
    if kind is LocalTransport:
        return LocalTransport(config, rank, device, status)
    if group is None:
        raise ValueError('transport "collective" needs torch.distributed; call init_process_group first, or use "auto"')
    assert issubclass(kind, (CollectiveTransport, SymmetricTransport))
    return kind(config, rank, device, status, group)
