"""The pages in docs/: what they show runs, and every typed error is explained."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from moequant import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_every_error_is_in_the_troubleshooting_page():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)]
    assert classes and [name for name in classes if f"`{name}`" not in page] == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_of_the_pages_runs(path, device, capsys, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for example in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        exec(compile(example, path.name, "exec"), {})
        assert capsys.readouterr().out


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_of_the_pages_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), link
