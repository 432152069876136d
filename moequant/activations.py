"""What experts do between their two products: the function, and what models put around it."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields

from moequant.checks import check_choice, check_is

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Activation:
    """f(gate) * (up + offset) in float32, or f(x) where nothing is gated. Of the columns (2I) of GEMM 1's result, gate is the first half
    and up the second, or, interleaved, gate the even ones and up the odd ones.

    In this order, each step only where it is asked for:

        gate = min(gate, limit), up = clamp(up, -limit, limit)
        up = up_softcap * tanh(up / up_softcap)
        f = gate * sigmoid(alpha * gate)                 "silu"; the first gate is gate_softcap * tanh(gate / gate_softcap) with that
            gate * (1 + erf(gate / sqrt(2))) / 2         "gelu"
            gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) / 2       "gelu_tanh"
            max(gate, 0), max(gate, 0)**2                "relu", "relu2"
        f * (up + offset)

    An Inf that a limit or a soft cap makes finite counts as the finite number; a NaN stays NaN.

    SwiGLU is Activation(), "silu" for short; DeepSeek-V4 Activation(limit=10.0); gpt-oss, min(gate, 7) * sigmoid(1.702 * min(gate, 7)) *
    (clamp(up, -7, 7) + 1), is Activation(limit=7.0, alpha=1.702, offset=1.0, interleaved=True); Gemma "gelu_tanh"; Nemotron-H, without a
    gate, Activation("relu2", gated=False); Step-3.7 Activation(limit=7.0, limit_after=True). The formulas are those of transformers 5.24.

    Attributes:
        function: f: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        gated: GEMM 1 has gate and up; False: it has I columns, and nothing is multiplied.
        alpha: of "silu", above 0: 1.702 makes it nearly "gelu".
        limit: the largest gate, and the largest |up|, above 0; None: none.
        limit_after: the limit is f(gate)'s instead of gate's.
        offset: added to up, after the limit.
        gate_softcap: of "silu", above 0: bounds the factor gate, which the sigmoid takes as it is.
        up_softcap: above 0: bounds up.
        interleaved: gate and up alternate, gate first.
        text: all of it, as operations of torch.library take it: the function's name, and the settings that aren't the defaults in JSON
            behind it. `parsed` is the way back.

    Raises:
        ValueError: an unknown function, a number that isn't finite or above 0 where it has to be, or settings that don't go together.
    """

    function: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    limit_after: bool = False
    offset: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None
    interleaved: bool = False
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("function", self.function, FUNCTIONS)
        for name in ("gated", "limit_after", "interleaved"):
            check_is(name, getattr(self, name), bool)
        for name in ("alpha", "limit", "offset", "gate_softcap", "up_softcap"):
            number = _finite(name, getattr(self, name), name in ("limit", "gate_softcap", "up_softcap"))
            if number is not None and number <= 0 and name != "offset":
                raise ValueError(f"{name} must be above 0, got {number}")
            # equal activations have equal texts, and an int is no float in a text
            object.__setattr__(self, name, number)
        if self.function != "silu" and (self.alpha != 1 or self.gate_softcap is not None):
            raise ValueError(f'alpha and gate_softcap are of function "silu" alone: leave them out for "{self.function}"')
        if not self.gated and (self.offset or self.up_softcap is not None or self.interleaved):
            raise ValueError(
                "offset, up_softcap and interleaved are about up, which there is none of with gated=False: leave them out"
            )
        if self.limit_after and self.limit is None:
            raise ValueError("limit_after says where limit applies: give limit, got None")
        others = {f.name: getattr(self, f.name) for f in fields(self)[1:-1] if getattr(self, f.name) != f.default}
        object.__setattr__(self, "text", f"{self.function} {json.dumps(others)}" if others else self.function)

    @property
    def plain(self) -> bool:
        """Whether it is SwiGLU, gate and up apart."""
        return self.text == "silu"

    @property
    def halves(self) -> int:
        """2 if gate and up are columns of their own, which blocks of w13 keep apart; otherwise 1."""
        return 2 if self.gated and not self.interleaved else 1

    @property
    def width(self) -> int:
        """Columns of GEMM 1's result for each of the I: 2, or 1 where nothing is gated."""
        return 2 if self.gated else 1


def _finite(name: str, value: object, optional: bool) -> float | None:
    """The number as a float. Raises ValueError for anything else."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number{' or None' if optional else ''}, got {type(value).__name__}")
    # of an int that is too large for a float too
    if not abs(value) <= 3.4028234663852886e38:
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return float(value)


def activation_of(activation: str | Activation) -> Activation:
    """The activation that was asked for.

    Args:
        activation: one, or the name of a function: gated, gate and up apart, without a limit.

    Returns:
        It.

    Raises:
        ValueError: anything else.
    """
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str) or activation not in PLAIN:
        raise ValueError(f"activation must be an Activation or one of {', '.join(map(repr, FUNCTIONS))}, got {activation!r}")
    return PLAIN[activation]


# what a compiler finds without running anything
PLAIN = {name: Activation(name) for name in FUNCTIONS}


@functools.lru_cache(256)
def parsed(text: str) -> Activation:
    """The activation of a text.

    Args:
        text: `Activation.text`.

    Returns:
        The activation.
    """
    function, _, settings = text.partition(" ")
    return Activation(function, **json.loads(settings or "{}"))
