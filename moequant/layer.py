"""A whole layer on a dispatcher and its experts: dispatch, products, combine.

With transport "symmetric" and reduce "exact", GEMM 2 stores each row at its token's rank (`GroupedExperts.push`), so that a flag round
and a local sum are all that remains of combine. `moequant/overlap.py` has the layers that go on two streams.

T tokens, K top-k, L local experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.batch import ExpertBatch
from moequant.checks import check_int
from moequant.config import DispatcherConfig
from moequant.experts import GroupedExperts, can_push
from moequant.traced import numbered

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher


def run_layer(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: Callable[[ExpertBatch], Tensor],
    pushing: GroupedExperts | None,
    slot: int,
    layer: int | None,
) -> Tensor:
    """A layer in one piece. tokens: hidden states, ids, weights. pushing: the experts, if they store rows at the tokens' ranks."""
    batch, handle = dispatcher.dispatch(*tokens, slot=slot, layer=layer)
    if pushing is not None:
        pushing.push(batch, dispatcher.begin_push(handle))
        return dispatcher.combine_pushed(handle)
    if isinstance(experts, GroupedExperts) and can_push(experts) and dispatcher.config.transport == "symmetric":
        return dispatcher.combine(experts(batch, out=dispatcher.output_buffer(slot)), handle)
    return dispatcher.combine(experts(batch), handle)


def pushing_experts(experts: object, chunks: int, first_experts: int, config: DispatcherConfig) -> GroupedExperts | None:
    """The experts, if they store their rows at the tokens' ranks themselves. Raises ValueError for a layer that can't be."""
    if not callable(experts):
        raise ValueError(f"experts must be callable with an ExpertBatch, as GroupedExperts are, got {type(experts).__name__}")
    pushing = experts if config.pushes and isinstance(experts, GroupedExperts) and can_push(experts) else None
    # True is no 1
    if type(chunks) is type(first_experts) is int and chunks == 1 and not first_experts:
        return pushing
    check_int("chunks", chunks, 1)
    check_int("first_experts", first_experts)
    check_overlap(chunks, first_experts, config, pushing is not None, type(experts).__name__)
    return pushing


def check_overlap(chunks: int, first_experts: int, config: DispatcherConfig, pushes: bool, experts: str) -> None:
    """Raises ValueError for an overlap that can't be."""
    if chunks == 1 and not first_experts:
        return
    here = f'"{config.transport}", "{config.reduce}", overlap={config.overlap} and slots={config.slots}'
    needed = 'GroupedExperts, transport "symmetric", reduce="exact" and overlap=True'
    if chunks != 1 and not (chunks == 2 and pushes and config.slots == 2):
        raise ValueError(f"chunks must be 1, or 2 with {needed} and slots=2, got {chunks} with {experts}, {here}")
    possible = isinstance(first_experts, int) and 0 < first_experts < config.num_local_experts
    if first_experts and not (pushes and chunks == 1 and possible):
        raise ValueError(
            f"first_experts must be from 0 to {config.num_local_experts - 1}, one less than a rank's experts, and above 0 only with "
            f"{needed} and chunks=1, got {first_experts} with chunks={chunks}, {experts}, {here}"
        )


def _number(experts: object) -> int:
    return numbered.number(experts)


# as torch.compiler.assume_constant_result does, which imports the compiler
_number._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_layer(
    dispatcher: MoEQuantDispatcher,
    experts: object,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    slot: int,
    layer: int | None,
    chunks: int,
    first_experts: int,
) -> Tensor:
    """A call of the dispatcher as one opaque operation, `torch.ops.moequant.layer`, for torch.compile."""
    number = experts._number if isinstance(experts, GroupedExperts) else _number(experts)
    return torch.ops.moequant.layer(
        hidden_states, topk_ids, topk_weights, dispatcher._number, number, slot, layer, chunks, first_experts
    )


@torch.library.custom_op("moequant::layer", mutates_args=())
def _layer(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    dispatcher: int,
    experts: int,
    slot: int,
    layer: int | None,
    chunks: int,
    first_experts: int,
) -> Tensor:
    called, given = numbered[dispatcher], numbered[experts]
    return called(hidden_states, topk_ids, topk_weights, given, slot=slot, layer=layer, chunks=chunks, first_experts=first_experts)


@_layer.register_fake
def _(hidden_states: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
