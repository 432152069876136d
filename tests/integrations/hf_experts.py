"""The experts classes of the installed transformers, found by scanning its modeling files, and modules of them with random weights."""

# pyright: reportMissingImports=false
from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from moequant.config import QUANT_DTYPES
from moequant.integrations.transformers.contract import contract_of
from moequant.integrations.transformers.weights import quantize_in_place

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 3, 160, 96
# names that configurations have for them; a limit that random gates do reach
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTERMEDIATE),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    "moe_latent_size": None,
    "swiglu_limit": 1.5,
}


class ExpertsClass(NamedTuple):
    """folder and file: of transformers/models. attributes: of the configuration that it reads."""

    name: str
    folder: str
    file: str
    attributes: tuple[str, ...]


@functools.cache
def scan() -> dict[str, ExpertsClass]:
    """Every class with the decorator, by its name. Imports none of them."""
    found: dict[str, ExpertsClass] = {}
    for path in sorted((Path(str(transformers.__file__)).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any("use_experts_impl" in ast.unparse(d) for d in node.decorator_list):
                attributes = tuple(sorted(set(re.findall(r"config\.(\w+)", ast.unparse(node)))))
                found[node.name] = ExpertsClass(node.name, path.parent.name, path.stem, attributes)
    return found


def config_of(which: ExpertsClass, experts: int) -> PreTrainedConfig:
    """The configuration, with its defaults but for the sizes, that the class reads: the first of its file that has all it asks for."""
    sizes = SIZES | dict.fromkeys((name for name in SIZES if "experts" in name), experts)
    module = importlib.import_module(f"transformers.models.{which.folder}.{which.file}")
    for value in list(vars(module).values()):
        if not (inspect.isclass(value) and issubclass(value, PreTrainedConfig) and value is not PreTrainedConfig):
            continue
        # of a model whose layers differ, it holds what all layers have
        config: Any = value()
        config.allow_global_per_layer_attribute_access = True
        if all(hasattr(config, name) for name in which.attributes):
            for name in which.attributes:
                if name in sizes:
                    several = isinstance(getattr(config, name), list)
                    setattr(config, name, [sizes[name]] * 2 if several else sizes[name])
            return config
    raise AssertionError(f"{which.file} has no configuration with {which.attributes}")


def make(which: ExpertsClass, experts: int = EXPERTS) -> Any:
    """A module of the class with random bfloat16 weights."""
    config = config_of(which, experts)
    module = getattr(importlib.import_module(f"transformers.models.{which.folder}.{which.file}"), which.name)
    arguments = (config, INTERMEDIATE) if "intermediate_size" in inspect.signature(module.__init__).parameters else (config,)
    made = module(*arguments)
    generator = torch.Generator().manual_seed(len(which.name))
    for parameter in made.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        # biases and norms around 1
        parameter.data = (values / 12 if parameter.dim() == 3 else 1 + values / 4).bfloat16()
    return made.requires_grad_(False)


def odd_gate(gate_up: Tensor) -> Tensor:
    """What no kernel has, of gates and ups that alternate."""
    return torch.sin(gate_up[..., ::2]) * gate_up[..., 1::2]


def quantize(module: Any, quant: str) -> None:
    """Gives a module the weights that it gets when it is loaded with a MoEQuantConfig."""
    quantize_in_place(module, contract_of(module), QUANT_DTYPES[quant])


def tokens(count: int, hidden: int = HIDDEN, experts: int = EXPERTS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in bfloat16, ids of distinct experts, and weights."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(count, experts, generator=generator).softmax(1).topk(TOP_K)
    return torch.randn(count, hidden, generator=generator).bfloat16(), ids, weights


def run(module: Any, implementation: str, *inputs: Tensor) -> Tensor:
    """The module's forward by an implementation."""
    module.config._experts_implementation_internal = implementation
    with torch.no_grad():
        return module(*inputs)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, by the Frobenius norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
