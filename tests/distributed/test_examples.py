"""examples/ as a reader would run them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from examples import moe_module, two_micro_batches
from moequant.testing import assert_bit_equal, relative_error, run_ranks


def dense(weights: list[dict[str, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """One layer without exchange or quantization. weights: each rank's state of it."""
    w13, w2 = (torch.cat([state[name].float() for state in weights]) for name in ("0.w13", "0.w2"))
    scores, ids = (x @ weights[0]["0.router.weight"].T).softmax(-1).topk(2)
    scores = scores / scores.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for k in range(2):
        gate, up = torch.einsum("tnh,th->tn", w13[ids[:, k]], x).chunk(2, -1)
        out += scores[:, k : k + 1] * torch.einsum("thi,ti->th", w2[ids[:, k]], F.silu(gate) * up)
    return out


def run_module(rank: int, ranks: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    dispatcher, model = moe_module.build("cpu", layers=1)
    x = torch.randn(2, 3 + rank, 256, generator=torch.Generator().manual_seed(rank)).bfloat16()
    with dispatcher:
        return {name: weight.detach() for name, weight in model.state_dict().items()}, x, model(x)


def test_the_module_on_two_ranks_is_near_a_dense_computation():
    results = run_ranks(run_module, 2)
    weights = [state for state, _, _ in results]
    for _, x, out in results:
        assert out.shape == x.shape and out.dtype == x.dtype
        assert relative_error(out.flatten(0, 1), dense(weights, x.flatten(0, 1).float())) < 0.076


def launch(path: Path) -> str:
    """What two ranks of a script print, started as its docstring says."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MOEQUANT_CPU_KERNELS")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    environment = kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_module_is_short_and_runs_as_its_docstring_says():
    path = Path(moe_module.__file__)
    tree = ast.parse(path.read_text())
    module = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    assert module.end_lineno is not None and module.end_lineno - module.lineno <= 30
    assert launch(path).count("(2, 16, 256) to (2, 16, 256) on cpu") == 2


def run_micro_batches(rank: int, ranks: int) -> None:
    """Side by side as one after the other."""
    dispatcher, layers = two_micro_batches.build("cpu")
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(tokens, 256, generator=generator).bfloat16() for tokens in (20 + rank, ranks - 1 - rank)]
    with dispatcher, torch.no_grad():
        outputs = two_micro_batches.run_layers(dispatcher, layers, batches)
        for x, out in zip(batches, outputs, strict=True):
            for router, experts in layers:
                x = x + dispatcher(x, *router(x), experts)
            assert_bit_equal(out, x)


def test_two_micro_batches_have_the_bits_of_one_after_the_other():
    run_ranks(run_micro_batches, 2)


def test_the_micro_batches_run_as_their_docstring_says():
    assert launch(Path(two_micro_batches.__file__)).count("[(64, 256), (40, 256)] on cpu, transport collective") == 2
