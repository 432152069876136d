"""Which transport serves a dispatcher."""

from __future__ import annotations

import dataclasses
import logging

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

LOG = logging.getLogger("moequant")


def resolve(config: DispatcherConfig, group: dist.ProcessGroup | None, device: torch.device) -> DispatcherConfig:
    """config with the transport that "auto" means here. Collective, with the same answer on all ranks.

    Raises UnreachableError for "symmetric" where ranks can't address each other's memory.
    """
    if config.transport in ("local", "collective"):
        return config
    if config.transport == "auto":
        if config.world_size == 1:
            return dataclasses.replace(config, transport="local")
        # whoever names an exchange wants the transport that has one
        if device.type != "cuda" or config.exchange != "auto":
            return dataclasses.replace(config, transport="collective")
    if group is None:
        raise ValueError('transport "symmetric" needs torch.distributed; call init_process_group first, or use "auto"')
    reason = why_unreachable(group, device)
    if reason is None:
        return dataclasses.replace(config, transport="symmetric")
    if config.transport == "symmetric":
        raise UnreachableError(f'transport "symmetric" can\'t be used here: {reason}; use "collective" or "auto"')
    LOG.warning('transport "auto" is "collective": "symmetric" can\'t be used here: %s', reason)
    return dataclasses.replace(config, transport="collective")


def guess(config: DispatcherConfig) -> DispatcherConfig:
    """`resolve` without a group: ranks are taken to reach each other's memory on a machine that has GPUs."""
    if config.transport != "auto":
        return config
    shared = config.exchange == "auto" and torch.cuda.is_available()
    transport = "local" if config.world_size == 1 else "symmetric" if shared else "collective"
    return dataclasses.replace(config, transport=transport)


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
