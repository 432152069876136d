"""Which `moequant.Activation` an experts module computes between its products: looked for by what its function does, not by its name.

Candidates follow from the numbers that the module has; one is taken only if it says what the module's own function says of a fixed set of
numbers, to float32's rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moequant.activations import FUNCTIONS, Activation
from moequant.integrations.transformers.contract import Contract, local
from moequant.reference.activations import activated

# gates and ups far beyond what models have, and around zero, where functions differ
PROBE = (-3000.0, -40.0, -9.0, -4.0, -2.0, -1.0, -0.5, -0.1, 0.0, 0.3, 0.7, 1.7, 3.0, 6.0, 8.0, 30.0, 2000.0)
# of float32, after a few steps
RELATIVE, ABSOLUTE = 1e-5, 2e-6
# with which silu is nearly gelu: transformers' "quick_gelu" has it in its code
QUICK = 1.702
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[Contract, Activation | None]] = weakref.WeakKeyDictionary()


def activation_of(module: Any, contract: Contract) -> Activation | None:
    """The activation of a module, which is looked for once.

    Args:
        module: experts.
        contract: theirs.

    Returns:
        It, for columns as the module's weights have them, or None for a function that moequant doesn't have.
    """
    known = _FOUND.get(module)
    if known is None or known[0] != contract:
        known = _FOUND[module] = contract, _looked_for(module, contract)
    return known[1]


def _looked_for(module: Any, contract: Contract) -> Activation | None:
    numbers = Numbers(module)
    probe = torch.tensor(sorted({*PROBE, *numbers.around()}), device="cpu")
    gate, up = (x.flatten() for x in torch.meshgrid(probe, probe, indexing="ij"))
    if not contract.gated:
        gate, up = probe, torch.zeros_like(probe)
    columns = torch.stack((gate, up), 1).flatten() if not contract.halves else torch.cat((gate, up))
    rows = columns[None] if contract.gated else gate[None]
    own = _own(module, contract, rows)
    if own is None or own.shape != (1, len(gate)):
        return None
    # what a sum cancels of its terms' rounding
    bound = ABSOLUTE * (1 + gate.abs()) * (1 + up.abs())
    for candidate in numbers.candidates(contract):
        expected = activated(rows, candidate)
        # a NaN is beyond any bound
        if bool(((own - expected).abs() <= bound + RELATIVE * expected.abs()).all()):
            return candidate
    return None


def _own(module: Any, contract: Contract, rows: Tensor) -> Tensor | None:
    """What the module makes of rows in float32, on the CPU; None where it wants sizes of its own, so that it is no plain function of gate
    and up."""
    device = local(module.down_proj).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            found = (module._apply_gate if contract.gated else module.act_fn)(rows.to(device))
        except RuntimeError:
            return None
        return found.float().cpu()


class Numbers:
    """The limits, factors and soft caps that a module or its function has, under whatever name.

    Args:
        module: experts.
    """

    def __init__(self, module: nn.Module) -> None:
        function = getattr(module, "act_fn", None)
        owners = [module, *(function.modules() if isinstance(function, nn.Module) else [])]
        self.limits, self.alphas, self.caps = ([*dict.fromkeys(_named(word, owners))] for word in ("limit", "alpha", "softcap"))

    def around(self) -> Iterator[float]:
        """Where a bound shows, if it is one.

        Yields:
            Numbers on both sides of it.
        """
        for bound in (*self.limits, *self.caps):
            yield from (-2 * bound, -bound / 2, bound / 2, 2 * bound)

    def candidates(self, contract: Contract) -> Iterator[Activation]:
        """All activations that the numbers allow, the plain ones first.

        Args:
            contract: of the module.

        Yields:
            Them.
        """
        optional: list[float | None] = [None, *self.limits]
        caps: list[float | None] = [None, *self.caps]
        gated = {"gated": contract.gated, "interleaved": contract.gated and not contract.halves}
        ups = list(product((0.0, 1.0), caps)) if contract.gated else [(0.0, None)]
        for limit, (offset, up_cap), function in product(optional, ups, FUNCTIONS):
            gates = list(product((1.0, QUICK, *self.alphas), caps)) if function == "silu" else [(1.0, None)]
            for (alpha, gate_cap), after in product(gates, (False, True) if limit is not None else (False,)):
                yield Activation(
                    function,
                    alpha=alpha,
                    limit=limit,
                    limit_after=after,
                    offset=offset,
                    gate_softcap=gate_cap,
                    up_softcap=up_cap,
                    **gated,
                )


def _named(word: str, owners: list[nn.Module]) -> Iterator[float]:
    """Positive numbers whose names have a word in them."""
    for owner in owners:
        for name, value in vars(owner).items():
            if word in name and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                yield float(value)
