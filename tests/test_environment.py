"""What `python -m moequant` says of a machine is what that machine gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import triton

import moequant
from moequant.kernels.library import triton_versions
from moequant.transport import peer_memory

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["moequant", "torch", "Triton", "NCCL", "GPUs", "kernels", "transport local", "transport collective", "transport symmetric"]


def said() -> dict[str, str]:
    found = dict(line.split(": ", 1) for line in moequant.environment().splitlines())
    assert list(found) == [*NAMES, "settings"]
    return found


@pytest.fixture
def gpus(monkeypatch):
    """A machine with Hopper GPUs that reach each other, as far as it is asked."""
    monkeypatch.delenv("MOEQUANT_CPU_KERNELS", raising=False)

    def install(count=8, problem=None, why_no_gluon=None):
        properties = [
            SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 << 30, uuid=f"GPU {index}")
            for index in range(count)
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[getattr(device, "index", device)])
        monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(triton_versions, "why_no_gluon", lambda device: why_no_gluon)
        identities = [f"GPU {index}" for index in range(count)]
        monkeypatch.setattr(
            peer_memory, "peer_access_problem", lambda device, seen: problem if device.index == 1 and seen == identities else None
        )

    return install


def test_a_hopper_machine_gets_everything(gpus, monkeypatch):
    gpus()
    for name in [name for name in os.environ if name.startswith(("MOEQUANT_", "TRITON_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOEQUANT_CHECK_GUARDS", "1")
    assert said() == {
        "moequant": said()["moequant"],
        "torch": f"{torch.__version__} (CUDA 13.0)",
        "Triton": triton.__version__,
        "NCCL": "2.28.9",
        "GPUs": "8 x NVIDIA H200 (compute capability 9.0, 141 GiB)",
        "kernels": "Hopper's in Gluon, and plain Triton",
        "transport local": "yes",
        "transport collective": "yes, over NCCL",
        "transport symmetric": "yes, among 8 GPUs",
        "settings": "MOEQUANT_CHECK_GUARDS=1",
    }


def test_what_a_machine_does_not_get_comes_with_the_reason(gpus, monkeypatch):
    gpus(4, "GPU 1 and GPU 2 are linked by PCIe", "Triton 3.5.1 is too old")
    assert said()["kernels"] == "plain Triton; not Hopper's in Gluon: Triton 3.5.1 is too old"
    assert said()["transport symmetric"] == "no: GPU 1 and GPU 2 are linked by PCIe"
    gpus(1)
    assert said()["transport symmetric"] == "no: it needs a GPU on every rank, and this process sees 1"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert said()["Triton"] == "none" and said()["kernels"].startswith("none: Triton is not installed")
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert said()["transport collective"].startswith("no") and said()["NCCL"] == "none"


def test_a_cpu_is_told_that_torch_computes(gpus):
    gpus(0)
    assert said()["kernels"] == "none, torch on the CPU: there is no GPU"
    assert said()["GPUs"] == said()["NCCL"] == "none"
    assert said()["transport collective"] == "yes, over gloo"


def test_the_module_prints_it():
    command = [sys.executable, "-m", "moequant"]
    printed = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert printed.stdout == moequant.environment() + "\n"


@pytest.mark.gpu
def test_this_gpu_is_named():
    assert torch.cuda.get_device_name() in said()["GPUs"]
    known = triton_versions.minor(triton.__version__) in triton_versions.KNOWN
    assert ("Hopper's in Gluon, and" in said()["kernels"]) == (torch.cuda.get_device_capability()[0] == 9 and known)
