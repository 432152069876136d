"""The collective transport on gloo and NCCL: the bits of one process, whatever the ranks, the exchange and the settings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trials import SHAPES, check_trial, install_interpreter, stand_in

from moequant import CapacityOverflowError, ConfigMismatchError, MoEQuantDispatcher, ops
from moequant.testing import assert_bit_equal, in_one_process, run_ranks

EXCHANGES = ("padded", "packed")
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
REDUCES = ("exact", "per_rank")


def run_trials(rank: int, ranks: int, trials: int, layout: str, device: str = "cpu", tokens: int = 40) -> None:
    for trial in range(trials):
        for exchange in EXCHANGES:
            transport = {"transport": "collective", "exchange": exchange}
            check_trial(rank, ranks, trial, transport, None, device, tokens=tokens, layout=layout)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@LAYOUTS
def test_random_settings_have_the_bits_of_one_process(ranks, layout):
    run_ranks(run_trials, ranks, 2 * SHAPES, layout)


def run_interpreted(rank: int, ranks: int, trials: int, layout: str) -> None:
    assert ops.uses_kernels(torch.empty(0))
    run_trials(rank, ranks, trials, layout, tokens=20)


@pytest.mark.parametrize(("ranks", "trials", "layout"), [(2, 6, "padded"), (2, 6, "ragged"), (8, 2, "ragged")])
def test_interpreted_kernels_have_the_bits_of_one_process(ranks, trials, layout, interpreted):
    run_ranks(run_interpreted, ranks, trials, layout, setup=install_interpreter)


def run_subgroups(rank: int, ranks: int) -> None:
    # odd and even ranks: group ranks differ from global ranks
    members = [[0, 2], [1, 3]]
    groups: list[Any] = [dist.new_group(group) for group in members]
    mine = rank % 2
    for trial in range(mine, 20, 2):
        for exchange in EXCHANGES:
            check_trial(members[mine].index(rank), 2, trial, {"transport": "collective", "exchange": exchange}, groups[mine], "cpu")
    with pytest.raises(ValueError, match="not a member of the group"):
        MoEQuantDispatcher(groups[1 - mine], num_experts=4, top_k=1, hidden_size=8, max_tokens_per_rank=1)


def test_two_groups_of_two_in_a_world_of_four_work_apart():
    run_ranks(run_subgroups, 4)


def run_repeats(rank: int, ranks: int, layout: str) -> None:
    """Many calls of one dispatcher on two slots: nothing of an earlier call may show."""
    sizes: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 130, "max_tokens_per_rank": 30, "layout": layout}
    for exchange, reduce in itertools.product(EXCHANGES, REDUCES):
        settings: dict[str, Any] = sizes | {"reduce": reduce}
        with MoEQuantDispatcher(**settings, exchange=exchange, transport="collective", slots=2) as dispatcher:
            for trial in range(10):
                generator = torch.Generator().manual_seed(trial)
                inputs = []
                for _ in range(ranks):
                    tokens = int(torch.randint(0, 31, (1,), generator=generator))
                    ids = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :2].int()
                    hidden = torch.randn(tokens, 130, generator=generator).bfloat16()
                    inputs.append([hidden, ids, torch.rand(tokens, 2, generator=generator)])
                _, outputs, _ = in_one_process(settings, inputs, stand_in)
                batch, handle = dispatcher.dispatch(*inputs[rank], slot=trial % 2)
                out = dispatcher.combine(stand_in(batch, rank * 2), handle)
                assert_bit_equal(out, outputs[rank])
                given = torch.full_like(out, torch.nan)
                hidden, ids, weights = inputs[rank]
                whole = dispatcher(hidden, ids, weights, lambda batch: stand_in(batch, rank * 2), slot=trial % 2, out=given)
                assert whole is given
                assert_bit_equal(given, outputs[rank])


@LAYOUTS
def test_repeated_calls_on_two_slots_leave_nothing_behind(layout):
    run_ranks(run_repeats, 2, layout)


def run_repeated_experts(rank: int, ranks: int, layout: str) -> int:
    """Tokens that name one expert twice: packed places every row that M or R holds, padded those within C of each source, and says so."""
    dropped = []
    for exchange in EXCHANGES:
        with MoEQuantDispatcher(
            num_experts=2,
            top_k=2,
            hidden_size=16,
            max_tokens_per_rank=16,
            exchange=exchange,
            layout=layout,
            on_overflow="drop",
        ) as dispatcher:
            tokens = 16 if rank == 0 else 0
            ids = torch.zeros(tokens, 2, dtype=torch.int32)
            out = dispatcher(
                torch.ones(tokens, 16),
                ids,
                torch.ones(tokens, 2),
                lambda batch: stand_in(batch, dispatcher.config.num_local_experts * rank),
            )
            dropped.append(dispatcher.check())
            if rank == 0:
                reached = 16 if exchange == "packed" else 8
                assert out[:, 0].tolist() == [2.0] * reached + [0.0] * (16 - reached)
    assert dropped == [16, 0]
    return 0


@LAYOUTS
def test_tokens_that_name_an_expert_twice_are_placed_or_reported(layout):
    run_ranks(run_repeated_experts, 2, layout)


def run_what_the_message_names(rank: int, ranks: int, layout: str, limit: str) -> None:
    """Every token names one expert twice: of 64 rows each rank may send 16 in the padded exchange, whatever the limit."""
    settings: dict[str, Any] = {"num_experts": 2, "top_k": 2, "hidden_size": 16, "max_tokens_per_rank": 16, "quant": "none"}
    settings |= {"layout": layout, limit: 64}
    tokens = torch.ones(16, 16).bfloat16(), torch.zeros(16, 2, dtype=torch.int32), torch.ones(16, 2)
    with MoEQuantDispatcher(**settings, exchange="padded") as dispatcher:
        message = rf'32 rows .* 64 rows, or among the 16 of an expert .* twice give {limit} a number and use exchange="packed"\)'
        with pytest.raises(CapacityOverflowError, match=message):
            dispatcher.dispatch(*tokens)
    with MoEQuantDispatcher(**settings, exchange="packed") as dispatcher:
        assert (dispatcher(*tokens, lambda batch: batch.values) == 2).all() and dispatcher.check() == 0


@pytest.mark.parametrize("layout, limit", [("padded", "capacity"), ("ragged", "rank_capacity")])
def test_what_the_message_names_gives_repeated_experts_room(layout, limit):
    run_ranks(run_what_the_message_names, 2, layout, limit)


SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 64, "max_tokens_per_rank": 8}


def run_disagreement(rank: int, ranks: int) -> None:
    with pytest.raises(ConfigMismatchError, match=r"ranks \d and \d of the group disagree on hidden_size: \d+ and \d+; give all"):
        MoEQuantDispatcher(**{**SETTINGS, "hidden_size": 64 + 64 * rank})
    # the rank whose settings are wrong says why, and the other is not left waiting
    bad = {**SETTINGS, "top_k": 0} if rank == 1 else SETTINGS
    with pytest.raises(ValueError, match="top_k must be a positive integer, got 0") as info:
        MoEQuantDispatcher(**bad)
    assert isinstance(info.value, ConfigMismatchError) == (rank == 0)
    with pytest.raises(ValueError, match="multiple of the number of ranks, got 3 experts on 2 ranks"):
        MoEQuantDispatcher(**{**SETTINGS, "num_experts": 3})
    with pytest.raises(ValueError, match='transport "local" serves one rank, got a group of 2'):
        MoEQuantDispatcher(dist.group.WORLD, **SETTINGS, transport="local")
    # each rank for itself, which the other one doesn't have to come to
    if rank == 1:
        with MoEQuantDispatcher(**SETTINGS, transport="local") as alone:
            assert alone.config.num_local_experts == SETTINGS["num_experts"]


def test_ranks_that_disagree_on_settings_raise_everywhere():
    run_ranks(run_disagreement, 2)


def run_nccl(rank: int, ranks: int, trials: int, layout: str) -> None:
    run_trials(rank, ranks, trials, layout, f"cuda:{rank}")


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
@LAYOUTS
def test_random_settings_on_nccl_have_the_bits_of_one_process(ranks, layout):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_nccl, ranks, 25, layout, backend="nccl")


def run_graph(rank: int, ranks: int, reduce: str, layout: str) -> None:
    device = f"cuda:{rank}"
    settings: dict[str, Any] = {
        "num_experts": 2 * ranks,
        "top_k": 2,
        "hidden_size": 384,
        "max_tokens_per_rank": 32,
        "layout": layout,
        "reduce": reduce,
    }

    def fresh(seed: int) -> list[list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        inputs = []
        for _ in range(ranks):
            ids = torch.rand(32, 2 * ranks, generator=generator).argsort(1)[:, :2].int()
            ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
            inputs.append([torch.randn(32, 384, generator=generator).bfloat16(), ids, torch.rand(32, 2, generator=generator)])
        return inputs

    with MoEQuantDispatcher(**settings, transport="collective", exchange="padded") as dispatcher:
        static: Any = [tensor.to(device) for tensor in fresh(0)[rank]]
        dispatcher(static[0], static[1], static[2], lambda batch: stand_in(batch, 2 * rank))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = dispatcher(static[0], static[1], static[2], lambda batch: stand_in(batch, 2 * rank))
        for seed in range(1, 20):
            inputs = fresh(seed)
            for target, source in zip(static, inputs[rank], strict=True):
                target.copy_(source)
            graph.replay()
            _, outputs, _ = in_one_process(settings, inputs, stand_in)
            assert_bit_equal(out.cpu(), outputs[rank])
    with MoEQuantDispatcher(**settings, transport="collective", exchange="packed") as dispatcher:
        packed = torch.cuda.CUDAGraph()
        with (
            pytest.raises(RuntimeError, match='use exchange="padded"'),
            torch.cuda.graph(packed, capture_error_mode="thread_local"),
        ):
            dispatcher.dispatch(*static)


@pytest.mark.multigpu
@pytest.mark.parametrize("reduce", REDUCES)
@LAYOUTS
def test_a_graph_of_the_padded_exchange_replays_with_new_inputs(reduce, layout):
    run_ranks(run_graph, 2, reduce, layout, backend="nccl")
