"""The recording script in a tiny form: text, vocabulary, experts' buffers, and a whole run on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import record_trace, traces
from benchmarks.record_trace import Experts, Sizes, encode, make_vocabulary, read_documents

SIZES = Sizes(hidden=16, intermediate=8, layers=2, context=16, batch=2, vocabulary=300)


def test_pieces_that_are_not_in_the_vocabulary_are_bytes():
    documents = ["if a:\n    return a\n", "é"]
    assert "".join(record_trace.PIECES.findall(documents[0])) == documents[0]
    vocabulary = make_vocabulary(documents * 3, 256 + 2)
    assert vocabulary == {" a": 256, ":": 257} or len(vocabulary) == 2
    tokens = encode(["é a"], {" a": 256})
    assert tokens.tolist() == [0xC3, 0xA9, 256]


def test_the_experts_buffers_give_the_dense_sum():
    experts = Experts(SIZES, 4)
    x, weights = torch.randn(6, 16), torch.rand(6, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    expected = torch.zeros_like(x)
    for token in range(6):
        for k in range(2):
            gate, up = (x[token] @ experts.w13[ids[token, k]]).chunk(2)
            expected[token] += weights[token, k] * ((F.silu(gate) * up) @ experts.w2[ids[token, k]])
    # room for 6 of 12 entries each: one expert may have 6
    torch.testing.assert_close(experts(x, ids, weights), expected, atol=1e-5, rtol=1e-4)


def test_rows_past_the_room_are_dropped_and_the_others_stay():
    experts = Experts(SIZES, 4)
    x = torch.randn(8, 16)
    ids = torch.zeros(8, 1, dtype=torch.long)
    out = experts(x, ids, torch.ones(8, 1))
    # room for 2 * 8 / 4
    assert out[:4].abs().sum(1).min() > 0 and not out[4:].any()
    assert experts.eval()(x, ids, torch.ones(8, 1)).abs().sum(1).min() > 0


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "text"
    for name in "abcdefghijklmnopqrstuvwxyz":
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"def {name}(x):\n    return x + {ord(name)}\n\n" * 8)
    (folder / "tests").mkdir()
    (folder / "tests" / "t.py").write_text("nothing")
    return folder


def test_some_files_are_held_out_and_tests_are_left_out(sources):
    documents, held_out = read_documents(sources)
    assert held_out and len(documents) + len(held_out) == 26


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tiny_run_writes_traces_that_are_replayed(device, sources, tmp_path, monkeypatch, capsys):
    output = tmp_path / "traces"
    sizes = ["--hidden", "16", "--intermediate", "8", "--layers", "4", "--context", "16", "--batch", "2", "--vocabulary", "300"]
    counts = ["--steps", "3", "--keep", "32", "--activations", "20", "--models", "8x2", "4x1"]
    record_trace.main([*sizes, *counts, "--text", str(sources), "--output", str(output), "--device", device])
    monkeypatch.setattr(traces, "FOLDER", output)
    assert [path.stem for path in traces.find_traces()] == ["lm-4x1", "lm-8x2"]
    trace = traces.load_trace("lm-8x2@3")
    assert (trace.num_experts, trace.top_k, trace.hidden_size, trace.intermediate_size) == (8, 2, 16, 8)
    assert trace.ids.shape == (32, 2) and trace.activations.shape == (20, 16)
    ids, weights = trace.routing(0, 32)
    assert (ids[:, 0] != ids[:, 1]).all() and int(ids.max()) < 8
    torch.testing.assert_close(weights.sum(1), torch.ones(32), atol=2e-3, rtol=0)
    readme = (output / "README.md").read_text()
    assert "| lm-8x2 | 3 | 8 | 2 | 16 | 32 | 20 |" in readme and "## lm-4x1" in readme and "| 3 | " in readme
    assert "lm-8x2.safetensors" in capsys.readouterr().out


def test_too_little_text_is_said(sources, tmp_path, capsys):
    with pytest.raises(SystemExit):
        record_trace.main(["--text", str(sources), "--context", "4096", "--output", str(tmp_path), "--device", "cpu"])
    assert "too few" in capsys.readouterr().err
