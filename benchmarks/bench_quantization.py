"""The float8 quantizers of matrices and weights, on one GPU: python benchmarks/bench_quantization.py

Letters: M rows (in a case: rows), H columns. The large case is timed call by call with a cold L2, the small ones in a CUDA graph, since
events take as long as their kernels.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, OneLineParser, measure, measure_graph, progress
from moequant import reference
from moequant.batch import QuantizedTensor
from moequant.quantization import (
    fused_flatten_fp8_group_quant,
    fused_rms_fp8_group_quant,
    per_block_quant_fp8,
    per_token_group_quant_fp8,
)
from moequant.testing import assert_bit_equal, assert_nearly_quantized

E4M3 = torch.float8_e4m3fn
# (M, H): 1 GiB of bfloat16, and the rows of decoding
SIZES = ((65536, 8192), *((rows, 7168) for rows in (1, 16, 64, 256)))
CPU_SIZES = ((64, 320),)
CHECKED_ROWS = 128


@dataclass(frozen=True)
class Quantizer:
    """One to be timed.

    call: does it. expected: what the first CHECKED_ROWS rows have to be: values and scales. extra: bytes for each number of x that it
    moves besides x, the values and the scales. exact: the bits are promised.
    """

    call: Callable[[], QuantizedTensor]
    expected: Callable[[], tuple[Tensor, Tensor]]
    extra: int = 0
    exact: bool = True


def groups(x: Tensor, recipe: str = "default", dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    return reference.quantize_groups(x, 128, dtype, recipe, None)


def quantizers(x: Tensor) -> dict[str, Quantizer]:
    """By name and variant. x: (M, H) bfloat16."""
    head = x[:CHECKED_ROWS].cpu()
    weight = torch.randn(x.shape[1], dtype=torch.bfloat16, device=x.device)
    added, gate = torch.randn_like(x), torch.randn_like(x)
    deep = x.view(x.shape[0], -1, 64)
    outer = x.view(-1, x.shape[0], 64 if x.shape[1] % 128 else 128).transpose(0, 1)

    def token(**options: Any) -> Quantizer:
        recipe, dtype = options.get("recipe", "default"), options.get("dtype", E4M3)
        return Quantizer(lambda: per_token_group_quant_fp8(x, **options), lambda: groups(head, recipe, dtype))

    def norm(extra: int, residual: Tensor | None = None, gates: Tensor | None = None, transpose_scale: bool = False) -> Quantizer:
        options = {"residual": residual, "gate": gates}
        heads = {name: None if tensor is None else tensor[:CHECKED_ROWS].cpu() for name, tensor in options.items()}
        return Quantizer(
            lambda: fused_rms_fp8_group_quant(x, weight, residual=residual, gate=gates, transpose_scale=transpose_scale)[0],
            lambda: groups(reference.rms_norm(head, weight.cpu(), 1e-6, heads["residual"], heads["gate"])[0]),
            extra,
            False,
        )

    def block() -> tuple[Tensor, Tensor]:
        q = reference.quantize_weight(head)
        return q.values, q.scales

    return {
        "per_token_group_quant_fp8": token(),
        "per_token_group_quant_fp8, transposed": token(scale_layout="transposed"),
        "per_token_group_quant_fp8, tma_aligned": token(scale_layout="tma_aligned"),
        "per_token_group_quant_fp8, ue8m0_packed": token(recipe="ue8m0", scale_dtype="ue8m0_packed"),
        "per_token_group_quant_fp8, e5m2": token(dtype=torch.float8_e5m2),
        "per_token_group_quant_fp8, e4m3fnuz": token(dtype=torch.float8_e4m3fnuz),
        "per_block_quant_fp8": Quantizer(lambda: per_block_quant_fp8(x), block),
        "fused_rms_fp8_group_quant": norm(0),
        "fused_rms_fp8_group_quant, transpose_scale": norm(0, transpose_scale=True),
        "fused_rms_fp8_group_quant, residual": norm(4, added),
        "fused_rms_fp8_group_quant, residual and gate": norm(6, added, gate),
        "fused_flatten_fp8_group_quant": Quantizer(lambda: fused_flatten_fp8_group_quant(deep), lambda: groups(head)),
        "fused_flatten_fp8_group_quant, transpose_scale": Quantizer(
            lambda: fused_flatten_fp8_group_quant(deep, transpose_scale=True), lambda: groups(head)
        ),
        "fused_flatten_fp8_group_quant, heads first": Quantizer(
            lambda: fused_flatten_fp8_group_quant(outer), lambda: groups(outer[:CHECKED_ROWS].cpu().flatten(1))
        ),
    }


def check(quantizer: Quantizer, name: str) -> int:
    """Raises AssertionError unless the first rows are the reference's. Returns the bytes of values and scales."""
    q, (values, scales) = quantizer.call(), quantizer.expected()
    got = q.values[: len(values)].cpu(), q.scales_by_row()[: len(scales)].cpu().contiguous()
    if quantizer.exact:
        assert_bit_equal(got[0], values, f"{name}'s values")
        assert_bit_equal(got[1], scales, f"{name}'s scales")
    else:
        assert_nearly_quantized(got, (values, scales))
    return q.values.nbytes + q.scales.nbytes


def run(bench: Bench, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=bench.device)
    for name, quantizer in quantizers(x).items():
        op, _, variant = name.partition(", ")
        case: dict[str, Any] = {"rows": rows, "H": columns} | ({"variant": variant} if variant else {})
        nbytes = x.nbytes + quantizer.extra * x.numel() + check(quantizer, name)
        timing = (measure if x.nbytes > 2**28 else measure_graph)(quantizer.call, device=bench.device)
        bench.record(op, case, timing, floor_us=bench.floor_us(nbytes), gbps=nbytes / timing.us / 1e3)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench.start(arguments.output_json, device=arguments.device)
    for size in SIZES if bench.device == "cuda" else CPU_SIZES:
        progress(f"quantizers {size}")
        run(bench, *size)


if __name__ == "__main__":
    main()
