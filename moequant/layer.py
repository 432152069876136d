"""A whole layer on a dispatcher and its experts: dispatch, products, combine, and what of them runs side by side.

With transport "symmetric" and reduce "exact", GEMM 2 stores each row at its token's rank (`GroupedExperts.push`), so that a flag round
and a local sum are all that remains of combine. Beyond that a layer can go in one of two ways on two streams.

In waves of experts: rows of each rank's first experts are sent first, those of the others under the products of the first:

    main   dispatch of the first | dispatch of the others | products of the others     | combine
    side                         | products of the first                               |

In halves of the tokens, one in each slot:

    main   dispatch 0 | dispatch 1   | products 1   combine 1
    side              | products 0   combine 0

The products on the side leave `num_sms` multiprocessors alone, for the exchange: their programs take one whole each, and stay until the
last tile. Their stream has the higher priority, so that they begin at once; the other stream's products start where these end.

Why two streams can't deadlock. What waits for other ranks are single programs, one a slot at most, so that they never fill a device and
everything else goes on. What a wait is for, every rank queues at the same place of the same sequence of steps, behind events that point
back in that sequence alone. Of the waits that ranks are in, take the earliest in the sequence: before it stand, on every rank, kernels
that end by themselves and waits that are over, so its answer comes. That holds as well where both streams share one hardware queue.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

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
# What the launches of a second part cost.
LAUNCHES = 15e-6


class Plan(NamedTuple):
    """How a layer goes: in how many parts its tokens, and how many experts of each rank in a first wave, 0 for none."""

    chunks: int = 1
    first_experts: int = 0


def layer_seconds(config: DispatcherConfig, intermediate_size: int, plan: Plan, sms: int) -> float:
    """A layer's time by a rough model, with max_tokens_per_rank tokens on each rank and uniform routing, on a device of sms
    multiprocessors.

    What is dispatched beside products costs them a share of the multiprocessors for so long. Half of the tokens have half of the rows of
    each expert: weights are read, and last tiles lost, twice.
    """
    tokens, ranks, hidden = config.max_tokens_per_rank, config.world_size, config.hidden_size
    entries = tokens * config.top_k

    def reached(experts: int) -> float:
        """The other ranks that have a row of a token among so many of their experts."""
        return (ranks - 1) * (1 - (1 - experts / config.num_experts) ** config.top_k)

    def seconds(ranks_reached: float) -> float:
        return tokens * ranks_reached * hidden * config.dtype.itemsize / DISPATCH_RATE

    dispatch = seconds(reached(config.num_local_experts))
    total = entries * 2 * hidden / SUM_RATE
    weights = 3 * config.num_local_experts * hidden * intermediate_size
    operations = 2 * weights * (entries * ranks / config.num_experts + plan.chunks * LOST_ROWS)
    products = max(operations / PRODUCT_RATE, plan.chunks * weights * config.dtype.itemsize / MEMORY_RATE)
    share = config.num_sms / sms
    if plan.chunks == 2:
        return dispatch / 2 * (1 + share) + products + total / 2 + LAUNCHES
    if plan.first_experts:
        first = seconds(reached(plan.first_experts))
        beside, meanwhile = dispatch - first, products * plan.first_experts / config.num_local_experts
        return first + products + beside * share + max(0.0, beside - meanwhile) + total + LAUNCHES
    return dispatch + products + total


def choose_plan(config: DispatcherConfig, intermediate_size: int, sms: int) -> Plan:
    """The fastest for a layer of max_tokens_per_rank tokens, if it is faster than one piece by more than the model may err."""
    plans = [Plan(first_experts=experts) for experts in range(config.num_local_experts)]
    if config.slots == 2:
        plans.append(Plan(chunks=2))
    times = [layer_seconds(config, intermediate_size, plan, sms) for plan in plans]
    best = min(times)
    return plans[times.index(best)] if best < 0.97 * times[0] else plans[0]


def side_stream(config: DispatcherConfig, device: torch.device) -> torch.cuda.Stream | None:
    """The stream of the first products, where there is something to run beside them. Its programs go before those of others."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and config.pushes else None


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU any number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def run_layer(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: Callable[[ExpertBatch], Tensor],
    slot: int,
    chunks: int | None,
    first_experts: int | None,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """What a call of the dispatcher does. tokens: hidden states, ids, weights. side: the stream of the first products."""
    config = dispatcher.config
    pushing = experts if isinstance(experts, GroupedExperts) and config.pushes else None
    plan = Plan(1 if chunks is None else chunks, first_experts or 0)
    check_plan(plan, config, pushing is not None, type(experts).__name__)
    if pushing is not None:
        sms = max(multiprocessors(dispatcher.device), config.num_sms + 1)
        if chunks is None and first_experts is None:
            plan = choose_plan(config, pushing.intermediate_size, sms)
        if plan.chunks == 2:
            return run_in_halves(dispatcher, tokens, pushing, side, sms - config.num_sms)
        if plan.first_experts:
            return run_in_waves(dispatcher, tokens, pushing, slot, plan.first_experts, side, sms - config.num_sms)
    batch, handle = dispatcher.dispatch(*tokens, slot=slot)
    if pushing is not None:
        push(pushing, batch, handle)
        return dispatcher.combine_pushed(handle)
    if isinstance(experts, GroupedExperts) and config.transport == "symmetric":
        return dispatcher.combine(experts(batch, out=dispatcher.output_buffer(slot)), handle)
    return dispatcher.combine(experts(batch), handle)


def check_plan(plan: Plan, config: DispatcherConfig, pushes: bool, experts: str) -> None:
    """Raises ValueError for a plan that can't be."""
    if plan == Plan():
        return
    here = f'"{config.transport}", "{config.reduce}", overlap={config.overlap} and slots={config.slots}'
    needed = 'GroupedExperts, transport "symmetric", reduce="exact" and overlap=True'
    if plan.chunks != 1 and not (plan.chunks == 2 and pushes and config.slots == 2):
        raise ValueError(f"chunks must be 1, or 2 with {needed} and slots=2, got {plan.chunks} with {experts}, {here}")
    if plan.first_experts and not (pushes and plan.chunks == 1 and 0 < plan.first_experts < config.num_local_experts):
        raise ValueError(
            f"first_experts must be 0, or with {needed} and without chunks=2 at most {config.num_local_experts - 1}, one less than each "
            f"rank's experts, got {plan.first_experts} with chunks={plan.chunks}, {experts}, {here}"
        )


def push(experts: GroupedExperts, batch: ExpertBatch, handle: DispatchHandle, num_sms: int | None = None) -> None:
    assert handle.destinations is not None
    experts.push(batch, handle.destinations, num_sms=num_sms)


def run_in_waves(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: GroupedExperts,
    slot: int,
    first: int,
    side: torch.cuda.Stream | None,
    side_sms: int,
) -> Tensor:
    """The module's first picture. side: the second stream; None on a CPU, where one step follows the other."""
    main = None if side is None else torch.cuda.current_stream(tokens[0].device)
    batch, handle = dispatcher.dispatch_first(*tokens, slot, first)
    assert handle.destinations is not None
    follow(side, main)
    with torch.cuda.stream(side):
        experts.part(0, first).push(batch, handle.destinations[:first], num_sms=side_sms)
    others = dispatcher.dispatch_second(*tokens[:2], handle, first)
    experts.part(first, dispatcher.config.num_local_experts).push(others, handle.destinations[first:])
    follow(main, side)
    return dispatcher.combine_pushed(handle)


def run_in_halves(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: GroupedExperts,
    side: torch.cuda.Stream | None,
    side_sms: int,
) -> Tensor:
    """The module's second picture. side: as for `run_in_waves`."""
    hidden = tokens[0]
    half = (hidden.shape[0] + 1) // 2
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    main = None if side is None else torch.cuda.current_stream(hidden.device)

    batch0, handle0 = dispatcher.dispatch(*(x[:half] for x in tokens), slot=0)
    # not beside it: they would share the wire
    follow(side, main)
    with torch.cuda.stream(side):
        push(experts, batch0, handle0, side_sms)
        dispatcher.combine_pushed(handle0, out=out[:half])
    batch1, handle1 = dispatcher.dispatch(*(x[half:] for x in tokens), slot=1)
    push(experts, batch1, handle1)
    dispatcher.combine_pushed(handle1, out=out[half:])
    follow(main, side)
    return out


def follow(later: torch.cuda.Stream | None, earlier: torch.cuda.Stream | None) -> None:
    """What comes on `later` waits for what is on `earlier`."""
    if later is not None and earlier is not None:
        later.wait_stream(earlier)
