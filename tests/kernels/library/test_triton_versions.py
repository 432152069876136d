"""Which kernels a device runs under which Triton, and what is said of it. That they compile is for tests/test_triton_releases.py."""

from __future__ import annotations

import logging
import re
from unittest.mock import create_autospec

import pytest
import torch
import triton

from moequant.kernels.gemm import gemm1_swiglu_hopper, grouped_gemm_hopper, weight_gradient_hopper
from moequant.kernels.library import common, triton_versions
from moequant.kernels.quantization import quantize_columnwise_hopper, quantize_weight_hopper

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    """Past the caches, which keep what this machine has."""
    for cached in (triton_versions.why_no_gluon, triton_versions.warn_once):
        cached.cache_clear()
    yield
    for cached in (triton_versions.why_no_gluon, triton_versions.warn_once):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    def pretend(version="3.6.0", capability=(9, 0), hip=None, broken=None):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(triton_versions, "probe", lambda device: broken)

    return pretend


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        pytest.param({}, None, id="Hopper"),
        pytest.param({"version": "3.6.1+git"}, None, id="another patch of Triton"),
        *(pytest.param({"version": version}, None, id=version) for version in triton_versions.RELEASES),
        pytest.param({"version": "3.5.1"}, "Triton 3.5.1 is too old", id="the minor version before"),
        pytest.param({"version": "3.10.0"}, None, id="a newer one that works"),
        pytest.param(
            {"version": "3.10.0", "broken": "E: x"}, "Triton 3.10.0 is newer .* \\(E: x\\)", id="a newer one that doesn't"
        ),
        pytest.param({"version": "3.60.0", "broken": "E"}, "newer", id="a version that only begins alike"),
        pytest.param({"capability": (8, 9)}, "the GPU has 8.9", id="Ada"),
        pytest.param({"capability": (10, 0)}, "the GPU has 10.0", id="Blackwell"),
        pytest.param({"capability": (9, 4), "hip": "6.4"}, "NVIDIA", id="AMD"),
    ],
)
def test_gluon_kernels_run_on_hopper_with_every_triton_that_compiles_them(machine, settings, why):
    machine(**settings)
    assert common.runs_gluon(GPU) is (why is None)
    assert common.runs_gluon(CPU) is False
    if why:
        assert re.search(why, triton_versions.why_no_gluon(GPU) or "")


@pytest.mark.parametrize("settings", [{"version": "3.5.1"}, {"version": "3.10.0", "broken": "AttributeError: no tma"}], ids=str)
def test_a_hopper_gpu_that_loses_its_kernels_is_told_once_and_what_to_do(machine, caplog, settings):
    machine(**settings)
    with caplog.at_level(logging.WARNING, "moequant"):
        for device in (GPU, GPU, torch.device("cuda", 1)):
            assert not common.runs_gluon(device)
    (record,) = caplog.records
    for part in (settings["version"], "1.6 times", "Install torch 2.10 to 2.15", settings.get("broken", "too old")):
        assert part in record.getMessage()


@pytest.mark.parametrize("settings", [{}, {"version": "3.10.0"}, {"capability": (8, 0), "version": "3.5.1"}], ids=str)
def test_nothing_is_said_where_nothing_is_lost(machine, caplog, settings):
    machine(**settings)
    with caplog.at_level(logging.DEBUG, "moequant"):
        common.runs_gluon(GPU)
        common.runs_gluon(CPU)
    assert not caplog.records


def test_a_newer_triton_is_tried_once(machine, monkeypatch):
    machine("3.10.0")
    tried = []
    monkeypatch.setattr(triton_versions, "probe", tried.append)
    for _ in range(3):
        common.runs_gluon(GPU)
    assert tried == [GPU]


def test_a_kernel_that_does_not_compile_is_a_reason_and_no_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("at 12:4:\n    barrier()\n    ^") from AttributeError("module 'gl' has no\n attribute 'barrier'\n")

    monkeypatch.setattr(grouped_gemm_hopper, "grouped_gemm_blockscale_hopper", fail)
    assert triton_versions.probe(CPU) == "AttributeError: module 'gl' has no attribute 'barrier'"


def test_the_probe_calls_the_kernels_as_they_are_called(monkeypatch):
    kernels = {
        grouped_gemm_hopper: "grouped_gemm_blockscale_hopper",
        gemm1_swiglu_hopper: "gemm1_swiglu_hopper",
        weight_gradient_hopper: "weight_gradient_hopper",
        quantize_columnwise_hopper: "quantize_columnwise_hopper",
        quantize_weight_hopper: "quantize_weight_hopper",
    }
    for module, name in kernels.items():
        monkeypatch.setattr(module, name, create_autospec(getattr(module, name)))
    assert triton_versions.probe(CPU) is None


@pytest.mark.gpu
def test_the_probe_compiles_the_kernels_and_runs_none(monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    assert triton_versions.probe(torch.device("cuda", 0)) is None
    a, out = torch.ones(1, 128, 128, device="cuda").to(torch.float8_e4m3fn), torch.zeros(1, 128, 256, device="cuda").bfloat16()
    b, scales = torch.ones(1, 256, 128, device="cuda").to(torch.float8_e4m3fn), torch.ones(1, 1, 128, device="cuda")
    arguments = a, scales.transpose(1, 2), b, torch.ones(1, 2, 1, device="cuda"), None, None, out
    grouped_gemm_hopper.grouped_gemm_blockscale_hopper(*arguments, num_sms=0)
    assert not out.any()
    # and the same launch, of programs, writes
    grouped_gemm_hopper.grouped_gemm_blockscale_hopper(*arguments)
    assert (out == 128).all()
