"""What ranks need on a machine without a GPU, imported once, by the server that `run_ranks` forks them from (conftest.py): the kernels,
rewritten for Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest  # noqa: F401
from triton.runtime.interpreter import InterpretedFunction

import interpreter
import moequant.testing  # noqa: F401

# ranks whose kernels are interpreted do so in their `setup`, which finds it done
interpreter.install()
KERNELS = Path(__file__).resolve().parents[1] / "kernels"
for path in sorted(KERNELS.glob("*/*.py")):
    module = importlib.import_module(f"moequant.kernels.{path.parent.name}.{path.stem}")
    # a rewritten function adds names to its module
    for value in list(vars(module).values()):
        if isinstance(value, InterpretedFunction):
            value.rewrite()
# and what ranks of transformers would import for 5 s each, where there is one
if importlib.util.find_spec("transformers"):
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("moequant.integrations.transformers.expert_parallel")
