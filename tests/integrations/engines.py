"""Serving engines as plain Python, without their compiled parts, each with what it imports in a folder, .venv/<name>-<version>.

    python tests/integrations/engines.py            fetches all that are not there; needs network, once
    python tests/integrations/engines.py vllm       this one
    python tests/integrations/engines.py --newest   fetches nothing; prints the newest releases, and fails if one has another interface
                                                    than the one that is tested

With MOEQUANT_ENGINES="vllm==0.34.0 sglang==0.6.0", or what --newest prints, those versions are fetched and tested instead.

Tests of an adapter run in processes of their own (`run_inside`), as the packages of an engine would hide those of the environment.
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
# name, version, and the oldest Python that there is one for. What an engine imports, in versions that go together, is in
# <name>_packages.txt; torch, Triton and NumPy are the environment's.
TESTED = {"vllm": ("0.33.0", (3, 11)), "sglang": ("0.5.23", (3, 11)), "torchtitan": ("0.3.0", (3, 11))}
INSTEAD = dict(wish.split("==") for wish in os.environ.get("MOEQUANT_ENGINES", "").split())
ENGINES = {name: (INSTEAD.get(name, version), oldest) for name, (version, oldest) in TESTED.items()}
# how many numbers of a version say which interface it has, where they aren't major and minor
PARTS = {"sglang": 3}
# of a wheel: neither compiled parts nor sources of kernels
KEPT = (".py", ".json", "METADATA", "entry_points.txt")


class NotFetchedError(RuntimeError):
    """An engine can't be had here."""


def folder(name: str, version: str) -> Path:
    """Where an engine lies, if it is there.

    Args:
        name: its package on PyPI.
        version: of it.

    Returns:
        What PYTHONPATH takes.
    """
    return ROOT / ".venv" / f"{name}-{version}"


def fetch(name: str, version: str) -> Path:
    """Fetches an engine, unless it is there.

    Args:
        name: its package on PyPI.
        version: of it.

    Returns:
        Its folder.

    Raises:
        NotFetchedError: without network, or for a Python that it doesn't run on.
    """
    done = folder(name, version)
    if done.exists():
        return done
    done.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=done.parent) as scratch:
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, f"{name}=={version}")
        unpacked = Path(scratch, "unpacked")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [entry for entry in wheel.namelist() if entry.endswith(KEPT)])
        # nothing that these ask for besides: it would bring another torch
        _pip("install", "--no-deps", "--target", str(unpacked), "--requirement", str(HERE / f"{name}_packages.txt"))
        unpacked.rename(done)
    return done


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", arguments[0], "--disable-pip-version-check", *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NotFetchedError(f"{' '.join(command)}:\n{result.stderr[-2000:]}")
    return result.stdout


def run_inside(name: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python command with an engine, or skips the test that asks for it.

    Args:
        name: the engine's.
        *command: Python's arguments.
        **variables: of the environment.

    Returns:
        What came of it, with stdout and stderr together.
    """
    version, oldest = ENGINES[name]
    if sys.version_info < oldest:
        pytest.skip(f"{name} {version} needs Python {'.'.join(map(str, oldest))}")
    place = folder(name, version)
    if not place.exists():
        pytest.skip(f"{name} {version} is not here: run python tests/integrations/engines.py {name}, which needs network")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE, place)))
    # on a CPU the references run, which take a hundredth of the interpreter's time
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version != TESTED[name][0]:
        inherited["MOEQUANT_UNTESTED_ENGINES"] = "1"
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # for what hangs
        timeout=600,
    )


def names_in(file: str) -> list[str]:
    """The tests of a file that can't be imported here.

    Args:
        file: beside this one.

    Returns:
        Names of its functions.
    """
    tree = ast.parse((HERE / file).read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def outcomes(name: str, file: str, folder: Path, **variables: str) -> dict[str, str]:
    """Runs a file's tests with an engine, once for all processes of this run, as an engine takes long to import.

    Args:
        name: the engine's.
        file: beside this one.
        folder: of this process, from `tmp_path_factory.getbasetemp()`.
        **variables: of the environment.

    Returns:
        By name of a test what went wrong in it; "" if nothing did.
    """
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    report = shared / f"{Path(file).stem}.xml"
    with open(report.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            options = ("-q", "--noconftest", "-p", "no:cacheprovider", f"--junitxml={report}")
            result = run_inside(name, "-m", "pytest", *options, str(HERE / file), **variables)
            # 1: tests failed; others: they did not run
            assert result.returncode in (0, 1) and report.exists(), result.stdout
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = str(case.get("name")).partition("[")[0]
        wrong = "".join(f"{case.get('name')}:\n{part.text}\n" for part in case if part.tag in ("failure", "error", "skipped"))
        found[test] = found.get(test, "") + wrong
    return found


def results(name: str, file: str, folder: Path, **variables: str) -> dict[str, Any]:
    """Runs a script with an engine, once for all processes of this run.

    Args:
        name: the engine's.
        file: beside this one; it takes a folder, makes it, and writes JSON there, {"failed": why} where something went wrong.
        folder: of this process, from `tmp_path_factory.getbasetemp()`.
        **variables: of the environment.

    Returns:
        What is in the files, by name.
    """
    made = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / Path(file).stem
    with open(made.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            result = run_inside(name, str(HERE / file), str(made), **variables)
            assert result.returncode == 0, result.stdout
    found = {path.stem: json.loads(path.read_text()) for path in sorted(made.glob("*.json"))}
    wrong = [f"{path}:\n{what['failed']}" for path, what in found.items() if "failed" in what]
    assert found and not wrong, "\n".join(wrong)
    return found


def newest(name: str) -> str:
    """The newest release of an engine.

    Args:
        name: its package on PyPI.

    Returns:
        The version.
    """
    # "vllm (0.33.0)", and then all of them
    return _pip("index", "versions", name).partition("(")[2].partition(")")[0]


def main(names: list[str]) -> int:
    """Fetches engines, or asks for newer ones.

    Args:
        names: which; none for all; --newest.

    Returns:
        The exit status.
    """
    failed = 0
    if names == ["--newest"]:
        found = {name: newest(name) for name in TESTED}
        print(" ".join(f"{name}=={there}" for name, there in found.items()))
        for name, (version, _) in TESTED.items():
            parts = PARTS.get(name, 2)
            if found[name].split(".")[:parts] != version.split(".")[:parts]:
                print(f"engines: {name} {found[name]} is the newest, and {version} is tested", file=sys.stderr)
                failed = 1
        return failed
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        print(f"engines: there is no {', '.join(unknown)}; give some of {', '.join(ENGINES)}, or --newest", file=sys.stderr)
        return 2
    for name in names or ENGINES:
        version, oldest = ENGINES[name]
        if sys.version_info < oldest:
            print(f"engines: there is no {name} {version} for this Python")
            continue
        try:
            print(f"engines: {name} {version} in {fetch(name, version).relative_to(ROOT)}")
        except NotFetchedError as error:
            print(f"engines: no {name} {version} here: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
