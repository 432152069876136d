# pyright: reportMissingImports=false
"""Whole models of transformers with their experts on moequant: logits, generation, saving and loading, compiling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5.23")

from hf_experts import error, run
from hf_models import FAMILIES, build, config_of, prompt
from transformers import AutoModelForCausalLM

from moequant.integrations.transformers import MoEQuantConfig
from moequant.testing import assert_bit_equal

NEW = 6


def experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "has_post_expert_norm")]


def error_of_most(found: Tensor, expected: Tensor) -> float:
    """Of the median token: where scores of a router lie side by side, another rounding chooses another expert for a token."""
    found, expected = found.float().flatten(0, -2), expected.float().flatten(0, -2)
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_logits_that_it_has_by_itself(family):
    model = build(family)
    assert len(experts_of(model)) >= 1
    expected = model(prompt()).logits
    model.set_experts_implementation("moequant")
    calls: list[tuple[Any, tuple[Tensor, ...], Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs, output)))
        for module in experts_of(model)
    ]
    assert error_of_most(model(prompt()).logits, expected) < 0.015
    assert len(calls) == len(experts_of(model))
    # copies would have them too
    for hook in hooks:
        hook.remove()
    for module, inputs, output in calls:
        alone = copy.deepcopy(module).float()
        assert error(output, run(alone, "eager", inputs[0].float(), inputs[1], inputs[2].float())) < 6e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_says_what_whole_forwards_say(family):
    model = build(family)
    model.set_experts_implementation("moequant")
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    made = model.generate(prompt(), **settings, return_dict_in_generate=True, output_logits=True)
    assert made.sequences.shape == (2, 11 + NEW)
    # token by token as all at once
    whole = model(made.sequences[:, :-1]).logits[:, -NEW:]
    assert error_of_most(torch.stack(made.logits, dim=1), whole) < 0.015
    without = model.generate(prompt(), **settings, use_cache=False)
    assert bool((without[:, : 11 + 1] == made.sequences[:, : 11 + 1]).all())


@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "gemma4_text"])
def test_experts_are_quantized_while_a_model_is_loaded_and_come_back_when_it_is_saved(family, quant, tmp_path):
    model = build(family)
    expected, full = model(prompt()).logits, sum(p.nbytes for m in experts_of(model) for p in m.parameters())
    model.save_pretrained(tmp_path / "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bfloat16", dtype=torch.bfloat16, quantization_config=MoEQuantConfig(quant)
    )
    taken = sum(p.nbytes for m in experts_of(loaded) for p in m.parameters())
    assert 0.5 < taken / full < 0.6
    assert loaded.config._experts_implementation == "moequant"
    with torch.no_grad():
        found = loaded(prompt()).logits
        assert error_of_most(found, expected) < 0.07
        loaded.save_pretrained(tmp_path / quant)
        # without a word of how
        again = AutoModelForCausalLM.from_pretrained(tmp_path / quant)
        assert_bit_equal(again(prompt()).logits, found)
    for module, other in zip(experts_of(loaded), experts_of(again), strict=True):
        assert module.down_proj.dtype == other.down_proj.dtype != torch.bfloat16
        assert not any(p.requires_grad for p in other.parameters() if p.dtype == module.down_proj.dtype)


def test_a_model_is_loaded_with_its_experts_on_moequant(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moequant", dtype=torch.bfloat16)
    model = build("qwen3_moe")
    model.set_experts_implementation("moequant")
    with torch.no_grad():
        assert_bit_equal(loaded(prompt()).logits, model(prompt()).logits)


def test_a_model_without_experts_is_refused(tmp_path):
    config = copy.copy(config_of("qwen3_moe"))
    config.decoder_sparse_step = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no experts that MoEQuantConfig could quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MoEQuantConfig())


@pytest.mark.parametrize("wrong", [{"quant": "none"}, {"quant": "fp4"}, {"recipe": "best"}])
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        MoEQuantConfig(**wrong)


def test_a_model_is_compiled_in_one_graph():
    model = build("qwen3_moe")
    model.set_experts_implementation("moequant")
    expected = model(prompt()).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_bit_equal(compiled(prompt()).logits, expected)


def test_experts_are_not_exported_whose_number_another_process_does_not_know():
    model = build("qwen3_moe")
    model.set_experts_implementation("moequant")
    (experts, *_) = (module for name, module in model.named_modules() if name.endswith("mlp.experts"))
    inputs = torch.zeros(3, model.config.hidden_size), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="a layer of moequant can't be exported"):
        torch.export.export(experts, inputs)


def test_a_copy_of_a_called_model_is_compiled_with_its_own_weights():
    model = build("qwen3_moe")
    model.set_experts_implementation("moequant")
    first = model(prompt()).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("down_proj"):
                weight.mul_(-1.5)
    compiled = torch.compile(other, fullgraph=True, backend="eager")(prompt()).logits
    assert_bit_equal(compiled, other(prompt()).logits)
    assert not torch.equal(compiled, first)


def test_generation_with_a_static_cache():
    model = build("qwen3_moe")
    model.set_experts_implementation("moequant")
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    assert torch.equal(model.generate(prompt(), **settings, cache_implementation="static"), model.generate(prompt(), **settings))
