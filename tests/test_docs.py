"""The pages in docs/: what they show runs, and every typed error is explained."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from moequant import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_every_error_is_in_the_troubleshooting_page():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)]
    assert classes and [name for name in classes if f"`{name}`" not in page] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_of_the_pages_runs_and_links_lead_somewhere(path, capsys):
    text = path.read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(example, path.name, "exec"), {})
        assert capsys.readouterr().out
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link
