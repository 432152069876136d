# pyright: reportMissingImports=false
"""Expert parallelism of transformers under grad: the gradients of one rank that has all tokens and experts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers", "5.23")

from hf_experts import ExpertsClass, error, make, odd_gate, run, scan, tokens
from hf_models import build, prompt
from test_transformers_expert_parallel import EXPERTS, exact_product, mesh_of, split

from moequant.integrations.transformers import configure, expert_parallel
from moequant.integrations.transformers.expert_parallel import MoEQuantEP
from moequant.integrations.transformers.settings import say_once
from moequant.ops import on_cpu
from moequant.testing import run_ranks

Given = tuple[Tensor, Tensor, Tensor]
# ranks that hold one batch: nothing travels to the experts, or each takes a slice; and ranks with batches of their own, one with none
LAYOUTS = ("shared", "slices", "apart")


def backward(call: Any, module: nn.Module, given: Given, seed: int) -> dict[str, Tensor]:
    """The output and all gradients."""
    hidden, weights = (x.clone().requires_grad_() for x in (given[0], given[2]))
    module.zero_grad()
    out = call(hidden, given[1], weights)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out))
    made = {"output": out.detach(), "hidden": hidden.grad, "weights": weights.grad}
    made |= {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in made.values())
    return {name: gradient.clone() for name, gradient in made.items()}  # type: ignore[union-attr]


def trained_layouts(rank: int, ranks: int, classes: list[ExpertsClass], device: str = "cpu") -> dict[str, float]:
    """How far each gradient is from that of one rank: 0 for equal bits."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    on_cpu.grouped_gemm_blockscale = exact_product
    # 7 and 16 tokens go in pieces, of which one rank then has none
    configure(max_tokens=8)
    together, alone = (mesh_of(groups, device) for groups in ([list(range(ranks))], [[each] for each in range(ranks)]))
    far: dict[str, float] = {}
    for which in classes:
        whole = make(which, EXPERTS).to(device).requires_grad_(True)
        whole.config._experts_implementation_internal = "moequant"
        for layout in LAYOUTS:
            expert_parallel.sends_nothing = lambda *given, layout=layout: layout == "shared"
            mine = split(whole, together).requires_grad_(True)
            tried = MoEQuantEP(mine, together, alone if layout == "apart" else together)
            counts = [7, 16] if layout == "apart" else [19] * ranks
            batches: list[Any] = [
                tuple(x.to(device) for x in tokens(count, experts=EXPERTS, seed=each)) for each, count in enumerate(counts)
            ]
            given = batches[rank if layout == "apart" else 0]
            found = backward(tried, mine, given, rank if layout == "apart" else 0)
            # of all ranks' losses, batch after batch
            expected = [
                backward(whole, whole, batch, each) for each, batch in enumerate(batches[: ranks if layout == "apart" else 1])
            ]
            for of, gradient in found.items():
                if of in ("output", "hidden", "weights"):
                    reference = expected[rank if layout == "apart" else 0][of]
                else:
                    local = EXPERTS // ranks
                    reference = sum(each[of].float() for each in expected)[rank * local : (rank + 1) * local]  # type: ignore[index]
                far[f"{which.name} {layout} {of}"] = error(gradient, reference)
    return far


def by_the_built_in(rank: int, which: ExpertsClass) -> tuple[float, list[str]]:
    """How far the output under grad is from inference, where moequant has no backward, and what is said of it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moequant").addHandler(handler)
    say_once.cache_clear()
    whole = make(which, EXPERTS)
    whole.config._experts_implementation_internal = "moequant"
    whole._apply_gate = odd_gate
    mesh = mesh_of([[0, 1]])
    mine = split(whole, mesh).requires_grad_(True)
    mine._apply_gate = odd_gate
    tried, given = MoEQuantEP(mine, mesh, mesh_of([[0], [1]])), tokens(5 + rank, experts=EXPERTS, seed=rank)
    first, second = (backward(tried, mine, given, 0) for _ in range(2))
    assert torch.equal(first["hidden"], second["hidden"])
    return error(first["output"], run(whole, "moequant", *given)), [line for line in said if "under grad" in line]


def made_anew_on_one_rank(rank: int, which: ExpertsClass) -> bool:
    """Whether ranks stay in step when the weights of one alone are others, and training and inference take turns."""
    mesh = mesh_of([[0, 1]])
    mine = split(make(which, EXPERTS), mesh).requires_grad_(True)
    tried, given = MoEQuantEP(mine, mesh, mesh), tokens(5, experts=EXPERTS)
    with torch.no_grad():
        before = tried(*given)
        if rank:
            mine.down_proj.mul_(1)
        after = tried(*given)
    return torch.equal(after, before) and torch.equal(tried(*given).detach(), before)


def trained_model(folder: str, sizes: tuple[int, int]) -> float:
    """The largest error of the gradients of a model that transformers has split, against the whole one with all tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    (tp, fsdp), ranks = sizes, dist.get_world_size()
    layout = DistributedConfig(tp_size=tp, fsdp_size=fsdp, ep_size=ranks, ep_implementation="moequant")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout, dtype=torch.float32).train()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="moequant").train()
    ids = prompt(batch=2, length=10)
    whole(ids, labels=ids).loss.backward()
    mine = ids if tp > 1 else ids[dist.get_rank() :][:1]
    model(mine, labels=mine).loss.backward()
    far = 0.0
    for name, parameter in whole.named_parameters():
        gradient, expected = model.get_parameter(name).grad, parameter.grad
        assert gradient is not None and expected is not None, name
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        far = max(far, error(gradient, expected))
    return far


MODELS = {"gpt_oss": (2, 1), "qwen3_moe": (1, 2)}


def run_all(rank: int, ranks: int, folder: str) -> tuple[dict[str, float], tuple[float, list[str]], list[float]]:
    """What `trained_layouts` and `by_the_built_in` say, and the largest error of each model."""
    classes = [scan()[name] for name in ("Qwen3MoeExperts", "GptOssExperts")]
    far, built_in = trained_layouts(rank, ranks, classes), by_the_built_in(rank, classes[0])
    assert made_anew_on_one_rank(rank, classes[0])
    configure(max_tokens=4096)
    return far, built_in, [trained_model(f"{folder}/{family}", sizes) for family, sizes in MODELS.items()]


def test_gradients_are_those_of_one_rank_in_every_layout_and_model(tmp_path, monkeypatch):
    # which transformers would take, whatever the group is
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for family in MODELS:
        build(family).save_pretrained(tmp_path / family)
    for far, (apart, said), models in run_ranks(run_all, 2, str(tmp_path)):
        assert len(far) == 3 * (5 + 7)
        for what, distance in far.items():
            # sums over an expert's rows are rounded once for each piece, and torch adds a row's products in an order of its own
            limit = 4e-3 if "proj" in what else 1e-6 if "weights" in what else 0.0
            assert distance <= limit, (what, distance)
        # Python's products are of other bits
        assert apart < 1e-2
        why = "what it computes between its products is not in moequant"
        assert said == [
            f'expert parallelism of Qwen3MoeExperts under grad is ep_implementation="all_to_all": {why}',
            f'Qwen3MoeExperts under grad runs as experts_implementation="grouped_mm": {why}',
        ]
        # where the dense layers' sums in another order round a product to bfloat16's next number
        assert all(distance < 5e-3 for distance in models), models
