"""The weights of an experts module as moequant takes them. E experts, H hidden size, I intermediate size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moequant.batch import QuantizedTensor, ceil_div
from moequant.integrations.transformers.contract import Contract, UnknownExpertsError, local
from moequant.integrations.transformers.settings import say_once
from moequant.quantization import quantize_weight
from moequant.weights import halves_apart

SCALES = "_scale_inv"
BLOCK = 128


def weight_names(module: nn.Module, contract: Contract) -> tuple[str, ...]:
    """The parameters that `products` come from.

    Args:
        module: experts.
        contract: theirs.

    Returns:
        Names of the two weights, and of their scales where they are quantized.
    """
    names = contract.up, "down_proj"
    scales = tuple(name + SCALES for name in names)
    return names + scales if getattr(module, scales[0], None) is not None else names


def products(module: nn.Module, contract: Contract) -> tuple[QuantizedTensor | Tensor, QuantizedTensor | Tensor]:
    """The weights of both products.

    Args:
        module: experts.
        contract: theirs.

    Returns:
        w13, (E, 2I, H), or (E, I, H) without a gate, and w2, (E, H, I): quantized in blocks, or bfloat16. Views where they can be. Gates
        and ups as `Contract.lays_apart` says.

    Raises:
        ValueError: as UnknownExpertsError: they are quantized in a way that is not known here.
    """
    weights = [local(getattr(module, name)) for name in weight_names(module, contract)]
    if len(weights) == 4:
        up, down, up_scales, down_scales = weights
        _check_quantized(module, up, down)
        return _blocks(module, up, up_scales, contract.segments(contract.up)), _blocks(module, down, down_scales, 1)
    up, down = (weight.transpose(1, 2) if contract.transposed else weight for weight in weights)
    if up.dtype != torch.bfloat16:
        say_once(f"experts of {str(up.dtype).removeprefix('torch.')} are multiplied in bfloat16, from a copy of their weights")
    if contract.lays_apart(False):
        up = halves_apart(up)
    return up.to(torch.bfloat16).contiguous(), down.to(torch.bfloat16).contiguous()


def quantized(weight: Tensor, contract: Contract, name: str, dtype: torch.dtype, recipe: str) -> QuantizedTensor:
    """A weight of a checkpoint in blocks of 128x128.

    Args:
        weight: a parameter's, of any float type.
        contract: of the experts.
        name: the parameter's.
        dtype: of the values.
        recipe: see `moequant.formats.RECIPES`.

    Returns:
        It, with columns last to be summed over: no longer transposed; gates and ups apart.
    """
    if contract.transposed:
        weight = weight.transpose(1, 2)
    if name == contract.up and contract.lays_apart(True):
        weight = halves_apart(weight)
    return quantize_weight(weight, dtype=dtype, recipe=recipe, segments=contract.segments(name))


def quantize_in_place(module: nn.Module, contract: Contract, dtype: torch.dtype, recipe: str = "default") -> None:
    """Gives a module of float weights those that it has when it is loaded with a MoEQuantConfig.

    Args:
        module: experts.
        contract: theirs; no longer right afterwards, if they were transposed.
        dtype: of the values.
        recipe: see `moequant.formats.RECIPES`.
    """
    for name in (contract.up, "down_proj"):
        with torch.no_grad():
            weight = quantized(getattr(module, name).detach(), contract, name, dtype, recipe)
        setattr(module, name, nn.Parameter(weight.values, requires_grad=False))
        module.register_parameter(name + SCALES, nn.Parameter(weight.scales, requires_grad=False))
    module.is_transposed = False  # type: ignore[assignment]


def _check_quantized(module: nn.Module, up: Tensor, down: Tensor) -> None:
    """Raises UnknownExpertsError for what is no block of one byte each."""
    name = type(module).__name__
    if getattr(module, "activation_scheme", "dynamic") != "dynamic":
        raise UnknownExpertsError(f"{name} has activation scales of its own (activation_scheme), which moequant would ignore")
    block = getattr(module, "block_size", (BLOCK, BLOCK))
    if block is not None and tuple(block) != (BLOCK, BLOCK):
        raise UnknownExpertsError(f"the weights of {name} are in blocks of {tuple(block)}, and moequant takes 128x128")
    packed, found = up.dtype == torch.int8 and hasattr(module, "block_size"), f"{up.dtype} and {down.dtype}"
    if up.dtype.itemsize > 1 and down.dtype.itemsize > 1:
        raise UnknownExpertsError(
            f"the weights of {name} are of {found}, beside scales of narrow numbers: a quantized model was given another type, by "
            ".to(dtype), say; load it again, and move it by .to(device) alone"
        )
    if packed or up.dtype != down.dtype or up.dtype.itemsize != 1:
        raise UnknownExpertsError(
            f"the weights of {name} are of {found}, which moequant can't multiply; it takes both in one type, of float8 or, by "
            "MoEQuantConfig, int8"
        )


def _blocks(module: nn.Module, values: Tensor, scales: Tensor, segments: int) -> QuantizedTensor:
    """Quantized values with their scales, for each block even where a checkpoint has one for all of them."""
    experts, rows, columns = values.shape
    scales = scales.float()
    down = segments * ceil_div(rows // segments, BLOCK), ceil_div(columns, BLOCK)
    if getattr(module, "block_size", (BLOCK, BLOCK)) is None:
        # per tensor: one for each segment, or one for all
        if scales.shape[1] == segments:
            scales = scales.repeat_interleave(down[0] // segments, dim=1)
        scales = scales[:, : down[0]].expand(experts, *down)
    elif scales.shape[1] != down[0]:
        # blocks of a checkpoint that go across the middle, where gate ends and up begins
        segments = 1
    return QuantizedTensor(values, scales.contiguous(), "block", segments=segments)
