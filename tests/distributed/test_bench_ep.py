"""launch/bench_ep.py as a user starts it, and the check that decides its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.common import TOLERANCES, Timing, check_output
from benchmarks.ep_layer import make_tokens
from benchmarks.timing import Modes, Way, time_turn_about
from launch import bench_ep

SCRIPT = str(Path(bench_ep.__file__).resolve())
TINY = ["--device", "cpu", "--num-tokens", "8", "--hidden", "144", "--intermediate", "64", "--num-topk", "2", "--iters", "2"]
STEPS = ["copy", "copy", "matmul", "quantize", "dispatch", "grouped_gemm", "silu_mul_quantize", "grouped_gemm", "combine", "layer"]


def start(*arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """The script in processes of its own. ranks: with torchrun; None: by itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MOEQUANT_CPU_KERNELS")}
    return subprocess.run(
        [sys.executable, *launcher, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=kept | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("exchange", ["padded", "packed"])
def test_two_ranks_write_well_formed_records(tmp_path, exchange):
    path = tmp_path / "records.jsonl"
    done = start(*TINY, "--num-experts", "8", "--exchange", exchange, "--output-json", str(path), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right: relative error") == 2
    assert "timing dispatch" in done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["op"] for record in records] == [*STEPS, "layer"]
    for record in records:
        assert {"op", "case", "us", "us_p20", "us_p80", "floor_us", "env", "commit", "date"} <= set(record)
        assert 0 < record["us_p20"] <= record["us"] <= record["us_p80"]
        if record["op"] not in ("copy", "matmul"):
            assert 0 < record["fresh_us_p20"] <= record["fresh_us"] <= record["fresh_us_p80"]
        assert set(record["env"]) == {"gpu", "torch", "triton", "nccl", "cuda"}
    layer, compared = records[-2:]
    expected = {"T": 8, "H": 144, "I": 64, "E": 8, "K": 2, "W": 2, "quant": "fp8_e4m3fn", "transport": "collective"}
    assert layer["case"] == expected | {"exchange": exchange, "reduce": "exact", "routing": "uniform"}
    assert compared["case"] == layer["case"] | {"quant": "none", "exchange": "packed"}
    assert [record["case"]["step"] for record in records if record["op"] == "grouped_gemm"] == ["gemm1", "gemm2"]
    if exchange == "padded":
        # half of 8 experts of 16 rows each: values and 2 scales and a source out, bfloat16 back
        assert layer["wire_bytes"] == 4 * 16 * (144 + 3 * 4 + 288)


def test_float16_is_timed_beside_bfloat16_and_right(tmp_path):
    path = tmp_path / "records.jsonl"
    done = start(*TINY, "--num-experts", "4", "--quant", "float16", "--output-json", str(path))
    assert done.returncode == 0 and done.stdout.count("right: relative error") == 2, done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["case"]["quant"] for record in records if record["op"] == "layer"] == ["float16", "none"]


def test_skewed_routing_has_rows_of_its_own_and_traces_name_the_steps(tmp_path):
    path, folder = tmp_path / "records.jsonl", tmp_path / "chrome"
    options = [
        "--num-experts",
        "4",
        "--skew",
        "--exchange",
        "padded",
        "--reduce",
        "per_rank",
        "--trace",
        str(folder),
        "--output-json",
        str(path),
    ]
    done = start(*TINY, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    layers = [record for record in records if record["op"] == "layer"]
    assert [record["case"]["routing"] for record in layers] == ["uniform", "zipf:1", "one-hot", "half", "empty-ranks", "uniform"]
    assert {record["case"]["reduce"] for record in layers} == {"per_rank"}
    combines = {record["case"]["routing"]: record for record in records if record["op"] == "combine"}
    # a sum of 8 tokens of the other rank, of which empty-ranks has none, but sizes are fixed
    assert {combine["wire_bytes"] for combine in combines.values()} == {8 * 288}
    assert done.stdout.count("right: relative error") == 6
    for rank in range(2):
        events = json.loads((folder / f"layer-fp8_e4m3fn-rank{rank}.json").read_text())["traceEvents"]
        assert {"dispatch", "GEMM 1", "SwiGLU + quantize", "GEMM 2", "combine"} <= {event.get("name") for event in events}


@pytest.mark.multigpu
@pytest.mark.parametrize("columns", ["2880", "2944", "1000"])
def test_rows_that_are_no_whole_tiles_wide_come_back_whole(columns):
    """gpt-oss's sizes: an expert's last tile of columns is half full, and its rows are stored at their tokens' ranks."""
    sizes = ["--hidden", columns, "--intermediate", columns, "--num-experts", "32", "--num-topk", "4", "--num-tokens", "48"]
    done = start(*sizes, "--transport", "symmetric", "--iters", "4", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right: relative error") >= 1


@pytest.mark.multigpu
@pytest.mark.parametrize(
    "options", [["--exchange", "padded"], ["--exchange", "padded", "--reduce", "per_rank"], ["--exchange", "packed"]]
)
def test_two_gpus_give_right_results_for_every_routing(tmp_path, options):
    sizes = ["--num-tokens", "32", "--hidden", "1024", "--intermediate", "256", "--num-experts", "16", "--num-topk", "4"]
    path = tmp_path / "records.jsonl"
    done = start(
        *sizes, *options, "--iters", "4", "--skew", "--peers", "--trace", str(tmp_path), "--output-json", str(path), ranks=2
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right: relative error") == 6
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["fresh_us"] > 0 for record in records if record["op"] not in ("copy", "matmul"))
    assert len(list(tmp_path.glob("layer-*.json"))) == 2


def test_ways_are_timed_turn_about():
    calls = []
    ways = {name: Way(lambda name=name: calls.append(name), False) for name in ("ours", "theirs")}
    timings = time_turn_about(ways, device="cpu", reps=8, rounds=4)
    assert set(timings) == {"ours", "theirs"} and all(modes.fresh.us >= 0 for modes in timings.values())
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert turns == ["ours", "theirs"] * 4


def test_one_rank_drops_what_the_capacity_implies(tmp_path):
    path = tmp_path / "records.jsonl"
    options = ["--num-experts", "4", "--capacity", "16", "--routing", "one-hot", "--num-tokens", "24", "--quant", "int8", "--skew"]
    done = start(*TINY, *options, "--output-json", str(path))
    assert done.returncode == 0, done.stderr
    # expert 0 has 24 rows and room for 16; the others share 24
    assert " 8 dropped" in done.stdout
    assert json.loads(path.read_text().splitlines()[-1])["case"]["capacity"] == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transport", "carrier-pigeon"], "--transport"),
        (["--num-topk", "9"], "top_k"),
        (["--routing", "zipf:much"], "zipf"),
        (["--num-tokens", "0"], "--num-tokens"),
        (["--num-tokens", "100000000"], "GiB are free"),
        (["--transport", "collective"], "torchrun"),
        (["--model", "gpt-1"], "--model"),
        (["--exchange"], "--exchange"),
        (["--first-experts", "8"], "first_experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_option_is_one_line_and_exit_code_2(options, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        bench_ep.main([*TINY, "--num-experts", "8", *options])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_the_process_itself_exits_with_2():
    done = start("--device", "cpu", "--num-tokens", "none")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_model_gives_the_shape_and_ranks_below_8_get_their_share():
    options = bench_ep.parse_options(["--device", "cpu", "--model", "qwen3-30b", "--num-tokens", "4"], 2)
    assert (options.hidden, options.intermediate, options.num_experts, options.num_topk) == (2048, 768, 32, 8)


def test_a_wrong_result_gives_exit_code_1(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(bench_ep, "check_output", lambda out, expected, quant: check_output(out * 1.2, expected, quant))
    monkeypatch.setattr(bench_ep.Layer, "time", lambda self, name, step: Modes(Timing(1.0, 1.0, 1.0), Timing(1.0, 1.0, 1.0)))
    threads = torch.get_num_threads()
    try:
        assert bench_ep.main([*TINY, "--num-experts", "8"]) == 1
    finally:
        torch.set_num_threads(threads)
    out, error = capsys.readouterr()
    assert "WRONG: relative error" in out and "past its tolerance" in error


@pytest.mark.parametrize("quant", TOLERANCES)
def test_the_check_sees_one_wrong_token_noise_and_nan(quant):
    expected = torch.randn(1024, 64)
    noise = torch.randn(1024, 64)
    assert check_output(expected + 0.8 * TOLERANCES[quant] * noise, expected, quant).passed
    assert not check_output(expected + 1.2 * TOLERANCES[quant] * noise, expected, quant).passed
    swapped = expected.clone()
    swapped[0] = expected[1]
    assert not check_output(swapped, expected, quant).passed
    expected_with_hole = expected.clone()
    expected_with_hole[3, 3] = torch.nan
    assert not check_output(expected_with_hole, expected, quant).passed


@pytest.mark.parametrize("quant", TOLERANCES)
def test_a_result_that_is_too_large_is_wrong_although_its_direction_is_right(quant):
    """1 - 2xy/(xx+yy) alone forgives the larger of the two more."""
    expected = torch.randn(64, 64)
    check = check_output(expected * (1 + 1.001 * TOLERANCES[quant]), expected, quant)
    assert check.cosine <= check.tolerance**2 / 2 and not check.passed
    assert check_output(expected * (1 + 0.99 * TOLERANCES[quant]), expected, quant).passed


@pytest.mark.parametrize("name, largest", [("relative", 0.1), ("cosine", 0.005), ("worst_token", 0.2)])
def test_each_error_has_a_limit_of_its_own(name, largest):
    within = bench_ep.Check(0.0, 0.0, 0.0, 0.1)
    assert within.passed and replace(within, **{name: 0.999 * largest}).passed
    for error in (1.001 * largest, float("nan")):
        assert not replace(within, **{name: error}).passed


@pytest.mark.parametrize("kind, tokens", [("empty-ranks", [8, 0, 8, 0]), ("uniform", [8] * 4), ("half", [8] * 4)])
def test_every_second_rank_of_empty_ranks_has_no_tokens(kind, tokens):
    options = bench_ep.parse_options([*TINY, "--num-experts", "8"], 4)
    made = [make_tokens(options, kind, rank, torch.device("cpu")) for rank in range(4)]
    for tensor in range(3):
        assert [len(each[tensor]) for each in made] == tokens


def test_the_worst_of_all_ranks_keeps_a_nan(monkeypatch):
    good, bad = (bench_ep.Check(error, error, error, 1.0) for error in (0.1, float("nan")))

    def gather(out, check):
        out[:] = [good, bad]

    monkeypatch.setattr(bench_ep.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(bench_ep.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(bench_ep.dist, "all_gather_object", gather)
    assert not bench_ep.worst_check(good).passed
