"""The int8 operations in blocks and the per-tensor fp8 ones, on one GPU: python benchmarks/bench_int8.py [--all-configs]

Letters: M rows (in a case: rows), H columns of what is quantized, N columns and K_dim contraction of a product. The large quantizers are
timed call by call with a cold L2, the small ones in a CUDA graph, since events take as long as their kernels. Products stand beside
torch's of the same type, which scale nothing (`torch._int_mm`) or by one number (`torch._scaled_mm`).
"""

from __future__ import annotations

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
from benchmarks.common import Bench, OneLineParser, Timing, measure, measure_graph, progress
from moequant import reference
from moequant.gemm import fp8_gemm, int8_addmm_quant, int8_gemm
from moequant.quantization import (
    act_dequant,
    act_quant,
    dequantize_fp8,
    int8_gelu,
    quantize_fp8,
    weight_dequant,
    weight_quant,
)
from moequant.testing import assert_bit_equal, relative_error

# (M, H) of what is quantized: 1 GiB of bfloat16, and the rows of decoding
SIZES = ((65536, 8192), *((rows, 7168) for rows in (1, 8, 64, 128, 256)))
CPU_SIZES = ((64, 320),)
# (M, N, K_dim)
PRODUCTS = ((4096, 4096, 4096), (128, 4096, 7168), (1, 4096, 7168), (4096, 7168, 2048))
CPU_PRODUCTS = ((40, 136, 264),)
CHECKED_ROWS = 64


def check_rows(x: Tensor, s: Tensor, expected: tuple[Tensor, Tensor], name: str, exact: bool = True) -> None:
    """Raises AssertionError unless the first rows of values and scales are the expected ones: within the design's tolerance if not
    exact."""
    rows = expected[0].shape[0]
    if exact:
        assert_bit_equal(x[:rows], expected[0], f"{name}'s values")
        assert_bit_equal(s[:rows], expected[1], f"{name}'s scales")
        return
    steps = int((x[:rows].int() - expected[0].int()).abs().max())
    ulps = int((s[:rows].view(torch.int32) - expected[1].view(torch.int32)).abs().max())
    if steps > 1 or ulps > 4:
        raise AssertionError(f"{name}: values {steps} steps and scales {ulps} units in the last place from the reference")


