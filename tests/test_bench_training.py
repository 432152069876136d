"""The benchmark of training in a tiny form: torch's layers are what they are taken for, and what is recorded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import bench_training
from benchmarks.common import Timing
from benchmarks.records import CEILINGS, RESULTS_CASES, TITLES
from benchmarks.timing import Modes
from benchmarks.torch_experts import WAYS, grouped_mm, torch_layer
from moequant.testing import relative_error, run_ranks
from training_cases import dense_gradients, leaves, tokens_of_rank, weights_of

NAMES = ("hidden", "weights", "w13", "w2")


def gradients(rank: int, ranks: int, way: str) -> list[torch.Tensor]:
    """Of this rank's tokens and experts. Token entries without an expert are left to expert 0, with a weight of zero."""
    every, tokens = weights_of(2 * ranks, 16, 8), tokens_of_rank(rank, ranks, 2 * ranks, 16, 12)
    mine = leaves(every.each(lambda w: w[2 * rank : 2 * rank + 2]))
    weights = torch.where(tokens.ids < 0, 0, tokens.weights)
    x, s = tokens.hidden.clone().requires_grad_(), weights.requires_grad_()
    out = torch_layer(x, tokens.ids.clamp_min(0), s, mine.w13, mine.w2, way)
    return list(torch.autograd.grad(out, (x, s, mine.w13, mine.w2), tokens.grad))


@pytest.mark.skipif(grouped_mm is None, reason="torch has no grouped_mm")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_torchs_layer_has_the_gradients_of_a_dense_computation(way, ranks):
    results = run_ranks(gradients, ranks, way) if ranks > 1 else [gradients(0, 1, way)]
    tokens = [tokens_of_rank(rank, ranks, 2 * ranks, 16, 12) for rank in range(ranks)]
    each, of_weights = dense_gradients(tokens, weights_of(2 * ranks, 16, 8), "silu")
    for rank, result in enumerate(results):
        made: dict[str, Any] = dict(zip(NAMES, result, strict=True))
        there = tokens[rank].ids >= 0
        assert relative_error(made["hidden"], each[rank]["hidden"]) < 0.02
        assert relative_error(made["weights"][there], each[rank]["weights"][there]) < 0.02
    for name, place in (("w13", 2), ("w2", 3)):
        assert relative_error(torch.cat([result[place] for result in results]), of_weights[name]) < 0.02


def once(ways: dict[str, Any], **_: Any) -> dict[str, Modes]:
    for way in ways.values():
        way.call()
    timing = Timing.of([100.0 + len(ways)])
    return {name: Modes(timing, timing) for name in ways}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tiny_run_records_both_formats_beside_torch(device, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_training, "time_turn_about", once)
    monkeypatch.setattr(bench_training, "model_shape", lambda name: bench_training.CPU_SHAPE)
    path, profile = tmp_path / "records.jsonl", tmp_path / "profiles" / "kernels.txt"
    options = ["--models", "qwen3-30b", "--num-tokens", "64", "--device", device, "--output-json", str(path)]
    bench_training.main([*options, "--profile", str(profile)])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [record for record in records if record["op"] not in CEILINGS]
    assert {record["op"] for record in records} == {"training"} <= TITLES.keys() & RESULTS_CASES.keys()
    assert [(record["case"]["quant"], record["case"]["step"]) for record in records] == [
        (quant, step) for quant in ("none", "fp8_e4m3fn") for step in ("forward", "forward + backward")
    ]
    assert all(record["floor_us"] > 0 and record["peers"].keys() == {f"torch {way}" for way in WAYS} for record in records)
    for record in records[1::2]:
        assert record["errors"]["torch gather"].keys() == {"output", *NAMES}
        if device == "cuda":
            sizes = record["memory"]["moequant"]
            assert (
                sizes["bytes"] > sizes["gradient_bytes"] > 0 < sizes["kept_bytes"] < record["memory"]["torch gather"]["kept_bytes"]
            )
    text = profile.read_text()
    assert all(f"{quant}, {name}: " in text for quant in ("none", "fp8_e4m3fn") for name in ("moequant", "torch gather"))


def test_gradients_that_differ_are_not_timed(tmp_path, monkeypatch):
    right = bench_training.torch_layer
    monkeypatch.setattr(bench_training, "torch_layer", lambda *inputs: 1.1 * right(*inputs))
    options = ["--num-tokens", "4", "--quants", "none", "--device", "cpu", "--output-json", str(tmp_path / "records.jsonl")]
    with pytest.raises(AssertionError, match="differ by"):
        bench_training.main(options)
