"""What ranks that are left learn of one that is lost or late, and that they can go on without it.

On a CPU in Triton's interpreter, in processes that share memory; on GPUs (`multigpu`) the same.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from trials import install_interpreter, patience, stand_in

from moequant import MoEQuantDispatcher, PeerTimeoutError
from moequant.testing import assert_bit_equal, in_one_process, run_ranks

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])


def settings_for(ranks: int, layout: str) -> dict[str, Any]:
    """For so many ranks, and for one less."""
    return {"num_experts": ranks * (ranks - 1), "top_k": 2, "hidden_size": 96, "max_tokens_per_rank": 8, "layout": layout}


def tokens_of(rank: int, experts: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(8, experts, generator=generator).argsort(1)[:, :2].contiguous()
    hidden, weights = torch.randn(8, 96, generator=generator).bfloat16(), torch.rand(8, 2, generator=generator)
    return [hidden.to(device), ids.to(device), weights.to(device)]


def two_calls(dispatcher: MoEQuantDispatcher, inputs: list[torch.Tensor], output: torch.Tensor) -> None:
    for _ in range(2):
        _, handle = dispatcher.dispatch(*inputs)
        dispatcher.combine(output, handle)
        dispatcher.check()


def run_with_a_lost_rank(
    rank: int, ranks: int, how: str, layout: str, device: str, store: str
) -> tuple[int | None, float, bool] | None:
    """The last rank is lost, or late. The others return whom they blame, how long it took, in time limits, and whether their sums became
    NaN."""
    device = device.format(rank=rank)
    settings = settings_for(ranks, layout)
    inputs = tokens_of(rank, settings["num_experts"], device)
    local = settings["num_experts"] // ranks
    with MoEQuantDispatcher(**settings, transport="symmetric", device=device) as dispatcher:
        output = stand_in(dispatcher.dispatch(*inputs)[0], rank * local)
        start = time.monotonic()
        two_calls(dispatcher, inputs, output)
        # of one call
        timeout = patience((time.monotonic() - start) / 2)
    dispatcher = MoEQuantDispatcher(**settings, transport="symmetric", device=device, timeout=timeout)
    _, handle = dispatcher.dispatch(*inputs)
    dispatcher.combine(output, handle)
    if rank == ranks - 1:
        if how == "killed":
            os._exit(1)
        if how == "killed after dispatch":
            dispatcher.dispatch(*inputs)
            os._exit(1)
        # until the others have given up
        dist.barrier()
        return None
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="of the group did not") as raised:
        two_calls(dispatcher, inputs, output)
    took = time.monotonic() - start
    # what was queued before anybody noticed, or is in a graph
    out, slot = torch.zeros_like(inputs[0]), dispatcher._slots[0]
    dispatcher._transport.combine(output, inputs[2], out, slot, slot.take(len(out)).rows)
    # a fault stays, and later calls return at once
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="lost a rank earlier"):
        dispatcher.dispatch(*inputs)
    assert time.monotonic() - start < timeout / 2
    dispatcher.close()
    if how == "late":
        dist.barrier()
    else:
        go_on(rank, ranks - 1, settings, device, store)
    return raised.value.rank, took / timeout, bool(out.isnan().all())


def run_replays_with_a_lost_rank(rank: int, ranks: int, device: str) -> int | None:
    """The last rank goes while the others replay a graph (on a CPU, where there is none: its launches), which calls nothing of the
    dispatcher. Returns whom a check that doesn't wait blames."""
    device, settings = device.format(rank=rank), settings_for(ranks, "padded")
    hidden, ids, weights = tokens_of(rank, settings["num_experts"], device)
    with MoEQuantDispatcher(**settings, transport="symmetric", device=device) as dispatcher:
        start = time.monotonic()
        dispatcher(hidden, ids, weights, stand_in)
        dispatcher.check()
        timeout = patience(time.monotonic() - start)
    dispatcher = MoEQuantDispatcher(**settings, transport="symmetric", device=device, timeout=timeout)
    out, slot, transport = torch.zeros_like(hidden), dispatcher._slots[0], dispatcher._transport
    dispatcher(hidden, ids, weights, stand_in, out=out)
    dispatcher.check()

    def replay() -> None:
        batch, state = transport.dispatch(hidden, ids, weights, slot)
        transport.combine(stand_in(batch), weights, out, slot, state)

    if device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            dispatcher(hidden, ids, weights, stand_in, out=out)
            assert dispatcher.check(wait=False) == 0
        replay = graph.replay
    replay()
    assert dispatcher.check() == dispatcher.check(wait=False) == 0
    dist.barrier()
    if rank == ranks - 1:
        dist.barrier()
        return None
    replay()
    give_up, blamed = time.monotonic() + 10 * timeout, None
    while blamed is None and time.monotonic() < give_up:
        try:
            dispatcher.check(wait=False)
        except PeerTimeoutError as error:
            blamed = error.rank
        time.sleep(0.01)
    dispatcher.close()
    dist.barrier()
    return blamed


def test_a_check_that_does_not_wait_names_a_rank_that_is_lost_under_replays(interpreted):
    assert run_ranks(run_replays_with_a_lost_rank, 3, "cpu", setup=install_interpreter) == [2, 2, None]


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_check_that_does_not_wait_names_a_rank_that_is_lost_under_replays_of_a_graph(ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    blamed = run_ranks(run_replays_with_a_lost_rank, ranks, "cuda:{rank}", backend="cpu:gloo,cuda:nccl")
    assert blamed == [ranks - 1] * (ranks - 1) + [None]


def go_on(rank: int, ranks: int, settings: dict[str, Any], device: str, store: str) -> None:
    """The ranks that are left build a group, whose store nobody lost holds, and get right results."""
    dist.destroy_process_group()
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo"
    dist.init_process_group(backend, store=FileStore(store, ranks), rank=rank, world_size=ranks)
    with MoEQuantDispatcher(**settings, transport="symmetric", device=device) as dispatcher:
        local = dispatcher.config.num_local_experts
        hidden, ids, weights = tokens_of(rank, settings["num_experts"], device)
        out = dispatcher(hidden, ids, weights, lambda batch: stand_in(batch, rank * local))
    everyone = [tokens_of(peer, settings["num_experts"], "cpu") for peer in range(ranks)]
    _, outputs, _ = in_one_process(settings, everyone, stand_in)
    assert_bit_equal(out.cpu(), outputs[rank])


def check_survivors(results: list[Any], ranks: int) -> None:
    for blamed, took, all_nan in results[:-1]:
        assert blamed == ranks - 1
        # one limit: after a fault no later wait lasts
        assert took < 2.0
        assert all_nan


@LAYOUTS
@pytest.mark.parametrize("how", ["killed", "killed after dispatch", "late"])
def test_survivors_blame_the_same_rank_in_time_and_go_on(how, layout, interpreted, tmp_path):
    arguments = (how, layout, "cpu", str(tmp_path / "store"))
    check_survivors(run_ranks(run_with_a_lost_rank, 3, *arguments, may_die=(2,), setup=install_interpreter), 3)


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [3, 4, 8])
@LAYOUTS
@pytest.mark.parametrize("how", ["killed", "killed after dispatch", "late"])
def test_survivors_on_gpus_blame_the_same_rank_in_time_and_go_on(how, layout, ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    arguments = (how, layout, "cuda:{rank}", str(tmp_path / "store"))
    results = run_ranks(run_with_a_lost_rank, ranks, *arguments, may_die=(ranks - 1,), backend="cpu:gloo,cuda:nccl")
    check_survivors(results, ranks)
