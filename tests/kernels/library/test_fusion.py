"""Whether a * b + c is one operation is said at every launch, since the bits depend on it and Triton's default changes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from moequant.kernels.library.launch import Launchable
from written_launches import install_gpu

KERNELS = sorted(path for path in (Path(__file__).resolve().parents[3] / "kernels").rglob("*.py") if path.parent.name != "library")
# products of whole groups are scaled and added in one operation: what a sum's bits are, and half the time
FUSED = {"grouped_gemm_kernel", "grouped_gemm_hopper_kernel"}


def launches(path: Path) -> list[tuple[str, ast.expr | None, bool]]:
    """Of each launch the kernel, what it says of fusion, and whether `launchable` says it otherwise."""
    tree = ast.parse(path.read_text())
    decorated = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "launchable" for d in node.decorator_list)
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name)), keywords=keywords) if name.endswith("_kernel"):
                said = next((keyword.value for keyword in keywords if keyword.arg == "enable_fp_fusion"), None)
                found.append((name, said, name in decorated))
    return found


def test_every_launch_says_whether_products_are_fused():
    found = [launch for path in KERNELS for launch in launches(path)]
    assert len(found) > 25 and {name for name, _, _ in found} > FUSED
    for name, said, decorated in found:
        assert said is not None or decorated, name
        assert (isinstance(said, ast.Constant) and said.value is True) == (name in FUSED), name


@pytest.mark.parametrize(("named", "expected"), [({}, False), ({"enable_fp_fusion": True}, True)], ids=str)
def test_a_launch_that_says_nothing_fuses_nothing(monkeypatch, named, expected):
    install_gpu(monkeypatch)
    asked = []

    class Kernel:
        params = ()

        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append(options)

    Launchable(Kernel())[(1,)](torch.zeros(1), num_warps=4, **named)  # pyright: ignore[reportArgumentType]
    assert asked == [{"num_warps": 4, "enable_fp_fusion": expected}]
