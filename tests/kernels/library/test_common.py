"""Which kernels a device runs. The device functions of `common` are tested with the kernels that call them."""

from __future__ import annotations

import pytest
import torch
import triton

from moequant.kernels.library import common


@pytest.mark.parametrize(
    ("version", "capability", "hip", "runs"),
    [
        pytest.param("3.6.0", (9, 0), None, True, id="Hopper"),
        pytest.param("3.6.1+git", (9, 0), None, True, id="another patch of Triton"),
        pytest.param("3.5.1", (9, 0), None, False, id="the minor version before"),
        pytest.param("3.7.0", (9, 0), None, False, id="the next minor version"),
        pytest.param("3.60.0", (9, 0), None, False, id="a version that only begins alike"),
        pytest.param("3.6.0", (8, 9), None, False, id="Ada"),
        pytest.param("3.6.0", (10, 0), None, False, id="Blackwell"),
        pytest.param("3.6.0", (9, 4), "6.4", False, id="AMD"),
    ],
)
def test_gluon_kernels_run_on_hopper_with_the_triton_they_are_written_for(monkeypatch, version, capability, hip, runs):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # past the cache, which keeps what this machine's GPUs are
    assert common.runs_gluon.__wrapped__(torch.device("cuda", 0)) is runs
    assert not common.runs_gluon.__wrapped__(torch.device("cpu"))
