"""A whole layer on a dispatcher and its experts: dispatch, products, combine.

With transport "symmetric" and reduce "exact", GEMM 2 stores each row at its token's rank (`GroupedExperts.push`), so that a flag round
and a local sum are all that remains of combine. `moequant/overlap.py` has the layers that go on two streams.

T tokens, K top-k, L local experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moequant.batch import ExpertBatch
from moequant.checks import check_given, check_int
from moequant.config import DispatcherConfig
from moequant.experts import GroupedExperts, can_push
from moequant.traced import numbered, refuse_export

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher


class Options(NamedTuple):
    """How a layer is called, as `MoEQuantDispatcher.__call__` says."""

    slot: int = 0
    layer: int | None = None
    chunks: int = 1
    first_experts: int = 0
    expected_tokens: int | None = None
    out: Tensor | None = None


def run_layer(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: Callable[[ExpertBatch], Tensor],
    pushing: GroupedExperts | None,
    options: Options,
) -> Tensor:
    """A layer in one piece. tokens: hidden states, ids, weights. pushing: the experts, if they store rows at the tokens' ranks."""
    slot, out = options.slot, options.out
    batch, handle = dispatcher.dispatch(*tokens, slot=slot, layer=options.layer, expected_tokens=options.expected_tokens)
    if pushing is not None:
        pushing.push(batch, dispatcher.begin_push(handle))
        return dispatcher.combine_pushed(handle, out=out)
    if isinstance(experts, GroupedExperts) and can_push(experts) and dispatcher.config.transport == "symmetric":
        return dispatcher.combine(experts(batch, out=dispatcher.output_buffer(slot)), handle, out=out)
    return dispatcher.combine(experts(batch), handle, out=out)


def check_layer(
    dispatcher: MoEQuantDispatcher, hidden_states: Tensor, experts: object, options: Options, trained: bool
) -> GroupedExperts | None:
    """`pushing_experts`, and raises for an output that can't be written, before anything is sent."""
    out = options.out
    if options.expected_tokens is not None:
        check_int("expected_tokens", options.expected_tokens)
    if out is not None:
        if trained:
            raise RuntimeError("out is not written under grad: leave it out, or call under torch.no_grad()")
        # other hidden states are refused by the dispatch
        if isinstance(hidden_states, Tensor) and hidden_states.dim() == 2:
            shape = hidden_states.shape[0], dispatcher.config.hidden_size
            check_given(out, shape, hidden_states.dtype, dispatcher.device)
    return pushing_experts(experts, options.chunks, options.first_experts, dispatcher.config)


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
    dispatcher: MoEQuantDispatcher, experts: object, tokens: tuple[Tensor, Tensor, Tensor], options: Options
) -> Tensor:
    """A call of the dispatcher as one opaque operation, `torch.ops.moequant.layer`, or with an output `layer_into`, for
    torch.compile."""
    refuse_export()
    number = experts._number if isinstance(experts, GroupedExperts) else _number(experts)
    slot, layer, chunks, first_experts, expected_tokens, out = options
    settings = [dispatcher._number, number, slot, chunks, first_experts], layer, expected_tokens
    if out is None:
        return torch.ops.moequant.layer(*tokens, *settings)
    torch.ops.moequant.layer_into(out, *tokens, *settings)
    return out


@torch.library.custom_op("moequant::layer", mutates_args=())
def _layer(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    numbers: Sequence[int],
    layer: int | None,
    expected_tokens: int | None,
) -> Tensor:
    return _call((hidden_states, topk_ids, topk_weights), numbers, layer, expected_tokens, None)


@_layer.register_fake
def _(hidden_states: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@torch.library.custom_op("moequant::layer_into", mutates_args=("out",))
def _layer_into(
    out: Tensor,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    numbers: Sequence[int],
    layer: int | None,
    expected_tokens: int | None,
) -> None:
    _call((hidden_states, topk_ids, topk_weights), numbers, layer, expected_tokens, out)


@_layer_into.register_fake
def _(out: Tensor, *arguments: object) -> None:
    pass


def _call(
    tokens: tuple[Tensor, Tensor, Tensor],
    numbers: Sequence[int],
    layer: int | None,
    expected_tokens: int | None,
    out: Tensor | None,
) -> Tensor:
    """numbers: of the dispatcher and of the experts, then slot, chunks and first_experts."""
    dispatcher, experts, slot, chunks, first_experts = numbers
    options = Options(slot, layer, chunks, first_experts, expected_tokens, out)
    return numbered[dispatcher](*tokens, numbered[experts], **options._asdict())
