"""The masked grouped GEMM of quantized operands on one GPU: python benchmarks/bench_grouped_gemm.py [--all-configs]

Letters: E experts, M rows of an expert's buffer, N columns, K_dim contraction, G = ceil(K_dim / 128), rows: the mean number of valid
rows of an expert; each expert's is drawn from 0.7 to 1.3 of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, Timing, gpu_samples, measure, progress
from benchmarks.peers import masked_product
from moequant import quantize_expert_batch, reference
from moequant.batch import QuantizedTensor
from moequant.formats import FORMATS
from moequant.gemm import grouped_gemm_blockscale
from moequant.models import MODELS
from moequant.ops import gemm_kernel
from moequant.testing import relative_error

# the peer, where it is installed
deep_gemm: Any = importlib.import_module("deep_gemm") if importlib.util.find_spec("deep_gemm") else None

ROWS = (1, 16, 64, 128, 256, 1024)
# (E, N, K_dim): mean rows. DeepSeek-V3 over 8 ranks, w13 and w2; Qwen3-235B, w13 and w2.
CASES = {(32, 4096, 7168): ROWS, (32, 7168, 2048): ROWS, (16, 3072, 4096): ROWS[1:], (16, 4096, 1536): ROWS[1:]}
CPU_CASES = {(4, 256, 320): (8, 32)}
# DeepGEMM's own tests of the masked product
DEEPGEMM_CASES = {
    (groups, n, k): rows
    for groups, rows in ((32, (20, 192)), (6, (20, 1024)))
    for n, k in ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
}


def model_cases() -> dict[tuple[int, int, int], tuple[int, ...]]:
    """Both products of every model, with the experts that one rank of 8 holds."""
    shapes = [(max(1, m.num_experts // 8), m.hidden_size, m.intermediate_size) for m in MODELS.values()]
    products = [(e, n, k) for e, h, i in shapes for n, k in ((2 * i, h), (h, i))]
    return {product: tuple(2**power for power in range(13)) for product in products}


CASE_LISTS = {"table": lambda: CASES, "deepgemm": lambda: DEEPGEMM_CASES, "models": model_cases}
# bfloat16 rounding alone is 1.66e-3
TOLERANCE = 1.75e-3
PEER = "deep_gemm"

Operand = QuantizedTensor | Tensor


@dataclass(frozen=True)
class Problem:
    """The operands of one case."""

    a: Operand
    b: Operand
    num_tokens: Tensor
    rows: int
    quant: str
    counts: str | None = None

    @property
    def case(self) -> dict[str, Any]:
        experts, columns, depth = self.b.shape
        case = {"E": experts, "N": columns, "K_dim": depth, "rows": self.rows, "quant": self.quant}
        return case if self.counts is None else {**case, "counts": self.counts}

    @property
    def dtype(self) -> torch.dtype:
        return self.a.values.dtype if isinstance(self.a, QuantizedTensor) else self.a.dtype

    def output(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        shape = (self.a.shape[0], self.a.shape[1], self.b.shape[1])
        return torch.full(shape, torch.nan, dtype=dtype, device=self.a.device)

    def work(self) -> tuple[int, int]:
        """Bytes that must be moved, for a bfloat16 output, and operations."""
        experts, columns, depth = self.b.shape
        valid = int(self.num_tokens.sum())
        size = self.dtype.itemsize
        nbytes = experts * columns * depth * size + valid * (depth * size + 2 * columns)
        if isinstance(self.a, QuantizedTensor) and isinstance(self.b, QuantizedTensor):
            nbytes += 4 * (valid * self.a.scales.shape[2] + self.b.scales.numel())
        return nbytes, 2 * valid * columns * depth


def weights(experts: int, columns: int, depth: int, quant: str, device: str) -> Operand:
    """Random (E, N, K_dim), quantized one expert at a time to spare memory."""
    if quant == "none":
        return torch.randn(experts, columns, depth, dtype=torch.bfloat16, device=device)
    dtype = FORMATS[quant].dtype
    parts = [reference.quantize_weight(torch.randn(1, columns, depth, device=device), dtype=dtype) for _ in range(experts)]
    values = torch.cat([part.values.view(torch.int8) for part in parts]).view(dtype)
    return QuantizedTensor(values, torch.cat([part.scales for part in parts]), "block")


def problem(b: Operand, rows: int, quant: str) -> Problem:
    """Random activations and counts for b."""
    experts, _, depth = b.shape
    x = torch.randn(experts, max(128, 2 * rows), depth, dtype=torch.bfloat16, device=b.device)
    low, high = max(1, int(0.7 * rows)), int(1.3 * rows)
    num_tokens = torch.randint(low, high + 1, (experts,), dtype=torch.int32, device=b.device)
    a = x if quant == "none" else quantize_expert_batch(x, dtype=FORMATS[quant].dtype)
    return Problem(a, b, num_tokens, rows, quant)


def hot_problem(b: Operand, rows: int, quant: str) -> Problem:
    """One expert with half of all rows, and the others with equal parts of the rest, in whole tiles of 128 rows."""
    p = problem(b, rows * b.shape[0] // 2, quant)
    p.num_tokens.fill_(rows // 2)
    p.num_tokens[b.shape[0] // 3] = rows * b.shape[0] // 2
    return replace(p, rows=rows, counts="half on one")


def check(p: Problem, out: Tensor) -> float:
    """The relative error of the expert with the most rows. Raises AssertionError if it is too large, or a row past it was written."""
    expert = int(p.num_tokens.argmax())
    count = int(p.num_tokens[expert])
    expected = reference.operand_rows(p.a, (expert, slice(count))) @ reference.operand_rows(p.b, (expert,)).T
    error = relative_error(out[expert, :count], expected)
    if not error <= TOLERANCE:
        raise AssertionError(f"{p.case}: relative error {error:.2e}, more than {TOLERANCE}")
    if not out[expert, count:].isnan().all():
        raise AssertionError(f"{p.case}: rows past num_tokens were written")
    return error


def peer_call(p: Problem) -> Callable[[], Any] | None:
    """DeepGEMM's masked product of the same operands, checked, if it is installed and has this case."""
    if deep_gemm is None or not isinstance(p.a, QuantizedTensor) or not isinstance(p.b, QuantizedTensor):
        return None
    if p.dtype != torch.float8_e4m3fn:
        return None
    function = masked_product(deep_gemm)
    out = p.output()
    left, right = (p.a.values, p.a.scales), (p.b.values, p.b.scales)

    def call() -> None:
        function(left, right, out, p.num_tokens, p.rows, disable_ue8m0_cast=True)

    call()
    expert = int(p.num_tokens.argmax())
    count = int(p.num_tokens[expert])
    expected = grouped_gemm_blockscale(p.a, p.b, p.num_tokens, expected_rows=p.rows)
    error = relative_error(out[expert, :count], expected[expert, :count])
    if not error < 5e-3:
        raise AssertionError(f"{p.case}: deep_gemm is off from this project by {error:.2e}")
    return call


