"""The benchmark of loss curves in a tiny form: its ways start from one model, and what it records."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_loss
from benchmarks.bench_loss import WAYS, make_model
from benchmarks.record_trace import Sizes
from benchmarks.records import CEILINGS, RESULTS_CASES, TITLES
from moequant import MoEQuantDispatcher
from moequant.testing import relative_error

SIZES = {"hidden": 16, "intermediate": 8, "layers": 2, "context": 16, "batch": 2, "vocabulary": 300}


def test_a_seed_is_one_model_whoever_multiplies():
    sizes, tokens = Sizes(**SIZES | {"hidden": 64}), torch.arange(34).view(2, 17)
    options = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "max_tokens_per_rank": 32, "quant": "none", "layout": "ragged"}
    with MoEQuantDispatcher(**options, device="cpu") as dispatcher:
        models = [make_model(sizes, "8x2", 3, torch.device("cpu"), way) for way in (None, dispatcher)]
        for model in models:
            model.losses(tokens)[0].backward()
    by_torch, ours = (dict(model.named_parameters()) for model in models)
    assert by_torch.keys() == ours.keys()
    for name, parameter in by_torch.items():
        assert torch.equal(parameter, ours[name]), name
        gradients = [x for x in (ours[name].grad, parameter.grad) if x is not None]
        assert relative_error(*gradients) < 0.02, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tiny_run_records_each_way_s_curve(device, tmp_path, capsys):
    for name in "abcdefghijklmnopqrstuvwxyz":
        (tmp_path / f"{name}.py").write_text(f"def {name}(x):\n    return x + {ord(name)}\n\n" * 8)
    options = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    options += [
        "--models",
        "8x2",
        "--steps",
        "3",
        "--batches",
        "2",
        "--text",
        str(tmp_path),
        "--device",
        device,
        "--seeds",
        "0",
        "1",
    ]
    losses = bench_loss.main([*options, "--output-json", str(tmp_path / "records.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    records = [record for record in records if record["op"] not in CEILINGS]
    assert {record["op"] for record in records} == {"training_loss"} <= TITLES.keys() & RESULTS_CASES.keys()
    assert [(record["case"]["seed"], record["case"]["way"]) for record in records] == [(s, way) for s in (0, 1) for way in WAYS]
    assert [step for step, _ in records[0]["curve"]] == [0, 1, 2, 3]
    # of one model before the first step, up to rounding, and of another one
    first = [record["curve"][0][1] for record in records]
    assert max(first[:3]) - min(first[:3]) < 0.02 and first[0] != first[3]
    assert losses.keys() == {f"8x2 {way}" for way in WAYS} and all(len(of) == 2 for of in losses.values())
    assert "seeds from" in capsys.readouterr().out
