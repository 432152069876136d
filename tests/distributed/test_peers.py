"""--peers with stand-ins for the libraries: what is called with what, checked, timed and recorded; and what is said without them."""

from __future__ import annotations

import json
import socket
import sys
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import peers
from launch import bench_ep
from moequant import reference
from moequant.batch import QuantizedTensor, empty_transposed_scales

SIZES = {"num-tokens": 6, "hidden": 256, "intermediate": 128, "num-experts": 4, "num-topk": 2, "iters": 4}
OPTIONS = ["--device", "cpu", *(text for name, size in SIZES.items() for text in (f"--{name}", str(size)))]
STEPS = {"dispatch", "gemm1", "gemm2", "combine", "layer"}


class FakeBuffer:
    """deep_ep.Buffer for a group of one rank, on a CPU."""

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=12):
        assert group.size() == 1 and (num_rdma_bytes if low_latency_mode else num_nvl_bytes) == 12345
        assert not low_latency_mode or num_qps_per_rank == 4

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts):
        assert (num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts) == (6, 256, 1, 4)
        return 12345

    @staticmethod
    def get_dispatch_config(num_ranks):
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: 12345 if hidden_bytes == 512 else 0)

    get_combine_config = get_dispatch_config

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=True):
        assert use_fp8 and topk_idx.dtype == torch.int64
        slots, rows = (torch.empty(topk_idx.shape, dtype=torch.int32) for _ in range(2))
        counts = torch.empty(num_experts, dtype=torch.int32)
        values = torch.empty(num_experts, num_max_dispatch_tokens_per_rank, x.shape[1], dtype=torch.float8_e4m3fn)
        scales = empty_transposed_scales(num_experts, num_max_dispatch_tokens_per_rank, x.shape[1] // 128, "cpu")
        reference.route(topk_idx, slots, counts)
        reference.scatter(x, topk_idx, slots, values, scales, rows=rows)
        return (values, scales), counts, rows, None, None

    def low_latency_combine(self, x, topk_idx, topk_weights, handle):
        out = torch.empty(len(handle), x.shape[2], dtype=torch.bfloat16)
        reference.combine(x.flatten(0, 1), handle, topk_weights, out)
        return out, None, None

    def get_dispatch_layout(self, topk_idx, num_experts):
        everything = torch.ones(len(topk_idx), 1, dtype=torch.bool)
        return torch.tensor([len(topk_idx)]), None, torch.bincount(topk_idx.flatten(), minlength=num_experts), everything, None

    def dispatch(self, x, *, num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert, **routing):
        assert set(routing) == {"topk_idx", "topk_weights"} and int(num_tokens_per_rank) == len(is_token_in_rank) == len(x[0])
        return (x[0].clone(), x[1].clone()), None, None, num_tokens_per_expert.tolist(), "handle", None

    def combine(self, x, handle):
        assert handle == "handle"
        return x.clone(), None, None


def product(a, b, out, masked_m, expected_m, disable_ue8m0_cast):
    assert disable_ue8m0_cast and expected_m >= 1
    left, right = QuantizedTensor(a[0], a[1], "transposed"), QuantizedTensor(b[0], b[1], "block")
    reference.grouped_gemm_blockscale(left, right, masked_m, out=out)


def module(name: str, **members) -> ModuleType:
    fake = ModuleType(name)
    vars(fake).update(members, __version__="9.9")
    return fake


@pytest.fixture
def one_rank_group(monkeypatch):
    """The environment of torchrun with one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in place.items():
        monkeypatch.setenv(key, str(value))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def records_of(path) -> dict[str, dict]:
    """By step, those of the first layer, without the ceilings."""
    records = {}
    for record in map(json.loads, path.read_text().splitlines()):
        records.setdefault(record["case"].get("step", record["op"]), record)
    return records


def test_peers_are_checked_timed_and_recorded(one_rank_group, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "deep_ep", module("deep_ep", Buffer=FakeBuffer))
    monkeypatch.setitem(sys.modules, "deep_gemm", module("deep_gemm", m_grouped_fp8_gemm_nt_masked=product))
    path = tmp_path / "records.jsonl"
    assert bench_ep.main([*OPTIONS, "--peers", "--output-json", str(path)]) == 0
    records = records_of(path)
    low, normal, gemm = "deep_ep 9.9 low-latency", "deep_ep 9.9 normal", "deep_gemm 9.9"
    expected = {"dispatch": {low, normal}, "combine": {low, normal}, "gemm1": {gemm}, "gemm2": {gemm}, "layer": {f"{low} + {gemm}"}}
    for step, names in expected.items():
        record = records[step]
        assert set(record["peers"]) == set(record["peers_fresh"]) == names
        assert record["peer"] in names and record["peer_us"] == record["peers"][record["peer"]] == min(record["peers"].values())
    assert not [step for step, record in records.items() if "peer" in record and step not in STEPS]
    out = capsys.readouterr().out
    assert f"  {low} " in out and f"  {normal} " in out and "not timed" not in out


def test_a_peer_that_is_wrong_or_missing_is_one_line(one_rank_group, monkeypatch, tmp_path, capsys):
    class Wrong(FakeBuffer):
        def low_latency_combine(self, x, topk_idx, topk_weights, handle):
            return super().low_latency_combine(x, topk_idx, 2 * topk_weights, handle)

        def dispatch(self, *arguments, **options):
            raise RuntimeError("no such kernel\nmore")

    monkeypatch.setitem(sys.modules, "deep_ep", module("deep_ep", Buffer=Wrong))
    # None in sys.modules: an import fails
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    path = tmp_path / "records.jsonl"
    assert bench_ep.main([*OPTIONS, "--peers", "--output-json", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum("deep_gemm: can't be imported" in line for line in out) == 1
    assert sum("deep_ep 9.9 low-latency: not timed (ValueError: combine of dispatch is off by" in line for line in out) == 1
    assert "deep_ep 9.9 normal: not timed (RuntimeError: no such kernel)" in out
    assert not any("peer" in record for record in records_of(path).values())


def test_without_a_group_deep_ep_is_not_tried(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(sys.modules, "deep_ep", module("deep_ep"))
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    monkeypatch.setattr(bench_ep.Run, "run_case", lambda *arguments, **options: None)
    threads = torch.get_num_threads()
    try:
        assert bench_ep.main([*OPTIONS, "--peers"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "deep_ep: needs a process group; start the script with torchrun" in capsys.readouterr().out


def test_the_release_is_the_distributions_or_the_modules():
    assert peers.release(module("no_such_distribution")) == "9.9"
    # which may have a local part that the module has not, or the other way round
    assert peers.release(torch) == version("torch")
