"""The fuzz runs anywhere, and what is wrong does not go unsaid. On GPUs it is run by hand, for minutes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fuzz_activations
import fuzz_gpu
import fuzz_operations
from guarded import GUARD_BYTES, Guarded, GuardTouchedError
from moequant import Activation

SCRIPT = Path(__file__).parent / "fuzz_gpu.py"


def test_a_few_settings_are_drawn_and_recorded(tmp_path):
    out = tmp_path / "fuzz.json"
    command = [sys.executable, str(SCRIPT), "--seconds", "5", "--workers", "1", "--seed", "2", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(out.read_text())
    assert record["settings"] >= 1
    assert (record["wrong"], record["guards_touched"], record["failures"]) == (0, 0, [])
    assert sum(record["by_family"].values()) == record["settings"]
    # those that were not drawn have none
    families = {*fuzz_gpu.ON_ONE, "local"} | ({*fuzz_gpu.ON_A_GPU} if torch.cuda.is_available() else set())
    assert set(record["by_family"]) <= families and len(record["by_family"]) == len(families) - 1
    assert all(draw.partition(": ")[0] in record["by_family"] for draw in record["by_draw"])
    assert record["torch"] == torch.__version__ and record["seed"] == 2


def failing(damage: Callable[[torch.Tensor], object]) -> tuple[str | None, bool]:
    """How a quantizer's setting ends whose operation does some damage besides."""
    family = fuzz_operations.Quantizers(random.Random(0), fuzz_operations.Place("cpu", True))
    family.group = 128
    before = fuzz_operations.ops.quantize_expert_batch

    def broken(x, num_tokens, starts, values, scales, *settings):
        before(x, num_tokens, starts, values, scales, *settings)
        damage(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_operations.ops, "quantize_expert_batch", broken)
        patch.setattr(fuzz_operations, "draw_counts", lambda rng, experts, rows: [rows] * experts)
        _, error, guards = fuzz_gpu.attempt(family.check, random.Random(1))
    return error, guards


def test_a_store_past_the_end_and_a_wrong_bit_are_told_apart():
    def past(values):
        whole = torch.empty(0, dtype=torch.uint8).set_(values.untyped_storage())
        whole[values.storage_offset() + values.numel() + 7] = 0

    def wrong(values):
        values.view(torch.uint8).view(-1)[3] ^= 1

    assert failing(lambda values: None) == (None, False)
    error, guards = failing(past)
    assert error is not None and "1 bytes behind values" in error and guards
    error, guards = failing(wrong)
    assert error is not None and "values differ in 1 of" in error and not guards


@pytest.mark.parametrize(
    ("operation", "limit"), [("silu_mul", 0), ("silu_mul_quantize", 0), ("add_bias", 0), ("silu_mul", 1), ("silu_mul_quantize", 1)]
)
def test_another_limit_and_another_bias_are_wrong(operation, limit, monkeypatch):
    family = fuzz_activations.Activated(random.Random(0), fuzz_operations.Place("cpu", True))
    family.activation, family.bias, family.columns = Activation(limit=1.5, alpha=1.702), torch.float32, 130
    monkeypatch.setattr(fuzz_activations, "draw_counts", lambda rng, experts, rows: [rows] * experts)
    assert fuzz_gpu.attempt(family.check, random.Random(1))[1] is None
    before, plain = getattr(fuzz_activations.ops, operation), Activation(limit=1.6 if limit else 1.5, alpha=1.702).text

    def other(*arguments):
        *given, bias = arguments
        before(
            *(plain if isinstance(part, str) and part == family.activation.text else part for part in given),
            bias if limit else 1.01 * bias,
        )

    monkeypatch.setattr(fuzz_activations.ops, operation, other)
    _, error, guards = fuzz_gpu.attempt(family.check, random.Random(1))
    assert error is not None and not guards


@pytest.mark.parametrize("offset", [-GUARD_BYTES, -1, 24, GUARD_BYTES + 23])
def test_guards_are_whole_or_an_error(offset):
    buffer = Guarded(3, 4, dtype=torch.bfloat16)
    buffer.assert_only()
    buffer.memory[buffer.begin + offset] ^= 1
    with pytest.raises(GuardTouchedError, match="1 bytes (before|behind) a buffer"):
        buffer.assert_only()


def test_an_element_outside_the_mask_is_an_error():
    buffer, written = Guarded(3, 4, dtype=torch.bfloat16, skew=1), torch.zeros(3, 4, dtype=torch.bool)
    written[1] = True
    buffer.tensor[1] = 0.0
    buffer.assert_only(written)
    buffer.tensor[2, 3] = 0.0
    with pytest.raises(GuardTouchedError, match=r"1 elements .* from \[\[2, 3\]\] on"):
        buffer.assert_only(written)


def test_the_report_says_what_failed_and_how_to_run_it_again(capsys):
    options = fuzz_gpu.parse(["--ranks", "2"])
    fine = {"seed": 40, "name": "symmetric", "done": True, "error": None, "guards": False}
    bad = {**fine, "seed": 41, "error": "Traceback\nValueError: no", "guards": True}
    assert fuzz_gpu.report(options, [fine], 0, 1.0) == 0
    # a worker that said nothing at all, or ended in a setting
    assert fuzz_gpu.report(options, [fine], 1, 1.0) == 1
    assert fuzz_gpu.report(options, [], 0, 1.0) == 1
    assert fuzz_gpu.report(options, [fine, {"seed": 42, "name": "symmetric"}], 0, 1.0) == 1
    capsys.readouterr()
    assert fuzz_gpu.report(options, [fine, bad], 0, 1.0) == 1
    said = capsys.readouterr().out
    assert "seed 41 (symmetric): ValueError: no" in said and "--only 41 --ranks 2" in said and "guards touched: 1" in said


def test_workers_that_end_between_settings_are_counted(tmp_path, monkeypatch, capsys):
    def start(self, first):
        self.first = first
        log = '{"seed": 40, "name": "local", "done": true, "error": null, "guards": false}'
        command = f"open({str(self.folder / f'log-{self.number}-0')!r}, 'a').write({log!r}); raise SystemExit(5)"
        self.processes = [subprocess.Popen([sys.executable, "-c", command])]

    monkeypatch.setattr(fuzz_gpu.Worker, "start", start)
    out = tmp_path / "fuzz.jsonl"
    options = fuzz_gpu.parse(["--seconds", "0", "--workers", "1", "--out", str(out)])
    assert fuzz_gpu.run(options) == 1
    assert "1 workers ended by an error of their own" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert (record["settings"], record["wrong"], record["workers_lost"]) == (1, 0, 1)
