"""Times GEMM 1 with SwiGLU and quantization inside on a Hopper GPU, beside what it replaces.

Letters as in bench_grouped_gemm.py; I is the intermediate size and H the hidden size.

Each record has the time of GEMM 1 alone (`gemm1_us`), of GEMM 1 followed by silu_mul_quantize (`unfused_us`), and, where deep_gemm can be
imported, of DeepGEMM's product followed by the same silu_mul_quantize (`peer_us`). All are timed turn about with a cold L2. The output
is first compared, bit for bit, with the unfused kernels'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_grouped_gemm import Problem, deep_gemm, interleaved, problem, weights
from benchmarks.common import Bench, OneLineParser
from moequant.batch import QuantizedTensor, empty_transposed_scales
from moequant.formats import FORMATS, RECIPES
from moequant.kernels.gemm.gemm1_swiglu_hopper import gemm1_swiglu_hopper, supports_gemm1_swiglu
from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper
from moequant.kernels.quantization.silu_mul_quantize import silu_mul_quantize
from moequant.ops import quant_spec

QUANT = "fp8_e4m3fn"
# (E, I, H): DeepSeek-V3 on 8 GPUs, Qwen3-235B and Qwen3-30B on 8 and 4
CASES = ((32, 2048, 7168), (16, 1536, 4096), (32, 768, 2048))
ROWS = (1, 16, 64, 128, 256, 1024)
RECIPE = RECIPES["default"]
ARITHMETIC: dict[str, Any] = {
    "max_value": FORMATS[QUANT].max,
    "eps": RECIPE.eps,
    "power_of_two": RECIPE.power_of_two,
    "reciprocal": RECIPE.reciprocal,
}
SPEC = quant_spec(FORMATS[QUANT].dtype, RECIPE.name)


def outputs(p: Problem) -> tuple[Tensor, Tensor]:
    """Values and scales, full of what no kernel writes."""
    experts, rows, _ = p.a.shape
    inner = p.b.shape[1] // 2
    values = torch.full((experts, rows, inner), 0x55, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = empty_transposed_scales(experts, rows, inner // 128, "cuda")
    scales.fill_(torch.nan)
    return values, scales


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8 if x.element_size() == 1 else torch.int32)


def calls(p: Problem, a: QuantizedTensor, b: QuantizedTensor) -> dict[str, Callable[[], None]]:
    """What is timed, by name. Checks that the fused kernel gives the unfused ones' bits."""
    gate_up = p.output()
    left, right = (a.values, a.scales), (b.values, b.scales)
    out, expected = outputs(p), outputs(p)

    def fused(target: tuple[Tensor, Tensor] = out) -> None:
        gemm1_swiglu_hopper(*left, *right, p.num_tokens, None, *target, **ARITHMETIC)

    def gemm1() -> None:
        grouped_gemm_blockscale_hopper(*left, *right, p.num_tokens, None, gate_up, segments=2, expected_rows=p.rows)

    def unfused(target: tuple[Tensor, Tensor] = expected) -> None:
        gemm1()
        silu_mul_quantize(gate_up, p.num_tokens, None, *target, SPEC)

    assert supports_gemm1_swiglu(*left, *right, *out), p.case
    fused()
    unfused()
    for name, x, y in zip(("values", "scales"), out, expected, strict=True):
        if not torch.equal(bits(x), bits(y)):
            raise AssertionError(f"{p.case}: {name} differ from the unfused kernels'")
    timed: dict[str, Callable[[], None]] = {"fused": fused, "gemm1": gemm1, "unfused": unfused}
    if deep_gemm is not None:
        product = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_masked", None) or deep_gemm.fp8_m_grouped_gemm_nt_masked

        def peer(target: tuple[Tensor, Tensor] = expected) -> None:
            product(left, right, gate_up, p.num_tokens, p.rows)
            silu_mul_quantize(gate_up, p.num_tokens, None, *target, SPEC)

        timed["peer"] = peer
    return timed


def peer_name() -> str:
    try:
        number = version("deep_gemm")
    except PackageNotFoundError:
        number = getattr(deep_gemm, "__version__", "")
    return f"deep_gemm {number} + silu_mul_quantize"


def run_case(bench: Bench, p: Problem, rounds: int) -> None:
    """Checks, times and records one case."""
    assert isinstance(p.a, QuantizedTensor) and isinstance(p.b, QuantizedTensor)
    timed = calls(p, p.a, p.b)
    timings = dict(zip(timed, interleaved(*timed.values(), rounds=rounds), strict=True))
    experts, columns, hidden = p.b.shape
    inner = columns // 2
    valid = int(p.num_tokens.sum())
    nbytes = p.b.values.numel() + 4 * p.b.scales.numel() + valid * (hidden + inner + 4 * (p.a.scales.shape[2] + inner // 128))
    flops = 2 * valid * columns * hidden
    case = {"E": experts, "I": inner, "H": hidden, "rows": p.rows, "quant": QUANT}
    us = {name: float(f"{timing.us:.5g}") for name, timing in timings.items()}
    extra: dict[str, Any] = {"gemm1_us": us["gemm1"], "unfused_us": us["unfused"]}
    if "peer" in us:
        extra |= {"peer": peer_name(), "peer_us": us["peer"]}
    bench.record(
        "gemm1_fused",
        case,
        timings["fused"],
        floor_us=bench.floor_us(nbytes, flops, p.dtype),
        gbps=nbytes / timings["fused"].us / 1e3,
        tflops=flops / timings["fused"].us / 1e6,
        **extra,
    )
    print(f"    GEMM 1 alone {us['gemm1']} us, followed by silu_mul_quantize {us['unfused']} us", flush=True)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("E", "I", "H"), help="this one instead of the table's")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="these mean rows instead of the table's")
    parser.add_argument("--rounds", type=int, default=5, help="times 10 calls of each kind, turn about (default: 5)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("needs a Hopper GPU")
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json)
    for experts, inner, hidden in [arguments.shape] if arguments.shape else CASES:
        b = weights(experts, 2 * inner, hidden, QUANT, "cuda")
        for rows in arguments.rows:
            run_case(bench, problem(b, rows, QUANT), arguments.rounds)
        del b
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
