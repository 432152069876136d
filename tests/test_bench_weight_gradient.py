"""The benchmark of weight gradients in a tiny form: what is recorded, and that a wrong product is not timed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import bench_weight_gradient
from benchmarks.common import Timing
from benchmarks.records import CEILINGS, RESULTS_CASES, TITLES


def once(bench: Any, calls: list[Any]) -> list[Timing]:
    for call in calls:
        call()
    return [Timing.of([100.0 + number]) for number in range(len(calls))]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tiny_run_records_the_product(device, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_weight_gradient, "time_all", once)
    path = tmp_path / "records.jsonl"
    bench_weight_gradient.main(["--device", device, "--shape", "3", "96", "160", "40", "--output-json", str(path)])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (record,) = (record for record in records if record["op"] not in CEILINGS)
    assert record["op"] == "weight_gradient" and record["op"] in TITLES and record["op"] in RESULTS_CASES
    assert record["case"] == {"E": 3, "N": 96, "K_dim": 160, "rows": 40, "quant": "fp8_e4m3fn"}
    assert record["us"] == 100.0 and record["floor_us"] > 0 and record["relative_error"] <= bench_weight_gradient.TOLERANCE
    assert ("peer_us" in record) == ("peer" in record)


def test_a_wrong_product_is_not_timed(monkeypatch, tmp_path):
    right = bench_weight_gradient.ops.weight_gradient

    def wrong(*operands: Any) -> None:
        right(*operands)
        operands[-1].mul_(1.01)

    monkeypatch.setattr(bench_weight_gradient.ops, "weight_gradient", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        bench_weight_gradient.main(["--device", "cpu", "--output-json", str(tmp_path / "records.jsonl")])
