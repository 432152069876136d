"""What README.md shows runs as it stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.records import number, read_records
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
        # products of other numbers of rows are summed in another order: one number that rounds to the other bfloat16 makes 1.6e-5
        assert relative_error(out, alone) < 1e-4 and (out != alone).float().mean() < 1e-3


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


def test_the_example_is_ten_lines_and_there_is_one_table_of_at_most_eight_rows_and_one_plot():
    text = (ROOT / "README.md").read_text()
    assert len([line for line in example().splitlines() if line]) <= 10
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    # head and rule are two of the lines
    assert len(tables) == 1 and tables[0].count("\n") <= 2 + 8
    assert len(re.findall(r"!\[", text)) == 1


def test_links_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), (path.name, link)


def test_the_public_modules_are_there():
    (section,) = re.findall(r"## Public names\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)
    named = re.findall(r"`(moequant(?:\.\w+)*)`", section)
    assert len(named) > 6
    for name in named:
        # found, not imported: some need what may not be installed
        assert importlib.util.find_spec(name)


def test_readme_has_the_times_of_deep_ep_that_are_recorded():
    records = read_records(ROOT / "benchmarks" / "results")
    beside = [
        (number(record["us"]), number(us))
        for record in records
        for name, us in record.get("peers", {}).items()
        if "deep_ep" in name
    ]
    text = (ROOT / "README.md").read_text()
    assert beside and all(f"{own} us where DeepEP" in text and f"kernels took {us}" in text for own, us in beside)


def test_the_tests_that_the_security_page_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    assert [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text()] == []
