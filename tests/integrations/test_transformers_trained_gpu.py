# pyright: reportMissingImports=false
"""Experts of transformers under grad on GPUs: the gradients of their own backward, and those of one GPU on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5.23")

from hf_experts import error, scan, tokens
from hf_models import build
from test_transformers_trained_ranks import trained_layouts
from test_transformers_training import LARGEST, gradients, loss_and_gradients, rounded, trainable

from moequant.integrations.transformers import configure
from moequant.testing import assert_bit_equal, run_ranks

NAMES = ("Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "Gemma4TextExperts", "DeepseekV4Experts", "AriaExperts")


def inputs_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, ids, weights = tokens(count)
    return hidden.cuda(), ids.cuda(), weights.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_class_has_the_gradients_of_its_own_backward_on_a_gpu(name):
    for count in (1, 21, 300):
        module, inputs = trainable(name).cuda(), inputs_of(count)
        expected = gradients(rounded(module), "eager", (inputs[0].float(), *inputs[1:]))
        found = gradients(module, "moequant", inputs)
        for of, gradient in found.items():
            # one token's are three sums of terms that cancel: the class's own backward in bfloat16 is up to 0.024 off
            largest = 4 * LARGEST if (of, count) == ("weights", 1) else LARGEST
            assert error(gradient, expected[of]) < largest, (of, count)
        module.zero_grad()
        for of, gradient in gradients(module, "moequant", inputs).items():
            assert_bit_equal(gradient, found[of], of)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES[:2])
def test_the_host_waits_for_no_gradient(name):
    module, inputs = trainable(name).cuda(), inputs_of(21)
    gradients(module, "moequant", inputs)
    (hidden, ids, weights), grad = inputs, torch.ones_like(inputs[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(hidden, ids, weights).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_model_has_the_loss_and_the_gradients_that_it_has_by_itself_on_a_gpu(family):
    model = build(family).float().cuda().train().requires_grad_(True)
    expected = loss_and_gradients(model)
    model.set_experts_implementation("moequant")
    found = loss_and_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # a router that chose between no two experts has none
        assert error(found[name], gradient) < 1.5e-2 if gradient.any() else not found[name].any(), name


def run_layouts(rank: int, ranks: int, names: list[str], settings: dict[str, Any]) -> dict[str, float]:
    configure(**settings)
    return trained_layouts(rank, ranks, [scan()[name] for name in names], "cuda")


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_gradients_on_two_gpus_are_those_of_one(transport):
    names = ["Qwen3MoeExperts", "GptOssExperts"]
    for far in run_ranks(run_layouts, 2, names, {"transport": transport}, backend="cpu:gloo,cuda:nccl"):
        assert len(far) == 3 * (5 + 7)
        for what, distance in far.items():
            # other tiles, other last bits; sums over an expert's rows are rounded once for each piece
            assert distance < 4e-3, (what, distance)