def quantizers(x: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name, calls that were checked, and the bytes that they have to move. x: (M, H) bfloat16."""
    count, scales = x.numel(), x.shape[0] * -(-x.shape[1] // 128) * 4
    head = x[:CHECKED_ROWS].cpu()
    values, s = act_quant(x)
    check_rows(values.cpu(), s.cpu(), reference.quantize_groups(head, 128, torch.int8, "default", None), "act_quant")
    gelu = int8_gelu(values, s)
    expected = reference.int8_gelu(values[:CHECKED_ROWS].cpu(), s[:CHECKED_ROWS].cpu())
    check_rows(gelu[0].cpu(), gelu[1].cpu(), expected, "int8_gelu", exact=False)
    weight, weight_s = weight_quant(x)
    back = {
        "act_dequant": (lambda: act_dequant(values, s, output_dtype=torch.bfloat16), 3 * count + scales),
        "weight_dequant": (lambda: weight_dequant(weight, weight_s, output_dtype=torch.bfloat16), 3 * count + weight_s.nbytes),
    }
    checked = {"act_dequant": (values, s[:CHECKED_ROWS], 1), "weight_dequant": (weight, weight_s[:1], 128)}
    for name, (q, q_s, group_rows) in checked.items():
        expected = reference.dequantize_blocks(q[:CHECKED_ROWS].cpu(), q_s.cpu(), group_rows, 128, torch.bfloat16)
        assert_bit_equal(back[name][0]()[:CHECKED_ROWS].cpu(), expected, name)
    codes, scale = quantize_fp8(x)
    if scale.item() != (torch.full((), 448.0) / x.abs().max().float().cpu()).item():
        raise AssertionError(f"quantize_fp8: scale {scale.item()} is not 448 / max(abs(x))")
    assert_bit_equal(codes[:CHECKED_ROWS], reference.quantize_fp8(head, scale.cpu(), codes.dtype)[0], "quantize_fp8's values")
    return {
        "act_quant": (lambda: act_quant(x), 3 * count + scales),
        **back,
        "int8_gelu": (lambda: int8_gelu(values, s), 2 * count + 2 * scales),
        # the maximum comes first: x is read twice
        "quantize_fp8": (lambda: quantize_fp8(x), 5 * count),
        "quantize_fp8, given scale": (lambda: quantize_fp8(x, scale), 3 * count),
        "quantize_fp8, offset": (lambda: quantize_fp8(x, scale, "uint8", "offset"), 3 * count),
        "dequantize_fp8": (lambda: dequantize_fp8(codes, scale, output_dtype=torch.bfloat16), 3 * count),
    }


def run_quantizers(bench: Bench, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=bench.device)
    for name, (call, nbytes) in quantizers(x).items():
        op, _, variant = name.partition(", ")
        case: dict[str, Any] = {"rows": rows, "H": columns} | ({"variant": variant} if variant else {})
        timing = (measure if x.nbytes > 2**28 else measure_graph)(call, device=bench.device)
        bench.record(op, case, timing, floor_us=bench.floor_us(nbytes), gbps=nbytes / timing.us / 1e3)


def run_product(bench: Bench, rows: int, columns: int, depth: int, all_configs: bool) -> None:
    """Checks, times and records the products of one shape."""
    a, a_s = act_quant(torch.randn(rows, depth, device=bench.device))
    b, b_s = weight_quant(torch.randn(columns, depth, device=bench.device))
    bias = torch.randn(columns, device=bench.device)
    expected = reference.int8_addmm(a, a_s, b, b_s)
    error = relative_error(int8_gemm(a, a_s, b, b_s, torch.float32), expected)
    if not error < 1e-6:
        raise AssertionError(f"int8_gemm: relative error {error:.2e}, more than 1e-6")
    wanted = reference.quantize_groups(expected[:CHECKED_ROWS] + bias, 128, torch.int8, "default", None)
    values, scales = int8_addmm_quant(a, a_s, b, b_s, bias)
    steps = int((values[:CHECKED_ROWS].int() - wanted[0].int()).abs().max())
    if steps > 1 or relative_error(scales[:CHECKED_ROWS], wanted[1]) > 1e-6:
        raise AssertionError(f"int8_addmm_quant: values {steps} steps from the reference")
    flops, nbytes = 2 * rows * columns * depth, (rows + columns) * depth + 4 * (a_s.numel() + b_s.numel())
    case = {"rows": rows, "N": columns, "K_dim": depth}
    calls: dict[str, Callable[[], Any]] = {
        "int8_gemm": lambda: int8_gemm(a, a_s, b, b_s),
        "int8_addmm_quant": lambda: int8_addmm_quant(a, a_s, b, b_s, bias),
    }
    # torch's takes more than 16 rows on a GPU
    if bench.device == "cpu" or rows > 16:
        calls["torch._int_mm"] = lambda: torch.ops.aten._int_mm(a, b.t())
    record_products(bench, case, calls, "torch._int_mm", torch.int8, flops, nbytes + 2 * rows * columns)
    if all_configs:
        try_configs((a, a_s, b, b_s), expected)

    (a8, a_scale), (b8, b_scale) = quantize_fp8(a.float()), quantize_fp8(b.float())
    product = fp8_gemm(a8, b8, a_scale, b_scale, out_dtype=torch.float32)
    fp8_error = relative_error(product, reference.fp8_gemm(a8, (1 / a_scale).expand(rows), b8, (1 / b_scale).expand(columns)))
    # fp8 tensor cores add with about 14 bits
    if not fp8_error < 1e-3:
        raise AssertionError(f"fp8_gemm: relative error {fp8_error:.2e}, more than 1e-3")
    calls = {"fp8_gemm": lambda: fp8_gemm(a8, b8, a_scale, b_scale, torch.bfloat16)}
    if bench.device == "cuda":
        left, right = 1 / a_scale, 1 / b_scale
        calls["torch._scaled_mm"] = lambda: torch.ops.aten._scaled_mm(
            a8, b8.t(), left, right, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    record_products(bench, case, calls, "torch._scaled_mm", torch.float8_e4m3fn, flops, nbytes + 2 * rows * columns)


def record_products(
    bench: Bench, case: dict[str, Any], calls: dict[str, Callable[[], Any]], peer: str, dtype: torch.dtype, flops: int, nbytes: int
) -> None:
    """Times the calls turn about and records all but the peer's."""
    timings = interleaved(*calls.values()) if bench.device == "cuda" else [measure(call, device="cpu") for call in calls.values()]
    by_name: dict[str, Timing] = dict(zip(calls, timings, strict=True))
    beside = {"peer": f"{peer}, torch {torch.__version__}", "peer_us": float(f"{by_name[peer].us:.5g}")} if peer in by_name else {}
    for op, timing in by_name.items():
        if op != peer:
            rates = {"gbps": nbytes / timing.us / 1e3, "tflops": flops / timing.us / 1e6}
            bench.record(op, case, timing, floor_us=bench.floor_us(nbytes, flops, dtype), **rates, **beside)


def try_configs(operands: tuple[Tensor, Tensor, Tensor, Tensor], expected: Tensor) -> None:
    """Checks and times the kernel in every candidate configuration, prints them, fastest first."""
    from moequant.kernels.dense.dense_gemm import CANDIDATES, dense_gemm

    out = torch.empty(expected.shape, dtype=torch.float16, device=expected.device)
    working = []
    for config in CANDIDATES:
        try:
            dense_gemm(*operands, None, out, config=config)
            if relative_error(out, expected) > 1e-3:
                raise AssertionError("wrong result")
            working.append(config)
        # a candidate that doesn't fit this GPU, or is wrong on it, must not end the sweep
        except Exception as error:
            print(f"    {config}: {type(error).__name__}: {str(error)[:200]}")
    timings = interleaved(*(lambda config=config: dense_gemm(*operands, None, out, config=config) for config in working))
    for timing, config in sorted(zip(timings, working, strict=True), key=lambda pair: pair[0].us):
        print(f"    {timing.us:9.1f} us {config}", flush=True)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    parser.add_argument(
        "--all-configs", action="store_true", help="also time every candidate configuration of the int8 product (GPU)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json, device=arguments.device)
    cuda = bench.device == "cuda"
    for shape in PRODUCTS if cuda else CPU_PRODUCTS:
        progress(f"products {shape}")
        run_product(bench, *shape, arguments.all_configs and cuda)
    for size in SIZES if cuda else CPU_SIZES:
        progress(f"quantizers {size}")
        run_quantizers(bench, *size)


if __name__ == "__main__":
    main()
