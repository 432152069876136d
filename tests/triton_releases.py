"""The releases of Triton that lie beside the installed one, where `.ci/fetch_tritons` puts them, and how programs run with them.

    python tests/triton_releases.py [--keep]

writes docs/versions.md, after it has compiled the Hopper kernels with each of them; --keep: without, so with what the page says of that.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from moequant.kernels.library import triton_versions
from moequant.kernels.library.triton_versions import RELEASES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
PRODUCTS = "grouped_gemm_hopper", "gemm1_swiglu_hopper", "weight_gradient_hopper"
TURNED = "quantize_columnwise_hopper", "quantize_weight_hopper"
OPERATIONS = *PRODUCTS, *TURNED
# records of their times
TIMED = "grouped_gemm", "gemm1_fused", "weight_gradient"
HEAD = """# Versions of Triton

<!-- written by tests/triton_releases.py -->

torch for CUDA brings its own Triton. On Hopper GPUs the grouped GEMMs of fp8 and int8, the weight gradients from fp8, and what is turned
as it is quantized to fp8 are written in Gluon, whose names change with Triton's minor versions. They compile with those of the table, in
all shipped configurations: tests check each. Every other kernel is plain Triton and runs with Triton 3.6 or newer, on every GPU.

"""
HEAD += f"| Triton | torch | Hopper kernels | {' | '.join(f'`{operation}`' for operation in OPERATIONS)} | timed on |\n"
HEAD += "| --- | --- | --- |" + " --- |" * (len(OPERATIONS) + 1) + "\n"
TAIL = """
Spilled are bytes of registers around the loops of products, once for each tile; in the loops there is none.

A newer Triton is tried, once in each process, by compiling the kernels. Where they are not used on a Hopper GPU, the log `moequant`
says so once, and `python -m moequant` at any time:

"""


def folder(release: str) -> Path:
    return ROOT / ".venv" / f"triton-{release}"


def is_here(release: str) -> bool:
    return release == triton.__version__ or folder(release).is_dir()


def run(release: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python command` with a release, and without the interpreter and this machine's compiler, which it would take for its own."""
    unwanted = {"TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"}
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    first = [] if release == triton.__version__ else [str(folder(release))]
    kept["PYTHONPATH"] = os.pathsep.join([*first, str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)


def compiled(release: str) -> list[list[dict[str, Any]]]:
    """What tests/compile_kernels.py reports of each Hopper kernel's configurations. A launch that leaves it to Triton's default
    whether products are fused is an error."""
    warnings = "error:TRITON_DEFAULT_FP_FUSION:UserWarning"
    result = run(release, "tests/compile_kernels.py", *OPERATIONS, PYTHONWARNINGS=warnings)
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0, f"failed at {reports[-1:]}\n{result.stderr[-4000:]}"
    of_each = [[report for report in reports if report["operation"] == operation] for operation in OPERATIONS]
    # each is said before it is compiled, and after
    kernels = [[report for report in reports if "kernel" in report] for reports in of_each]
    assert all(len(some) * 2 == len(all_of_one) > 0 for some, all_of_one in zip(kernels, of_each, strict=True))
    return kernels


def summary(kernels: list[dict[str, Any]]) -> str:
    registers, spilled = {kernel["registers"] for kernel in kernels}, max(kernel["spills"] for kernel in kernels)
    return f"{len(kernels)} compiled: {max(registers)} registers, {f'up to {spilled} bytes' if spilled else 'none'} spilled"


def timed_on(release: str) -> str:
    """The GPUs that records in benchmarks/results have times of these kernels from, under this minor version."""
    names = set()
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            same = triton_versions.minor(record["env"].get("triton", "")) == triton_versions.minor(release)
            if same and record["op"] in TIMED:
                names.add(record["env"]["gpu"])
    return ", ".join(sorted(names)) or "not yet"


def log_line(version: str, error: str) -> str:
    """What a Hopper GPU with a Triton that does not compile the kernels is told."""
    with (
        mock.patch.object(triton, "__version__", version),
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(triton_versions, "probe", return_value=error),
        mock.patch.object(triton_versions, "warn_once") as warn,
    ):
        triton_versions.why_no_gluon.__wrapped__(torch.device("cuda", 0))
    return warn.call_args.args[0]


def row(release: str, cells: list[str]) -> str:
    return f"| {release} | {', '.join(RELEASES[release])} | used | {' | '.join(cells)} | {timed_on(release)} |\n"


def cells_of(page: str) -> dict[str, list[str]]:
    """What a page says of each release's compiled kernels."""
    return {
        cells[0]: cells[3 : 3 + len(OPERATIONS)]
        for cells in (line[2:-2].split(" | ") for line in re.findall(r"^\| \d.*\|$", page, re.M))
    }


def page(cells: dict[str, list[str]]) -> str:
    oldest, *_, newest = (release.rsplit(".", 1)[0] for release in RELEASES)
    around = "plain Triton instead |" + " |" * (len(OPERATIONS) + 1) + "\n"
    rows = "".join(row(release, cells[release]) for release in RELEASES)
    lines = log_line("3.5.1", ""), log_line("3.10.0", "AttributeError: module 'tma' has no attribute 'async_load'")
    return (
        f"{HEAD}| before {oldest} | | {around}{rows}| after {newest} | | used if they compile, else {around}"
        + TAIL
        + "\n".join(f"    {line}" for line in lines)
        + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--keep"]:
        found = cells_of(PAGE.read_text())
    else:
        found = {release: [summary(kernels) for kernels in compiled(release)] for release in RELEASES}
    PAGE.write_text(page(found))
