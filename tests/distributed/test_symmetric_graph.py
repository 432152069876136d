"""CUDA graphs of the symmetric transport, replayed many times over many inputs, and input that no user should give.

MOEQUANT_REPLAYS sets how many replays there are; the default is small.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trials import count_wrong, stand_in

from moequant import CapacityOverflowError, InvalidExpertIdError, MoEQuantDispatcher
from moequant.testing import assert_bit_equal, in_one_process, run_ranks

REPLAYS = int(os.environ.get("MOEQUANT_REPLAYS", "2000"))
POOL, TOKENS, HIDDEN, TOP_K = 64, 16, 256, 4
BACKEND = "cpu:gloo,cuda:nccl"
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
pytestmark = pytest.mark.multigpu


def settings_for(ranks: int, reduce: str = "exact", layout: str = "padded") -> dict[str, Any]:
    return {
        "num_experts": 8 * ranks,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "max_tokens_per_rank": TOKENS,
        "reduce": reduce,
        "layout": layout,
    }


def pool_of(rank: int, ranks: int, hot: bool) -> list[torch.Tensor]:
    """POOL inputs of a rank, stacked: hidden states, ids, weights. hot: in every second input all tokens name expert 0 first."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(POOL, TOKENS, 8 * ranks, generator=generator)
    if hot:
        ids[::2, :, 0] = -1.0
    ids = ids.argsort(2)[..., :TOP_K].contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    hidden = torch.randn(POOL, TOKENS, HIDDEN, generator=generator).bfloat16()
    tensors = [hidden, ids, torch.rand(POOL, TOKENS, TOP_K, generator=generator)]
    return [tensor.to(f"cuda:{rank}") for tensor in tensors]


def run_replays(rank: int, ranks: int, replays: int, late: bool, reduce: str, layout: str, overlap: bool) -> int:
    """Replays over the pool, against what the collective transport gives. overlap: combine pushes rows, and pulls them otherwise."""
    settings, first = settings_for(ranks, reduce, layout), 8 * rank
    pool = pool_of(rank, ranks, hot=True)
    padded: dict[str, Any] = {**settings, "layout": "padded"}
    with MoEQuantDispatcher(**padded, transport="collective", exchange="padded") as dispatcher:
        expected = torch.stack([dispatcher(h, i, w, lambda batch: stand_in(batch, first)) for h, i, w in zip(*pool, strict=True)])
    with MoEQuantDispatcher(**settings, transport="symmetric", overlap=overlap) as dispatcher:
        out = torch.empty_like(expected[0])

        def layer(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            batch, handle = dispatcher.dispatch(hidden, ids, weights)
            output = dispatcher.output_buffer().copy_(stand_in(batch, first))
            out.fill_(torch.nan)
            return dispatcher.combine(output, handle, out=out)

        return count_wrong(rank, ranks, pool, expected, layer, replays, late)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("reduce", "overlap"), [("exact", True), ("exact", False), ("per_rank", True)])
@LAYOUTS
def test_replays_over_a_pool_of_inputs_give_what_the_collective_transport_gives(ranks, reduce, overlap, layout):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    assert run_ranks(run_replays, ranks, REPLAYS, False, reduce, layout, overlap, backend=BACKEND) == [0] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@LAYOUTS
@pytest.mark.parametrize("overlap", [True, False])
def test_a_rank_that_is_late_at_random_changes_no_bit(ranks, layout, overlap):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    assert run_ranks(run_replays, ranks, 1000, True, "exact", layout, overlap, backend=BACKEND) == [0] * ranks


def run_hostile_ids(rank: int, ranks: int, trials: int, layout: str) -> None:
    """Ids from all of int32 or int64: none becomes an address, and all are counted."""
    device, local, settings = f"cuda:{rank}", 8, settings_for(ranks, layout=layout)
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial * ranks + rank)
        dtype = (torch.int32, torch.int64)[trial % 2]
        limits = torch.iinfo(dtype)
        ids = torch.rand(TOKENS, 8 * ranks, generator=generator).argsort(1)[:, :TOP_K].to(dtype)
        wild = torch.randint(limits.min, limits.max, ids.shape, generator=generator, dtype=dtype)
        edges = torch.tensor([limits.min, limits.max, -2, 8 * ranks, 2**31 - 1, -(2**31)], dtype=torch.int64).to(dtype)
        wild = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, wild, edges[torch.randint(0, 6, ids.shape)])
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, wild, ids)
        tamed = torch.where((ids >= 0) & (ids < 8 * ranks), ids, -1)
        invalid = int(((tamed < 0) & (ids != -1)).sum())
        hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
        weights = torch.rand(TOKENS, TOP_K, generator=generator)
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, [hidden, tamed.long(), weights])
        dispatcher = MoEQuantDispatcher(**settings, transport="symmetric", slots=2)
        # canaries: rows of the other slot, and rows that are not valid
        for slot in dispatcher._slots:
            slot.buffers.values.view(torch.uint8).fill_(0x55)
        dist.barrier()
        batch, handle = dispatcher.dispatch(hidden.to(device), ids.to(device), weights.to(device))
        out = dispatcher.combine(stand_in(batch, local * rank), handle)
        if invalid:
            with pytest.raises(InvalidExpertIdError, match=f"{invalid} entries"):
                dispatcher.check()
        expected, outputs, _ = in_one_process(settings, everyone, stand_in)
        assert_bit_equal(batch.num_tokens.cpu(), expected.num_tokens[local * rank : local * (rank + 1)])
        assert_bit_equal(out.cpu(), outputs[rank])
        assert bool((dispatcher._slots[1].buffers.values.view(torch.uint8) == 0x55).all())
        values = batch.values.view(torch.uint8)
        for expert in range(local):
            batch.rows_of(values, expert).fill_(0x55)
        assert bool((values == 0x55).all()), "rows that belong to no expert"
        dispatcher.close()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@LAYOUTS
