"""A call of an experts module on one rank: what transformers calls under the name "moequant".

T tokens, K top-k, E experts, H hidden size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moequant.dispatcher import MoEQuantDispatcher
from moequant.experts import GroupedExperts
from moequant.integrations.transformers.contract import contract_of, local
from moequant.integrations.transformers.dispatchers import Place, Sizes, dispatcher_of, room_for
from moequant.integrations.transformers.products import Experts, experts_of
from moequant.integrations.transformers.settings import Settings, current, say_once
from moequant.integrations.transformers.training import Steps, Trained, train_on, trained, wants_grad
from moequant.integrations.transformers.weights import SCALES, weight_names
from moequant.traced import numbered, refuse_export, untraced

# What takes over where gradients are wanted that moequant doesn't have.
BUILT_IN = "grouped_mm"


@dataclass(frozen=True, eq=False)
class Layer:
    """What is kept of an experts module.

    Attributes:
        names: of the parameters that it was made from.
        sources: what these were, so that no others can come to lie where they lay.
        stamp: of them.
        experts: what computes them.
        quant: of the dispatchers that they go with.
        dispatchers: those that it has had, by place, K and room, with the settings that they are for.
    """

    names: tuple[str, ...]
    sources: tuple[Tensor, ...]
    stamp: tuple[int, ...]
    experts: Experts
    quant: str
    dispatchers: dict[tuple[Place, int, int], tuple[Settings, MoEQuantDispatcher]] = field(default_factory=dict)


# one object each: places are told apart by identity
ALONE = {absent: Place(absent=absent) for absent in (False, True)}
_LAYERS: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module, as transformers' ExpertsInterface calls it.

    Args:
        module: it.
        hidden_states: (T, H) bfloat16, float16 or float32.
        top_k_index: (T, K) int64, ids of this module's experts.
        top_k_weights: (T, K) of any float type.

    Returns:
        (T, H) of the hidden states' type.
    """
    if wants_grad(module, hidden_states, top_k_weights):
        return under_grad(module, hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_compiling():
        refuse_export()
        mark = getattr(module, "_moequant", None)
        number = _number(module) if mark is None or mark.number is None else mark.number
        return torch.ops.moequant.transformers_experts(hidden_states, top_k_index, top_k_weights, number)
    return run(module, hidden_states, top_k_index, top_k_weights)


@untraced
def under_grad(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one rank, with a backward: moequant's, or that of what transformers has.

    Args:
        module: experts.
        hidden_states: as `experts_forward`.
        top_k_index: as `experts_forward`.
        top_k_weights: as `experts_forward`.

    Returns:
        (T, H) of the hidden states' type.
    """
    of = trained(module)
    if isinstance(of, str):
        return built_in(module, of)(module, hidden_states, top_k_index, top_k_weights)
    return run(module, hidden_states, top_k_index, top_k_weights, of)


def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, of: Trained | None = None) -> Tensor:
    """The experts of one rank.

    Args:
        module: experts.
        hidden_states: as `experts_forward`.
        top_k_index: as `experts_forward`.
        top_k_weights: as `experts_forward`.
        of: what is trained of them; None: nothing, and there is no grad.

    Returns:
        (T, H) of the hidden states' type.
    """
    inputs, tokens = (hidden_states, top_k_index, top_k_weights), hidden_states.shape[0]
    # where experts are split, ids beyond the range are other ranks'
    place = ALONE[bool(getattr(module, "_is_expert_parallel", False))]
    return run_on(place, module, int(module.num_experts), inputs, tokens, current(), of)


def run_on(
    place: Place,
    module: nn.Module,
    num_experts: int,
    tokens: tuple[Tensor, Tensor, Tensor],
    most: int,
    settings: Settings,
    of: Trained | None = None,
) -> Tensor:
    """The experts of a group's ranks. Collective.

    Args:
        place: of the ranks.
        module: this rank's experts.
        num_experts: E.
        tokens: hidden states, ids and weights of this rank, T of each.
        most: the largest T of any rank.
        settings: as the user has them.
        of: what is trained of them; None: nothing, and there is no grad.

    Returns:
        (T, H) of the hidden states' type.
    """
    hidden, ids, _ = tokens
    (_, columns), top_k = hidden.shape, ids.shape[1]
    piece = min(most, settings.max_tokens)
    if of is not None:
        # copies of weights that are going to change
        _LAYERS.pop(module, None)
        sizes = Sizes(num_experts, top_k, columns, "none", hidden.device)
        dispatcher = dispatcher_of(place, sizes, piece, settings)
        return in_pieces(lambda *inputs: train_on(dispatcher, inputs, of), tokens, most, piece)
    with torch.no_grad():
        layer = layer_of(module)
        key = place, top_k, room_for(piece, settings)
        found = layer.dispatchers.get(key)
        if found is None or found[0] is not settings:
            sizes = Sizes(num_experts, top_k, columns, layer.quant, hidden.device)
            found = layer.dispatchers[key] = settings, dispatcher_of(place, sizes, piece, settings)
        dispatcher = found[1]
        experts: Callable[..., Tensor] = layer.experts
        if not isinstance(experts, GroupedExperts):
            experts = functools.partial(experts, most=dispatcher.config.num_batches * piece * top_k)
        # the module's, as experts may be made anew on one rank alone
        number = dispatcher._layer_of(module)
        return in_pieces(lambda x, ids, weights: dispatcher(x, ids, weights, experts, layer=number), tokens, most, piece)


def in_pieces(layer: Callable[..., Tensor], tokens: tuple[Tensor, Tensor, Tensor], most: int, piece: int) -> Tensor:
    """A layer that has no room for all tokens at once. Every rank goes through as many pieces as the largest needs.

    Args:
        layer: from hidden states, ids and weights to their sums.
        tokens: those of this rank, T of each.
        most: the largest T of any rank.
        piece: as many tokens as go through at once.

    Returns:
        (T, H).
    """
    if piece == most:
        return layer(*tokens)
    spans = [slice(cut, cut + piece) for cut in range(0, most, piece)]
    return torch.cat([layer(*(x[span] for x in tokens)) for span in spans])


def layer_of(module: nn.Module) -> Layer:
    """What is kept of a module, made anew when its weights are others.

    Args:
        module: experts.

    Returns:
        It.
    """
    kept = _LAYERS.get(module)
    if kept is not None and kept.stamp == _stamp(module, kept.names):
        return kept
    contract = contract_of(module)
    names = *weight_names(module, contract), *contract.biases
    experts, quant = experts_of(module, contract)
    sources = tuple(local(getattr(module, name)) for name in names)
    layer = Layer(names, sources, _stamp(module, names), experts, quant)
    first = experts.w13
    if isinstance(module, FSDPModule) and isinstance(first, Tensor) and first.data_ptr() != sources[0].data_ptr():
        # FSDP gathers new weights where the old ones were, and a copy would be taken for theirs
        say_once(f"{type(module).__name__}: weights of another type or order are copied in every call under FSDP")
        return layer
    _LAYERS[module] = layer
    module.__dict__["_moequant"] = Mark(numbered.number(module))
    return layer


def _stamp(module: nn.Module, names: tuple[str, ...]) -> tuple[int, ...]:
    """Addresses and versions of a module's parameters, and the optimizers' steps for those that are trained."""
    weights = [getattr(module, name) for name in names]
    stamp = [Steps.taken if any(weight.requires_grad for weight in weights) else 0]
    for weight in weights:
        if isinstance(weight, DTensor):
            weight = weight.to_local()
        stamp += weight.data_ptr(), 0 if weight.is_inference() else weight._version
    return tuple(stamp)


def built_in(module: nn.Module, why: str) -> Callable[..., Tensor]:
    """What transformers has for a module where gradients are wanted.

    Args:
        module: experts.
        why: moequant does not train them.

    Returns:
        The function.

    Raises:
        RuntimeError: transformers can't compute these weights.
    """
    if isinstance(module, FP8Experts):
        functions = FP8ExpertsInterface()
    elif getattr(module, "down_proj" + SCALES, None) is not None:
        raise RuntimeError(
            f"{type(module).__name__} was quantized by MoEQuantConfig and has no backward; call the model under torch.no_grad()"
        )
    else:
        functions = ExpertsInterface()
    say_once(f'{type(module).__name__} under grad runs as experts_implementation="{BUILT_IN}": {why}')
    return functions[BUILT_IN]


class Mark:
    """What a module that has been called is known by: the compiler of torch 2.11 can read it, but asks no function about a module. A copy
    is another module, and has no number yet.

    Args:
        number: of `moequant.traced.numbered`, or None.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number

    def __deepcopy__(self, memo: object) -> Mark:
        return Mark()

    def __reduce__(self) -> tuple[type[Mark], tuple[()]]:
        return Mark, ()


def _number(module: nn.Module) -> int:
    return numbered.number(module)


# as torch.compiler.assume_constant_result does, which imports the compiler
_number._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("moequant::transformers_experts", mutates_args=())
def _experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: int) -> Tensor:
    """`run` as one opaque operation, for torch.compile."""
    return run(numbered[module], hidden_states, top_k_index, top_k_weights)


@_experts.register_fake
def _(hidden_states: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
