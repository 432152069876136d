"""The records of benchmarks/results: reading them, and what the tables and plots ask of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TITLES = {
    "copy": "Copy, the ceiling of memory (between ranks: of the wire)",
    "matmul": "One large GEMM, the ceiling of the tensor cores",
    "quantize": "Quantize",
    "silu_mul_quantize": "SwiGLU + quantize",
    "grouped_gemm": "Grouped GEMM",
    "gemm1_fused": "GEMM 1 with SwiGLU and quantization",
    "weight_gradient": "Weight gradients from fp8 operands",
    "mm_fp8_blockscale": "Dense block-scaled fp8 GEMM",
    "int8_gemm": "Dense block-scaled int8 GEMM",
    "int8_addmm_quant": "Dense block-scaled int8 GEMM, with bias and quantization",
    "fp8_gemm": "Dense fp8 GEMM with one scale for each operand",
    "gemm2_push": "GEMM 2, storing its rows at the tokens' ranks",
    "route": "Route",
    "dispatch": "Dispatch",
    "combine": "Combine",
    "combine_pull": "Combine, by loads from the other ranks",
    "combine_push": "Combine, of rows that GEMM 2 stored",
    "layer": "The whole layer",
    "training": "The whole layer, forward alone and with its backward, eager",
    "transformers_layer": "Experts of a layer of transformers' models",
    "transformers_experts": "Experts of a layer of transformers' models, split over ranks",
    "transformers_model": "Whole models of transformers: prefill, or a step of decoding T sequences",
    "vllm_layer": "A layer of vLLM's modular MoE kernel, from its Python sources",
    "accuracy": "Held-out loss of small language models, their experts in each format",
    "training_loss": "Held-out loss of small language models, trained with their experts by torch and by moequant",
    "host_layer": "The host's time for a whole layer without a graph",
    "host_dispatch": "The host's time for a dispatch",
    "host_experts": "The host's time for the experts of a batch",
    "host_product": "The host's time for GEMM 1 of a batch",
    "host_product_triton": "The host's time for GEMM 1's kernel by Triton's launch",
    "host_quantize": "The host's time for `quantize_expert_batch`",
    "host_quantize_triton": "The host's time for the kernel of `quantize_expert_batch` by Triton's launch",
    "host_deep_gemm": "The host's time for DeepGEMM's GEMM 1 of the batch",
    "host_torch_grouped_mm": "The host's time for `torch.nn.functional.grouped_mm`",
}
CEILINGS = ("copy", "matmul")
V3, V4_FLASH = {"H": (7168,), "I": (2048,)}, {"H": (4096,), "I": (2048,)}
# layers as they go by default, on four GPUs with the experts of 32 each; large batches with the capacity that they all have
SHARED = {"E": (128,), "reduce": ("exact",), "routing": ("uniform",), "quant": ("fp8_e4m3fn",), "overlap": (None, "rows pushed")}
SHARED |= {"batch_invariant": (None,)}
FEW, MANY = {"T": (1, 8, 128), "capacity": (None,)}, {"T": (4096,), "capacity": (2048,)}
EXCHANGED = [V3 | SHARED | FEW, V3 | SHARED | MANY]
# What docs/results.md shows: of these ops the cases that have the values of one of these. Everything stands in the full table.
RESULTS_CASES: dict[str, list[dict[str, tuple[Any, ...]]]] = {
    "quantize": [{"H": (7168,), "rows": (32, 1024), "quant": ("fp8_e4m3fn",)}],
    "silu_mul_quantize": [{"I": (2048,), "rows": (32, 1024)}],
    "grouped_gemm": [
        {
            "E": (32,),
            "N": (n,),
            "K_dim": (k,),
            "rows": (16, 64, 128, 256, 1024),
            "quant": ("fp8_e4m3fn",),
            "counts": (None,),
            "routing": (None,),
        }
        for n, k in ((4096, 7168), (7168, 2048))
    ],
    "gemm1_fused": [{"H": (7168,), "rows": (16, 128, 256, 1024), "T": (None,)}],
    "weight_gradient": [{}],
    "mm_fp8_blockscale": [
        {"N": (n,), "K_dim": (k,), "rows": (1, 128, 4096), "step": ("quantize + product",)}
        for n, k in ((4096, 7168), (7168, 16384))
    ],
    "int8_gemm": [{"N": (4096,)}],
    "dispatch": EXCHANGED,
    "gemm2_push": EXCHANGED,
    "combine": EXCHANGED,
    "combine_push": EXCHANGED,
    "layer": [
        *EXCHANGED,
        *(V4_FLASH | SHARED | size for size in (FEW, MANY)),
        V3 | SHARED | {"E": (32,), "T": (8, 128, 4096)},
    ],
    **{op: [{"mode": ("graph",)}] for op in ("transformers_layer", "transformers_model", "vllm_layer")},
    "training": [{}],
    "transformers_experts": [{}],
    "accuracy": [{}],
    "training_loss": [{}],
    **{op: [{"T": (1, 64, 512)}] for op in TITLES if op.startswith("host_")},
}
SYMMETRIC, PADDED, PACKED = (
    [case | {"transport": (transport,), "exchange": exchanges} for case in EXCHANGED]
    for transport, exchanges in (("symmetric", (None, "auto")), ("collective", ("padded",)), ("collective", ("packed",)))
)
# README.md's table, a row each by title: an op, the machine, and which cases.
README_ROWS: dict[str, tuple[str, str, list[dict[str, tuple[Any, ...]]]]] = {
    "Dispatch": ("dispatch", "nvidia-h200-x4", SYMMETRIC),
    "GEMM 2, storing its rows at the tokens' ranks": ("gemm2_push", "nvidia-h200-x4", SYMMETRIC),
    "Combine of those rows": ("combine_push", "nvidia-h200-x4", SYMMETRIC),
    "Whole layer": ("layer", "nvidia-h200-x4", SYMMETRIC),
    "Whole layer in bfloat16": ("layer", "nvidia-h200-x4", [case | {"quant": ("none",)} for case in SYMMETRIC]),
    "Whole layer over NCCL, `padded`": ("layer", "nvidia-h200-x4", PADDED),
    "Whole layer over NCCL, `packed`": ("layer", "nvidia-h200-x4", PACKED),
    "Whole layer on one GPU": ("layer", "nvidia-h200", [V3 | SHARED | {"E": (32,), "capacity": (None,)}]),
}
README_TOKENS = (1, 8, 128, 4096)
Record = dict[str, Any]


class ReportError(Exception):
    """A file is not as it has to be. The message names it."""


def read_records(folder: Path) -> list[Record]:
    """The newest record of each (op, case, machine), with the machine's name added, in the order of the tables."""
    newest: dict[tuple[str, str, str], Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                key = (record["op"], json.dumps(record["case"], sort_keys=True), path.stem)
                date, _ = record["date"], record["us"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ReportError(f"{path}, line {number}: not a record with op, case, us and date ({error!r})") from error
            # the later line wins where dates are equal
            if key not in newest or date >= newest[key]["date"]:
                newest[key] = {**record, "machine": path.stem}
    return sorted(newest.values(), key=order)


def order(record: Record) -> tuple[Any, ...]:
    """By op, machine, then case, numbers as numbers."""
    known = list(TITLES)
    place = known.index(record["op"]) if record["op"] in known else len(known)
    case = [
        (key, 0, value, "") if isinstance(value, (int, float)) else (key, 1, 0, str(value)) for key, value in record["case"].items()
    ]
    # T and rows vary fastest
    case.sort(key=lambda item: (item[0] in ("T", "rows"), item[0]))
    return place, record["op"], record["machine"], case


def goal_rows(records: Iterable[Record]) -> list[Record]:
    """What docs/results.md shows."""
    return [record for record in records if is_one_of(record, RESULTS_CASES.get(record["op"], []))]


def is_one_of(record: Record, choices: Iterable[dict[str, tuple[Any, ...]]]) -> bool:
    """Whether the record's case has the values of one of these."""
    return any(all(record["case"].get(key) in values for key, values in choice.items()) for choice in choices)


def readme_rows(records: list[Record]) -> dict[str, dict[int, Record]]:
    """README.md's table: by title, then by T, those that are recorded."""
    rows: dict[str, dict[int, Record]] = {}
    for title, (op, machine, choices) in README_ROWS.items():
        for record in records:
            wanted = (record["op"], record["machine"]) == (op, machine) and record["case"].get("T") in README_TOKENS
            if wanted and is_one_of(record, choices):
                rows.setdefault(title, {})[record["case"]["T"]] = record
    return rows


def other_routing_rows(records: Iterable[Record]) -> list[Record]:
    """What docs/results.md shows besides: quantized layers of the same shape at 128 tokens, as they go by default, with routing that is
    not uniform."""
    return [
        record
        for record in records
        if record["op"] == "layer"
        and (record["case"].get("H"), record["case"].get("T")) == (7168, 128)
        and record["case"].get("routing", "uniform") != "uniform"
        and record["case"].get("quant") != "none"
        and record["case"].get("overlap") in SHARED["overlap"]
        and "batch_invariant" not in record["case"]
    ]


def case_text(case: dict[str, Any]) -> str:
    """A case on one line: numbers with their letters, names alone."""
    return ", ".join(str(value) if isinstance(value, str) else f"{key}={value}" for key, value in case.items() if value is not None)


def number(value: float | None) -> str:
    """Three significant digits, or all of those before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(record: Record) -> float | None:
    """The floor's part of the time: 1 at the ceiling."""
    return record["floor_us"] / record["us"] if record.get("floor_us") else None


def is_gemm(record: Record) -> bool:
    return record["op"] == "grouped_gemm" and "step" not in record["case"] and "rows" in record["case"]
