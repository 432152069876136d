"""Quantizing experts while a model is loaded, without a bfloat16 copy of them. E experts, H hidden size, I intermediate size."""

# pyright: reportMissingImports=false
from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from moequant.batch import ceil_div
from moequant.checks import check_choice
from moequant.config import QUANT_DTYPES
from moequant.formats import FORMATS, recipe_of
from moequant.integrations.transformers.contract import FLAGS, Contract, contract_of
from moequant.integrations.transformers.weights import BLOCK, SCALES, quantized

METHOD = "moequant"
# of modules whose weights have places for quantized ones, as they were before
_CONTRACT: weakref.WeakKeyDictionary[nn.Module, Contract] = weakref.WeakKeyDictionary()


class MoEQuantConfig(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=MoEQuantConfig())`: the experts become fp8 or int8 while they are loaded, and run in
    moequant. Everything else stays as it is. Models that were loaded so can be saved, and loaded again without a config.

    Args:
        quant: "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2" or "int8".
        recipe: see `moequant.formats.RECIPES`.
        modules_to_not_convert: names of experts modules that stay as they are, or parts of names.
        **ignored: what else a saved configuration has.

    Attributes:
        quant_method: "moequant", by which a saved configuration is known.

    Raises:
        ValueError: a wrong quant or recipe.
    """

    def __init__(
        self,
        quant: str = "fp8_e4m3fn",
        recipe: str = "default",
        modules_to_not_convert: list[str] | None = None,
        **ignored: Any,
    ) -> None:
        del ignored
        check_choice("quant", quant, tuple(FORMATS))
        recipe_of(recipe)
        self.quant_method: Any = METHOD
        self.quant, self.recipe = quant, recipe
        self.modules_to_not_convert = modules_to_not_convert


class MoEQuantizer(HfQuantizer):
    """What transformers asks while it loads a model with a MoEQuantConfig.

    Args:
        quantization_config: the user's.
        **kwargs: of transformers' own class.
    """

    quantization_config: MoEQuantConfig

    def __init__(self, quantization_config: MoEQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # a scale for each block beside each weight; checkpoints of experts one by one get them one by one
        self.serialized_names = {"weight": ["weight", f"weight{SCALES}"]}

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a number of a quantized weight."""
        return 1

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Whether a model that was loaded so can be trained."""
        return False

    def is_serializable(self) -> bool:  # type: ignore[override]
        """Whether a model that was loaded so can be saved.

        Returns:
            True.
        """
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight of the checkpoint is to be quantized.

        Args:
            model: with the places of `_process_model_before_weight_loading`.
            param_name: the weight's.
            **kwargs: not used.

        Returns:
            The answer.
        """
        module, name = get_module_from_name(model, param_name)
        contract = _CONTRACT.get(module)
        return not self.pre_quantized and contract is not None and name in (contract.up, "down_proj")

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes a weight.

        Returns:
            The operation.
        """
        return _Quantize(self.quantization_config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Makes places for quantized weights and their scales, on the meta device."""
        dtype, places = QUANT_DTYPES[self.quantization_config.quant], 0
        for _, module in _experts_of(model, self.quantization_config.modules_to_not_convert):
            contract = _CONTRACT[module] = contract_of(module)
            for name in (contract.up, "down_proj"):
                experts, rows, columns = getattr(module, name).shape
                if contract.transposed:
                    rows, columns = columns, rows
                segments = contract.segments(name)
                blocks = segments * ceil_div(rows // segments, BLOCK), ceil_div(columns, BLOCK)
                values = torch.empty(experts, rows, columns, dtype=dtype, device="meta")
                scales = torch.empty(experts, *blocks, dtype=torch.float32, device="meta")
                setattr(module, name, nn.Parameter(values, requires_grad=False))
                module.register_parameter(name + SCALES, nn.Parameter(scales, requires_grad=False))
            places += 1
        if not places:
            raise ValueError(
                f"{type(model).__name__} has no experts that MoEQuantConfig could quantize: their class does not have transformers' "
                "use_experts_implementation, or modules_to_not_convert names them all; load it without"
            )
        model.set_experts_implementation(METHOD)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Numbers in a narrow type don't take part in training."""
        for module in model.modules():
            contract = _CONTRACT.get(module)
            if contract is not None:
                for name in (contract.up, "down_proj"):
                    for parameter in (getattr(module, name), getattr(module, name + SCALES)):
                        parameter.requires_grad_(False)
                # the values were turned round when they were quantized
                module.is_transposed = False
        return model


class _Quantize(ConversionOps):
    """One weight of a module to values and scales, under their full names."""

    def __init__(self, config: MoEQuantConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in input_dict.items():
            module, name = get_module_from_name(model, key)
            weight = value[0] if isinstance(value, list) else value
            dtype = QUANT_DTYPES[self.config.quant]
            with torch.no_grad():
                result = quantized(weight, _CONTRACT[module], name, dtype, self.config.recipe)
            made |= {key: result.values, key + SCALES: result.scales}
        return made


def _experts_of(model: nn.Module, left_out: list[str] | None) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules of a model that take part in transformers' choice of an implementation, by name."""
    for name, module in model.named_modules():
        if all(hasattr(module, flag) for flag in FLAGS) and should_convert_module(name, left_out):
            yield name, module


def register() -> None:
    """Registers the configuration and the quantizer. May be called again."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoEQuantConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(MoEQuantizer)
