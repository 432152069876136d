"""Quantization, and SwiGLU + quantization, of expert batches on one GPU: python benchmarks/bench_quantize.py

Letters: E experts, T rows of an expert's buffer, H columns, I columns of the SwiGLU's result, G = ceil(columns / 128), rows: valid
rows of every expert.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, OneLineParser, measure, progress
from moequant import quantization, reference
from moequant.batch import QuantizedTensor, ceil_div, empty_transposed_scales
from moequant.formats import FORMATS
from moequant.testing import assert_bit_equal, relative_error

# op, E, T, H or I, rows, format
CASES = [
    *[("quantize", 32, 1024, 7168, rows, "fp8_e4m3fn") for rows in (1024, 128, 32)],
    *[("quantize", 32, 1024, 2880, rows, "fp8_e4m3fn") for rows in (1024, 128)],
    ("quantize", 32, 1024, 7168, 1024, "int8"),
    *[("silu_mul_quantize", 32, 1024, 2048, rows, "fp8_e4m3fn") for rows in (1024, 128, 32)],
    *[("silu_mul_quantize", 32, 1024, 2880, rows, "fp8_e4m3fn") for rows in (1024, 128)],
]
CPU_CASES = [
    ("quantize", 4, 32, 512, 32, "fp8_e4m3fn"),
    ("quantize", 4, 32, 320, 8, "int8"),
    ("silu_mul_quantize", 4, 32, 256, 16, "fp8_e4m3fn"),
]
# The exponential of a GPU may differ from that of a CPU in its last bits, which moves single values by one step.
SILU_TOLERANCE = 2e-3


def check(op: str, x: torch.Tensor, num_tokens: torch.Tensor, got: QuantizedTensor) -> None:
    """Raises AssertionError unless the first expert's first rows are what the reference makes of them on a CPU.

    x: (E, T, H or 2I). num_tokens: (E,) int32.
    """
    rows = min(64, int(num_tokens[0]))
    expected = getattr(reference, op)(x[:1, :rows].cpu(), dtype=got.values.dtype)
    actual = QuantizedTensor(got.values[:1, :rows].cpu(), got.scales[:1, :rows].cpu().contiguous(), "row")
    if op == "quantize_expert_batch":
        assert_bit_equal(actual.scales, expected.scales, "scales")
        assert_bit_equal(actual.values, expected.values, "values")
        return
    error = relative_error(reference.dequantize(actual), reference.dequantize(expected))
    if not error < SILU_TOLERANCE:
        raise AssertionError(f"silu_mul_quantize is off from the reference by {error:.2e}, more than {SILU_TOLERANCE}")


def run_case(bench: Bench, op: str, experts: int, buffer_rows: int, columns: int, rows: int, quant: str) -> None:
    """Checks and times one case. columns: H, or I."""
    silu = op == "silu_mul_quantize"
    x = torch.randn(experts, buffer_rows, columns * 2 if silu else columns, dtype=torch.bfloat16, device=bench.device)
    num_tokens = torch.full((experts,), rows, dtype=torch.int32, device=bench.device)
    groups = ceil_div(columns, 128)
    outputs = {
        "values": torch.empty(experts, buffer_rows, columns, dtype=FORMATS[quant].dtype, device=bench.device),
        "scales": empty_transposed_scales(experts, buffer_rows, groups, bench.device),
    }
    name = "silu_mul_quantize" if silu else "quantize_expert_batch"
    function = getattr(quantization, name)
    got = function(x, num_tokens, dtype=FORMATS[quant].dtype, **outputs)
    check(name, x, num_tokens, got)
    timing = measure(lambda: function(x, num_tokens, dtype=FORMATS[quant].dtype, **outputs), device=bench.device)
    nbytes = experts * rows * (2 * x.shape[2] + columns + 4 * groups)
    case = {"E": experts, "T": buffer_rows, "I" if silu else "H": columns, "rows": rows, "quant": quant}
    bench.record(op, case, timing, floor_us=bench.floor_us(nbytes), gbps=nbytes / timing.us / 1e3)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json, device=arguments.device)
    for case in CASES if bench.device == "cuda" else CPU_CASES:
        progress(f"{case[0]} {case[1:]}")
        run_case(bench, *case)


if __name__ == "__main__":
    main()
