"""A whole layer on a dispatcher and its experts: dispatch, products, combine, and what of them runs side by side.

With transport "symmetric" and reduce "exact", GEMM 2 stores each row at its token's rank (`GroupedExperts.push`), so that a flag round
and a local sum are all that remains of combine.

Many tokens go in two halves, one in each slot, on two streams:

    main   dispatch 0 | GEMM 1 of 0   GEMM 2 of 0 | GEMM 1 of 1   GEMM 2 of 1   combine 1
    side              | dispatch 1                | combine 0

Beside dispatch 1, GEMM 1 of 0 leaves `num_sms` multiprocessors alone: its programs take one whole each, and stay until the last tile.

Why two streams can't deadlock. What waits for other ranks are single programs, one a slot at most, so that they never fill a device and
everything else goes on. What a wait is for, every rank queues at the same place of the same sequence of steps, behind events that point
back in that sequence alone. Of the waits that ranks are in, take the earliest in the sequence: before it stand, on every rank, kernels
that end by themselves and waits that are over, so its answer comes. That holds as well where both streams share one hardware queue.

T tokens, K top-k, E experts, W ranks, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.batch import DispatchHandle, ExpertBatch
from moequant.config import DispatcherConfig
from moequant.experts import GroupedExperts

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher

# What a layer's parts reach on H200s, of benchmarks/results, in bytes/s: dispatch, the local sum, weights from memory; and in
# operations/s: fp8 products of many rows.
DISPATCH_RATE, SUM_RATE, MEMORY_RATE, PRODUCT_RATE = 240e9, 3.9e12, 4.2e12, 1.2e15
# An expert's last tile of 128 rows is half full.
LOST_ROWS = 64


def layer_seconds(config: DispatcherConfig, intermediate_size: int, chunks: int, sms: int) -> float:
    """A layer's time by a rough model, with max_tokens_per_rank tokens on each rank and uniform routing.

    Of two chunks, half of the dispatch hides under GEMM 1 of the first half, which has fewer of the device's sms multiprocessors; and
    weights are read, and last tiles lost, twice.
    """
    tokens, ranks, hidden = config.max_tokens_per_rank, config.world_size, config.hidden_size
    entries = tokens * config.top_k
    reached = ranks * (1 - (1 - 1 / ranks) ** config.top_k)
    dispatch = tokens * reached * (1 - 1 / ranks) * hidden * config.dtype.itemsize / DISPATCH_RATE
    total = entries * 2 * hidden / SUM_RATE
    weights = 3 * config.num_local_experts * hidden * intermediate_size
    rows = entries * ranks / config.num_experts
    operations = 2 * weights * (rows + chunks * LOST_ROWS)
    products = max(operations / PRODUCT_RATE, chunks * weights * config.dtype.itemsize / MEMORY_RATE)
    if chunks == 1:
        return dispatch + products + total
    # GEMM 1 is two thirds of the products
    return dispatch / 2 + products * (1 + config.num_sms / (sms - config.num_sms) / 3) + total


def choose_chunks(config: DispatcherConfig, intermediate_size: int, sms: int) -> int:
    """2 where a layer of max_tokens_per_rank tokens is faster in halves by more than the model may err; otherwise 1."""
    one, two = (layer_seconds(config, intermediate_size, chunks, sms) for chunks in (1, 2))
    return 2 if two < 0.97 * one else 1


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU any number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def run_layer(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: Callable[[ExpertBatch], Tensor],
    slot: int,
    chunks: int | None,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """What a call of the dispatcher does. tokens: hidden states, ids, weights. side: a stream for the second half of the tokens."""
    config = dispatcher.config
    pushing = experts if isinstance(experts, GroupedExperts) and config.pushes else None
    halves = pushing is not None and config.slots == 2
    if chunks not in (None, 1) and not (chunks == 2 and halves):
        raise ValueError(
            'chunks must be 1, or 2 with GroupedExperts, transport "symmetric", reduce="exact", overlap=True and slots=2, got '
            f'{chunks} with {type(experts).__name__}, "{config.transport}", "{config.reduce}", overlap={config.overlap} and '
            f"slots={config.slots}"
        )
    if pushing is not None and halves:
        sms = max(multiprocessors(dispatcher.device), config.num_sms + 1)
        if (chunks or choose_chunks(config, pushing.intermediate_size, sms)) == 2:
            return run_in_halves(dispatcher, tokens, pushing, side, sms - config.num_sms)
    batch, handle = dispatcher.dispatch(*tokens, slot=slot)
    if pushing is not None:
        push(pushing, batch, handle)
        return dispatcher.combine_pushed(handle)
    if isinstance(experts, GroupedExperts) and config.transport == "symmetric":
        return dispatcher.combine(experts(batch, out=dispatcher.output_buffer(slot)), handle)
    return dispatcher.combine(experts(batch), handle)


def push(experts: GroupedExperts, batch: ExpertBatch, handle: DispatchHandle, gemm1_sms: int | None = None) -> None:
    assert handle.destinations is not None
    experts.gemm2_push(experts.gemm1_swiglu(batch, num_sms=gemm1_sms), batch, handle.destinations)


def run_in_halves(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: GroupedExperts,
    side: torch.cuda.Stream | None,
    gemm1_sms: int,
) -> Tensor:
    """The module's picture. side: the second stream; None on a CPU, where one step follows the other."""
    hidden = tokens[0]
    half = (hidden.shape[0] + 1) // 2
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    main = None if side is None else torch.cuda.current_stream(hidden.device)

    batch0, handle0 = dispatcher.dispatch(*(x[:half] for x in tokens), slot=0)
    # not beside it: they would share the wire
    follow(side, main)
    with torch.cuda.stream(side):
        batch1, handle1 = dispatcher.dispatch(*(x[half:] for x in tokens), slot=1)
    arrived = None if side is None else side.record_event()
    push(experts, batch0, handle0, gemm1_sms)
    follow(side, main)
    with torch.cuda.stream(side):
        dispatcher.combine_pushed(handle0, out=out[:half])
    if main is not None and arrived is not None:
        main.wait_event(arrived)
    push(experts, batch1, handle1)
    dispatcher.combine_pushed(handle1, out=out[half:])
    follow(main, side)
    return out


def follow(later: torch.cuda.Stream | None, earlier: torch.cuda.Stream | None) -> None:
    """What comes on `later` waits for what is on `earlier`."""
    if later is not None and earlier is not None:
        later.wait_stream(earlier)
