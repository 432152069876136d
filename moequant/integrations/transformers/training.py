"""Experts under grad: which of them moequant trains, and with what.

E experts, H hidden size, I intermediate size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.integrations.finegrained_fp8 import FP8Experts

from moequant.activations import Activation
from moequant.dispatcher import MoEQuantDispatcher
from moequant.integrations.transformers.activations import activation_of
from moequant.integrations.transformers.contract import Contract, UnknownExpertsError, contract_of
from moequant.integrations.transformers.settings import say_once
from moequant.integrations.transformers.weights import SCALES
from moequant.training.layer import train
from moequant.transport.lifecycle import step

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Trained(NamedTuple):
    """What is trained of a module.

    Attributes:
        weights: w13 (E, 2I, H), or (E, I, H) without a gate, w2 (E, H, I), and their biases or None: the module's parameters, or views.
        kind: the activation between them.
        module: whose they are.
    """

    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    kind: Activation
    module: nn.Module


def wants_grad(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether the result of a call has to have a derivative.

    Args:
        module: experts.
        *inputs: of the call.

    Returns:
        Whether grad mode is on and something requires grad.
    """
    if not torch.is_grad_enabled():
        return False
    # a weight may be computed from parameters of others
    weights = (getattr(module, name, None) for name in WEIGHTS)
    return any(getattr(tensor, "requires_grad", False) for tensor in (*inputs, *module.parameters(), *weights))


def trained(module: Any) -> Trained | str:
    """What is trained of a module by moequant.

    Args:
        module: experts.

    Returns:
        It, or why there is nothing, in words.
    """
    if isinstance(module, FP8Experts) or getattr(module, "down_proj" + SCALES, None) is not None:
        return "weights that are quantized have no backward in moequant"
    try:
        contract = contract_of(module)
    except UnknownExpertsError as error:
        return str(error)
    if contract.normed:
        return "the norm behind its products is not in moequant"
    kind = activation_of(module, contract)
    if kind is None:
        return "what it computes between its products is not in moequant"
    w13, w2, *biases = (_own(getattr(module, name)) for name in (contract.up, "down_proj", *contract.biases))
    if w13.dtype != torch.bfloat16:
        say_once(f"experts of {str(w13.dtype).removeprefix('torch.')} are trained in products of bfloat16")
    bias13, bias2 = biases or (None, None)
    return Trained((*_upright(contract, w13, w2), bias13, bias2), kind, module)


@step
def train_on(dispatcher: MoEQuantDispatcher, tokens: tuple[Tensor, Tensor, Tensor], of: Trained) -> Tensor:
    """A layer with a backward. Collective, and so is its backward.

    Args:
        dispatcher: of quant "none".
        tokens: hidden states (T, H), ids and weights (T, K).
        of: the experts.

    Returns:
        (T, H) of the hidden states' type.
    """
    return train(dispatcher, tokens, of.weights, of.kind, layer=dispatcher._layer_of(of.module))


def _own(weight: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _upright(contract: Contract, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Weights whose last columns are summed over."""
    return (w13.transpose(1, 2), w2.transpose(1, 2)) if contract.transposed else (w13, w2)


class Steps:
    """Counts what all optimizers have done: some change parameters without a trace on these.

    Attributes:
        taken: steps.
    """

    taken = 0

    @classmethod
    def count(cls, *step: object) -> None:
        """Called after each.

        Args:
            *step: the optimizer, and what it was called with.
        """
        cls.taken += 1


register_optimizer_step_post_hook(Steps.count)
