"""The pages in docs/: what they show runs, and every typed error is explained."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import two_micro_batches
from moequant import MoEQuantDispatcher, errors
from moequant.batch import ceil_div

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_every_error_is_in_the_troubleshooting_page():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)]
    assert classes and [name for name in classes if f"`{name}`" not in page] == []


def texts() -> list[str]:
    """All strings of the package, with NUL for what is filled in."""
    nodes = [node for path in (ROOT / "moequant").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    filled = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = [*filled, *([node] for node in nodes if isinstance(node, ast.Constant))]
    return ["".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in values).replace("`", "") for values in parts]


def test_every_message_of_the_troubleshooting_page_is_one_of_the_package():
    page, known = (ROOT / "docs" / "troubleshooting.md").read_text(), texts()
    cells = [re.sub(r"^`\w+`:? ?", "", cell) for cell in re.findall(r"^\| (.*?) \| ", page, re.M)]
    quoted = [message for cell in cells for message in cell.replace("`", "").split(" / ") if message not in ("", "---", "message")]
    pieces = {message: [piece.strip() for piece in message.split("..")] for message in quoted}
    assert len(pieces) > 50
    assert [message for message in pieces if not any(all(piece in text for piece in pieces[message]) for text in known)] == []


def test_the_memory_of_the_page_is_what_a_dispatcher_takes():
    sizes: dict[str, Any] = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "max_tokens_per_rank": 128, "world_size": 8}
    experts, rows, hidden, groups = 32, 8 * 128, 7168, ceil_div(7168, 128)
    for quant, width, scales in (("fp8_e4m3fn", 1, 4 * groups), ("int8", 1, 4 * groups), ("none", 2, 0)):
        batch = experts * rows * (width * hidden + scales)
        cases: tuple[tuple[dict[str, Any], int], ...] = (
            ({"transport": "collective", "exchange": "packed"}, batch),
            ({"transport": "collective", "exchange": "padded"}, batch + 2 * 256 * 128 * (2 * hidden + scales)),
            (
                {"transport": "collective", "exchange": "packed", "layout": "ragged"},
                (8 * 128 * 8 + 31 * 16) * (width * hidden + scales),
            ),
            ({"transport": "symmetric"}, batch + experts * rows * scales + 128 * 8 * 2 * hidden),
            (
                {"transport": "symmetric", "overlap": False},
                batch + experts * rows * (2 * hidden + scales) + 128 * 8 * 2 * hidden,
            ),
        )
        for more, expected in cases:
            taken = MoEQuantDispatcher.buffer_bytes(**sizes, quant=quant, **more)
            assert expected < taken < 1.005 * expected, (quant, more)
            assert MoEQuantDispatcher.buffer_bytes(**sizes, quant=quant, slots=2, **more) == 2 * taken


def test_the_example_of_two_micro_batches_has_the_lines_that_the_page_says():
    lines, _ = inspect.getsourcelines(two_micro_batches.run_layers)
    assert "`examples/two_micro_batches.py` is 20 lines" in (ROOT / "docs" / "use.md").read_text() and len(lines) <= 20


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_of_the_pages_runs(path, device, capsys, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for example in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        exec(compile(example, path.name, "exec"), {})
        assert capsys.readouterr().out


def test_files_that_the_pages_name_are_there():
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    pattern = r"`((?:benchmarks|docs|examples|kernels|launch|moequant|tests)/[\w/.-]+\.\w+)[`:]"
    named = {(page.name, path) for page in pages for path in re.findall(pattern, page.read_text())}
    assert len(named) > 30 and [(page, path) for page, path in named if not (ROOT / path).exists()] == []


def test_the_words_of_the_glossary_stand_in_the_code():
    ours = re.findall(r"^\| (.*?) \| .* \| .* \|$", (ROOT / "docs" / "glossary.md").read_text().partition("## Words with")[0], re.M)
    words = {word for cell in ours for word in re.findall(r"`(\w+)`", cell)}
    files = [path for folder in ("kernels", "moequant") for path in (ROOT / folder).rglob("*.py")]
    known = {word for path in files for word in re.findall(r"\w+", path.read_text())}
    assert len(words) > 10 and words <= known, words - known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_of_the_pages_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), link
