"""What formats a GPU is asked for: float8 is there from sm_89 on, e4m3fnuz on AMD alone, int8 and bfloat16 anywhere."""

from __future__ import annotations

import pytest
import torch

from moequant.checks import check_format
from moequant.config import QUANT_DTYPES

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "refused"),
    [
        ((8, 0), {"fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"}),
        ((8, 6), {"fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"}),
        ((8, 9), {"fp8_e4m3fnuz"}),
        ((9, 0), {"fp8_e4m3fnuz"}),
    ],
)
def test_a_format_that_the_gpu_has_not_is_refused_with_those_that_it_has(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    for quant in QUANT_DTYPES:
        check_format(quant, torch.device("cpu"))
        if quant in refused:
            with pytest.raises(ValueError, match=rf"quant=\"{quant}\" can't be computed on some GPU .*\"int8\" and \"none\" can"):
                check_format(quant, GPU)
        else:
            check_format(quant, GPU)


def test_amd_is_not_asked_for_nvidias_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for quant in QUANT_DTYPES:
        check_format(quant, GPU)
