"""The benchmark of transformers' models, tried out on a CPU: what it records, and that a wrong result is not timed."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from benchmarks import bench_transformers
from benchmarks.records import CEILINGS, TITLES

OPTIONS = ["--device", "cpu", "--models", "gpt-oss-20b", "--num-tokens", "2", "--quants", "none", "int8"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(bench_transformers, "samples_of", lambda call, device, reps: [call() or 1.0])


def records_of(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["op"] in TITLES for record in records)
    return [record for record in records if record["op"] not in CEILINGS]


def test_it_records_layers_and_models_beside_peers(tmp_path):
    bench_transformers.main([*OPTIONS, "--output-json", str(tmp_path / "one.jsonl")])
    records = records_of(tmp_path / "one.jsonl")
    assert [(record["op"], record["case"]["quant"]) for record in records] == [
        (f"transformers_{part}", quant) for part in ("layer", "model") for quant in ("none", "int8")
    ]
    assert all(record["peers"].keys() == {"grouped_mm", "batched_mm"} for record in records)
    assert all((record["floor_us"] is not None) == (record["op"] == "transformers_layer") for record in records)


def test_it_ends_when_its_time_is_up(tmp_path, capsys):
    bench_transformers.main([*OPTIONS, "--seconds", "0", "--output-json", str(tmp_path / "none.jsonl")])
    assert records_of(tmp_path / "none.jsonl") == []
    assert "left out after 0 s: gpt-oss-20b: layer, T=2, grouped_mm; " in capsys.readouterr().err


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    right = bench_transformers.expected_rows
    monkeypatch.setattr(bench_transformers, "expected_rows", lambda *inputs: 1.1 * right(*inputs))
    with pytest.raises(AssertionError, match="WRONG"):
        bench_transformers.main([*OPTIONS, "--output-json", str(tmp_path / "none.jsonl")])


def test_under_torchrun_it_records_experts_that_are_split(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    threads = torch.get_num_threads()
    bench_transformers.main([*OPTIONS, "--output-json", str(tmp_path / "ranks.jsonl")])
    torch.set_num_threads(threads)
    records = records_of(tmp_path / "ranks.jsonl")
    assert [(record["case"]["batch"], record["case"]["quant"]) for record in records] == [
        (batch, quant) for batch in ("one batch", "batches of their own") for quant in ("none", "int8")
    ]
    assert records[0]["peers"].keys() == {"all_reduce", "all_to_all"} and records[2]["peers"].keys() == {"all_to_all"}
