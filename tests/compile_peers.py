"""Calls of the symmetric transport's kernels that begin early, for any shape: what the kernels' tests and `test_pdl.py` compile.

T tokens, K top-k, E experts in all, W ranks, H hidden size.
"""

from __future__ import annotations

import torch
import triton.language as tl

from compile_case import BF16, PLAIN, empty, quantized
from moequant import ops
from moequant.batch import ceil_div
from moequant.config import ROW_ALIGNMENT
from moequant.kernels.library.symmetric import Peers, headers_of
from moequant.kernels.routing import combine as combine_module
from moequant.kernels.symmetric import (
    exchange_counts as exchange_counts_module,
    push_tokens as push_tokens_module,
    signal_and_wait as signal_and_wait_module,
    unpack_rows as unpack_rows_module,
)


def peers_of(ranks: int = 8) -> Peers:
    """What every kernel of the symmetric transport is told of the others."""
    word = empty(1, dtype=torch.int32)
    return Peers(empty(ranks, dtype=torch.int64), word, word, word, word, 4096, 8192, ranks // 2, ranks, 1000)


def push_tokens(
    dtype: torch.dtype,
    tokens: int = 128,
    per_rank: bool = False,
    wave: int = 0,
    columns: int = 7168,
    top_k: int = 8,
    experts: int = 256,
    ranks: int = 8,
    ragged: bool = False,
) -> None:
    entries, offsets = empty(tokens, top_k, dtype=torch.int32), empty(experts, dtype=torch.int32)
    push_tokens_module.push_tokens(
        empty(tokens, columns),
        entries,
        empty(tokens, top_k, dtype=torch.float32) if per_rank else None,
        push_tokens_module.Entries(entries, offsets, entries, entries if per_rank else None),
        push_tokens_module.Landing(
            rows=256,
            headers=1024,
            experts=experts,
            local_experts=experts // ranks,
            capacity=1024,
            columns=columns,
            max_tokens=128,
            spec=None if dtype in PLAIN else ops.quant_spec(dtype, "default"),
            ragged=tl.constexpr(ragged),
        ),
        peers_of(ranks),
        dtype,
        wait=True,
        wave=(wave, 8),
    )


def unpack_rows(
    dtype: torch.dtype,
    expected_rows: int = 128,
    columns: int = 7168,
    experts: int = 32,
    ranks: int = 8,
    ragged: bool = False,
) -> None:
    values, scales = quantized(1 if ragged else experts, 1024, columns, dtype)
    if ragged:
        values, scales = values[0], None if scales is None else scales[0]
    groups = 0 if scales is None else ceil_div(columns, 128)
    headers = empty(*values.shape[:-1], 4 * ceil_div(groups, 4) + 4, dtype=torch.int32)
    sources, counts = empty(*values.shape[:-1], dtype=torch.int64), empty(experts, dtype=torch.int32)
    batch = unpack_rows_module.Landed(values.view(torch.uint8), scales, counts, sources, counts if ragged else None)
    returns = unpack_rows_module.Returns(sources, 1024, 1024, 2 * columns)
    unpack_rows_module.unpack_rows(batch, headers_of(headers, groups), peers_of(ranks), returns, dtype.itemsize, expected_rows)


def combine_shared(
    tokens: int = 128, columns: int = 7168, top_k: int = 8, ranks: int = 8, way: str = "pulled", dtype: torch.dtype = BF16
) -> None:
    """way: of the rows: "pulled", "pushed", or "summed", one of each rank."""
    entries = ranks if way == "summed" else top_k
    rows = empty(tokens, entries, dtype=torch.int32)
    weights = None if way == "summed" else empty(tokens, entries, dtype=torch.float32)
    remote = combine_module.Remote(empty(ranks, dtype=torch.int64), 256, 32768, ranks) if way == "pulled" else None
    out, fault = empty(tokens, columns, dtype=dtype), empty(1, dtype=torch.int32)
    combine_module.combine_shared(empty(1, columns), rows, weights, out, fault, in_order=way == "pushed", remote=remote)


def exchange_counts(experts: int = 256, ranks: int = 8, ragged: bool = False) -> None:
    counts, num_tokens = empty(experts, dtype=torch.int32), empty(experts // ranks, dtype=torch.int32)
    calls, status = empty(1, dtype=torch.int32), empty(3, dtype=torch.int64)
    slot = exchange_counts_module.Counts(counts, counts, num_tokens, calls, status, 1024)
    if ragged:
        slot = slot._replace(expert_start=num_tokens, alignment=tl.constexpr(ROW_ALIGNMENT))
    exchange_counts_module.exchange_counts(slot, peers_of(ranks), 1024, 7)


def signal_and_wait() -> None:
    signal_and_wait_module.signal_and_wait(peers_of(), empty(3, dtype=torch.int64), 2, way=2)
