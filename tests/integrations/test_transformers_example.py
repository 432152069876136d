"""The example of generation, and what the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from hf_models import build, prompt

from examples import generate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"


def rows_of(printed: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]


def test_the_example_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    generate.main(["--new-tokens", "2", "--batch", "2"])
    title, _, *rows = rows_of(capsys.readouterr().out)
    assert title[:2] == ["experts", "tokens/s"]
    assert [row[0] for row in rows] == list(generate.WAYS[:3])
    assert all(float(number) > 0 for row in rows for number in row[1:])
    # fewer bytes with experts in fp8
    assert float(rows[2][3]) < float(rows[1][3])


def test_the_page_shows_what_runs(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    shown = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.S)
    assert len(shown) == 4
    names: dict[str, Any] = {"path": str(tmp_path), "ids": prompt()}
    # the third is of several ranks
    plain, quantized, _, trained = shown
    for block in (plain, quantized):
        exec(compile(block, PAGE.name, "exec"), names)
        with torch.no_grad():
            assert names["model"](prompt()).logits.isfinite().all()
    assert names["model"].model.layers[0].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    exec(compile(trained, PAGE.name, "exec"), names)
    assert names["model"].model.layers[0].mlp.experts.down_proj.grad.any()
