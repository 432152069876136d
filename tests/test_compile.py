"""Every kernel builds for every kind of GPU, spills no registers to speak of, and moves aligned rows 16 bytes at a time. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton

import compile_kernels
from kernel_tests import SUBJECTS, compile_cases
from moequant.kernels.library.triton_versions import KNOWN, minor

Compiler = Callable[[str], list[dict[str, Any]]]
ROOT = Path(__file__).resolve().parents[1]
# bytes of a thread: none with the oldest Triton, for whose compiler the kernels are cut, some around their loops with newer ones
SPILLED = 0 if minor(triton.__version__) == KNOWN[0] else 160
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
# the tensor cores' fastest way, where a GEMM must take it
MATRIX_INSTRUCTIONS = {
    ("sm_90", "float8_e4m3fn"): "QGMMA",
    ("sm_90", "int8"): "IGMMA",
    ("sm_90", "bfloat16"): "HGMMA",
    ("sm_90", "float16"): "HGMMA",
    ("sm_100", "float8_e4m3fn"): "UTCQMMA",
    ("sm_100", "bfloat16"): "UTCHMMA",
    ("sm_100", "float16"): "UTCHMMA",
}
# what rounds to e4m3fnuz by the instruction of the GPU that has one
NATIVE_FNUZ = {"quantize", "silu_mul_quantize", "quantize_weight", "fused_rms_quantize"}


def multiplies(operation: str) -> bool:
    return "gemm" in operation or operation.startswith("weight_gradient")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    """Compiles an operation's kernels: what tests/compile_kernels.py, which starts once, reports of each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    errors = tmp_path_factory.mktemp("compile") / "stderr"
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py")]
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        asked, told = process.stdin, process.stdout
        assert asked is not None and told is not None

        def compiled(operation: str) -> list[dict[str, Any]]:
            # of the others no instruction is looked for
            disassembled = [target for target, _ in MATRIX_INSTRUCTIONS] if multiplies(operation) else []
            asked.write(json.dumps([operation, disassembled]) + "\n")
            asked.flush()
            reports: list[dict[str, Any]] = []
            for report in map(json.loads, told):
                if "status" not in report:
                    reports.append(report)
                    continue
                last = reports[-1] if reports else "the start"
                assert report["status"] == 0, f"failed at {last}\n{errors.read_text()[-4000:]}"
                return [report for report in reports if "kernel" in report]
            raise AssertionError(f"the compiler ended\n{errors.read_text()[-4000:]}")

        yield compiled
        asked.close()


@pytest.mark.parametrize("operation", SUBJECTS)
def test_every_case_is_built_for_hopper_and_another_and_each_format_for_all(operation):
    cases = compile_cases(operation)
    everywhere, chosen = ({target: [] for target in compile_kernels.TARGETS} for _ in range(2))
    for built, every in ((everywhere, True), (chosen, False)):
        for target, case in compile_kernels.builds(cases, every):
            built[target].append(case)
    assert set(compile_kernels.TARGETS) == TARGETS and chosen["sm_90"] == everywhere["sm_90"]
    for case in cases:
        able, taken = ({target for target in TARGETS - {"sm_90"} if case in built[target]} for built in (everywhere, chosen))
        assert taken <= able and (taken or not able), case
    for target, built in everywhere.items():
        formats, taken = ({(case.call, case.arguments.get("dtype")) for case in some} for some in (built, chosen[target]))
        assert formats == taken


@pytest.mark.parametrize("operation", SUBJECTS)
def test_builds_with_next_to_no_spills(operation, compiler):
    reports = compiler(operation)
    declared = compile_cases(operation)
    # written for Hopper, or for NVLink
    hopper, nvidia = (all(getattr(case, only) for case in declared) for only in ("hopper", "nvidia"))
    assert hopper == operation.endswith("_hopper")
    expected = {target for target in TARGETS if target == "sm_90" or (not hopper and (target.startswith("sm_") or not nvidia))}
    assert {report["target"] for report in reports} == expected
    wrong = []
    for report in reports:
        is_nvidia = report["target"].startswith("sm_")
        moves_narrow = report["wide"] and is_nvidia and not (report["wide_loads"] and report["wide_stores"])
        instruction = MATRIX_INSTRUCTIONS.get((report["target"], report["dtype"])) if multiplies(operation) else None
        wrong_instruction = instruction is not None and instruction not in report["instructions"]
        if (report["target"], report["dtype"]) == ("gfx942", "float8_e4m3fnuz") and operation in NATIVE_FNUZ:
            wrong_instruction = "v_cvt_pk_fp8_f32" not in report["instructions"]
        if (report["spills"] > SPILLED and not report["may_spill"]) or moves_narrow or wrong_instruction:
            wrong.append({key: value for key, value in report.items() if key != "instructions"})
    assert not wrong, "\n" + "\n".join(map(str, wrong))
