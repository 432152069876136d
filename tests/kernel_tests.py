"""The tests of kernels, each named for its kernel and in a folder of the same name, and what they say of it:

COMPILE_CASES, which `test_compile.py` compiles ahead of time for each kind of GPU, and OPERATION_CASES, arguments of the operations of
`moequant.ops` that it serves, with which `test_ops.py` tests how they are registered.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from compile_case import Case

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "kernels"
# of each kernel its folder; device functions that others call are none
SUBJECTS = {path.stem: path.parent.name for path in sorted(KERNELS.glob("*/*.py")) if path.parent.name != "library"}


def test_of(kernel: str) -> ModuleType:
    """The module of a kernel's tests."""
    folder = str(TESTS / "kernels" / SUBJECTS[kernel])
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"test_{kernel}")


def compile_cases(kernel: str) -> list[Case]:
    return test_of(kernel).COMPILE_CASES


def operation_cases() -> dict[str, dict[str, Callable[[], tuple]]]:
    """For each operation, by what its arguments are, how to make them anew."""
    return {name: cases for kernel in SUBJECTS for name, cases in getattr(test_of(kernel), "OPERATION_CASES", {}).items()}
