# pyright: reportMissingImports=false
"""transformers' own tests of expert parallelism, forward and backward, with moequant for its experts and for their exchange.

They are in transformers' source distribution alone. `.ci/fetch_transformers_tests` fetches them; without network this is skipped.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from hf_models import config_of
from transformers import AutoModelForCausalLM, __version__
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.moe import ExpertsInterface

from moequant.integrations.transformers.expert_parallel import MoEQuantEP
from moequant.integrations.transformers.layers import experts_forward
from moequant.testing import run_ranks

FOLDER = Path(__file__).parents[2] / ".venv" / f"transformers-{__version__}-tests"
FAMILY = "qwen3_moe"
# of its test classes, for models in float32: products of bfloat16 on one rank and on two are the same ones
TOLERANCE = 1e-5


class _Anything(ModuleType):
    """A module that the tests import, and that is not there: what starts processes, and decorates methods of test classes."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *given: Any, **options: Any) -> Any:
        return torch.device("cpu") if given and isinstance(given[0], int) else self

    def __iter__(self) -> Any:
        return iter(())


def own_tests(name: str) -> Any:
    """The module of that name."""
    package = ModuleType("transformers_own")
    package.__path__ = [str(FOLDER)]
    absent = (_Anything(f"{package.__name__}.distributed_testing_utils"), _Anything("parameterized"))
    sys.modules[package.__name__] = package
    for module in absent:
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{package.__name__}.{name}")


def run_all(rank: int, ranks: int, folder: str) -> None:
    expert_parallel, fsdp = own_tests("test_expert_parallel_mixin"), own_tests("test_fsdp_mixin")
    EPImplementationInterface.register("auto", MoEQuantEP)
    call = rank, folder, AutoModelForCausalLM, TOLERANCE, TOLERANCE, "moequant"
    expert_parallel._test_ep_forward_impl(*call)
    expert_parallel._test_ep_backward_impl(*call)
    # models of the next one run by default on this
    ExpertsInterface.register("grouped_mm", experts_forward)
    config = config_of(FAMILY)
    fsdp._test_fsdp2_expert_parallel_bf16_grads_impl(rank, type(config), config.to_dict())


@pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not here: run .ci/fetch_transformers_tests, which needs network")
def test_transformers_own_tests_of_expert_parallelism_pass(tmp_path, monkeypatch):
    # which transformers would take, whatever the group is
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config_of(FAMILY), dtype=torch.float32).save_pretrained(tmp_path)
    run_ranks(run_all, 2, str(tmp_path))
