"""Ranks that all hold the same tokens: each gets the sums that one rank has, to the bit, and nothing travels to the experts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from trials import install_interpreter

from moequant import ExpertBatch, MoEQuantDispatcher, OutOfStepError
from moequant.config import DispatcherConfig
from moequant.testing import run_ranks
from moequant.transport import shared
from moequant.transport.wire import Wire

RANKS, EXPERTS, TOP_K, HIDDEN, MOST = 3, 6, 4, 136, 41
SIZES: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN}
# more tokens than ranks, fewer, none; so few that all rows go to all ranks, and more
COUNTS = (MOST, 2, 0, 1, 17)
FEW = 5


def tokens_of(count: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    if kind == "absent":
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    if kind == "one expert":
        # of the second rank, by all entries of a token
        ids[:] = 3
    hidden = torch.randn(count, HIDDEN, generator=generator)
    return hidden, ids.int() if kind == "absent" else ids, torch.rand(ids.shape, generator=generator)


def experts(batch: ExpertBatch, first: int, dtype: torch.dtype) -> Tensor:
    """Of each row another multiple for each expert; NaN where there is no row."""
    assert batch.expert_start is not None
    out = torch.full(batch.values.shape, torch.nan, dtype=dtype)
    for expert, (start, count) in enumerate(zip(batch.expert_start.tolist(), batch.num_tokens.tolist(), strict=True)):
        rows = slice(start, start + count)
        wide = batch.values[rows].float()
        if batch.scales is not None:
            wide = wide * batch.scales[rows].repeat_interleave(128, 1)[:, :HIDDEN]
        out[rows] = (wide * (1.1 + first + expert)).to(dtype)
    return out


def run_all(rank: int, ranks: int, counts: tuple[int, ...] = COUNTS) -> list[str]:
    """What was wrong."""
    shared.FEW_BYTES = FEW * ranks * TOP_K * HIDDEN * 2
    wrong: list[str] = []
    local = EXPERTS // ranks
    for quant, reduce, dtype in (
        ("int8", "exact", torch.bfloat16),
        ("none", "exact", torch.float16),
        ("fp8_e4m3fn", "per_rank", torch.bfloat16),
    ):
        settings = SIZES | {"max_tokens_per_rank": MOST, "quant": quant, "reduce": reduce}
        mine = functools.partial(experts, first=rank * local, dtype=dtype)
        with (
            MoEQuantDispatcher(**settings, shared_batch=True) as dispatcher,
            # in which each rank sends them all
            MoEQuantDispatcher(**settings, layout="ragged", rank_capacity=ranks * MOST * TOP_K + 16 * local) as other,
        ):
            assert (dispatcher.config.transport, dispatcher.config.layout) == ("collective", "ragged")
            for count in counts:
                for kind in ("distinct", "absent", "one expert"):
                    tokens = tokens_of(count, kind)
                    found, expected = dispatcher(*tokens, mine), other(*tokens, mine)
                    # once more by hand, into a place of one's own
                    batch, handle = dispatcher.dispatch(*tokens)
                    place = torch.full_like(tokens[0], torch.nan)
                    dispatcher.combine(mine(batch), handle, out=place)
                    if not (torch.equal(found, expected) and torch.equal(place, expected)):
                        wrong.append(f"{quant} {reduce} {count} {kind}")
    return wrong


def run_unlike(rank: int, ranks: int) -> list[str]:
    """What is said where ranks have other tokens, and where they went to other calls; what travelled in a dispatch."""
    said: list[str] = []
    with MoEQuantDispatcher(**SIZES, max_tokens_per_rank=8, quant="none", shared_batch=True) as dispatcher:
        sent: list[int] = []
        gather, exchange = Wire.all_gather, Wire.all_to_all
        Wire.all_gather = lambda self, out, x: sent.append(x.nbytes) or gather(self, out, x)  # type: ignore[method-assign]
        Wire.all_to_all = lambda self, out, x, *splits: sent.append(x.nbytes) or exchange(self, out, x, *splits)  # type: ignore[method-assign]
        dispatcher.dispatch(*tokens_of(8, "distinct"))
        said.append(str(max(sent)))
        Wire.all_gather, Wire.all_to_all = gather, exchange  # type: ignore[method-assign]
        hidden, ids, weights = tokens_of(8, "distinct")
        try:
            dispatcher.dispatch(hidden, ids.flip(1) if rank == 1 else ids, weights)
        except OutOfStepError as error:
            said.append(str(error).partition(":")[0])
    return said


def run_both(rank: int, ranks: int) -> tuple[list[str], list[str]]:
    return run_all(rank, ranks), run_unlike(rank, ranks)


def test_all_ranks_get_the_sums_of_one_and_other_tokens_are_noticed():
    results = run_ranks(run_both, RANKS)
    assert [wrong for wrong, _ in results] == [[]] * RANKS
    # two numbers of a call, and two of its tokens
    assert [said for _, said in results] == [
        ["16", "with shared_batch=True all ranks give the same tokens, and these gave others"]
    ] * RANKS


@pytest.mark.usefixtures("interpreted")
def test_kernels_give_all_ranks_the_sums_of_one():
    assert run_ranks(run_all, RANKS, (FEW + 2, 1), setup=install_interpreter) == [[]] * RANKS


def test_one_rank_shares_with_nobody():
    tokens = tokens_of(9, "one expert")
    mine = functools.partial(experts, first=0, dtype=torch.bfloat16)
    with MoEQuantDispatcher(**SIZES, max_tokens_per_rank=9, shared_batch=True, device="cpu") as dispatcher:
        assert dispatcher.config.transport == "local"
        assert dispatcher(*tokens, mine).isfinite().all()


def test_a_rank_has_room_for_all_rows_of_its_experts():
    config = DispatcherConfig(**SIZES, max_tokens_per_rank=10, world_size=3, shared_batch=True)
    assert (config.layout, config.total_rows, config.num_batches) == ("ragged", 48 + 16, 1)
    # rows come back in two buffers, of 12 tokens that 3 ranks can share and, where they are few, all to all
    specs = shared.SharedTransport.buffer_specs(config)
    assert (specs.sent.shape, specs.received.shape) == ((12 * TOP_K, HIDDEN), (10 * 3 * TOP_K, HIDDEN))


@pytest.mark.parametrize(
    "setting", [{"transport": "symmetric"}, {"exchange": "packed"}, {"rank_capacity": 64}, {"capacity": 64}], ids=str
)
def test_what_a_shared_batch_does_not_have_is_refused(setting):
    with pytest.raises(ValueError, match="shared_batch=True goes over transport .* leave out exchange, capacity and rank_capacity"):
        DispatcherConfig(**SIZES, max_tokens_per_rank=10, world_size=3, shared_batch=True, **setting)


def run_gpus(rank: int, ranks: int) -> list[str]:
    """What was wrong, eager and replayed from a graph with other tokens."""
    torch.cuda.set_device(rank)
    shared.FEW_BYTES = FEW * ranks * TOP_K * HIDDEN * 2
    wrong: list[str] = []
    for reduce in ("exact", "per_rank"):
        settings = SIZES | {"max_tokens_per_rank": MOST, "quant": "none", "reduce": reduce, "device": f"cuda:{rank}"}
        room = ranks * MOST * TOP_K + 16 * EXPERTS // ranks
        with (
            MoEQuantDispatcher(**settings, shared_batch=True) as dispatcher,
            MoEQuantDispatcher(**settings, transport="collective", exchange="packed", layout="ragged", rank_capacity=room) as other,
        ):
            for count in (MOST, 2, 1, 17):
                kept = on_gpu(tokens_of(count, "distinct"))
                dispatcher(*kept, values_of)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    out = dispatcher(*kept, values_of)
                for kind in ("distinct", "one expert"):
                    tokens = on_gpu(tokens_of(count, kind))
                    expected = other(*tokens, values_of)
                    for place, new in zip(kept, tokens, strict=True):
                        place.copy_(new)
                    graph.replay()
                    if not torch.equal(out, expected) or not torch.equal(dispatcher(*tokens, values_of), expected):
                        wrong.append(f"{reduce} {count} {kind}")
                graph.reset()
    return wrong


def on_gpu(tokens: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, ids, weights = (tensor.cuda() for tensor in tokens)
    return hidden, ids, weights


def values_of(batch: ExpertBatch) -> Tensor:
    return batch.values


@pytest.mark.multigpu
def test_gpus_get_the_sums_of_one_and_a_graph_holds_them():
    assert run_ranks(run_gpus, 2, backend="cpu:gloo,cuda:nccl") == [[]] * 2
