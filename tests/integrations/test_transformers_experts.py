"""Every experts class of the installed transformers, run by moequant, against its own forward in float32 at the same routing."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from hf_experts import error, make, quantize, run, scan, tokens

import moequant.integrations.transformers  # noqa: F401
from moequant import GroupedExperts
from moequant.integrations.transformers.layers import layer_of
from moequant.integrations.transformers.products import OwnActivation

# What GroupedExperts computes: silu(gate) * up between two products.
PLAIN = """
Afmoe Aria AXK1 AXK2 BailingHybrid Beam Cohere2Moe DeepseekOcr2Text DeepseekV2 DeepseekV3 DeepseekV32 Dots1 Dots3Note Ernie4_5_Moe
Ernie4_5_VLMoeMoe ExaoneMoe FlexOlmo Flint Glm4Moe Glm4MoeLite Glm4vMoeText GlmMoeDsa GraniteMoe GraniteMoeSWA GraniteMoeHybrid
GraniteMoeShared HunYuanMoEV1 HYV3 Inkling Jamba KimiLinear Kolibri1 Laguna LaraMini Lfm2Moe Mellum MiMoV2Flash MiniMax MiniMaxM2
Mistral4 MistralLarge4Text Mixtral Olmoe Phimoe Qwen2Moe Qwen3_5Moe Qwen3Moe Qwen3Next Qwen3OmniMoeThinkerText
Qwen3OmniMoeTalkerText Qwen3VLMoeText Qwen4ExpText SolarOpen UnlimitedOcrText Zaya
"""
# Other functions, biases, a norm, or no gate: products by moequant, and the rest by the class itself.
OWN = """DeepseekV4 DiffusionGemmaText Gemma4Text Glm5NextText GptOss HYV4 HYV4VL Inkling2 Inkling2Loop MiniMaxM3VL MuseSpark NemotronH
    OpenAIPrivacyFilter"""
# Measured over all classes, at most: 5.1e-3, 6.9e-2, 2.3e-2.
LIMITS = {"none": 6e-3, "fp8_e4m3fn": 7.5e-2, "int8": 2.7e-2}


def test_every_class_of_transformers_is_classified():
    found = {name.removesuffix("Experts") for name in scan()}
    assert found - set(PLAIN.split()) - set(OWN.split()) == set(), (
        "experts classes that are new: look at what they compute, then add them here"
    )
    assert not set(PLAIN.split()) & set(OWN.split())


@pytest.mark.parametrize("name", scan())
def test_a_class_computes_what_its_own_forward_does(name):
    module = make(scan()[name])
    inputs = tokens(21)
    expected = run(copy.deepcopy(module).float(), "eager", inputs[0].float(), *inputs[1:])
    for quant, limit in LIMITS.items():
        tried = copy.deepcopy(module)
        if quant != "none":
            quantize(tried, quant)
        found = run(tried, "moequant", *inputs)
        assert found.dtype == torch.bfloat16
        assert error(found, expected) < limit, quant
        kind = GroupedExperts if name.removesuffix("Experts") in PLAIN.split() else OwnActivation
        assert isinstance(layer_of(tried).experts, kind)
