"""Without a GPU the kernels run in Triton's interpreter, on the same tests. It has to be asked for before Triton is imported."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

# of this process and of the ranks that it starts: every dispatcher that is checked or closed looks for stores outside its buffers
os.environ.setdefault("MOEQUANT_CHECK_GUARDS", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()


# files with the tests that take longest, which come first, so that none of them is what the last process still has to do
LONGEST = (
    *("test_triton_releases", "test_compile", "test_symmetric_protocol", "test_pdl", "test_symmetric", "test_symmetric_faults"),
    *("test_layer", "test_faults", "test_collective", "test_bench_ep", "test_vllm"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs at least two GPUs"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if hasattr(getattr(item, "module", None), "run_ranks") and not torch.cuda.is_available():
        start_server()


@functools.cache
def start_server() -> None:
    """Starts the server that ranks are forked from, before `run_ranks` does, so that it imports more (preloaded.py). Where its modules
    are, it has to be told by its environment; it takes no path from this process, and the ranks' environment is another one."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        folder = Path(__file__).resolve().parent
        paths = [str(folder), str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "preloaded"])
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1", TRITON_INTERPRET="1"):
            forkserver.ensure_running()


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors: a GPU, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "kernels"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    """Runs a test of public functions twice: with what runs on a CPU, and with the kernels, interpreted where there is no GPU. Tensors
    that the test makes lie where they take that path."""
    kernels = request.param == "kernels"
    if kernels and device == "cpu":
        monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")
    with torch.device(device if kernels else "cpu"):
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that a test starts interpret kernels on CPU tensors, on a machine with GPUs too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")


@pytest.fixture
def one_rank() -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone, the default one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
