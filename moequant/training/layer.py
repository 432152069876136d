"""What a dispatcher does with tensors that require grad. T tokens of this rank, K top-k, L local experts, H hidden size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moequant.activations import Activation
from moequant.batch import DispatchHandle, ExpertBatch, QuantizedTensor
from moequant.checks import check_expert_output, check_tensor, check_weight_shapes
from moequant.experts import GroupedExperts, can_push
from moequant.formats import FLOAT_DTYPES
from moequant.training.functions import CombineFunction, DispatchFunction, LayerFunction, Plan
from moequant.training.operands import Operands
from moequant.training.precision import Precision
from moequant.training.routes import Routes
from moequant.weights import check_fits, checked_bias, halves_apart

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher

# of experts that are no module
WEIGHTS = ("w13", "w2", "bias13", "bias2")


@dataclass(frozen=True, eq=False)
class TrackedHandle(DispatchHandle):
    """A handle of a dispatch that autograd knows.

    Attributes:
        topk_weights: (T, K), as they were given.
        dtype: of the hidden states.
        dispatcher: whose it is.
        slot: which of its slots.
        generation: which of the slot's dispatches this was.
        state: the transport's own record.
        topk_ids: (T, K), as they were given.
        routes: between tokens and rows.
        untracked: the dispatch's own handle.
    """

    topk_ids: Tensor
    routes: Routes
    untracked: DispatchHandle


def dispatch_tracked(
    dispatcher: MoEQuantDispatcher, tokens: tuple[Tensor, Tensor, Tensor], slot: int, layer: int | None
) -> tuple[ExpertBatch, TrackedHandle]:
    """`MoEQuantDispatcher.dispatch` for autograd.

    Args:
        dispatcher: with quant="none".
        tokens: hidden states (T, H), ids and weights (T, K).
        slot: whose buffers to use.
        layer: the number of the model's layer, or None.

    Returns:
        The batch, a copy of its own with zeros in rows that belong to no expert, and the handle.

    Raises:
        RuntimeError: the dispatcher quantizes.
    """
    hidden, ids, weights = tokens
    if dispatcher.config.quantized:
        given = {"hidden_states": hidden, "topk_weights": weights}
        name = next((name for name, x in given.items() if getattr(x, "requires_grad", False)), None)
        ways = "or torch.no_grad()" if name is None else f"torch.no_grad(), or {name}.detach()"
        raise RuntimeError(
            f"{name or 'a parameter of the experts'} requires grad, and a batch in {dispatcher.config.quant} has no gradient: use "
            f'moequant.nn.MoEExperts, a dispatcher with quant="none", {ways}'
        )
    routes = Routes(dispatcher, slot, layer)
    values = DispatchFunction.apply(hidden, ids, weights, routes)
    batch, handle = routes.last()
    starts = None if batch.expert_start is None else batch.expert_start.clone()
    own = replace(batch, values=values, num_tokens=batch.num_tokens.clone(), sources=batch.sources.clone(), expert_start=starts)
    # the weights as they were given: the handle's own may be a copy
    fields = {**vars(handle), "topk_weights": weights}
    return own, TrackedHandle(**fields, topk_ids=ids, routes=routes, untracked=handle)


def combine_tracked(dispatcher: MoEQuantDispatcher, expert_output: Tensor, handle: TrackedHandle, out: Tensor | None) -> Tensor:
    """`MoEQuantDispatcher.combine` for autograd.

    Args:
        dispatcher: whose handle it is.
        expert_output: (L, M, H), ragged (R, H), bfloat16 or float16.
        handle: of `dispatch_tracked`.
        out: None.

    Returns:
        (T, H).

    Raises:
        StaleHandleError: the handle's slot has dispatched again since.
        RuntimeError: out was given.
        ValueError: wrong tensors.
    """
    dispatcher._slot_of(handle, "combine")
    if out is not None:
        raise RuntimeError("out is not written under grad: leave it out, or combine under torch.no_grad()")
    with torch.no_grad():
        check_expert_output(dispatcher.config, dispatcher.device, expert_output)
    handle.routes.resume(handle.untracked)
    return CombineFunction.apply(expert_output, handle.topk_ids, handle.topk_weights, handle.routes)


def train_layer(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: Callable[[ExpertBatch], Tensor],
    slot: int,
    layer: int | None,
) -> Tensor:
    """A call of a dispatcher, in one piece, for autograd.

    Args:
        dispatcher: any.
        tokens: hidden states (T, H), ids and weights (T, K).
        experts: `GroupedExperts` in bfloat16, or what else makes a batch's expert output.
        slot: whose buffers to use.
        layer: the number of the model's layer, or None.

    Returns:
        (T, H).

    Raises:
        RuntimeError: the experts' weights, or the batch, are quantized.
        ValueError: wrong tensors, or experts of another dispatcher.
    """
    if isinstance(experts, GroupedExperts) and (can_push(experts) or experts.bias2 is not None):
        w13, w2 = experts.w13, experts.w2
        if isinstance(w13, QuantizedTensor) or isinstance(w2, QuantizedTensor):
            raise RuntimeError(
                "a tensor requires grad, and quantized experts have no backward: use moequant.nn.MoEExperts, whose weights are "
                "quantized in each forward, or call under torch.no_grad()"
            )
        weights = w13, w2, experts.bias13, experts.bias2
        if w13.dtype != dispatcher.config.dtype:
            # these are multiplied as they are, and not in what is made of them
            check_experts(dispatcher, weights, experts.kind, (dispatcher.config.dtype,))
        return train(dispatcher, tokens, weights, experts.kind, slot=slot, layer=layer)
    batch, handle = dispatch_tracked(dispatcher, tokens, slot, layer)
    return combine_tracked(dispatcher, experts(batch), handle, None)


def train(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    kind: Activation,
    *,
    recompute: bool = False,
    keep_quantized: bool = False,
    operands: Operands | None = None,
    slot: int = 0,
    layer: int | None = None,
) -> Tensor:
    """A layer of given weights. Collective, and so is its backward.

    Args:
        dispatcher: of quant "none" or "fp8_e4m3fn".
        tokens: hidden states (T, H), ids and weights (T, K).
        weights: w13 (L, 2I, H), not gated (L, I, H), w2 (L, H, I), and their biases or None.
        kind: the activation.
        recompute: GEMM 1's result is not kept for the backward.
        keep_quantized: it is kept as the dispatcher's quant has it.
        operands: of w13 and w2, or None: they are made anew.
        slot: whose buffers to use.
        layer: the number of the model's layer, or None.

    Returns:
        (T, H) of the hidden states' type.

    Raises:
        ValueError: a format or recipe in which nothing is trained, wrong tensors, or experts of another dispatcher.
    """
    check_experts(dispatcher, weights, kind, FLOAT_DTYPES)
    w13, w2, bias13, bias2 = weights
    if kind.interleaved:
        w13, kind = halves_apart(w13), replace(kind, interleaved=False)
        bias13 = None if bias13 is None else halves_apart(bias13)
    plan = Plan(Routes(dispatcher, slot, layer), Precision.of(dispatcher.config), kind, recompute, keep_quantized, operands)
    return LayerFunction.apply(*tokens, w13, w2, bias13, bias2, plan)


def check_experts(
    dispatcher: MoEQuantDispatcher,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    kind: Activation,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Refuses weights that are not of a dispatcher's experts, before anything is sent. A refusal counts as a call.

    Args:
        dispatcher: that is to bring their batch.
        weights: as for `train`.
        kind: the activation.
        dtypes: in which w13 may be.

    Raises:
        ValueError: another number of experts, other sizes, another type or device.
    """
    (w13, w2, bias13, bias2), config = weights, dispatcher.config
    try:
        check_weight_shapes(w13.shape, w2.shape, kind.gated)
        shape = *config.batch_shape, config.hidden_size
        check_fits(w13, config.num_local_experts, shape, config.dtype, dispatcher.device, dtypes)
        check_tensor("w2", w2, dtypes=FLOAT_DTYPES, device=w13.device)
        for name, bias, w in (("bias13", bias13, w13), ("bias2", bias2, w2)):
            checked_bias(name, bias, w)
    except ValueError:
        dispatcher._count_refusal()
        raise


def requires_grad(*tensors: Any) -> bool:
    """Whether one of them requires grad, under grad mode.

    Args:
        *tensors: tensors, and what else was given.

    Returns:
        The answer.
    """
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)
