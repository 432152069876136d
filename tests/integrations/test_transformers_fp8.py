# pyright: reportMissingImports=false
"""transformers' own FP8 experts, of checkpoints in blocks, on moequant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from hf_experts import SIZES, error, tokens
from transformers import Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.integrations.moe import use_experts_implementation

import moequant.integrations.transformers  # noqa: F401
from moequant import Activation, dequantize, quantize_weight
from moequant.integrations.transformers import UnknownExpertsError
from moequant.integrations.transformers.layers import layer_of
from moequant.integrations.transformers.products import OwnActivation

Experts: Any = use_experts_implementation(FP8Experts, experts_interface=FP8ExpertsInterface())
WIDE = 256
# of which gate and up have a block of their own, though it is no whole one
NARROW = 96
# of which one block holds rows of both, as transformers makes it when it quantizes
ACROSS = 192
# what a configuration says of the function between the products
GATES = ("swiglu_limit", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap")


def make(intermediate: int = WIDE, **settings: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Experts with random weights in blocks, and what these stand for."""
    more = {name: settings.pop(name) for name in GATES if name in settings}
    config = Qwen3MoeConfig(**{**{k: v for k, v in SIZES.items() if v}, "moe_intermediate_size": intermediate})
    for name in GATES:
        setattr(config, name, more.get(name))
    config._experts_implementation_internal = "moequant"
    module = Experts(config, **({"block_size": (128, 128)} | settings))
    generator = torch.Generator().manual_seed(0)
    wide = []
    for name in ("gate_up_proj", "down_proj"):
        shape, scales = getattr(module, name).shape, getattr(module, name + "_scale_inv")
        weight = torch.randn(shape, generator=generator) / 12
        if name == "gate_up_proj" and not more:
            # a block with the scales of another would show
            weight[:, intermediate:] *= 16
        if module.block_size is None:
            parts = weight.unflatten(1, (scales.shape[1], -1))
            factor = parts.abs().amax((2, 3)) / 448
            values = (parts / factor[..., None, None]).to(torch.float8_e4m3fn).flatten(1, 2)
            wide.append((values.float().unflatten(1, (scales.shape[1], -1)) * factor[..., None, None]).flatten(1, 2))
            factor = factor[..., None]
        else:
            recipe = "ue8m0" if scales.dtype != torch.float32 else "default"
            apart = name == "gate_up_proj" and intermediate != ACROSS
            quantized = quantize_weight(weight, recipe=recipe, segments=2 if apart else 1)
            values, factor = quantized.values, quantized.scales
            wide.append(dequantize(quantized).float())
        getattr(module, name).data = values
        scales.data = factor.to(scales.dtype).reshape(scales.shape)
    return module.requires_grad_(False), wide[0], wide[1]


def expected(module: Any, w13: torch.Tensor, w2: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """In float32, one pair of token and expert after the other."""
    hidden, ids, weights = inputs
    out = torch.zeros(hidden.shape)
    for token, experts in enumerate(ids.tolist()):
        for k, expert in enumerate(experts):
            inner = module._apply_gate(w13[expert] @ hidden[token].float())
            out[token] += weights[token, k] * (w2[expert] @ inner)
    return out


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({}, Activation()),
        ({"scale_fmt": "ue8m0"}, Activation()),
        ({"block_size": None}, Activation()),
        ({"swiglu_limit": 1.5}, Activation(limit=1.5)),
        ({"swiglu_limit": 1.5, "swiglu_alpha": 1.702}, Activation(limit=1.5, alpha=1.702, offset=1.0)),
        ({"mlp_gate_softcap": 2.0, "mlp_up_softcap": 5.0}, Activation(gate_softcap=2.0, up_softcap=5.0)),
        ({"intermediate": NARROW}, Activation()),
        ({"intermediate": ACROSS}, None),
    ],
    ids=str,
)
@torch.no_grad()
def test_experts_of_checkpoints_in_blocks(settings, activation):
    module, *weights = make(**settings)
    inputs = tokens(9)
    assert error(module(*inputs), expected(module, *weights, *inputs)) < 7.5e-2
    taken: Any = layer_of(module).experts
    assert isinstance(taken, OwnActivation) if activation is None else taken.kind == activation


@torch.no_grad()
def test_quantized_experts_that_were_given_another_type_are_refused_in_words():
    module, *_ = make()
    module(*tokens(3))
    with pytest.raises(
        UnknownExpertsError, match=r"of torch.float32 and torch.float32, beside scales .* by .to\(dtype\), say; load it"
    ):
        module.to(torch.float32)(*tokens(3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": (64, 64)}, r"in blocks of \(64, 64\), and moequant takes 128x128"),
        ({"activation_scheme": "static"}, "activation scales of its own"),
        ({"expert_dtype": "fp4"}, "which moequant can't multiply"),
    ],
)
@torch.no_grad()
def test_checkpoints_of_other_formats_are_refused_in_words(settings, words):
    config = Qwen3MoeConfig(**{k: v for k, v in SIZES.items() if v})
    config._experts_implementation_internal = "moequant"
    module = Experts(config, **({"block_size": (128, 128)} | settings))
    with pytest.raises(UnknownExpertsError, match=words):
        module(*tokens(3))
