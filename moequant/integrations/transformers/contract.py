"""What transformers says of an experts module, and what of it moequant can compute.

A class takes part by transformers' decorator `use_experts_implementation`: flags on the module, weights of one name each for all
experts, and functions for what happens between and behind the two products. E experts, H hidden size, I intermediate size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import use_experts_implementation

# The decorator's flags that are honoured here. A later transformers may have more: what one of them changes would be silently missed.
FLAGS = frozenset(("is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"))
# Its functions on the class.
STEPS = frozenset(("_apply_gate",))
# gates and ups that go past every clamp, and around zero
PROBE = torch.tensor([-3000.0, -40.0, -9.0, -2.0, -0.5, 0.0, 0.3, 1.7, 6.0, 8.0, 30.0, 2000.0], device="cpu")


class UnknownExpertsError(ValueError):
    """A class of experts that asks for something that is not known here."""


@dataclass(frozen=True)
class Contract:
    """One module's, as far as products are concerned.

    Attributes:
        up: name of the first weight: "gate_up_proj", or "up_proj" without a gate.
        gated: whether it holds gate and up.
        halves: whether gate is its first half, and up its second; otherwise they alternate.
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

    def segments(self, name: str) -> int:
        """How many parts of a weight are blocked apart, so that no block holds gate and up.

        Args:
            name: the weight's.

        Returns:
            1 or 2.
        """
        return 2 if name == self.up and self.gated and self.halves else 1


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


def activation_of(module: Any) -> str | None:
    """The name that moequant has for a module's activation. Here is where an activation is handed over to the kernels: what has no name
    here is computed by the module's own function (`products.OwnActivation`).

    It is found by what the function does, and not by its name.

    Args:
        module: experts.

    Returns:
        "silu" for silu(gate) * up, or None.
    """
    if not getattr(module, "has_gate", True):
        return None
    device = local(module.down_proj).device
    probe = PROBE.to(device)
    gate, up = torch.meshgrid(probe, probe, indexing="ij")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            found = module._apply_gate(torch.cat((gate, up), dim=1))
        except RuntimeError:
            # it wants sizes of its own, so that it is not a plain function of gate and up
            return None
        expected = nn.functional.silu(gate) * up
        if found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-5, atol=1e-6):
            return "silu"
    return None


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight, without grad.

    Args:
        weight: a parameter, sharded or not.

    Returns:
        A view of it.
    """
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _check_known(module: nn.Module) -> None:
    """Raises UnknownExpertsError for what the class asks beyond FLAGS and STEPS."""
    options = inspect.signature(use_experts_implementation).parameters.values()
    flags = {option.name: option.default for option in options if option.name not in ("experts_class", "experts_interface")}
    asked = [name for name, default in flags.items() if name not in FLAGS and getattr(module, name, default) != default]
    asked += [name for name in dir(type(module)) if name.startswith("_apply_") and name not in STEPS]
    if asked:
        raise UnknownExpertsError(
            f'{type(module).__name__} asks for {", ".join(asked)}, which moequant does not know; use experts_implementation="grouped_mm" '
            "for this model, or a newer moequant"
        )
