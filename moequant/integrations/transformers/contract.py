"""What transformers says of an experts module, and what of it moequant can compute.

A class takes part by transformers' decorator `use_experts_implementation`: flags on the module, weights of one name each for all
experts, and functions for what happens between and behind the two products. E experts, H hidden size, I intermediate size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import use_experts_implementation

# The decorator's flags that are honoured here. A later transformers may have more: what one of them changes would be silently missed.
FLAGS = frozenset(("is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"))
# Its functions on the class.
STEPS = frozenset(("_apply_gate",))


class UnknownExpertsError(ValueError):
    """A class of experts that asks for something that is not known here."""


@dataclass(frozen=True)
class Contract:
    """One module's, as far as products are concerned.

    Attributes:
        up: name of the first weight: "gate_up_proj", or "up_proj" without a gate.
        gated: whether it holds gate and up.
        halves: whether gate is its first half, and up its second; otherwise they alternate, in the weights as the class has them.
        transposed: weights are (E, H, 2I) and (E, I, H), and not (E, 2I, H) and (E, H, I).
        biased: both products have a bias, `<name>_bias`, (E, columns).
        normed: `post_expert_norm` follows the second product.
    """

    up: str
    gated: bool
    halves: bool
    transposed: bool
    biased: bool
    normed: bool

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of both products' biases, if they have any."""
        return (f"{self.up}_bias", "down_proj_bias") if self.biased else ()

    def segments(self, name: str) -> int:
        """How many parts of a weight are blocked apart, so that no block holds gate and up.

        Args:
            name: the weight's.

        Returns:
            1 or 2.
        """
        return 2 if name == self.up and self.gated else 1

    def lays_apart(self, quantized: bool) -> bool:
        """Whether gates and ups that alternate in a class's weights are halves in those that are multiplied. Where weights are copied
        anyway, that costs nothing, and what reads halves is faster.

        Args:
            quantized: whether these are.

        Returns:
            The answer.
        """
        return self.gated and not self.halves and (quantized or self.transposed)


def contract_of(module: nn.Module) -> Contract:
    """The contract of an experts module.

    Args:
        module: of a class with transformers' decorator `use_experts_implementation`, or FP8Experts.

    Returns:
        What it says.

    Raises:
        ValueError: as UnknownExpertsError: it asks for something that is not known here.
    """
    _check_known(module)
    gated = bool(getattr(module, "has_gate", True))
    return Contract(
        up="gate_up_proj" if gated else "up_proj",
        gated=gated,
        halves=bool(getattr(module, "is_concatenated", True)),
        transposed=bool(getattr(module, "is_transposed", False)),
        biased=bool(getattr(module, "has_bias", False)),
        normed=bool(getattr(module, "has_post_expert_norm", False)),
    )


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight, without grad.

    Args:
        weight: a parameter, sharded or not.

    Returns:
        A view of it.
    """
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


@functools.cache
def _other_flags() -> dict[str, object]:
    """The decorator's flags that are not known here, with their defaults."""
    options = inspect.signature(use_experts_implementation).parameters.values()
    known = FLAGS | {"experts_class", "experts_interface"}
    return {option.name: option.default for option in options if option.name not in known}


def _check_known(module: nn.Module) -> None:
    """Raises UnknownExpertsError for what the class asks beyond FLAGS and STEPS."""
    asked = [name for name, default in _other_flags().items() if getattr(module, name, default) != default]
    asked += [name for name in dir(type(module)) if name.startswith("_apply_") and name not in STEPS]
    if asked:
        raise UnknownExpertsError(
            f'{type(module).__name__} asks for {", ".join(asked)}, which moequant does not know; use experts_implementation="grouped_mm" '
            "for this model, or a newer moequant"
        )
