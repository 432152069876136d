"""The benchmark of vLLM's kernel, tried out: on a CPU vLLM's kernels, and the stand-ins for compiled ones, in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
from engines import ENGINES, ROOT, run_inside

from benchmarks.common import TOLERANCES
from benchmarks.records import CEILINGS, TITLES

# tests/interpreter.py corrects the interpreter
SCRIPT = "import sys, interpreter; interpreter.install(); from benchmarks import bench_vllm; bench_vllm.main(sys.argv[1:])"


def test_it_records_a_layer_beside_vllms_own_experts(tmp_path):
    path = tmp_path / "records.jsonl"
    options = ("--device", "cpu", "--models", "qwen3-30b", "--num-tokens", "1", "6", "--reps", "1", "--output-json", str(path))
    # vLLM takes Triton's kernels where all GPUs are hidden, and no others where there is none
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "VLLM_TARGET_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    result = run_inside("vllm", "-c", SCRIPT, *options, **hidden)
    assert result.returncode == 0, result.stdout
    assert "moe_align_block_size" in result.stdout
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["op"] in TITLES for record in records)
    found = [record for record in records if record["op"] not in CEILINGS]
    assert [(record["op"], record["case"]["T"], record["case"]["mode"]) for record in found] == [
        ("vllm_layer", tokens, "eager") for tokens in (1, 6)
    ]
    for record in found:
        assert record["peer"] == f"vLLM {ENGINES['vllm'][0]} Triton experts" and record["peer_us"] > 0
        for error in ("relative_error", "peer_relative_error"):
            assert 0 < record[error] < TOLERANCES["fp8_e4m3fn"]


@pytest.mark.parametrize("gpus", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multigpu)])
def test_on_gpus_moequant_is_right_in_vllms_kernel_called_and_captured(tmp_path, gpus):
    path = tmp_path / "records.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)) if gpus > 1 else ()
    options = ("--models", "qwen3-30b", "--num-tokens", "1", "32", "--reps", "2", "--output-json", str(path))
    result = run_inside("vllm", *launcher, str(ROOT / "benchmarks" / "bench_vllm.py"), *options)
    assert result.returncode == 0, result.stdout
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [record for record in records if record["op"] == "vllm_layer"]
    expected = [(gpus, tokens, mode) for tokens in (1, 32) for mode in ("eager", "graph")]
    assert [(record["case"]["W"], record["case"]["T"], record["case"]["mode"]) for record in found] == expected
    assert all(0 < record["relative_error"] < TOLERANCES["fp8_e4m3fn"] for record in found)
