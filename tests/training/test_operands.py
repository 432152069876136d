"""Micro-batches between two steps of an optimizer, which share what the first has made of the weights."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from moequant import Activation, MoEQuantDispatcher
from moequant.nn import MoEExperts
from moequant.testing import assert_bit_equal, run_ranks
from moequant.training.precision import Precision

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 2, 64, 32, 12


def dispatcher_of(quant: str = "none", **settings: Any) -> MoEQuantDispatcher:
    common: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "max_tokens_per_rank": TOKENS}
    return MoEQuantDispatcher(**{**common, "device": "cpu", **settings}, quant=quant, recipe="ue8m0", layout="ragged")


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    return torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16(), ids, torch.rand(TOKENS, TOP_K, generator=generator)


@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"bias": True, "activation": Activation(interleaved=True)}], ids=str)
def test_micro_batches_share_the_weights_that_the_first_has_made(quant, settings, dtype, monkeypatch):
    made = []
    weight = Precision.weight
    both_ways = Precision.both_ways
    monkeypatch.setattr(Precision, "weight", lambda self, w, *segments: made.append(w.shape) or weight(self, w, *segments))
    monkeypatch.setattr(Precision, "both_ways", lambda self, w, *segments: made.append(w.shape) or both_ways(self, w, *segments))
    with dispatcher_of(quant) as dispatcher:
        experts = MoEExperts(dispatcher, INNER, dtype=dtype, **settings)
        expected, kept = copy.deepcopy(experts), copy.deepcopy(experts)
        for number in range(4):
            given = routed(number)
            outs = []
            for module, first in ((expected, None), (kept, number == 0)):
                before = len(made)
                outs.append(module(*given, is_first_microbatch=first))
                outs[-1].square().sum().backward()
                assert len(made) == before or quant == "none" or module is expected or number == 0
            assert_bit_equal(outs[1].detach(), outs[0].detach())
            with torch.no_grad():
                # which leaves what is kept
                assert_bit_equal(kept(*given), outs[0].detach())
                assert_bit_equal(kept(*given, is_first_microbatch=False), outs[0].detach())
        for name, parameter in expected.named_parameters():
            grad = kept.get_parameter(name).grad
            assert grad is not None and parameter.grad is not None
            assert_bit_equal(grad, parameter.grad, name)
        # what was kept is gone with the first that says nothing
        kept(*routed())
        with pytest.raises(RuntimeError, match="no forward with True came before it, or one without the argument came since"):
            kept(*routed(), is_first_microbatch=False)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
@pytest.mark.parametrize("inner", [128, 96], ids=["whole blocks", "parts of blocks"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
def test_micro_batches_on_a_gpu_have_the_bits_of_weights_that_are_made_anew(quant, inner, gated):
    settings: dict[str, Any] = {"hidden_size": 272, "max_tokens_per_rank": 100, "device": "cuda"}
    with dispatcher_of(quant, **settings) as dispatcher:
        kind = Activation() if gated else Activation("gelu", gated=False)
        expected = MoEExperts(dispatcher, inner, activation=kind)
        kept = copy.deepcopy(expected)
        for number in range(6):
            generator = torch.Generator("cuda").manual_seed(number)
            hidden = torch.randn(100, 272, generator=generator, device="cuda").bfloat16()
            ids = torch.rand(100, EXPERTS, generator=generator, device="cuda").argsort(1)[:, :TOP_K]
            weights = torch.rand(100, TOP_K, generator=generator, device="cuda")
            outs = expected(hidden, ids, weights), kept(hidden, ids, weights, is_first_microbatch=number % 3 == 0)
            assert_bit_equal(outs[1].detach(), outs[0].detach())
            for out in outs:
                out.square().sum().backward()
            for name, parameter in expected.named_parameters():
                grad = kept.get_parameter(name).grad
                assert grad is not None and parameter.grad is not None
                assert_bit_equal(grad, parameter.grad, name)


def test_micro_batches_after_a_change_of_the_weights_are_refused():
    experts = MoEExperts(dispatcher_of(), INNER)
    given = routed()
    with pytest.raises(ValueError, match="is_first_microbatch must be True, False or None"):
        experts(*given, is_first_microbatch=cast(Any, 1))
    experts(*given, is_first_microbatch=True).sum().backward()
    torch.optim.SGD(experts.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="weights have changed since"):
        experts(*given, is_first_microbatch=False)
    experts(*given, is_first_microbatch=True)
    experts(*given, is_first_microbatch=False)
    experts.to(torch.float16)
    with pytest.raises(RuntimeError, match="weights have changed since"):
        experts(*given, is_first_microbatch=False)
    experts(*given, is_first_microbatch=True)
    experts.w13 = nn.Parameter(torch.zeros_like(experts.w13))
    with pytest.raises(RuntimeError, match="weights have changed since"):
        experts(*given, is_first_microbatch=False)


def run_sharded_micro_batches(rank: int, ranks: int, checkpointed: bool) -> list[tuple[Tensor, ...]]:
    """Gradients of experts that FSDP2 has sharded, of weights that are made anew, and of kept ones."""
    results: list[tuple[Tensor, ...]] = []
    with dispatcher_of("fp8_e4m3fn", transport="local") as dispatcher:
        for kept in (False, True):
            torch.manual_seed(0)
            experts: Any = MoEExperts(dispatcher, INNER)
            fully_shard(experts, mesh=init_device_mesh("cpu", (ranks,)))
            for number in range(3):
                call = functools.partial(experts, is_first_microbatch=number == 0 if kept else None)
                out = checkpoint(call, *routed(number), use_reentrant=False) if checkpointed else call(*routed(number))
                out.square().sum().backward()
            results.append(tuple(p.grad.full_tensor() for p in experts.parameters()))
    return results


@pytest.mark.parametrize("checkpointed", [False, True], ids=["called", "checkpointed"])
def test_micro_batches_share_weights_of_sharded_experts_too(checkpointed):
    ((anew, kept),) = run_ranks(run_sharded_micro_batches, 1, checkpointed)
    for mine, expected in zip(kept, anew, strict=True):
        assert expected.any()
        assert_bit_equal(mine, expected)
