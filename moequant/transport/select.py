"""Which transport serves a dispatcher."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.batch import ceil_div
from moequant.checks import check_int, check_is
from moequant.config import DispatcherConfig
from moequant.errors import UnreachableError
from moequant.transport.base import Transport
from moequant.transport.buffers import BufferSpec, named
from moequant.transport.collective import CollectiveTransport, choose_exchange
from moequant.transport.local import LocalTransport
from moequant.transport.packed import PackedTransport
from moequant.transport.padded import PaddedTransport
from moequant.transport.peer_memory import why_unreachable
from moequant.transport.shared import SharedTransport
from moequant.transport.symmetric import SymmetricTransport

LOG = logging.getLogger("moequant")


def resolve(config: DispatcherConfig, group: dist.ProcessGroup | None, device: torch.device) -> DispatcherConfig:
    """config with the transport that "auto" means here, and on a CPU the exchange: packed, as no graph is captured there, and what is
    sent is copied. Collective, with the same answer on all ranks.

    Raises UnreachableError for "symmetric" where ranks can't address each other's memory.
    """
    if config.shared_batch:
        return dataclasses.replace(config, transport="local" if config.world_size == 1 else "collective")
    if device.type == "cpu" and config.exchange == "auto" and config.world_size > 1 and config.transport != "symmetric":
        return dataclasses.replace(config, transport="collective", exchange="packed")
    if config.transport in ("local", "collective"):
        return config
    if config.transport == "auto":
        if config.world_size == 1:
            return dataclasses.replace(config, transport="local")
        # `exchange=` is a setting of "collective" alone: who gives it wants that transport
        if device.type != "cuda" or config.exchange != "auto":
            return dataclasses.replace(config, transport="collective")
    if group is None:
        raise ValueError('transport "symmetric" needs torch.distributed; call init_process_group first, or use "auto"')
    reason = why_unreachable(group, device, config.first_limit)
    if reason is None:
        return dataclasses.replace(config, transport="symmetric")
    if config.transport == "symmetric":
        raise UnreachableError(f'transport "symmetric" can\'t be used here: {reason}; use "collective" or "auto"')
    LOG.warning('transport "auto" is "collective": "symmetric" can\'t be used here: %s', reason)
    return dataclasses.replace(config, transport="collective")


def buffer_bytes(
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    max_tokens_per_rank: int,
    world_size: int = 1,
    intermediate_size: int | None = None,
    fused: bool = True,
    gated: bool = True,
    **settings: Any,
) -> int:
    """Bytes of device memory that a dispatcher with these settings allocates on each rank, and, with intermediate_size, those of the
    workspaces that whole layers on it add. Needs no GPU and no group.

    Args:
        num_experts: as the constructor's.
        top_k: as the constructor's.
        hidden_size: as the constructor's.
        max_tokens_per_rank: as the constructor's.
        world_size: stands in for the group.
        intermediate_size: I of the experts; None: without their workspaces.
        fused: whether GEMM 1 needs no gate and up in memory (`GroupedExperts.fuses`), as quantized experts with plain SwiGLU and no
            bias13 may.
        gated: whether GEMM 1 has gate and up, 2I columns, or, as of an `Activation` with gated=False, I. Those are never fused.
        **settings: as the constructor's. transport="auto" with several ranks means "symmetric" on a machine that has GPUs, and
            "collective" on one that has none, where exchange="auto" is "packed".

    Returns:
        The bytes.

    Raises:
        ValueError: wrong settings.
    """
    config = DispatcherConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        max_tokens_per_rank=max_tokens_per_rank,
        world_size=world_size,
        **settings,
    )
    if config.transport == "auto":
        shared = config.exchange == "auto" and torch.cuda.is_available() and not config.shared_batch
        transport = "local" if config.world_size == 1 else "symmetric" if shared else "collective"
        config = dataclasses.replace(config, transport=transport)
    exchanged = config.transport == "collective" and not config.shared_batch
    if exchanged and config.exchange == "auto" and not torch.cuda.is_available():
        config = dataclasses.replace(config, exchange="packed")
    specs = [*named(transport_class(config).buffer_specs(config)).values()]
    for name, value in (("fused", fused), ("gated", gated)):
        check_is(name, value, bool)
    if intermediate_size is not None:
        check_int("intermediate_size", intermediate_size, 1)
        # None: not in memory
        product = None if config.quantized and fused and gated else (2 if gated else 1) * intermediate_size
        specs += workspace_specs(config, intermediate_size, product)
    return config.slots * sum(spec.nbytes for spec in specs)


def workspace_specs(config: DispatcherConfig, intermediate_size: int, product_size: int | None) -> list[BufferSpec]:
    """What whole layers add to a slot: `moequant.workspaces`. With `symmetric` their output is among the buffers, where it is pulled,
    and of rows that are pushed there is none."""
    rows = config.batch_shape
    specs = [BufferSpec((*rows, intermediate_size), config.dtype)]
    if config.quantized:
        specs.append(BufferSpec((*rows, ceil_div(intermediate_size, 128)), torch.float32))
    if product_size is not None:
        specs.append(BufferSpec((*rows, product_size), config.output_dtype))
    if config.transport != "symmetric" or config.per_rank:
        specs.append(BufferSpec((*rows, config.hidden_size), config.output_dtype))
    return specs


def transport_class(config: DispatcherConfig) -> type[Transport]:
    """The class for settings whose transport is resolved."""
    if config.transport == "local":
        return LocalTransport
    if config.transport == "symmetric":
        return SymmetricTransport
    if config.shared_batch:
        return SharedTransport
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
