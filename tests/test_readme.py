"""What README.md shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moequant.testing import relative_error, run_ranks

ROOT = Path(__file__).resolve().parents[1]


def hide_gpus() -> None:
    torch.cuda.is_available = lambda: False


def example() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_example_runs(device, capsys, monkeypatch):
    # as on a user's machine: without interpreted kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    exec(compile(example(), "README.md", "exec"), names)
    assert capsys.readouterr().out == "torch.Size([32, 512])\n"
    assert names["dispatcher"].device.type == names["hidden"].device.type == device


def run_example(rank: int, ranks: int) -> torch.Tensor:
    """What the example computes with seed 0, changed for several ranks as README says."""
    code = example()
    for old, new in (
        ("from_weights(w13, w2", "from_weights(*(w[rank * L : (rank + 1) * L] for w in (w13, w2))"),
        ("print(", "out = ("),
        (".shape)", ")"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict[str, Any] = {"rank": rank, "L": 8 // ranks}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)
    return names["out"]


def test_the_example_on_two_ranks_has_the_result_of_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alone = run_example(0, 1)
    for out in run_ranks(run_example, 2, setup=hide_gpus):
        assert relative_error(out, alone) < 1e-5


@pytest.mark.multigpu
def test_the_example_on_two_gpus_has_the_result_of_one():
    alone = run_example(0, 1).cpu()
    # products of other tiles are summed in another order
    for out in run_ranks(run_example, 2, backend="cpu:gloo,cuda:nccl"):
        assert relative_error(out.cpu(), alone) < 1e-2


def test_the_commands_are_targets_of_the_makefile():
    shown = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"bench", "test"} <= shown <= targets
