"""The benchmark of held-out losses in a tiny form: its experts are those of the model, and what it records."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_accuracy
from benchmarks.bench_accuracy import QuantizedExperts
from benchmarks.common import TOLERANCES
from benchmarks.record_trace import Experts, Sizes
from benchmarks.records import CEILINGS, RESULTS_CASES, TITLES
from moequant import MoEQuantDispatcher
from moequant.testing import relative_error

SIZES = {"hidden": 16, "intermediate": 8, "layers": 2, "context": 16, "batch": 2, "vocabulary": 300}


@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn", "int8"])
def test_experts_run_by_moequant_are_near_the_dense_ones(quant):
    torch.manual_seed(0)
    dense = Experts(Sizes(**SIZES | {"hidden": 256, "intermediate": 128}), 4).eval()
    x, weights, ids = torch.randn(24, 256), torch.rand(24, 2), torch.stack([torch.randperm(4)[:2] for _ in range(24)])
    options = {"num_experts": 4, "top_k": 2, "hidden_size": 256, "max_tokens_per_rank": 24, "quant": quant, "layout": "ragged"}
    with torch.no_grad(), MoEQuantDispatcher(**options, device="cpu") as dispatcher:
        out = QuantizedExperts(dense, dispatcher)(x, ids, weights)
        assert out.dtype == torch.float32 and 1e-4 < relative_error(out, dense(x, ids, weights)) < TOLERANCES[quant]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tiny_run_records_the_loss_in_each_format(device, tmp_path, capsys):
    for name in "abcdefghijklmnopqrstuvwxyz":
        (tmp_path / f"{name}.py").write_text(f"def {name}(x):\n    return x + {ord(name)}\n\n" * 8)
    options = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    options += ["--models", "8x2", "--steps", "3", "--batches", "2", "--text", str(tmp_path), "--device", device]
    bench_accuracy.main([*options, "--output-json", str(tmp_path / "records.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    dense, *others = (record for record in records if record["op"] not in CEILINGS)
    assert {record["op"] for record in (dense, *others)} == {"accuracy"} <= TITLES.keys() & RESULTS_CASES.keys()
    assert [(r["case"]["quant"], r["case"]["recipe"]) for r in (dense, *others)] == [
        ("dense float32", None),
        ("left out", None),
        ("none", None),
        ("fp8_e4m3fn", "default"),
        ("fp8_e4m3fn", "ue8m0"),
        ("int8", "default"),
    ]
    # e to the loss is at most a few times the vocabulary, of which hardly anything was learnt
    assert 1 < dense["loss"] < 8 and dense["relative_loss"] == dense["relative_loss_error"] == 0
    assert len({record["loss"] for record in (dense, *others)}) > 3
    for record in others:
        assert record["us"] > 0 and (record["steps"], record["tokens"]) == (3, 64)
        assert record["relative_loss"] == pytest.approx(record["loss"] / dense["loss"] - 1, abs=2e-5)
    # hardly trained experts are worth little, and their rounding less
    left_out, *formats = (abs(record["relative_loss"]) for record in others)
    assert 0 < max(formats) < 0.2 * left_out
    assert f"8x2 int8 default: loss {others[-1]['loss']:.4f}" in capsys.readouterr().out


def test_one_batch_has_no_error(capsys):
    with pytest.raises(SystemExit):
        bench_accuracy.main(["--batches", "1"])
    assert "--batches must be at least 2" in capsys.readouterr().err
