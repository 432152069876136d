"""What README.md shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs(capsys, monkeypatch):
    # as on a user's machine: without interpreted kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert example is not None
    exec(compile(example.group(1), "README.md", "exec"), {"torch": torch})
    assert capsys.readouterr().out == "torch.Size([32, 512])\n"


def test_the_commands_are_targets_of_the_makefile():
    shown = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"bench", "test"} <= shown <= targets
