"""Every experts class of the installed transformers, run by moequant, against its own forward in float32 at the same routing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from hf_experts import error, make, quantize, run, scan, tokens

import moequant.integrations.transformers  # noqa: F401
from moequant import Activation, GroupedExperts
from moequant.integrations.transformers.layers import layer_of
from moequant.integrations.transformers.products import Normed

# What moequant's kernels compute, all of it: SwiGLU,
PLAIN = """
Afmoe Aria AXK1 AXK2 BailingHybrid Beam Cohere2Moe DeepseekOcr2Text DeepseekV2 DeepseekV3 DeepseekV32 Dots1 Dots3Note Ernie4_5_Moe
Ernie4_5_VLMoeMoe ExaoneMoe FlexOlmo Flint Glm4Moe Glm4MoeLite Glm4vMoeText GlmMoeDsa GraniteMoe GraniteMoeSWA GraniteMoeHybrid
GraniteMoeShared HunYuanMoEV1 HYV3 Inkling Jamba KimiLinear Kolibri1 Laguna LaraMini Lfm2Moe Mellum MiMoV2Flash MiniMax MiniMaxM2
Mistral4 MistralLarge4Text Mixtral Olmoe Phimoe Qwen2Moe Qwen3_5Moe Qwen3Moe Qwen3Next Qwen3OmniMoeThinkerText
Qwen3OmniMoeTalkerText Qwen3VLMoeText Qwen4ExpText SolarOpen UnlimitedOcrText Zaya
"""
# and other activations, with biases where there are any.
CLAMPED = Activation(limit=1.5)
OAI = Activation(limit=1.5, alpha=1.702, offset=1.0)
SOFT_CAPPED = Activation(gate_softcap=4.0, up_softcap=25.0)
GELU = Activation("gelu_tanh")
OTHERS = {
    "DeepseekV4": CLAMPED,
    "DiffusionGemmaText": GELU,
    "Gemma4Text": GELU,
    "Glm5NextText": CLAMPED,
    # whose gates and ups alternate, but not in the copy of its weights
    "GptOss": OAI,
    "HYV4": CLAMPED,
    "HYV4VL": CLAMPED,
    "Inkling2": SOFT_CAPPED,
    "Inkling2Loop": SOFT_CAPPED,
    "MiniMaxM3VL": OAI,
    "NemotronH": Activation("relu2", gated=False),
    "OpenAIPrivacyFilter": OAI,
}
# What a norm follows, which is the model's own: behind SwiGLU.
NORMED = ("MuseSpark",)
BIASED = ("GptOss", "OpenAIPrivacyFilter")
# Measured over all classes, at most: 5.1e-3, 6.9e-2, 2.3e-2.
LIMITS = {"none": 6e-3, "fp8_e4m3fn": 7.5e-2, "int8": 2.7e-2}


def test_every_class_of_transformers_is_classified():
    found = {name.removesuffix("Experts") for name in scan()}
    assert found - set(PLAIN.split()) - OTHERS.keys() - set(NORMED) == set(), (
        "experts classes that are new: look at what they compute, then add them here"
    )
    assert not set(PLAIN.split()) & OTHERS.keys()


@pytest.mark.parametrize("name", scan())
def test_a_class_computes_what_its_own_forward_does(name):
    module, short = make(scan()[name]), name.removesuffix("Experts")
    inputs = tokens(21)
    expected = run(copy.deepcopy(module).float(), "eager", inputs[0].float(), *inputs[1:])
    for quant, limit in LIMITS.items():
        tried = copy.deepcopy(module)
        if quant != "none":
            quantize(tried, quant)
        found = run(tried, "moequant", *inputs)
        assert found.dtype == torch.bfloat16
        assert error(found, expected) < limit, quant
        taken: Any = layer_of(tried).experts
        assert isinstance(taken, Normed) == (short in NORMED)
        grouped = taken._experts if short in NORMED else taken
        assert isinstance(grouped, GroupedExperts)
        assert grouped.kind == OTHERS.get(short, Activation())
        assert [bias is not None for bias in (grouped.bias13, grouped.bias2)] == [short in BIASED] * 2
