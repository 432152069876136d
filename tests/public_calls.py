"""A valid call of every public function and method: what nets over all of them start from."""

from __future__ import annotations

import types
from typing import Any

import torch

import moequant
from function_calls import FUNCTIONS, Call
from layer_calls import LAYERS
from moequant import ExpertBatch, QuantizedTensor, gemm, quantization

CALLS = FUNCTIONS | LAYERS
__all__ = ["CALLS", "Call", "public_names", "tensors_of", "valid_rows"]


def tensors_of(result: Any, num_tokens: torch.Tensor | None) -> list[torch.Tensor]:
    """Copies of the tensors and numbers in a result; of (L, M, ...) with rows from num_tokens[l] on, which may hold anything, zero."""
    if isinstance(result, torch.Tensor):
        copied = result.detach().clone()
        if num_tokens is not None and not result.is_meta and result.shape[:1] == num_tokens.shape and result.dim() > 1:
            for expert, count in enumerate(num_tokens.clamp(0, result.shape[1]).tolist()):
                copied[expert, count:].zero_()
        return [copied]
    if isinstance(result, ExpertBatch):
        return [x for part in (result.values, result.scales, result.sources) for x in tensors_of(part, result.num_tokens)]
    if isinstance(result, QuantizedTensor):
        return tensors_of([result.values, result.scales], num_tokens)
    if isinstance(result, (tuple, list)):
        return [tensor for x in result for tensor in tensors_of(x, num_tokens)]
    return [torch.tensor(float(result), dtype=torch.float64)] if isinstance(result, (bool, int, float)) else []


def valid_rows(arguments: dict[str, Any]) -> torch.Tensor | None:
    """num_tokens of a call."""
    batch = arguments.get("batch")
    return batch.num_tokens if isinstance(batch, ExpertBatch) else arguments.get("num_tokens")


def public_names() -> set[str]:
    """Functions, types and methods of the modules that users import from, as CALLS names them."""
    names = set()
    for module in (moequant, quantization, gemm):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith("moequant")
            if name.startswith(("_", "check_")) or not own or (isinstance(value, type) and issubclass(value, Exception)):
                continue
            if isinstance(value, types.FunctionType):
                names.add(name)
            elif isinstance(value, type):
                names.add(name)
                ours = [base for base in value.__mro__ if base.__module__.startswith("moequant")]
                members = {m: f for base in ours for m, f in vars(base).items()}
                methods = (m for m, f in members.items() if callable(getattr(value, m)) and not isinstance(f, type))
                names |= {f"{name}.{m}" for m in methods if m == "__call__" or not m.startswith("_")}
    # handles are opaque: dispatch makes them; the others are the package's own
    own = {
        "DispatchHandle",
        "activation_of",
        "QuantizedTensor.made_of",
        "quantize_blocks",
        "ceil_div",
        "scale_layout",
        "empty_transposed_scales",
        "empty_scales_of",
        "Repeats",
        "Repeats.run",
        "Repeats.call",
        "Repeats.device",
    }
    return names - own
