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

Why two streams can't deadlock. All ranks queue the same steps; what waits for other ranks are single programs, with a time limit, but
kernels that begin early behind a wait can hold multiprocessors that products need whole. So the steps have an order in which each
depends on earlier ones alone, and can be held up until other ranks come by earlier ones alone (later ones only delay it, as products
end): dispatch of the first, of the others, products of the first, of the others, combine; or dispatch 0, dispatch 1, products 0,
combine 0, products 1, combine 1, where events hold combine 0 back until dispatch 1 is done, and combine 1 until products 0 are. Of the
steps that are not done on some rank the first one can go on. That holds as well where both streams share one hardware queue, since
events point back in that order alone.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moequant.batch import DispatchHandle, ExpertBatch
from moequant.checks import check_int
from moequant.config import DispatcherConfig
from moequant.experts import GroupedExperts, can_push

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher

# What a layer's parts reach on H200s, of benchmarks/results, in bytes/s: dispatch, and each multiprocessor of one that has few; the local
# sum; weights from memory; and in operations/s: fp8 products of many rows.
DISPATCH_RATE, DISPATCH_RATE_OF_ONE, SUM_RATE, MEMORY_RATE, PRODUCT_RATE = 240e9, 14e9, 3.9e12, 4.2e12, 1.2e15
# An expert's last tile of 128 rows is half full.
LOST_ROWS = 64


class Plan(NamedTuple):
    """How a layer goes: in how many parts its tokens, and how many experts of each rank in a first wave, 0 for none."""

    chunks: int = 1
    first_experts: int = 0


def layer_seconds(config: DispatcherConfig, intermediate_size: int, plan: Plan, sms: int) -> float:
    """A layer's time by a rough model, with max_tokens_per_rank tokens on each rank and uniform routing, on a device of sms
    multiprocessors.

    In two parts the products end unevenly twice, which costs about the time of a tile; half of the tokens have half of the rows of each
    expert, so that weights are read, and last tiles lost, twice as well. What is dispatched beside products takes longer, on few
    multiprocessors. Nothing is gained where products are many enough to be held by the card's power: beside others they get less of it.
    """
    tokens, ranks, hidden = config.max_tokens_per_rank, config.world_size, config.hidden_size
    entries = tokens * config.top_k

    def sent(experts: int) -> float:
        """Bytes to other ranks for the tokens that name one of so many experts there."""
        reached = (ranks - 1) * (1 - (1 - experts / config.num_experts) ** config.top_k)
        return tokens * reached * hidden * config.dtype.itemsize

    weights = 3 * config.num_local_experts * hidden * intermediate_size
    reading = plan.chunks * weights * config.dtype.itemsize / MEMORY_RATE
    computing = 2 * weights * (entries * ranks / config.num_experts + plan.chunks * LOST_ROWS) / PRODUCT_RATE
    products, exchanged = max(reading, computing), sent(config.num_local_experts)
    whole = exchanged / DISPATCH_RATE + products + entries * 2 * hidden / SUM_RATE
    if plan == Plan():
        return whole
    tile = 2 * 128 * 256 * (hidden + intermediate_size) * sms / PRODUCT_RATE
    if plan.chunks == 2:
        beside, meanwhile = exchanged / 2, products / 2
    else:
        beside, meanwhile = exchanged - sent(plan.first_experts), products * plan.first_experts / config.num_local_experts
    late = max(0.0, beside / (config.num_sms * DISPATCH_RATE_OF_ONE) - meanwhile)
    return whole + tile - (0.0 if computing > reading else max(0.0, beside / DISPATCH_RATE - late))


@functools.lru_cache
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
    # before anything is sent: the others would wait for what this rank can't do
    if not callable(experts):
        raise ValueError(f"experts must be callable with an ExpertBatch, as GroupedExperts are, got {type(experts).__name__}")
    for name, value in (("chunks", chunks), ("first_experts", first_experts)):
        if value is not None:
            check_int(name, value)
    config = dispatcher.config
    pushing = experts if isinstance(experts, GroupedExperts) and can_push(experts) and config.pushes else None
    plan = Plan(1 if chunks is None else chunks, first_experts or 0)
    check_plan(plan, config, pushing is not None, type(experts).__name__)
    if pushing is not None:
        from moequant.kernels.common import multiprocessors

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
    if isinstance(experts, GroupedExperts) and can_push(experts) and config.transport == "symmetric":
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
    possible = isinstance(plan.first_experts, int) and 0 < plan.first_experts < config.num_local_experts
    if plan.first_experts and not (pushes and plan.chunks == 1 and possible):
        raise ValueError(
            f"first_experts must be from 0 to {config.num_local_experts - 1}, one less than a rank's experts, and above 0 only with "
            f"{needed} and chunks=1, got {plan.first_experts} with chunks={plan.chunks}, {experts}, {here}"
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
    try:
        with torch.cuda.stream(side):
            experts.part(0, first).push(batch, handle.destinations[:first], num_sms=side_sms)
        others = dispatcher.dispatch_second(handle)
        experts.part(first, dispatcher.config.num_local_experts).push(others, handle.destinations[first:])
    finally:
        # after an error too: what the side uses may be freed then
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
    try:
        with torch.cuda.stream(side):
            push(experts, batch0, handle0, side_sms)
        pushed = None if side is None else side.record_event()
        batch1, handle1 = dispatcher.dispatch(*(x[half:] for x in tokens), slot=1)
        follow(side, main)
        with torch.cuda.stream(side):
            dispatcher.combine_pushed(handle0, out=out[:half])
        push(experts, batch1, handle1)
        if main is not None and pushed is not None:
            main.wait_event(pushed)
        dispatcher.combine_pushed(handle1, out=out[half:])
    finally:
        # after an error too: what the side uses may be freed then
        follow(main, side)
    return out


def follow(later: torch.cuda.Stream | None, earlier: torch.cuda.Stream | None) -> None:
    """What comes on `later` waits for what is on `earlier`."""
    if later is not None and earlier is not None:
        later.wait_stream(earlier)
