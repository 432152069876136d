"""What a program may have set around a call changes no result: autocast, grad and inference modes, default types, a missing Triton."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from moequant import GroupedExperts, MoEQuantDispatcher
from moequant.testing import assert_bit_equal, routing
from public_calls import CALLS, Call, tensors_of, valid_rows

ROOT = Path(__file__).parent.parent
# what says how many bytes, and what is made at random or holds what was there before
OTHERS = {
    "routing",
    "poison",
    "record_routing",
    "GroupedExperts.push",
    "GroupedExperts.gemm2_push",
    "MoEQuantDispatcher.output_buffer",
}
OTHERS |= {f"MoEQuantDispatcher.{name}" for name in ("dispatch_first", "dispatch_second", "push", "begin_push", "combine_pushed")}
NAMES = [name for name in CALLS if name not in OTHERS]
MODES: dict[str, Callable[[], Any]] = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


def results(call: Call) -> list[torch.Tensor]:
    return tensors_of(call.function(**call.arguments), valid_rows(call.arguments))


def made(name: str) -> Call:
    torch.manual_seed(0)
    return CALLS[name]()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_no_bit(name):
    expected, call = results(made(name)), made(name)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(call)
    for a, b in zip(got, expected, strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_type_changes_no_bit(name):
    expected, call = results(made(name)), made(name)
    torch.set_default_dtype(torch.float64)
    try:
        got = results(call)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert_bit_equal(a, b)


def test_random_routing_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        ids, weights = routing(5, 2, 4, "zipf:1", torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    for a, b in zip((ids, weights), routing(5, 2, 4, "zipf:1", torch.Generator().manual_seed(0)), strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn", "int8"])
@pytest.mark.parametrize("first, second", list(itertools.product(MODES, MODES)), ids=str)
def test_experts_take_batches_in_any_mode_after_a_first_one_in_any_other(first, second, quant):
    dispatcher = MoEQuantDispatcher(num_experts=3, top_k=2, hidden_size=40, max_tokens_per_rank=8, quant=quant, device="cpu")
    w13, w2 = torch.randn(3, 48, 40).bfloat16(), torch.randn(3, 40, 24).bfloat16()
    experts = GroupedExperts.from_weights(w13, w2, quant=quant)
    tokens = torch.randn(5, 40).bfloat16(), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    outs = []
    for mode in (first, second):
        with MODES[mode]():
            outs.append(dispatcher(*tokens, experts))
    assert_bit_equal(outs[0], outs[1])


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.split(" ")[0] in ("quantize_fp8", "silu_mul", "act_quant", "fp8_gemm")]
)
def test_tangents_of_forward_mode_are_refused_and_not_dropped(name):
    call = made(name)
    argument = next(key for key, x in call.arguments.items() if isinstance(x, torch.Tensor) and x.dtype == torch.float32)
    with forward_ad.dual_level(), torch.no_grad():
        primal = call.arguments[argument]
        call.arguments[argument] = forward_ad.make_dual(primal, torch.ones_like(primal))
        with pytest.raises(RuntimeError, match=f"{argument} has a tangent"):
            call.function(**call.arguments)
        # one that has none is taken
        call.arguments[argument] = primal
        call.function(**call.arguments)


def test_a_dispatcher_refuses_tangents():
    call = made("MoEQuantDispatcher.dispatch")
    with forward_ad.dual_level(), torch.no_grad():
        weights = call.arguments["topk_weights"]
        call.arguments["topk_weights"] = forward_ad.make_dual(weights, torch.ones_like(weights))
        with pytest.raises(RuntimeError, match="topk_weights has a tangent"):
            call.function(**call.arguments)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MOEQUANT_CPU_KERNELS")}
    settings |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=240)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from moequant import GroupedExperts, MoEQuantDispatcher
dispatcher = MoEQuantDispatcher(num_experts=3, top_k=2, hidden_size=40, max_tokens_per_rank=8, device="cpu")
experts = GroupedExperts.from_weights(torch.randn(3, 48, 40).bfloat16(), torch.randn(3, 40, 24).bfloat16())
out = dispatcher(torch.randn(5, 40), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2), experts)
sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 40, "max_tokens_per_rank": 8}
print(MoEQuantDispatcher.buffer_bytes(**sizes, world_size=2, transport="collective"))
"""


def test_a_layer_on_a_cpu_needs_no_triton():
    ended = run(WITHOUT_TRITON)
    assert ended.returncode == 0 and int(ended.stdout) > 0, ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "gpu", 5, [], {}], ids=str)
def test_a_device_that_is_not_there_is_refused_in_words(device):
    with pytest.raises(ValueError, match="device must be"):
        MoEQuantDispatcher(num_experts=3, top_k=2, hidden_size=40, max_tokens_per_rank=8, device=device)
