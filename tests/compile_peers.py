"""Calls of the symmetric transport's kernels that begin early, for any shape: what the kernels' tests and `test_early.py` compile.

T tokens, K top-k, E experts in all, W ranks, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from compile_case import BF16, counted, empty, quantized
from moequant import ops
from moequant.batch import ceil_div
from moequant.kernels.routing import combine as combine_module
from moequant.kernels.symmetric import (
    exchange_counts as exchange_counts_module,
    land_rows as land_rows_module,
    push_tokens as push_tokens_module,
    signal_and_wait as signal_and_wait_module,
)


def peer_arguments(ranks: int = 8) -> dict[str, Any]:
    """What every kernel of the symmetric transport is told of the others."""
    integer = empty(1, dtype=torch.int32)
    return {
        "peers": empty(ranks, dtype=torch.int64),
        "epoch": integer,
        "fault": integer,
        "record": integer,
        "flags_offset": 4096,
        "abort_offset": 8192,
        "rank": ranks // 2,
        "limit": 1000,
    }


def push_tokens(
    dtype: torch.dtype,
    tokens: int = 128,
    per_rank: bool = False,
    wave: int = 0,
    columns: int = 7168,
    top_k: int = 8,
    experts: int = 256,
    ranks: int = 8,
) -> None:
    entries = empty(tokens, top_k, dtype=torch.int32)
    push_tokens_module.push_tokens(
        empty(tokens, columns),
        entries,
        entries,
        empty(tokens, top_k, dtype=torch.float32) if per_rank else None,
        empty(experts, dtype=torch.int32),
        entries,
        entries if per_rank else None,
        ticket=empty(1, dtype=torch.int32),
        values_offset=256,
        notes_offset=1024,
        max_tokens=128,
        local_experts=experts // ranks,
        capacity=1024,
        dtype=dtype,
        wait=True,
        wave=wave,
        first_experts=8,
        **peer_arguments(ranks),
        **({} if dtype == BF16 else ops.quantize_settings(empty(1, dtype=dtype), "default", None)),
    )


def land_rows(dtype: torch.dtype, expected_rows: int = 128, columns: int = 7168, experts: int = 32, ranks: int = 8) -> None:
    values, scales = quantized(experts, 1024, columns, dtype)
    groups = 0 if scales is None else ceil_div(columns, 128)
    notes = empty(experts, 1024, 4 * ceil_div(groups, 4) + 4, dtype=torch.int32)
    sources, fault = empty(experts, 1024, dtype=torch.int64), empty(1, dtype=torch.int32)
    peers = empty(ranks, dtype=torch.int64)
    land_rows_module.land_rows(
        values, notes, counted(values), scales, sources, sources, peers, fault, 1024, 1024, 2 * columns, expected_rows
    )


def combine_shared(
    tokens: int = 128, columns: int = 7168, top_k: int = 8, ranks: int = 8, way: str = "pulled", dtype: torch.dtype = BF16
) -> None:
    """way: of the rows: "pulled", "pushed", or "summed", one of each rank."""
    entries = ranks if way == "summed" else top_k
    rows = empty(tokens, entries, dtype=torch.int32)
    weights = None if way == "summed" else empty(tokens, entries, dtype=torch.float32)
    peers = {"peers": empty(ranks, dtype=torch.int64), "peer_offset": 256, "rows_of_rank": 32768} if way == "pulled" else {}
    out, fault = empty(tokens, columns, dtype=dtype), empty(1, dtype=torch.int32)
    combine_module.combine_shared(empty(1, columns), rows, weights, out, fault, in_order=way == "pushed", **peers)


def exchange_counts(experts: int = 256, ranks: int = 8) -> None:
    counts, num_tokens = empty(experts, dtype=torch.int32), empty(experts // ranks, dtype=torch.int32)
    arguments = peer_arguments(ranks)
    del arguments["flags_offset"]
    exchange_counts_module.exchange_counts(
        counts,
        counts,
        num_tokens,
        empty(3, dtype=torch.int64),
        calls=empty(1, dtype=torch.int32),
        words_offset=1024,
        capacity=1024,
        call=7,
        **arguments,
    )


def signal_and_wait() -> None:
    signal_and_wait_module.signal_and_wait(phase=2, status=empty(3, dtype=torch.int64), way=2, **peer_arguments())
