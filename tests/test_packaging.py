"""However the package is installed, `moequant.kernels` is there, and no package named `kernels` is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moequant

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py"))
USE = """
import sys
import torch
import moequant
assert not [name for name in sys.modules if name.startswith("moequant.kernels")], "kernels are imported only when they are run"
q = moequant.quantize_expert_batch(torch.ones(2, 3, 200, dtype=torch.bfloat16))
assert torch.equal(moequant.dequantize(q), torch.ones(2, 3, 200)), moequant.dequantize(q)
import moequant.kernels.quantization.quantize
assert moequant.kernels.quantization.quantize.quantize_kernel
print(moequant.__file__)
"""


def run(code: str, folder: Path, *path: Path) -> str:
    """Runs Python code in a fresh process, in a folder, with additions to its path. Returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds a "wheel", "sdist" or "editable" as pip does, without isolation and so without network."""
    target.mkdir()
    # where torch can't be imported: the version is read from the source
    block = "import sys; sys.modules['torch'] = None\n"
    run(f"{block}from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})", source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project, because building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "moequant"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "moequant", "kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


def check_wheel(wheel: Path, folder: Path) -> None:
    assert wheel.name.split("-")[1] == moequant.__version__
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(folder / "installed")
    assert {f"moequant/kernels/{name}" for name in KERNELS} <= names
    assert "moequant/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"moequant"}
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    assert run(USE, elsewhere, folder / "installed") == str(folder / "installed" / "moequant" / "__init__.py")


def test_kernels_is_a_folder_without_init_behind_a_relative_symlink():
    # an importable `kernels` shadows Hugging Face's package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "moequant" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_wheel(source, tmp_path):
    check_wheel(build("wheel", source, tmp_path / "dist"), tmp_path)


def test_wheel_from_sdist(source, tmp_path):
    shutil.unpack_archive(build("sdist", source, tmp_path / "sdist"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    check_wheel(build("wheel", unpacked, tmp_path / "dist"), tmp_path)


def test_editable(source, tmp_path):
    with zipfile.ZipFile(build("editable", source, tmp_path / "dist")) as archive:
        archive.extractall(tmp_path / "installed")
    printed = run(f"import site; site.addsitedir({str(tmp_path / 'installed')!r})\n{USE}", tmp_path)
    assert printed == str(source / "moequant" / "__init__.py")


def test_source_folder_on_the_path(tmp_path):
    assert run(USE, tmp_path, ROOT) == str(ROOT / "moequant" / "__init__.py")


def test_the_version_stands_in_one_place_and_is_not_behind_the_changelog():
    assert re.search(r"^version =.*[0-9]", (ROOT / "pyproject.toml").read_text(), re.M) is None
    heads = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", head) for head in heads[1:]]
    assert all(released)
    versions = [tuple(map(int, match[1].split("."))) for match in released if match]
    assert versions == sorted(versions, reverse=True)
    own = tuple(map(int, re.findall(r"\d+", moequant.__version__)[:3]))
    assert len(own) == 3 and [version for version in versions if version > own] == []
