"""Weight gradients from fp8 operands on one GPU, beside torch's product in bfloat16: python benchmarks/bench_weight_gradient.py

Letters: E experts, N and K_dim columns of the operands, rows: the mean number of an expert's tokens; each expert's is drawn from 0.7 to
1.3 of it, in steps of 16. Operands are quantized before; a case is the product alone, in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_mm_fp8 import time_all
from benchmarks.common import Bench, OneLineParser, progress
from moequant import ops
from moequant.batch import ceil_div
from moequant.config import round_up
from moequant.ops.gemm import GROUPED_MM
from moequant.reference.columnwise import BLOCK, quantize_columnwise
from moequant.testing import relative_error

QUANT, RECIPE = "fp8_e4m3fn", "ue8m0"
# (E, N, K_dim, rows): Qwen3-30B's w13 and w2 on 8 GPUs, DeepSeek-V3's on 8
SHAPES = ((16, 1536, 2048, 4096), (16, 2048, 768, 4096), (32, 4096, 7168, 1024), (32, 7168, 2048, 1024))
CPU_SHAPES = ((3, 96, 160, 40),)
# bfloat16 rounding alone is 1.66e-3
TOLERANCE = 1.75e-3


def columnwise(x: Tensor, num_tokens: Tensor, starts: Tensor, blocks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, N) as an operand: values, scales and block_ends."""
    room, width = x.shape[0] // BLOCK + len(num_tokens), x.shape[1]
    shape = (ceil_div(width, BLOCK), room) if blocks else (room, round_up(width, 4))
    values = torch.zeros(width, BLOCK * room, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
    scales = torch.zeros(shape, device=x.device)
    scales = scales if blocks else scales[:, :width]
    block_ends = torch.zeros_like(num_tokens)
    quantize_columnwise(x, None, num_tokens, starts, values, scales, block_ends, RECIPE, blocks)
    return values, scales, block_ends


def peer_call(rows: tuple[Tensor, Tensor], ends: Tensor, expected: Tensor) -> Callable[[], Any] | None:
    """torch's product of the bfloat16 rows from which the operands were quantized, checked, where torch has it for this GPU."""
    a, b = rows
    if GROUPED_MM is None or not a.is_cuda or torch.cuda.get_device_capability()[0] < 9:
        return None

    def call() -> Tensor:
        return GROUPED_MM(a.t(), b, offs=ends)

    error = relative_error(call()[0], expected)
    if not error < 0.1:
        raise AssertionError(f"torch's grouped_mm is off from this project by {error:.2e}")
    return call


def run_case(bench: Bench, experts: int, columns: int, depth: int, rows: int) -> None:
    """Checks, times and records one case."""
    device = bench.device
    counts = (
        torch.randint(max(1, int(0.7 * rows) // 16), int(1.3 * rows) // 16 + 1, (experts,), device=device, dtype=torch.int32) * 16
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    valid, starts = int(ends[-1]), ends - counts
    pair = torch.randn(valid, columns, device=device).bfloat16(), torch.randn(valid, depth, device=device).bfloat16()
    a, a_scales, block_ends = columnwise(pair[0], counts, starts, False)
    b, b_scales, _ = columnwise(pair[1], counts, starts, True)
    out = torch.full((experts, columns, depth), torch.nan, dtype=torch.bfloat16, device=device)

    def call() -> None:
        ops.weight_gradient(a, a_scales, b, b_scales, block_ends, out)

    call()
    # of the first expert; every other number must have been written
    blocks = int(block_ends[0])
    left = a[:, : blocks * BLOCK].float() * a_scales[:blocks].mT.repeat_interleave(BLOCK, 1)
    right = b[:, : blocks * BLOCK].float() * b_scales[:, :blocks].repeat_interleave(BLOCK, 0)[:depth].repeat_interleave(BLOCK, 1)
    expected = left.double() @ right.double().T
    error = relative_error(out[0], expected)
    if not error <= TOLERANCE or out.isnan().any():
        raise AssertionError(f"{(experts, columns, depth, rows)}: relative error {error:.2e}, more than {TOLERANCE}, or NaN")
    peer = peer_call(pair, ends, expected)
    ours, *theirs = time_all(bench, [call, peer] if peer is not None else [call])
    tokens = int(block_ends[-1]) * BLOCK
    nbytes = tokens * (columns + depth) + 2 * out.numel() + 4 * int(block_ends[-1]) * (columns + ceil_div(depth, BLOCK))
    flops = 2 * valid * columns * depth
    extra: dict[str, Any] = {"relative_error": float(f"{error:.3e}")}
    if theirs:
        extra |= {"peer": "torch grouped_mm in bfloat16", "peer_us": float(f"{theirs[0].us:.5g}")}
    case = {"E": experts, "N": columns, "K_dim": depth, "rows": rows, "quant": QUANT}
    rates = {"gbps": nbytes / ours.us / 1e3, "tflops": flops / ours.us / 1e6}
    floor = bench.floor_us(nbytes, flops, torch.float8_e4m3fn)
    bench.record("weight_gradient", case, ours, floor_us=floor, **rates, **extra)


def main(given: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("E", "N", "K_dim", "rows"), help="this one instead of the table's")
    arguments = parser.parse_args(given)
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json, device=arguments.device)
    for shape in [tuple(arguments.shape)] if arguments.shape else SHAPES if bench.device == "cuda" else CPU_SHAPES:
        progress(f"weight_gradient E={shape[0]} N={shape[1]} K_dim={shape[2]} rows={shape[3]}")
        run_case(bench, *shape)


if __name__ == "__main__":
    main()
