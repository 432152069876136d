"""examples/ as a reader would run them, on a CPU and on GPUs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples import moe_module, two_micro_batches
from moequant.testing import assert_bit_equal, relative_error, run_ranks

GPU = pytest.mark.gpu
BACKEND = "cpu:gloo,cuda:nccl"
State = dict[str, torch.Tensor]


def dense(weights: list[State], x: torch.Tensor) -> torch.Tensor:
    """One layer without exchange or quantization. weights: each rank's state of it."""
    w13, w2 = (torch.cat([state[name].float() for state in weights]) for name in ("0.w13", "0.w2"))
    scores, ids = (x @ weights[0]["0.router.weight"].T).softmax(-1).topk(2)
    scores = scores / scores.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for k in range(2):
        gate, up = torch.einsum("tnh,th->tn", w13[ids[:, k]], x).chunk(2, -1)
        out += scores[:, k : k + 1] * torch.einsum("thi,ti->th", w2[ids[:, k]], F.silu(gate) * up)
    return out


def run_module(rank: int, ranks: int, device: str, default: str) -> tuple[State, torch.Tensor, torch.Tensor]:
    """The model's weights, its input and what it makes of that. default: the default device while it is built."""
    del ranks
    device, default = device.format(rank=rank), default.format(rank=rank)
    x = torch.randn(2, 3 + rank, 256, generator=torch.Generator().manual_seed(rank)).bfloat16().to(device)
    with torch.device(default):
        dispatcher, model = moe_module.build(device, layers=1)
        with dispatcher:
            out = model(x)
    return {name: weight.detach().cpu() for name, weight in model.state_dict().items()}, x.cpu(), out.cpu()


def check_module(results: list[tuple[State, torch.Tensor, torch.Tensor]]) -> None:
    weights = [state for state, _, _ in results]
    for _, x, out in results:
        assert out.shape == x.shape and out.dtype == x.dtype
        assert relative_error(out.flatten(0, 1), dense(weights, x.flatten(0, 1).float())) < 0.076


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_the_module_on_two_ranks_is_near_a_dense_computation(default):
    check_module(run_ranks(run_module, 2, "cpu", default))


@pytest.mark.gpu
@pytest.mark.parametrize("default", ["cpu", "cuda"])
def test_the_module_on_a_gpu_is_near_a_dense_computation(default):
    check_module([run_module(0, 1, "cuda", default)])


@pytest.mark.multigpu
@pytest.mark.parametrize("default", ["cpu", "cuda:{rank}"])
def test_the_module_on_two_gpus_is_near_a_dense_computation(default):
    check_module(run_ranks(run_module, 2, "cuda:{rank}", default, backend=BACKEND))


def loaded_later(device: str) -> None:
    """Weights that are loaded are those that are used, and the layers go on sharing their workspaces."""
    dispatcher, model = moe_module.build(device)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    with dispatcher:
        before = model(x)
        state = {name: weight.clone() for name, weight in model.state_dict().items()}
        # up, and so the layer's output, by a power of two: no rounding changes
        state["1.w13"][:, 128:] *= 2
        model.load_state_dict(state)
        assert_bit_equal(model(x), 2 * before)
        model.load_state_dict(state, assign=True)
        assert_bit_equal(model(x), 2 * before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_weights_that_are_loaded_later_are_used(device):
    loaded_later(device)


def run_ddp(rank: int, ranks: int, told: bool) -> bool:
    """Whether this rank still has its own experts after DDP has gone over a model with the example's layers."""
    del rank, ranks
    dispatcher, layers = moe_module.build("cpu")
    model: Any = nn.ModuleDict({"layers": layers})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    if told:
        model._ddp_params_and_buffers_to_ignore = [name for name in before if name.endswith(("w13", "w2"))]
    DistributedDataParallel(model)
    dispatcher.close()
    return all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_ddp_leaves_the_experts_alone_when_it_is_told():
    assert run_ranks(run_ddp, 2, True) == [True, True]
    # what the page warns of: rank 0's experts on all ranks
    assert run_ranks(run_ddp, 2, False) == [True, False]


def launch(path: str | None, ranks: int | None, device: str) -> str:
    """What a script prints, started as its docstring says; ranks None: by itself. device: "cpu" hides the GPUs."""
    assert path is not None
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MOEQUANT_CPU_KERNELS")}
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(path).parents[1])}
    done = subprocess.run([sys.executable, *launcher, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# by itself and with torchrun
LAUNCHED = pytest.mark.parametrize(
    ("ranks", "device"),
    [(2, "cpu"), pytest.param(None, "cuda", marks=GPU), pytest.param(2, "cuda", marks=pytest.mark.multigpu)],
)


def devices(ranks: int | None, device: str) -> list[str]:
    return ["cpu"] * (ranks or 1) if device == "cpu" else [f"cuda:{rank}" for rank in range(ranks or 1)]


@LAUNCHED
def test_the_module_runs_as_its_docstring_says(ranks, device):
    # ends of lines come apart from the lines: another rank's may stand between
    printed = "".join(launch(moe_module.__file__, ranks, device).splitlines())
    assert sorted(printed.split("(2, 16, 256) to ")[1:]) == [f"(2, 16, 256) on {name}" for name in devices(ranks, device)]


def test_the_module_is_short():
    tree = ast.parse(Path(moe_module.__file__).read_text())
    module = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    assert module.end_lineno is not None and module.end_lineno - module.lineno <= 30


def run_micro_batches(rank: int, ranks: int, device: str, default: str) -> None:
    """Side by side as one after the other."""
    device, default = device.format(rank=rank), default.format(rank=rank)
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(tokens, 256, generator=generator).bfloat16().to(device) for tokens in (20 + rank, ranks - 1 - rank)]
    with torch.device(default):
        dispatcher, layers = two_micro_batches.build(device)
        with dispatcher, torch.no_grad():
            outputs = two_micro_batches.run_layers(dispatcher, layers, batches)
            for x, out in zip(batches, outputs, strict=True):
                for router, experts in layers:
                    x = x + dispatcher(x, *router(x), experts)
                assert_bit_equal(out, x)


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_two_micro_batches_have_the_bits_of_one_after_the_other(default):
    run_ranks(run_micro_batches, 2, "cpu", default)


@pytest.mark.multigpu
@pytest.mark.parametrize("default", ["cpu", "cuda:{rank}"])
def test_two_micro_batches_on_gpus_have_the_bits_of_one_after_the_other(default):
    run_ranks(run_micro_batches, 2, "cuda:{rank}", default, backend=BACKEND)


@LAUNCHED
def test_the_micro_batches_run_as_their_docstring_says(ranks, device):
    printed = "".join(launch(two_micro_batches.__file__, ranks, device).splitlines()).replace("[(64", "\n[(64").split("\n")[1:]
    transports = ["local"] if ranks is None else ["collective"] if device == "cpu" else ["symmetric", "collective"]
    lines = [[f"[(64, 256), (40, 256)] on {name}, transport {kind}" for name in devices(ranks, device)] for kind in transports]
    assert sorted(printed) in lines
