"""examples/train_moe.py for a few steps: it learns, goes on where it stopped, and draws its curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import train_moe
from moequant.testing import run_ranks

GPU = pytest.mark.gpu


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "abcdefghijklmnopqrstuvwxyz":
        (folder / f"{name}.py").write_text(f"def {name}(x):\n    return x + {ord(name)}\n\n" * 8)
    return folder


def arguments(sources: Path, folder: Path, steps: int, *more: str) -> list[str]:
    sizes = {"hidden": 32, "intermediate": 16, "layers": 1, "context": 16, "batch": 2, "vocabulary": 300, "experts": 4, "top-k": 2}
    given = {"steps": steps, "every": 2, "lr": 0.01, "text": sources, "folder": folder, **sizes}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))] + list(more)


def hide_gpus() -> None:
    torch.cuda.is_available = lambda: False


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_run_that_goes_on_has_the_losses_of_one_that_never_stopped(device, sources, tmp_path, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = train_moe.main(arguments(sources, tmp_path / "whole", 4))
    assert set(whole) == {"bf16", "fp8"}
    for curve in whole.values():
        assert [step for step, _ in curve] == [0, 2, 4] and curve[-1][1] < curve[0][1] - 0.05
    train_moe.main(arguments(sources, tmp_path / "parts", 2))
    assert train_moe.main(arguments(sources, tmp_path / "parts", 4)) == whole
    picture = (tmp_path / "parts" / "loss.svg").read_text()
    assert "<svg" in picture and (tmp_path / "parts" / "fp8.json").exists()


def test_without_matplotlib_there_is_no_picture_and_everything_else(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    first = train_moe.main(arguments(sources, tmp_path, 2, "--precisions", "bf16"))
    assert "loss.svg, as there is no matplotlib: pip install matplotlib" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bf16.json", "bf16-rank0-of-1.pt"}
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # nothing is trained again
    assert train_moe.main(arguments(sources, tmp_path, 2, "--precisions", "bf16")) == first
    assert (tmp_path / "loss.svg").exists()


def test_a_checkpoint_of_another_model_is_refused_in_words(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train_moe.main(arguments(sources, tmp_path, 1, "--precisions", "bf16"))
    with pytest.raises(ValueError, match="of another model: .* take another --folder"):
        train_moe.main(arguments(sources, tmp_path, 2, "--precisions", "bf16", "--experts", "8"))


def run_example(rank: int, ranks: int, argv: list[str]) -> dict[str, Any]:
    del rank, ranks
    return train_moe.main(argv)


def check_ranks(results: list[dict[str, Any]], folder: Path) -> None:
    """All have the same model but for the experts, so that all have the same losses."""
    first, second = results
    assert first == second and first["fp8"][-1][1] < first["fp8"][0][1] - 0.05
    assert {path.name for path in folder.glob("*.pt")} == {f"fp8-rank{rank}-of-2.pt" for rank in range(2)}


def test_two_ranks_train_one_model(sources, tmp_path):
    argv = arguments(sources, tmp_path / "out", 4, "--precisions", "fp8")
    check_ranks(run_ranks(run_example, 2, argv, setup=hide_gpus), tmp_path / "out")


@pytest.mark.multigpu
def test_two_gpus_train_one_model(sources, tmp_path):
    argv = arguments(sources, tmp_path / "out", 4, "--precisions", "fp8")
    check_ranks(run_ranks(run_example, 2, argv, backend="cpu:gloo,cuda:nccl"), tmp_path / "out")
