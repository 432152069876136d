"""Whole layers whose experts push their rows, in one piece, in waves and in halves, against the same layer step by step.

On a CPU in Triton's interpreter, in processes that share memory; on GPUs (`multigpu`) also in graphs, with late ranks and lost ones.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from trials import count_wrong, install_interpreter, patience

from moequant import CallOrderError, GroupedExperts, MoEQuantDispatcher, PeerTimeoutError
from moequant.testing import assert_bit_equal, run_ranks

BACKEND = "cpu:gloo,cuda:nccl"


LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])


def settings_for(
    ranks: int, tokens: int, hidden: int, quant: str, local_experts: int = 2, layout: str = "padded"
) -> dict[str, Any]:
    settings = {"num_experts": max(3, local_experts * ranks), "top_k": 3, "hidden_size": hidden, "max_tokens_per_rank": tokens}
    return settings | {"quant": quant, "transport": "symmetric", "slots": 2, "layout": layout}


def experts_of(rank: int, settings: dict[str, Any], ranks: int, inner: int, device: str) -> GroupedExperts:
    generator = torch.Generator().manual_seed(100 + rank)
    local, hidden = settings["num_experts"] // ranks, settings["hidden_size"]
    w13 = torch.randn(local, 2 * inner, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(local, hidden, inner, generator=generator) * inner**-0.5
    dtype = torch.float16 if settings["quant"] == "float16" else torch.bfloat16
    return GroupedExperts.from_weights(w13.to(device, dtype), w2.to(device, dtype), quant=settings["quant"])


def tokens_of(seed: int, settings: dict[str, Any], tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, settings["num_experts"], generator=generator).argsort(1)[:, : settings["top_k"]].contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    hidden = torch.randn(tokens, settings["hidden_size"], generator=generator).bfloat16()
    return hidden.to(device), ids.to(device), torch.rand(ids.shape, generator=generator).to(device)


def check_given_output(dispatcher: MoEQuantDispatcher, tokens: Any, experts: GroupedExperts, expected: Any, **how: Any) -> None:
    """Rows of a wider tensor, of which nothing else is written."""
    hidden, ids, weights = tokens
    wide = torch.full((len(expected), expected.shape[1] + 8), 7.0, dtype=expected.dtype, device=expected.device)
    out = wide[:, :-8]
    assert dispatcher(hidden, ids, weights, experts, out=out, **how) is out
    assert_bit_equal(out, expected, f"given, {how}")
    assert bool((wide[:, -8:] == 7).all())


def run_ways(rank: int, ranks: int, quant: str, layout: str, sizes: tuple[int, int, int], device: str) -> None:
    """The layer with and without overlap, in waves and in halves; other ranks have other numbers of tokens, the last one has none."""
    (most, hidden, inner), device = sizes, device.format(rank=rank)
    settings = settings_for(ranks, most, hidden, quant, layout=layout)
    experts = experts_of(rank, settings, ranks, inner, device)
    tokens = tokens_of(rank, settings, 0 if rank and rank == ranks - 1 else most - rank, device)
    with MoEQuantDispatcher(**settings, overlap=False, device=device) as dispatcher:
        expected = dispatcher(*tokens, experts)
        check_given_output(dispatcher, tokens, experts, expected)
    assert expected.shape == tokens[0].shape and bool(expected.isfinite().all())
    with MoEQuantDispatcher(**settings, device=device) as dispatcher:
        # of a rank with two experts the first one is all but the last
        for chunks, first in dict.fromkeys(((1, 0), (2, 0), (1, 1), (1, settings["num_experts"] // ranks - 1))):
            out = dispatcher(*tokens, experts, chunks=chunks, first_experts=first)
            assert_bit_equal(out, expected, f"{chunks} chunks, {first} experts first")
            check_given_output(dispatcher, tokens, experts, expected, chunks=chunks, first_experts=first)
        assert_bit_equal(dispatcher(*tokens, experts, slot=1, first_experts=1), expected, "in the second slot")
        with pytest.raises(ValueError, match="chunks must be 1, or 2 with"):
            dispatcher(*tokens, experts, chunks=3)
        refusals: list[dict[str, Any]] = [
            {"first_experts": settings["num_experts"] // ranks},
            {"first_experts": -1},
            {"chunks": 2, "first_experts": 1},
        ]
        for refused in refusals:
            with pytest.raises(ValueError, match="first_experts must be (from 0 to .* only with GroupedExperts|at least 0)"):
                dispatcher(*tokens, experts, **refused)


# each layout with one rank, two and more, and with each kind of format
@pytest.mark.parametrize(
    ("ranks", "quant", "layout"),
    [
        (1, "fp8_e4m3fn", "padded"),
        (1, "fp8_e4m3fn", "ragged"),
        (2, "int8", "padded"),
        (2, "fp8_e4m3fn", "ragged"),
        (2, "float16", "padded"),
        (2, "float16", "ragged"),
        (4, "fp8_e4m3fn", "padded"),
        (8, "int8", "ragged"),
    ],
)
def test_pushed_waved_and_halved_layers_have_the_bits_of_one_step_after_the_other(layout, ranks, quant, interpreted):
    run_ranks(run_ways, ranks, quant, layout, (9, 136, 72), "cpu", setup=install_interpreter)


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8", "none", "float16"])
@LAYOUTS
def test_layers_on_gpus_have_the_bits_of_one_step_after_the_other(layout, ranks, quant):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_ways, ranks, quant, layout, (700, 1032, 384), "cuda:{rank}", backend=BACKEND)


IN_ONE_PIECE: dict[str, Any] = {}
IN_HALVES, IN_WAVES = {"chunks": 2}, {"first_experts": 1}
WAYS = pytest.mark.parametrize("way", [IN_HALVES, IN_WAVES], ids=["halves", "waves"])


def run_replays(rank: int, ranks: int, replays: int, late: bool, way: dict[str, Any], layout: str) -> int:
    """Replays of a layer whose rows are pushed, against the layer without overlap."""
    device, pool_size = f"cuda:{rank}", 64
    settings = settings_for(ranks, 256, 512, "fp8_e4m3fn", local_experts=4, layout=layout)
    experts = experts_of(rank, settings, ranks, 256, device)
    inputs = [tokens_of(1000 * rank + number, settings, 256, device) for number in range(pool_size)]
    pool = [torch.stack(tensors) for tensors in zip(*inputs, strict=True)]
    with MoEQuantDispatcher(**settings, overlap=False) as dispatcher:
        expected = torch.stack([dispatcher(*tokens, experts) for tokens in inputs])
    with MoEQuantDispatcher(**settings) as dispatcher:

        def layer(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return dispatcher(hidden, ids, weights, experts, **way)

        return count_wrong(rank, ranks, pool, expected, layer, replays, late)


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("layout", "way"),
    [("padded", IN_HALVES), ("padded", IN_WAVES), ("ragged", IN_ONE_PIECE), ("ragged", IN_HALVES), ("ragged", IN_WAVES)],
    ids=str,
)
def test_replays_of_a_layer_change_no_bit(layout, way, ranks, late):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    replays = 1000 if late else int(os.environ.get("MOEQUANT_REPLAYS", "2000"))
    assert run_ranks(run_replays, ranks, replays, late, way, layout, backend=BACKEND) == [0] * ranks


def two_layers(
    dispatcher: MoEQuantDispatcher,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    experts: GroupedExperts,
    way: dict[str, Any],
) -> None:
    for _ in range(2):
        dispatcher(*tokens, experts, **way)
        dispatcher.check()


def run_until_lost(rank: int, ranks: int, device: str, way: dict[str, Any]) -> tuple[int | None, float] | None:
    """The last rank dies; the others return whom they blame, and how long it took, in time limits."""
    device = device.format(rank=rank)
    settings = settings_for(ranks, 8, 128, "fp8_e4m3fn")
    experts = experts_of(rank, settings, ranks, 128, device)
    tokens = tokens_of(rank, settings, 8, device)
    with MoEQuantDispatcher(**settings, device=device) as dispatcher:
        # the first one compiles
        dispatcher(*tokens, experts, **way)
        dispatcher.check()
        start = time.monotonic()
        dispatcher(*tokens, experts, **way)
        dispatcher.check()
        timeout = patience(time.monotonic() - start)
    dispatcher = MoEQuantDispatcher(**settings, device=device, timeout=timeout)
    dispatcher(*tokens, experts, **way)
    dispatcher.check()
    if rank == ranks - 1:
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="of the group did not") as raised:
        two_layers(dispatcher, tokens, experts, way)
    took = time.monotonic() - start
    dispatcher.close()
    return raised.value.rank, took / timeout


def check_survivors(results: list[Any]) -> None:
    for blamed, took in results[:-1]:
        assert blamed == len(results) - 1
        # one limit: after a fault no later wait lasts
        assert took < 2.0


@WAYS
def test_survivors_of_a_layer_on_two_streams_blame_the_lost_rank(way, interpreted):
    check_survivors(run_ranks(run_until_lost, 3, "cpu", way, may_die=(2,), setup=install_interpreter))


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [3, 4, 8])
@WAYS
def test_survivors_on_gpus_of_a_layer_on_two_streams_blame_the_lost_rank(way, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    check_survivors(run_ranks(run_until_lost, ranks, "cuda:{rank}", way, may_die=(ranks - 1,), backend=BACKEND))


def run_second_without_first(rank: int, ranks: int) -> None:
    settings = settings_for(ranks, 4, 64, "int8")
    tokens = tokens_of(rank, settings, 4, "cpu")
    with MoEQuantDispatcher(**settings, device="cpu") as dispatcher:
        _, handle = dispatcher.dispatch(*tokens)
        with pytest.raises(CallOrderError, match="dispatch_second came without dispatch_first"):
            dispatcher.dispatch_second(handle)


def test_a_second_wave_without_a_first_is_refused(interpreted):
    run_ranks(run_second_without_first, 1, setup=install_interpreter)