def plain_call(p: Problem) -> Callable[[], Any] | None:
    """The plain Triton kernel on the same operands, where another one is chosen."""
    from moequant.kernels.gemm.grouped_gemm import grouped_gemm_blockscale as plain

    left = (p.a.values, p.a.scales) if isinstance(p.a, QuantizedTensor) else (p.a, None)
    right = (p.b.values, p.b.scales) if isinstance(p.b, QuantizedTensor) else (p.b, None)
    out = p.output()
    if gemm_kernel(*left, *right, out, 1, p.rows) is plain:
        return None
    return lambda: plain(*left, *right, p.num_tokens, None, out, expected_rows=p.rows)


def interleaved(*calls: Callable[[], Any], rounds: int = 5, reps: int = 10) -> list[Timing]:
    """Timings with a cold L2, turn about, so that all calls meet the same clocks and temperatures."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        gpu_samples(call, 3, flush_l2=True)
    for _ in range(rounds):
        for call, taken in zip(calls, samples, strict=True):
            taken += gpu_samples(call, reps, flush_l2=True)
    return [Timing.of(taken) for taken in samples]


def try_configs(p: Problem) -> None:
    """Checks and times every candidate configuration, prints them, fastest first."""
    from moequant.kernels.gemm.grouped_gemm import CANDIDATES, Config, grouped_gemm_blockscale as kernel

    left = (p.a.values, p.a.scales) if isinstance(p.a, QuantizedTensor) else (p.a, None)
    right = (p.b.values, p.b.scales) if isinstance(p.b, QuantizedTensor) else (p.b, None)
    out = p.output()

    def call(config: Config) -> Callable[[], None]:
        return lambda: kernel(*left, *right, p.num_tokens, None, out, config=config)

    working = []
    for config in CANDIDATES:
        out.fill_(torch.nan)
        try:
            call(config)()
            check(p, out)
            working.append(config)
        # a candidate that doesn't fit this GPU, or is wrong on it, must not end the sweep
        except Exception as error:
            print(f"    {config}: {type(error).__name__}: {str(error)[:200]}")
    timed = zip(working, interleaved(*(call(config) for config in working)), strict=True)
    flops = p.work()[1]
    for config, timing in sorted(timed, key=lambda pair: pair[1].us):
        print(f"    {timing.us:9.1f} us {flops / timing.us / 1e6:7.1f} TFLOP/s  {tuple(config)}", flush=True)


def run_case(bench: Bench, p: Problem, all_configs: bool) -> None:
    """Checks, times and records one case."""
    out, wide = p.output(), p.output(torch.float32)

    def call(out: Tensor = out) -> None:
        grouped_gemm_blockscale(p.a, p.b, p.num_tokens, out=out, expected_rows=p.rows)

    call()
    call(wide)
    error, wide_error = check(p, out), check(p, wide)
    del wide
    extra: dict[str, Any] = {"relative_error": float(f"{error:.3e}"), "relative_error_fp32_output": float(f"{wide_error:.3e}")}
    if bench.device == "cpu":
        timing = measure(call, device="cpu")
    else:
        others = {"plain_us": plain_call(p), "peer_us": peer_call(p)}
        present = {name: other for name, other in others.items() if other is not None}
        timing, *timings = interleaved(call, *present.values())
        extra |= {name: float(f"{other.us:.5g}") for name, other in zip(present, timings, strict=True)}
        if "peer_us" in extra:
            extra["peer"] = f"{PEER} {getattr(deep_gemm, '__version__', '')}".strip()
    nbytes, flops = p.work()
    bench.record(
        "grouped_gemm",
        p.case,
        timing,
        floor_us=bench.floor_us(nbytes, flops, p.dtype),
        gbps=nbytes / timing.us / 1e3,
        tflops=flops / timing.us / 1e6,
        **extra,
    )
    beside = "".join(
        f", {name.removesuffix('_us')} {extra[name] / timing.us:.3f}x" for name in ("plain_us", "peer_us") if name in extra
    )
    print(f"    relative error {error:.2e}, with float32 output {wide_error:.2e}{beside}", flush=True)
    if all_configs:
        try_configs(p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    parser.add_argument("--quant", choices=("none", *FORMATS), default="fp8_e4m3fn", help="format of the operands")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("E", "N", "K_dim"), help="this one instead of the table's")
    parser.add_argument("--rows", type=int, nargs="+", help="these mean rows instead of the table's")
    parser.add_argument("--list", choices=CASE_LISTS, default="table", help="which shapes (default: table)")
    parser.add_argument("--hot", action="store_true", help="also one expert with half of all rows, at 256 mean rows")
    parser.add_argument("--all-configs", action="store_true", help="also time every candidate configuration (GPU)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json, device=arguments.device)
    cases = CASE_LISTS[arguments.list]() if bench.device == "cuda" else CPU_CASES
    if arguments.shape:
        cases = {tuple(arguments.shape): ROWS}
    for (experts, columns, depth), table_rows in cases.items():
        b = weights(experts, columns, depth, arguments.quant, bench.device)
        for rows in arguments.rows or table_rows:
            progress(f"grouped_gemm E={experts} N={columns} K_dim={depth} rows={rows}")
            run_case(bench, problem(b, rows, arguments.quant), arguments.all_configs and bench.device == "cuda")
        if arguments.hot:
            run_case(bench, hot_problem(b, 256, arguments.quant), False)


if __name__ == "__main__":
    main()
