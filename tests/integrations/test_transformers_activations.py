# pyright: reportMissingImports=false
"""How a module's activation is found, and that another is not taken for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", "5.23")

from transformers.activations import ACT2FN

from moequant import Activation
from moequant.integrations.transformers.activations import activation_of
from moequant.integrations.transformers.contract import Contract
from moequant.reference.activations import activated


class Experts(nn.Module):
    """An experts module, as far as what is between its products."""

    def __init__(self, function: Any, gate: Any = None, **numbers: float | None) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.empty(1, 1, 1))
        self.act_fn = function
        self._gate = gate
        vars(self).update(numbers)

    def _apply_gate(self, columns: Tensor) -> Tensor:
        if self._gate is not None:
            return self._gate(self, columns)
        gate, up = columns.chunk(2, -1)
        return self.act_fn(gate) * up


def contract(gated: bool = True, halves: bool = True) -> Contract:
    return Contract("gate_up_proj" if gated else "up_proj", gated, halves, False, False, False)


KNOWN = {
    **dict.fromkeys(("silu", "swish"), Activation()),
    **dict.fromkeys(("gelu", "gelu_python"), Activation("gelu")),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), Activation("gelu_tanh")),
    "quick_gelu": Activation(alpha=1.702),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
}


@pytest.mark.parametrize("name", list(ACT2FN))
@pytest.mark.parametrize("gated", [True, False])
def test_every_function_of_transformers_is_found_or_left_to_the_model(name, gated):
    if name in ("prelu", "xielu"):
        pytest.skip("it has parameters")
    found = activation_of(Experts(ACT2FN[name]), contract(gated))
    assert found == (replace(KNOWN[name], gated=gated) if name in KNOWN else None)


def by(kind: Activation) -> Any:
    return lambda module, columns: activated(columns, kind)


SETTINGS: dict[str, tuple[Any, ...]] = {
    "alpha": (1.0, 1.702),
    "limit": (None, 1.5, 3.0),
    "limit_after": (False, True),
    "offset": (0.0, 1.0),
    "gate_softcap": (None, 4.0),
    "up_softcap": (None, 25.0),
    "interleaved": (False, True),
}


@pytest.mark.parametrize("values", list(product(*SETTINGS.values())), ids=str)
def test_every_setting_is_found_by_the_numbers_of_a_module(values):
    settings = dict(zip(SETTINGS, values, strict=True))
    if settings["limit_after"] and settings["limit"] is None:
        pytest.skip("there is none")
    kind = Activation(**settings)
    # under other names, and beside numbers that mean nothing
    numbers = {"swiglu_limit": kind.limit, "my_alpha": kind.alpha, "gate_softcap": kind.gate_softcap, "softcap_2": kind.up_softcap}
    module = Experts(nn.SiLU(), by(kind), alpha=1.3, limit=11, **numbers)
    assert activation_of(module, contract(halves=not kind.interleaved)) == kind
    # columns in the other order
    assert activation_of(module, contract(halves=kind.interleaved)) is None


@pytest.mark.parametrize(
    "gate",
    [
        lambda module, columns: torch.sin(columns.chunk(2, -1)[0]),
        # up for gate
        lambda module, columns: activated(columns.roll(columns.shape[-1] // 2, -1)),
        # off by one part in ten thousand, for small gates or large ones alone
        lambda module, columns: activated(columns) * 1.0001,
        lambda module, columns: activated(columns) + 1e-4 * (columns.chunk(2, -1)[0] == 0),
        lambda module, columns: torch.where(columns.chunk(2, -1)[1] > 1000, 0.0, activated(columns)),
        # a limit that no attribute says
        lambda module, columns: activated(columns, Activation(limit=100.0)),
        # not a function of a row's gate and up
        lambda module, columns: activated(columns) / activated(columns).norm(dim=-1, keepdim=True),
        lambda module, columns: activated(columns)[..., :1],
        lambda module, columns: activated(columns + torch.ones(7)),
        lambda module, columns: activated(columns) * float("nan"),
    ],
)
def test_a_function_that_is_nearly_one_is_left_to_the_model(gate):
    assert activation_of(Experts(nn.SiLU(), gate), contract()) is None
