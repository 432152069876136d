"""Layers on two streams, by request: communication under the experts' GEMMs. Transport "symmetric", reduce="exact", `GroupedExperts`.

In waves of experts: rows of each rank's first experts are sent first, those of the others under the GEMMs of the first:

    main   dispatch of the first | dispatch of the others | GEMMs of the others        | combine
    side                         | GEMMs of the first                                  |

In halves of the tokens, one in each slot:

    main   dispatch 0 | dispatch 1   | GEMMs 1   combine 1
    side              | GEMMs 0   combine 0

The GEMMs on the side leave `num_sms` SMs alone, for the exchange: their programs take one whole each, and stay until the
last tile. Their stream has the higher priority, so that they begin at once; the other stream's GEMMs start where these end.

Why two streams can't deadlock:

1. All ranks queue the same steps, and there is one order of them: dispatch of the first experts, of the others, GEMMs of the first, of
   the others, combine; or dispatch 0, dispatch 1, GEMMs 0, combine 0, GEMMs 1, combine 1. Events make it so for combine 0, which waits
   for dispatch 1, and for combine 1, which waits for GEMMs 0.
2. A step depends on earlier steps alone.
3. What can hold up a step until other ranks come is an earlier step, or the step itself. Later ones only delay it: they are GEMMs, which
   end. What waits for other ranks are single programs with a time limit, and kernels that use programmatic dependent launch behind a
   wait leave GEMMs some SMs (`kernels/library/pdl.py`).
4. So of the steps that are not done on some rank, the first can go on. This holds as well where both streams share one hardware queue,
   since events point back in that order alone.

When the GEMMs are bound by the card's power, overlap gains nothing: at every size measured on H200s one piece is as fast
(benchmarks/notes_layer.md).

L local experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.config import DispatcherConfig
from moequant.experts import GroupedExperts
from moequant.layer import Options

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher


def side_stream(config: DispatcherConfig, device: torch.device) -> torch.cuda.Stream | None:
    """The stream of the first products, where there is something to run beside them. Its programs go before those of others."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and config.pushes else None


def side_sms(dispatcher: MoEQuantDispatcher) -> int:
    """Multiprocessors for the products beside an exchange."""
    from moequant.kernels.library.common import multiprocessors

    return max(multiprocessors(dispatcher.device) - dispatcher.config.num_sms, 1)


def run_in_waves(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: GroupedExperts,
    options: Options,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """The module's first picture. side: the second stream; None on a CPU, where one step follows the other."""
    main = None if side is None else torch.cuda.current_stream(tokens[0].device)
    sms, first = side_sms(dispatcher), options.first_experts
    batch, handle = dispatcher.dispatch_first(*tokens, options.slot, first, options.layer, options.expected_tokens)
    destinations = dispatcher.begin_push(handle)
    # of ragged rows both waves' are numbered from the first on
    parts = (destinations, destinations) if dispatcher.config.ragged else (destinations[:first], destinations[first:])
    follow(side, main)
    try:
        with torch.cuda.stream(side):
            experts.part(0, first).push(batch, parts[0], num_sms=sms)
        others = dispatcher.dispatch_second(handle)
        experts.part(first, dispatcher.config.num_local_experts).push(others, parts[1])
    finally:
        # after an error too: what the side uses may be freed then
        follow(main, side)
    return dispatcher.combine_pushed(handle, out=options.out)


def run_in_halves(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: GroupedExperts,
    options: Options,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """The module's second picture. side: as for `run_in_waves`."""
    hidden, layer, out = tokens[0], options.layer, options.out
    half = (hidden.shape[0] + 1) // 2
    expected = None if options.expected_tokens is None else (options.expected_tokens + 1) // 2
    if out is None:
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    main = None if side is None else torch.cuda.current_stream(hidden.device)

    batch0, handle0 = dispatcher.dispatch(*(x[:half] for x in tokens), slot=0, layer=layer, expected_tokens=expected)
    # not beside it: they would share the wire
    follow(side, main)
    try:
        with torch.cuda.stream(side):
            experts.push(batch0, dispatcher.begin_push(handle0), num_sms=side_sms(dispatcher))
        pushed = None if side is None else side.record_event()
        batch1, handle1 = dispatcher.dispatch(*(x[half:] for x in tokens), slot=1, layer=layer, expected_tokens=expected)
        follow(side, main)
        with torch.cuda.stream(side):
            dispatcher.combine_pushed(handle0, out=out[:half])
        experts.push(batch1, dispatcher.begin_push(handle1))
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