def test_hostile_ids_are_counted_and_never_addresses(ranks, layout):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_hostile_ids, ranks, 20, layout, backend=BACKEND)


def run_slots(rank: int, ranks: int, layout: str) -> None:
    """Two micro-batches in flight, each in its slot, the halves of one around those of the other; and an overflow."""
    device, local, inputs = f"cuda:{rank}", 8, [pool_of(peer, ranks, hot=False) for peer in range(ranks)]
    settings = settings_for(ranks, layout=layout)
    with MoEQuantDispatcher(**settings, transport="symmetric", slots=2) as dispatcher:
        for trial in range(20):
            pair = [[tensor[2 * trial + slot].to(device) for tensor in inputs[rank]] for slot in range(2)]
            handles = [dispatcher.dispatch_send(*pair[slot], slot=slot) for slot in range(2)]
            outputs = [stand_in(dispatcher.dispatch_recv(handle), local * rank) for handle in handles]
            for output, handle in zip(outputs, handles, strict=True):
                dispatcher.combine_send(output, handle)
            sums = [dispatcher.combine_recv(handle) for handle in reversed(handles)][::-1]
            for slot in range(2):
                everyone = [[tensor[2 * trial + slot].cpu() for tensor in theirs] for theirs in inputs]
                assert_bit_equal(sums[slot].cpu(), in_one_process(settings, everyone, stand_in)[1][rank])
    settings["rank_capacity" if layout == "ragged" else "capacity"] = 16
    with MoEQuantDispatcher(**settings, transport="symmetric") as dispatcher:
        hidden, ids, weights = (tensor[0].to(device) for tensor in inputs[rank])
        dispatcher.dispatch(hidden, torch.zeros_like(ids), weights)
        with pytest.raises(CapacityOverflowError):
            dispatcher.check()


@LAYOUTS
def test_two_slots_in_flight_do_not_disturb_each_other(layout):
    run_ranks(run_slots, 2, layout, backend=BACKEND)


def run_auto(rank: int, ranks: int) -> str:
    with MoEQuantDispatcher(**settings_for(ranks)) as dispatcher:
        return dispatcher.config.transport


def test_auto_is_symmetric_between_gpus_of_one_host():
    assert run_ranks(run_auto, 2, backend=BACKEND) == ["symmetric"] * 2


def run_other_graphs(rank: int, ranks: int) -> None:
    """Graphs of 4 and of 16 tokens, captured one after the other: a rank replays the one, its fellow the other, or calls eagerly."""
    settings, first = settings_for(ranks), 8 * rank
    inputs = [[tensor[0] for tensor in pool_of(peer, ranks, hot=False)] for peer in range(ranks)]
    with MoEQuantDispatcher(**settings, transport="symmetric") as dispatcher:

        def layer(tokens: int) -> torch.Tensor:
            hidden, ids, weights = (tensor[:tokens].to(f"cuda:{rank}") for tensor in inputs[rank])
            return dispatcher(hidden, ids, weights, lambda batch: stand_in(batch, first))

        graphs, outs = {}, {}
        for tokens in (4, 16):
            layer(tokens)
            torch.cuda.synchronize()
            graphs[tokens] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[tokens], capture_error_mode="thread_local"):
                outs[tokens] = layer(tokens)
        for turn in range(12):
            sizes = [(4, 16)[(peer + turn) % 2] for peer in range(ranks)]
            if (rank + turn) % 3:
                graphs[sizes[rank]].replay()
                out = outs[sizes[rank]]
            else:
                out = layer(sizes[rank])
            everyone = [[tensor[:tokens].cpu() for tensor in theirs] for tokens, theirs in zip(sizes, inputs, strict=True)]
            assert_bit_equal(out.cpu(), in_one_process(settings, everyone, stand_in)[1][rank], f"turn {turn}")
        assert dispatcher.check() == 0


def test_ranks_that_replay_other_graphs_or_none_are_in_step():
    run_ranks(run_other_graphs, 2, backend=BACKEND)
