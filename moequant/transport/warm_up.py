"""Compiles and loads a transport's kernels, so that no first call compiles while other ranks wait."""

from __future__ import annotations

import torch

from moequant.config import DispatcherConfig
from moequant.transport.base import Slot, Transport


def token_counts(most: int) -> list[int]:
    """Numbers of tokens, at least one of them for each way in which kernels are launched for 1 to most tokens: each is half as many
    again as the one before, or less."""
    counts = {factor * 2**power for power in range(most.bit_length()) for factor in (1, 3)}
    return [*sorted(count for count in counts if count < most), most]


def warm_up(transport: Transport, config: DispatcherConfig, slot: Slot, device: torch.device) -> None:
    """For any number of tokens and both types of ids, with tokens of the experts' type that go nowhere. Collective; waits for it all."""
    most = config.max_tokens_per_rank
    hidden = torch.zeros(most, config.hidden_size, dtype=config.output_dtype, device=device)
    weights = torch.zeros(most, config.top_k, device=device)
    # stands in for expert output, of which nothing is read: a whole one may be gigabytes
    nothing = torch.zeros(1, dtype=config.output_dtype, device=device)
    output = nothing.expand(*config.batch_shape, config.hidden_size)
    # how a kernel is launched depends on whether tokens are few or many
    sizes = token_counts(most)
    for dtype in (torch.int32, torch.int64):
        ids = torch.full(weights.shape, -1, dtype=dtype, device=device)
        for tokens in sizes:
            _, state = transport.dispatch(hidden[:tokens], ids[:tokens], weights[:tokens], slot)
            transport.combine(output, weights[:tokens], hidden[:tokens], slot, state)
            state = transport.dispatch_send(hidden[:tokens], ids[:tokens], weights[:tokens], slot)
            transport.dispatch_recv(tokens, slot)
            transport.combine_send(output, slot)
            transport.combine_recv(weights[:tokens], hidden[:tokens], slot, state)
    torch.cuda.synchronize(device)
