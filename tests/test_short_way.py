"""How far it is from the call to the launches, for a layer that has come before: calls inside the package, and the files they lie in."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import moequant
from moequant import GroupedExperts, MoEQuantDispatcher
from moequant.repeats import Repeats
from moequant.testing import routing
from written_launches import install_gpu

PACKAGE = Path(moequant.__file__).parent
# beside the calls that stand in the package, those of comprehensions and of what is made at once
WRITTEN = {"<lambda>", "<listcomp>", "<genexpr>", "<dictcomp>"}


class Way:
    """Counts the package's own calls, by file."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(PACKAGE)) and frame.f_code.co_name not in WRITTEN:
            self.calls[f"{Path(name).relative_to(PACKAGE)}:{frame.f_code.co_name}"] += 1

    def of(self, call: Any) -> Way:
        sys.setprofile(self)
        try:
            call()
        finally:
            sys.setprofile(None)
        return self


def check(way: Way, most_calls: int = 60, most_files: int = 10) -> None:
    files = {name.split(":")[0] for name in way.calls}
    assert 10 < sum(way.calls.values()) <= most_calls, "\n".join(f"{count} {name}" for name, count in way.calls.items())
    assert len(files) <= most_files, sorted(files)


def layer(device: str, quant: str) -> Any:
    settings: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 128, "max_tokens_per_rank": 16, "quant": quant}
    dispatcher = MoEQuantDispatcher(**settings, device=device)
    weights = (torch.zeros(4, *shape, device=device).bfloat16() for shape in ((256, 128), (128, 128)))
    experts = GroupedExperts.from_weights(*weights, quant=quant)
    hidden, (ids, topk_weights) = torch.zeros(5, 128, device=device).bfloat16(), routing(5, 2, 4)
    given = hidden, ids.to(device), topk_weights.to(device)
    return lambda: dispatcher(*given, experts)


def test_a_layer_whose_launches_are_repeated_takes_at_most_60_calls_in_10_files(monkeypatch):
    """Without a GPU: every step is taken for one that has come before."""
    call = layer("cpu", "int8")
    call()
    install_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    known: dict[Any, Any] = {}
    device, run = Repeats.device, Repeats.run

    def remembered(self: Repeats, x: Any, inputs: Any, settings: Any, step: Any) -> Any:
        key = id(self), settings
        if key not in known:
            known[key] = step()
            return known[key]
        # as on a GPU, but for the launches
        device(self, x)
        return known[key]

    monkeypatch.setattr(Repeats, "run", remembered)
    call()
    check(Way().of(call))
    assert run is not Repeats.run


@pytest.mark.gpu
def test_a_layer_on_a_gpu_takes_at_most_60_calls_in_10_files():
    call = layer("cuda", "int8")
    for _ in range(3):
        call()
    check(Way().of(call))
