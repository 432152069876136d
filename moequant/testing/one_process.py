"""What several ranks together have to get, on one. T tokens, K top-k, E experts, W ranks, M rows of an expert's buffer, R rows of a
rank's (layout "ragged"), H hidden size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moequant import reference
from moequant.batch import ExpertBatch
from moequant.checks import check_has_numbers, check_is, check_tensor, check_tokens
from moequant.config import DispatcherConfig
from moequant.reference.routing import ragged_rows
from moequant.transport.local import LocalTransport


def in_one_process(
    settings: Mapping[str, Any], inputs: Sequence[Sequence[Tensor]], experts: Callable[[ExpertBatch], Tensor]
) -> tuple[ExpertBatch, list[Tensor], int]:
    """What W ranks together have to get from a dispatch and a combine, computed on a CPU by one process with all ranks' tokens: what
    any transport is compared with, bit for bit.

    Args:
        settings: of the dispatcher on W ranks; its transport, exchange and slots don't matter.
        inputs: each rank's hidden states (T, H), ids and weights (T, K).
        experts: from the batch of all E experts to their output (E, M, H), or, ragged, (W * R, H).

    Returns:
        The batch, whose sources are entry numbers, token * K + k, of all ranks' tokens joined; each rank's output (T, H); and the
        number of rows that had no room. Ragged, the batch is the ranks' buffers one behind the other: rank w's experts start from row
        w * R on.

    Raises:
        InvalidExpertIdError: ids outside -1..E-1.
        ValueError: other wrong settings and inputs.
    """
    check_is("settings", settings, Mapping)
    if not callable(experts):
        raise ValueError(f"experts must be callable with an ExpertBatch, got {type(experts).__name__}")
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise ValueError(f"inputs must be a list of each rank's hidden states, ids and weights, got {inputs!r}")
    cpu, ignored = (
        torch.device("cpu"),
        {"transport": "local", "exchange": "auto", "slots": 1, "reduce": "exact", "shared_batch": False},
    )
    each = DispatcherConfig(**{**settings, **ignored})
    for rank, tensors in enumerate(inputs):
        if not isinstance(tensors, (list, tuple)) or len(tensors) != 3:
            raise ValueError(f"inputs[{rank}] must be the rank's hidden states, ids and weights, got {type(tensors).__name__}")
        for tensor in tensors:
            check_tensor(f"inputs[{rank}]", tensor)
            check_has_numbers(f"inputs[{rank}]", tensor)
        check_tokens(each, cpu, *(tensor.cpu() for tensor in tensors))
    ranks = len(inputs)
    most = ranks * each.max_tokens_per_rank
    if each.ragged:
        of_rank = replace(each, transport="collective", world_size=ranks).total_rows
        config = replace(each, max_tokens_per_rank=most, rank_capacity=ranks * of_rank)
    else:
        config = replace(each, max_tokens_per_rank=most, capacity=each.capacity or most)
    status = torch.zeros(3, dtype=torch.int64, device="cpu")
    transport = LocalTransport(config, 0, cpu, status)
    hidden, ids, weights = (torch.cat([tensor.cpu() for tensor in tensors]) for tensors in zip(*inputs, strict=True))
    slot = transport.allocate()
    batch, taken = transport.expert_batch(slot, len(ids)), slot.take(len(ids))
    # the specification's own steps, where the transport would take kernels, if interpreted
    counts, rows_in_expert = slot.buffers.counts, taken.rows_in_expert
    if batch.expert_start is None:
        reference.route(ids, rows_in_expert, counts, config.max_rows, batch.num_tokens, status)
    else:
        reference.route(ids, rows_in_expert, counts, status=status)
        starts, placed = ragged_rows(counts.unflatten(0, (ranks, -1)), config.total_rows // ranks)
        starts += torch.arange(0, config.total_rows, config.total_rows // ranks, dtype=torch.int32, device="cpu")[:, None]
        batch.expert_start.copy_(starts.flatten())
        batch.num_tokens.copy_(placed.flatten())
        status[1] += (counts - batch.num_tokens).sum()
        # what a rank has no room for would be among the next one's rows
        rows_in_expert.masked_fill_(rows_in_expert >= batch.num_tokens[ids.clamp_min(0).long()], -1)
    rows, outputs = taken.rows, (batch.values, batch.scales)
    reference.scatter(
        hidden,
        ids,
        rows_in_expert,
        *outputs,
        rows=rows,
        sources=batch.sources,
        recipe=config.recipe,
        expert_start=batch.expert_start,
    )
    output, out = experts(batch), torch.empty_like(hidden)
    check_tensor("what experts return", output, shape=tuple(batch.values.shape))
    output = output.flatten(0, -2)
    if settings.get("reduce", "exact") == "per_rank":
        reference.combine_per_rank(output, rows, weights, output.shape[0] // ranks, out)
    else:
        reference.combine(output, rows, weights, out)
    return batch, list(out.split([len(tensors[0]) for tensors in inputs])), int(status[1])
