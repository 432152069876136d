"""The checks before a commit, those of `make lint`, and what continuous integration runs, are the same."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lint_commands() -> list[str]:
    """The recipe of `make lint`, its variables filled in."""
    makefile = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) := (.*)$", makefile, re.M))
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    return [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], line.strip()) for line in recipe.splitlines()]


def test_the_hooks_run_what_make_lint_runs_and_nothing_else():
    hooks = re.findall(r"^ *entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.M)
    assert len(hooks) > 2 and hooks == lint_commands()


def test_hooks_are_local_so_that_nothing_is_fetched():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^ *- repo: (.*)$", config, re.M) == ["local"]
    assert set(re.findall(r"^ *language: (.*)$", config, re.M)) == {"system"}


def test_the_workflow_runs_what_the_repository_runs_and_it_can_be_run():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^ *- run: (.*)$", workflow, re.M) == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_workflow_takes_the_first_and_the_last_python_that_is_said_to_work():
    (tried,) = re.findall(r"python-version: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    said = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert re.findall(r"3\.\d+", tried) == [said[0], said[-1]]
