"""Quantization and the dense fp8 product of one projection, on one GPU: python benchmarks/bench_mm_fp8.py

Letters: M rows (in a case: rows), N columns, K_dim contraction, G = ceil(K_dim / 128). A case with step "product" is the product alone;
one with "quantize + product" starts from bfloat16 activations.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_grouped_gemm import interleaved
from benchmarks.common import Bench, OneLineParser, Timing, measure, progress
from moequant import grouped_gemm_blockscale, quantize_expert_batch, reference
from moequant.batch import QuantizedTensor, ceil_div
from moequant.gemm import mm_fp8_blockscale
from moequant.testing import relative_error

# the peer, where it is installed
deep_gemm: Any = importlib.import_module("deep_gemm") if importlib.util.find_spec("deep_gemm") else None

# (N, K_dim): DeepSeek-V3's attention and expert projections, then the experts' of V4-Flash and V4-Pro
SHAPES = (
    *((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)),
    *((4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072)),
)
ROWS = (1, 128, 4096)
CPU_SHAPES, CPU_ROWS = ((320, 384),), (1, 20)
# bfloat16 rounding alone is 1.66e-3
TOLERANCE = 1.75e-3


def aligned_scales(rows: int, groups: int, device: str) -> Tensor:
    """Uninitialised scales (1, M, G), groups a multiple of 4 rows apart: what TMA reads, the peer's too."""
    return torch.empty(1, groups, ceil_div(rows, 4) * 4, device=device)[:, :, :rows].transpose(1, 2)


def peer_product(a: QuantizedTensor, b: QuantizedTensor, out: Tensor) -> Callable[[], None] | None:
    """DeepGEMM's dense product of the same operands into out, checked, if it is installed."""
    if deep_gemm is None:
        return None

    def call() -> None:
        deep_gemm.fp8_gemm_nt((a.values, a.scales), (b.values, b.scales), out, disable_ue8m0_cast=True)

    call()
    error = relative_error(out, mm_fp8_blockscale(a, None, b))
    if not error < 5e-3:
        raise AssertionError(f"deep_gemm is off from this project by {error:.2e}")
    return call


def run_case(bench: Bench, x: Tensor, b: QuantizedTensor) -> None:
    """Checks, times and records one case. x: (M, K_dim) bfloat16."""
    (rows, depth), columns = x.shape, b.shape[0]
    groups = ceil_div(depth, 128)
    values = torch.empty(1, rows, depth, dtype=torch.float8_e4m3fn, device=x.device)
    scales = aligned_scales(rows, groups, bench.device)
    a = QuantizedTensor(values[0], scales[0], "tma_aligned")
    row_a = QuantizedTensor(a.values, torch.empty(rows, groups, device=x.device), "row")
    grouped_a = QuantizedTensor(values, scales, "transposed")
    grouped_b = QuantizedTensor(b.values.unsqueeze(0), b.scales.unsqueeze(0), "block")
    out, peer_out = (torch.empty(1, rows, columns, dtype=torch.bfloat16, device=x.device) for _ in range(2))

    def quantize() -> None:
        quantize_expert_batch(x.unsqueeze(0), values=values, scales=scales)

    def product() -> None:
        mm_fp8_blockscale(a, None, b)

    quantize()
    row_a.scales.copy_(a.scales)
    got = mm_fp8_blockscale(a, None, b)
    expected = reference.mm_fp8_blockscale(a.values, a.scales, b.values, b.scales, torch.float32)
    error = relative_error(got, expected)
    if not error <= TOLERANCE:
        raise AssertionError(f"rows={rows} N={columns} K_dim={depth}: relative error {error:.2e}, more than {TOLERANCE}")
    if relative_error(mm_fp8_blockscale(row_a, None, b), got) > TOLERANCE:
        raise AssertionError(f"rows={rows} N={columns} K_dim={depth}: row scales give another product")
    del expected, got
    peer = peer_product(a, b, peer_out[0]) if bench.device == "cuda" else None
    calls = {
        "": product,
        "row_scales_us": lambda: mm_fp8_blockscale(row_a, None, b),
        "grouped_us": lambda: grouped_gemm_blockscale(grouped_a, grouped_b, out=out),
    }
    steps = {"": lambda: (quantize(), product())}
    if peer is not None:
        calls["peer_us"] = peer
        steps["peer_us"] = lambda: (quantize(), peer())
    nbytes = columns * depth + rows * (depth + 2 * columns) + 4 * (rows * groups + b.scales.numel())
    flops = 2 * rows * columns * depth
    floor = bench.floor_us(nbytes, flops, torch.float8_e4m3fn)
    quantize_floor = bench.floor_us(rows * (3 * depth + 4 * groups))
    for step, timed, least in (("product", calls, floor), ("quantize + product", steps, floor + quantize_floor)):
        timings = time_all(bench, list(timed.values()))
        extra: dict[str, Any] = {"relative_error": float(f"{error:.3e}")}
        extra |= {name: float(f"{timing.us:.5g}") for name, timing in zip(timed, timings, strict=True) if name}
        if "peer_us" in extra:
            extra["peer"] = f"deep_gemm {getattr(deep_gemm, '__version__', '')}".strip()
        case = {"rows": rows, "N": columns, "K_dim": depth, "quant": "fp8_e4m3fn", "step": step}
        timing = timings[0]
        rates = {"gbps": nbytes / timing.us / 1e3, "tflops": flops / timing.us / 1e6}
        bench.record("mm_fp8_blockscale", case, timing, floor_us=least, **rates, **extra)
        beside = ", ".join(f"{name} {extra[name] / timing.us:.3f}x" for name in timed if name)
        if beside:
            print(f"    {beside}", flush=True)


def time_all(bench: Bench, calls: list[Callable[[], Any]]) -> list[Timing]:
    """Timings turn about on a GPU, one after the other on a CPU."""
    if bench.device == "cuda":
        return interleaved(*calls)
    return [measure(call, device="cpu", min_reps=3) for call in calls]


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("N", "K_dim"), help="this one instead of the table's")
    parser.add_argument("--rows", type=int, nargs="+", help="these instead of 1, 128 and 4096")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json, device=arguments.device)
    shapes, table_rows = (SHAPES, ROWS) if bench.device == "cuda" else (CPU_SHAPES, CPU_ROWS)
    for columns, depth in [tuple(arguments.shape)] if arguments.shape else shapes:
        b = reference.quantize_weight(torch.randn(columns, depth, device=bench.device))
        for rows in arguments.rows or table_rows:
            progress(f"mm_fp8_blockscale rows={rows} N={columns} K_dim={depth}")
            run_case(bench, torch.randn(rows, depth, dtype=torch.bfloat16, device=bench.device), b)


if __name__ == "__main__":
    main()
