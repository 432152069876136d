"""What computes the experts of one module on a batch of a dispatcher.

L local experts, R rows of a rank, S valid rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moequant.batch import ExpertBatch, QuantizedTensor
from moequant.experts import GroupedExperts
from moequant.gemm import grouped_gemm_blockscale
from moequant.integrations.transformers.activations import activation_of
from moequant.integrations.transformers.contract import Contract, local
from moequant.integrations.transformers.settings import say_once
from moequant.integrations.transformers.weights import products
from moequant.quantization import quantize_expert_batch
from moequant.weights import Weight, dtype_of, halves_apart


def experts_of(module: nn.Module, contract: Contract) -> tuple[Experts, str]:
    """What computes a module's experts: moequant, and the module itself where moequant doesn't have its function.

    Args:
        module: experts.
        contract: theirs.

    Returns:
        It, and the `quant` of the dispatchers that it goes with.

    Raises:
        ValueError: as UnknownExpertsError: their weights are of a kind that is not known here.
    """
    w13, w2 = products(module, contract)
    quant = "none" if isinstance(w13, Tensor) else _NAMES[dtype_of(w13)]
    activation = activation_of(module, contract)
    biases = [local(getattr(module, name)) for name in contract.biases]
    apart = contract.lays_apart(quant != "none")
    if apart and activation is not None:
        activation = replace(activation, interleaved=False)
        biases[:1] = map(halves_apart, biases[:1])
    experts: Experts
    # blocks that hold rows of gate and up are none that GroupedExperts takes
    if activation is None or (isinstance(w13, QuantizedTensor) and w13.segments != activation.halves):
        _say(module, "what it computes between its products")
        experts = OwnActivation(module, contract, w13, w2, apart)
    else:
        experts = GroupedExperts(w13, w2, activation=activation, **dict(zip(("bias13", "bias2"), biases, strict=False)))
    if contract.normed:
        _say(module, "the norm behind its products")
        experts = Normed(module, experts)
    return experts, quant


def _say(module: nn.Module, what: str) -> None:
    say_once(
        f"{type(module).__name__}: {what} is not in moequant's kernels, and runs as the model's own Python code; the products run in "
        "moequant"
    )


_NAMES = {
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int8: "int8",
}


class OwnActivation:
    """Both products by moequant, and what is between them by the module itself, on valid rows only.

    Args:
        module: experts; kept weakly.
        contract: theirs.
        w13: the first weight, (L, 2I, H), or (L, I, H) without a gate.
        w2: the second, (L, H, I).
        apart: gates and ups of w13 are halves, and alternate for the module.
    """

    def __init__(self, module: nn.Module, contract: Contract, w13: Weight, w2: Weight, apart: bool) -> None:
        self._module, self._contract, self._apart = weakref.ref(module), contract, apart
        self.w13, self.w2 = w13, w2

    def __call__(self, batch: ExpertBatch, most: int | None = None) -> Tensor:
        """What the experts make of a batch.

        Args:
            batch: of a dispatcher with layout "ragged".
            most: valid rows that it may have; None: as many as it has rows.

        Returns:
            (R, H) bfloat16; its valid rows are written.
        """
        module: Any = self._module()
        counts = batch.num_tokens, batch.expert_start
        assert module is not None
        hints = {"expected_rows": batch.expected_rows, "batch_invariant": batch.batch_invariant}
        biases = [local(getattr(module, name)) for name in self._contract.biases]
        up = grouped_gemm_blockscale(batch.activations, self.w13, *counts, **hints)
        rows = valid_rows(batch, most)
        experts = batch.experts_of_rows()[rows] if biases else None
        columns = up[rows]
        if self._apart:
            columns = torch.stack(columns.chunk(2, -1), -1).flatten(-2)
        if experts is not None:
            columns = columns + biases[0][experts]
        inner = up.new_empty(up.shape[0], self.w2.shape[2])
        inner[rows] = (module._apply_gate if self._contract.gated else module.act_fn)(columns).to(inner.dtype)
        activations: QuantizedTensor | Tensor = inner
        if isinstance(self.w2, QuantizedTensor):
            activations = quantize_expert_batch(inner, *counts, dtype=dtype_of(self.w2), recipe=batch.recipe)
        out = grouped_gemm_blockscale(activations, self.w2, *counts, **hints)
        if experts is not None:
            out[rows] = (out[rows] + biases[1][experts]).to(out.dtype)
        return out


class Normed:
    """Experts, and then the module's own norm, on valid rows only.

    Args:
        module: experts; kept weakly.
        experts: what computes them.
    """

    def __init__(self, module: nn.Module, experts: GroupedExperts | OwnActivation) -> None:
        self._module, self._experts = weakref.ref(module), experts
        self.w13, self.w2 = experts.w13, experts.w2

    def __call__(self, batch: ExpertBatch, most: int | None = None) -> Tensor:
        """What the experts make of a batch.

        Args:
            batch: of a dispatcher with layout "ragged".
            most: valid rows that it may have; None: as many as it has rows.

        Returns:
            (R, H) bfloat16; its valid rows are written.
        """
        module: Any = self._module()
        assert module is not None
        out = self._experts(batch) if isinstance(self._experts, GroupedExperts) else self._experts(batch, most)
        rows = valid_rows(batch, most)
        # what is filled up with row 0 must read it before it is written
        out[rows] = module.post_expert_norm(out[rows]).to(out.dtype)
        return out


def valid_rows(batch: ExpertBatch, most: int | None) -> Tensor:
    """The rows of a batch that belong to an expert. Syncs with no GPU.

    Args:
        batch: with layout "ragged".
        most: as many as there may be; None: as the buffer has.

    Returns:
        (S,) int64. On a GPU S is `most`, and those too many are row 0: what is computed for each row alone may be written there again.
    """
    assert batch.expert_start is not None
    experts = batch.experts_of_rows()
    rows = torch.arange(batch.values.shape[0], device=batch.values.device)
    valid = rows - batch.expert_start[experts] < batch.num_tokens[experts]
    return places(valid, len(valid) if most is None else min(most, len(valid)))


def places(valid: Tensor, most: int) -> Tensor:
    """Where a mask holds.

    Args:
        valid: (R,) bool.
        most: on a GPU as many places as are returned.

    Returns:
        (S,) int64, on a GPU filled up with 0.
    """
    if valid.device.type == "cpu":
        return valid.nonzero()[:, 0]
    return torch.nonzero_static(valid, size=most, fill_value=0)[:, 0]


Experts = GroupedExperts | OwnActivation | Normed
