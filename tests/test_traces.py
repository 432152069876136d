"""Recorded routing: files, replay in document order, and refusal of other shapes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ep_options, traces
from benchmarks.traces import TraceError, load_trace, skew
from moequant.testing import assert_bit_equal
from moequant.testing.recording import read_safetensors, write_safetensors


def write(
    folder, name: str, experts: int, top_k: int, tokens: int = 10, layers: tuple[int, ...] = (1, 3, 5)
) -> dict[str, torch.Tensor]:
    ids = torch.rand(len(layers), tokens, experts).argsort(2)[..., :top_k]
    tensors = {
        "ids": ids.to(torch.uint8 if experts <= 256 else torch.int16),
        "weights": torch.rand(len(layers), tokens, top_k).half(),
        "activations": torch.randn(len(layers), 4, 128).bfloat16(),
    }
    metadata = {"num_experts": str(experts), "intermediate_size": "64", "layers": json.dumps(layers)}
    write_safetensors(folder / f"{name}.safetensors", tensors, metadata)
    return tensors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two traces, in the place of the project's."""
    monkeypatch.setattr(traces, "FOLDER", tmp_path)
    write(tmp_path, "b-8x2", 8, 2)
    write(tmp_path, "a-16x4", 16, 4)
    return tmp_path


def test_files_are_those_of_the_safetensors_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    written = write(tmp_path, "one", 300, 2)
    theirs = safetensors.load_file(tmp_path / "one.safetensors")
    safetensors.save_file(written, tmp_path / "two.safetensors", {"layers": "[1]"})
    ours, metadata = read_safetensors(tmp_path / "two.safetensors")
    assert metadata == {"layers": "[1]"} and set(ours) == set(theirs) == set(written)
    for name, tensor in written.items():
        assert_bit_equal(theirs[name], tensor)
        assert_bit_equal(ours[name], tensor)


def test_tokens_come_in_document_order_and_begin_again(folder):
    stored, _ = read_safetensors(folder / "b-8x2.safetensors")
    trace = load_trace("b-8x2@5")
    assert (trace.name, trace.num_experts, trace.top_k, trace.hidden_size) == ("b-8x2@5", 8, 2, 128)
    ids, weights = trace.routing(8, 4)
    order = [8, 9, 0, 1]
    assert ids.dtype == torch.int32 and torch.equal(ids, stored["ids"][2][order].int())
    assert torch.equal(weights, stored["weights"][2][order].float())
    assert torch.equal(trace.hidden_states(3, 2), stored["activations"][2][[3, 0]])


def test_the_middle_layer_of_the_first_file_is_the_default(folder):
    assert load_trace().name == "a-16x4@3"
    assert load_trace(str(folder / "b-8x2.safetensors")).name == "b-8x2@3"


def test_what_is_not_there_is_named(folder):
    with pytest.raises(TraceError, match=r"no trace c; in .*: a-16x4, b-8x2"):
        load_trace("c")
    with pytest.raises(TraceError, match="has no layer 2"):
        load_trace("b-8x2@2")
    (folder / "c.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(TraceError, match="is not a trace"):
        load_trace("c")


def options(*arguments: str, ranks: int = 2):
    return ep_options.parse_options(["--device", "cpu", "--num-tokens", "4", *arguments], ranks)


def test_a_cpu_runs_the_recorded_model_by_default(folder):
    chosen = options()
    assert (chosen.model, chosen.routing, chosen.num_experts, chosen.num_topk) == ("trace", "trace:a-16x4@3", 16, 4)
    assert (chosen.hidden, chosen.intermediate) == (128, 64)
    # sizes that are given, or ranks that don't divide the experts, mean another model
    assert options("--hidden", "256").model is None
    assert options(ranks=3).model is None


def test_a_file_may_lie_anywhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, "c", 6, 2)
    spec = f"trace:{elsewhere / 'c.safetensors'}@5"
    assert options("--model", "trace", "--routing", spec).routing == "trace:c@5"
    assert options("--num-experts", "6", "--num-topk", "2", "--routing", spec).routing == "trace:c@5"


def test_a_trace_of_as_many_experts_is_the_default_routing(folder):
    assert options("--num-experts", "8", "--num-topk", "2").routing == "trace:b-8x2@3"
    assert options("--num-experts", "8", "--num-topk", "4").routing == "uniform"
    assert options("--num-experts", "8", "--num-topk", "2", "--routing", "uniform").recorded is None
    assert options("--num-experts", "8", "--num-topk", "2", "--routing", "trace").routing == "trace:b-8x2@3"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--num-experts", "8", "--num-topk", "2", "--routing", "trace:a-16x4"),
            "never mapped: give --num-experts 16 --num-topk 4",
        ),
        (
            ("--num-experts", "16", "--num-topk", "2", "--routing", "trace:a-16x4"),
            "has 16 experts and top-4, the layer 16 and top-2",
        ),
        (("--num-experts", "8", "--num-topk", "4", "--routing", "trace:a-16x4"), "has 16 experts and top-4, the layer 8 and top-4"),
        (("--model", "trace", "--num-experts", "8"), "never mapped"),
        (("--model", "trace", "--routing", "uniform"), "replays its own routing"),
        (("--model", "trace", "--hidden", "256"), "hidden size 128, got --hidden 256"),
        (("--routing", "trace:nowhere"), "no trace nowhere"),
    ],
)
def test_another_shape_is_refused(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as info:
        options(*arguments)
    assert info.value.code == 2 and message in capsys.readouterr().err


def test_without_traces_everything_is_as_before(folder, capsys):
    for path in folder.glob("*"):
        path.unlink()
    folder.rmdir()
    chosen = options()
    assert (chosen.model, chosen.routing, chosen.recorded) == (None, "uniform", None)
    with pytest.raises(SystemExit):
        options("--model", "trace")
    assert "record_trace.py makes some" in capsys.readouterr().err


def test_skew_of_uniform_and_of_power_law_loads():
    even = skew(torch.arange(64).repeat(100).view(-1, 4), 64)
    assert even == {"max_over_mean": 1.0, "zipf": pytest.approx(0.0, abs=1e-9), "unused": 0.0}
    loads = (10000.0 / torch.arange(1, 33)).round().long()
    steep = skew(torch.repeat_interleave(torch.arange(32), loads)[:, None], 40)
    assert steep["zipf"] == pytest.approx(1.0, abs=0.01) and steep["unused"] == 8
