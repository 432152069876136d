"""Layout "ragged" on one rank: the bits of "padded" in one buffer that ends where the rows that can come do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from guarded import Guarded
from moequant import CapacityOverflowError, ExpertBatch, GroupedExperts, MoEQuantDispatcher, ops, reference
from moequant.config import DispatcherConfig
from moequant.reference.routing import ragged_rows
from moequant.testing import assert_bit_equal, in_one_process, routing
from moequant.transport.buffers import named

EXPERTS, TOP_K, HIDDEN, TOKENS = 6, 3, 200, 20
SETTINGS: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "max_tokens_per_rank": TOKENS}
RAGGED: dict[str, Any] = SETTINGS | {"layout": "ragged"}
both_paths = pytest.mark.usefixtures("both_paths")


def inputs(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = torch.empty(0).device
    ids, weights = (tensor.to(device) for tensor in routing(tokens, TOP_K, EXPERTS))
    return torch.randn(tokens, HIDDEN).bfloat16(), ids, weights


def dispatcher(settings: dict[str, Any] = RAGGED, **changes: Any) -> MoEQuantDispatcher:
    made = MoEQuantDispatcher(**settings | changes, device=torch.empty(0).device)
    for slot in made._slots:
        for buffer in named(slot.buffers).values():
            buffer.view(torch.uint8).fill_(0xFF)
    return made


def stand_in(batch: ExpertBatch) -> torch.Tensor:
    """An elementwise expert, different for each."""
    values = batch.values.float()
    if batch.scales is not None:
        values = values * batch.scales.repeat_interleave(128, -1)[..., :HIDDEN]
    return (values * (1.0 + batch.experts_of_rows())[..., None]).bfloat16()


ROUTINGS: dict[str, Sequence[int] | None] = {
    "any": None,
    "one expert": [2, -1, -1],
    "the last ones": [3, 4, 5],
    "none": [-1, -1, -1],
}


@both_paths
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "none"])
def test_values_scales_sources_and_sums_are_the_padded_ones(quant, reduce, kind):
    hidden, ids, weights = inputs()
    if ROUTINGS[kind] is not None:
        ids[:] = torch.tensor(ROUTINGS[kind])
    outputs, batches = [], []
    for layout in ("padded", "ragged"):
        with dispatcher(layout=layout, quant=quant, reduce=reduce) as layer:
            batch, handle = layer.dispatch(hidden, ids, weights)
            outputs.append(layer.combine(stand_in(batch), handle))
            assert layer.check() == 0
            batches.append(batch)
    assert_bit_equal(outputs[1], outputs[0])
    padded, ragged = batches
    assert_bit_equal(ragged.num_tokens, padded.num_tokens)
    for expert in range(EXPERTS):
        for name in ("values", "scales", "sources") if quant != "none" else ("values", "sources"):
            mine, other = (batch.rows_of(getattr(batch, name), expert) for batch in (ragged, padded))
            assert_bit_equal(mine.clone(), other.clone(), f"{name} of expert {expert}")


def check_layer(experts: GroupedExperts, settings: dict[str, Any], tokens: Sequence[torch.Tensor]) -> None:
    """A whole layer has the padded bits. On the device of new tensors."""
    outputs = []
    for layout in ("padded", "ragged"):
        with dispatcher(settings, layout=layout) as layer:
            x, ids, weights = tokens
            outputs.append(layer(x, ids, weights, experts))
            assert layer.check() == 0
    assert outputs[0].isfinite().all()
    assert_bit_equal(outputs[1], outputs[0])


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8", "none"])
def test_whole_layers_have_the_padded_bits(quant, kind):
    hidden, ids, weights = inputs()
    if ROUTINGS[kind] is not None:
        ids[:] = torch.tensor(ROUTINGS[kind])
    w13, w2 = torch.randn(EXPERTS, 2 * 40, HIDDEN).bfloat16() / 14, torch.randn(EXPERTS, HIDDEN, 40).bfloat16() / 6
    experts = GroupedExperts.from_weights(w13, w2, quant=quant)
    check_layer(experts, SETTINGS | {"quant": quant}, (hidden, ids, weights))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "zipf:1.2", "one-hot"])
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8", "none"])
def test_layers_of_model_sizes_have_the_padded_bits(quant, kind):
    sizes: dict[str, Any] = {"num_experts": 48, "top_k": 6, "hidden_size": 2880, "max_tokens_per_rank": 1500, "quant": quant}
    with torch.device("cuda"):
        w13, w2 = torch.randn(48, 2 * 768, 2880).bfloat16() / 54, torch.randn(48, 2880, 768).bfloat16() / 28
        experts = GroupedExperts.from_weights(w13, w2, quant=quant)
        for tokens in (0, 1, 16, 129, 1500):
            ids, weights = (tensor.cuda() for tensor in routing(tokens, 6, 48, kind))
            check_layer(experts, sizes, (torch.randn(tokens, 2880).bfloat16(), ids, weights))


@both_paths
def test_the_batch_has_the_contracts_shapes_strides_and_starts():
    hidden, ids, weights = inputs(7)
    with dispatcher() as layer:
        # 60 rows, rounded up, and 5 experts' alignment
        assert layer.config.total_rows == 64 + 5 * 16
        batch, _ = layer.dispatch(hidden, ids, weights)
    assert batch.values.shape == (144, HIDDEN) and batch.values.is_contiguous()
    assert batch.scales is not None and batch.scales.shape == (144, 2) and batch.scales.stride() == (1, 144)
    assert batch.sources.shape == (144,) and batch.expert_start is not None
    counts = [int((ids == expert).sum()) for expert in range(EXPERTS)]
    assert batch.num_tokens.tolist() == counts
    assert batch.expert_start.tolist() == [sum(math.ceil(count / 16) * 16 for count in counts[:e]) for e in range(EXPERTS)]
    assert batch.num_tokens.dtype == batch.expert_start.dtype == torch.int32


@both_paths
def test_rows_that_a_rank_has_no_room_for_are_dropped_in_row_order_and_reported():
    hidden, ids, weights = inputs()
    ids[:] = torch.tensor([0, 1, 4])
    with dispatcher(rank_capacity=50, on_overflow="drop") as layer:
        batch, handle = layer.dispatch(hidden, ids, weights)
        # experts 0 and 1 take 32 rows each
        assert batch.expert_start is not None and batch.expert_start.tolist() == [0, 32, 64, 64, 64, 64]
        assert batch.num_tokens.tolist() == [20, 20, 0, 0, 0, 0]
        out = layer.combine(stand_in(batch), handle)
        assert layer.check() == 20 and layer.check() == 0
    # without the rows of expert 4, and without other weights
    kept = ids.masked_fill(ids == 4, -1)
    with dispatcher(SETTINGS) as layer:
        assert_bit_equal(out, layer(hidden, kept, weights, stand_in))
    with dispatcher(rank_capacity=48, on_overflow="drop") as layer:
        batch, _ = layer.dispatch(hidden, ids, weights)
        assert batch.num_tokens.tolist() == [20, 16, 0, 0, 0, 0] and layer.check() == 24


@both_paths
@pytest.mark.parametrize("rank_capacity", [1, 17, 48, 1.0, 0.3, None])
def test_any_capacity_gives_what_one_process_says(rank_capacity):
    for tokens in (0, 1, TOKENS):
        arguments = inputs(tokens)
        settings = RAGGED | {"rank_capacity": rank_capacity, "on_overflow": "drop"}
        with dispatcher(settings) as layer:
            out = layer(*arguments, stand_in)
            dropped = layer.check()
        _, (expected,), without_room = in_one_process(settings, [tuple(x.cpu() for x in arguments)], stand_in)
        assert_bit_equal(out.cpu(), expected)
        assert dropped == without_room


def test_a_rank_that_is_full_is_an_error_that_says_what_to_do():
    hidden, ids, weights = inputs()
    with dispatcher(rank_capacity=32) as layer:
        with pytest.raises(
            CapacityOverflowError, match=r"rows had no room in their rank's buffer of 32 rows .* raise rank_capacity"
        ):
            layer.dispatch(hidden, ids, weights)
        assert layer.check() == 0
        assert layer(hidden[:1], ids[:1].fill_(0), weights[:1], stand_in).isfinite().all()


@pytest.mark.gpu
def test_a_full_rank_on_a_gpu_is_raised_by_the_next_dispatch_that_can_know_and_by_check():
    with torch.device("cuda"):
        hidden, ids, weights = inputs()
        ids[:] = torch.tensor([0, 1, 2])
        with dispatcher(rank_capacity=64) as layer:
            layer(hidden, ids, weights, stand_in)
            torch.cuda.synchronize()
            with pytest.raises(CapacityOverflowError, match=r"20 rows .* raise rank_capacity"):
                layer.dispatch(hidden, ids, weights)
            assert layer.check(wait=False) == 0
            layer.dispatch(hidden, ids, weights)
            with pytest.raises(CapacityOverflowError, match=r"20 rows .* raise rank_capacity"):
                layer.check()


def test_tokens_that_name_an_expert_twice_are_an_error_only_where_their_rows_have_no_room():
    hidden, ids, weights = inputs()
    ids.fill_(2)
    with dispatcher() as layer:
        assert layer(hidden, ids, weights, stand_in).isfinite().all()
    # what comes at most of distinct experts is a row of each token
    with (
        dispatcher(num_experts=1) as layer,
        pytest.raises(CapacityOverflowError, match="28 rows .* twice give rank_capacity a number"),
    ):
        layer.dispatch(hidden, ids.fill_(0), weights)


@pytest.mark.parametrize("rows", [16, 32, 96, 256])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_nothing_is_written_outside_the_rows_of_experts(rows, dtype, both_paths):
    """Of 60 rows in a buffer between guard bytes."""
    hidden, ids, _ = inputs()
    device, rows_in_expert = hidden.device, torch.empty(TOKENS, TOP_K, dtype=torch.int32)
    counts, num_tokens, starts = (Guarded(EXPERTS, dtype=torch.int32, device=device) for _ in range(3))
    ops.route(ids, rows_in_expert, counts.tensor, rows, num_tokens.tensor, None, starts.tensor)
    values, scales = Guarded(rows, HIDDEN, dtype=dtype, device=device), Guarded(2, rows, dtype=torch.float32, device=device)
    places, sources = Guarded(TOKENS, TOP_K, dtype=torch.int32, device=device), Guarded(rows, dtype=torch.int64, device=device)
    quantized = scales.tensor.mT if dtype == torch.int8 else None
    placed, came_from = places.tensor, sources.tensor
    ops.scatter(hidden, ids, rows_in_expert, values.tensor, quantized, rows=placed, sources=came_from, expert_start=starts.tensor)
    written = torch.zeros(rows, dtype=torch.bool)
    for start, count in zip(starts.tensor.tolist(), num_tokens.tensor.tolist(), strict=True):
        written[start : start + count] = True
    values.assert_only(written[:, None], "values")
    scales.assert_only(written if quantized is not None else torch.zeros_like(written), "scales")
    sources.assert_only(written, "sources")
    for buffer in (counts, num_tokens, starts, places):
        buffer.assert_only()
    assert sorted(places.tensor[places.tensor >= 0].tolist()) == written.nonzero().flatten().tolist()


def test_memory_follows_the_rows_that_can_come():
    """DeepSeek-V3 on 8 ranks at 4096 tokens: 21.9 GiB if padded, of which values, scales and sources are a third."""
    sizes: dict[str, Any] = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "max_tokens_per_rank": 4096, "world_size": 8}
    rows = [
        DispatcherConfig(**sizes, layout=layout, rank_capacity=capacity).total_rows
        for layout, capacity in (("padded", None), ("ragged", None), ("ragged", 1.5))
    ]
    assert rows == [32 * 32768, 8 * 4096 * 8 + 31 * 16, 12 * 4096 + 32 * 16]


def test_the_reference_moves_source_rows_by_offsets_in_the_ranks_buffer():
    counts = torch.tensor([[1, 2], [2, 1]], dtype=torch.int32)
    starts, _ = ragged_rows(counts.sum(0), 32)
    assert starts.tolist() == [0, 16]
    offsets = torch.tensor([[0, 16], [1, 18]], dtype=torch.int32)
    padded = torch.arange(8.0).view(2, 2, 2, 1)
    merged = torch.full((32, 1), -1.0)
    reference.move_source_rows(padded, merged, offsets, counts, True)
    assert merged[:3, 0].tolist() == [0.0, 4.0, 5.0] and merged[16:19, 0].tolist() == [2.0, 3.0, 6.0]
    assert int((merged >= 0).sum()) == 6
