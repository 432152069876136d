# pyright: reportMissingImports=false
"""Experts and models of transformers on a GPU: what kernels compute, graphs, and generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from hf_experts import EXPERTS, error, make, odd_gate, quantize, run, scan, tokens
from hf_models import build, prompt
from test_transformers_experts import LIMITS
from transformers import AutoModelForCausalLM
from transformers.cache_utils import StaticCache
from transformers.distributed.configuration_utils import DistributedConfig

from examples import generate
from moequant.integrations.transformers import MoEQuantConfig, configure
from moequant.testing import assert_bit_equal, run_ranks

GPU = pytest.mark.gpu
# a class whose function is the model's own
OWN = "GptOssExperts of its own"
NAMES = ("Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "Gemma4TextExperts", "DeepseekV4Experts", "MuseSparkExperts")


def moequant(name: str) -> Any:
    module = make(scan()[name.partition(" ")[0]]).cuda()
    if name == OWN:
        module._apply_gate = odd_gate
    return module


@GPU
@pytest.mark.parametrize("quant", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_a_class_computes_what_its_own_forward_does(name, quant):
    module = make(scan()[name]).cuda()
    if quant.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    for count in (1, 21, 300):
        inputs = tuple(tensor.cuda() for tensor in tokens(count))
        expected = run(copy.deepcopy(module).float(), "eager", inputs[0].float(), *inputs[1:])
        tried = copy.deepcopy(module)
        if quant != "none":
            quantize(tried, quant)
        assert error(run(tried, "moequant", *inputs), expected) < LIMITS[quant]
        # what names no expert, and what is another rank's
        others = inputs[1] % 3 == 0
        ids, weights = inputs[1].masked_fill(others, EXPERTS), inputs[2].masked_fill(others, 0)
        tried._is_expert_parallel = True
        expected = run(copy.deepcopy(module).float(), "eager", inputs[0].float(), inputs[1], weights)
        assert error(run(tried, "moequant", inputs[0], ids, weights), expected) < 1.2 * LIMITS[quant]


@GPU
@pytest.mark.parametrize("name", [*NAMES, OWN])
def test_a_graph_is_replayed_with_other_tokens(name):
    module = moequant(name)
    inputs = [tensor.cuda() for tensor in tokens(5)]
    run(module, "moequant", *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = module(*inputs)
    for seed in (1, 2):
        other = tokens(5, seed=seed)
        for kept, new in zip(inputs, other, strict=True):
            kept.copy_(new)
        graph.replay()
        replayed = out.clone()
        # more tokens in between have a dispatcher of their own
        run(module, "moequant", *(tensor.cuda() for tensor in tokens(100)))
        assert_bit_equal(replayed, run(module, "moequant", *(tensor.cuda() for tensor in other)))


@GPU
def test_the_host_waits_for_nothing():
    for name in (*NAMES, OWN):
        module = moequant(name)
        inputs = [tensor.cuda() for tensor in tokens(5)]
        run(module, "moequant", *inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(module, "moequant", *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generation_with_a_cache_that_is_compiled(family):
    model = build(family).cuda()
    model.set_experts_implementation("moequant")
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt().cuda(), **settings)
    assert expected.shape == (2, 17)
    static = model.generate(prompt().cuda(), **settings, cache_implementation="static")
    # another attention may choose another token, and all after it
    assert bool((static[:, :12] == expected[:, :12]).all())


@GPU
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_step_of_decoding_with_a_static_cache_is_captured(family):
    # what slides has another length of its own
    model = build(family, **({"layer_types": ["full_attention"] * 2} if family == "gpt_oss" else {})).cuda()
    model.set_experts_implementation("moequant")
    prompts, room = prompt().cuda(), 32
    cache: Any = StaticCache(config=model.config, max_cache_len=room)
    ids, position = prompts[:, -1:].clone(), torch.full((2, 1), 10, device="cuda")
    # of keys, the 10 before and its own
    mask = torch.zeros(2, 1, 1, room, dtype=torch.bfloat16, device="cuda")
    mask[..., 11:] = torch.finfo(torch.bfloat16).min

    def step() -> torch.Tensor:
        return model(ids, past_key_values=cache, attention_mask=mask, position_ids=position).logits

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(10)

    with torch.no_grad():
        model(prompts[:, :10], past_key_values=cache)
        step()
        back()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        for token in (5, 6):
            ids.fill_(token)
            back()
            graph.replay()
            replayed = logits.clone()
            back()
            assert_bit_equal(replayed, step())


@GPU
def test_the_example_prints_a_table(capsys):
    generate.main(["--new-tokens", "2", "--batch", "2", "--ways", "grouped_mm", "moequant", "moequant:int8"])
    printed = capsys.readouterr().out
    assert "| moequant:int8 | " in printed and "memory, GiB" in printed


def run_model(rank: int, ranks: int, folder: str, quant: str, transport: str) -> tuple[float, str]:
    """How far the experts of a model that is split over GPUs are from those of the whole one on one, given the same inputs."""
    torch.cuda.set_device(rank)
    configure(transport=transport)
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if quant != "none":
        settings["quantization_config"] = MoEQuantConfig(quant)
    layout = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation="moequant")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout, **settings)
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, **{"experts_implementation": "moequant"} | settings)
    recorded: list[tuple[Any, Any, Any]] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            alone = whole.get_submodule(name).to("cuda")
            module.register_forward_hook(
                lambda module, inputs, output, alone=alone: recorded.append((alone, inputs, output.clone()))
            )
    with torch.no_grad():
        made = model.generate(prompt().cuda(), max_new_tokens=4, do_sample=False)
        errors = [error(output, alone(*inputs)) for alone, inputs, output in recorded]
    assert len(errors) >= 8
    return max(errors), str(made.tolist())


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["auto", "collective"])
@pytest.mark.parametrize(("family", "quant"), [("qwen3_moe", "none"), ("qwen3_moe", "int8"), ("gpt_oss", "none")])
def test_a_model_on_two_gpus_says_what_it_says_on_one(family, quant, transport, tmp_path):
    build(family).save_pretrained(tmp_path)
    (first, made), (second, other) = run_ranks(run_model, 2, str(tmp_path), quant, transport, backend="cpu:gloo,cuda:nccl")
    assert made == other
    # other tiles, other last bits
    assert max(first, second) < 2e-3
