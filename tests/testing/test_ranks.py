"""The launcher of worker processes."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from moequant.testing import RankFailedError, run_ranks


def summed(rank, world_size, offset):
    x = torch.tensor([float(rank + offset)])
    dist.all_reduce(x)
    return rank, world_size, torch.get_num_threads(), x


def test_run_ranks_returns_each_ranks_result():
    results = run_ranks(summed, 2, 10)
    assert [result[:3] for result in results] == [(0, 2, 1), (1, 2, 1)]
    assert all(result[3].item() == 21.0 for result in results)


def environment(rank, world_size):
    return os.environ.get("MOEQUANT_TEST_MARK"), os.environ.get("TRITON_INTERPRET"), "marked" in sys.modules


def mark():
    sys.modules["marked"] = os


def test_workers_see_the_environment_of_the_call_and_the_setup(monkeypatch):
    # the server that workers come from may have started before this was set
    monkeypatch.setenv("MOEQUANT_TEST_MARK", "here")
    assert run_ranks(environment, 1, setup=mark) == [("here", os.environ.get("TRITON_INTERPRET"), True)]


def raises_on_last(rank, world_size):
    if rank == world_size - 1:
        raise KeyError("the reason")
    dist.barrier()


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed(.|\n)*KeyError: 'the reason'") as error:
        run_ranks(raises_on_last, 2)
    assert error.value.rank == 1


def sleeps(rank, world_size):
    while rank == 0:
        time.sleep(60)


def test_ranks_that_hang_are_killed_and_shown():
    # the first one may have to start the server
    run_ranks(summed, 2, 10)
    start = time.monotonic()
    run_ranks(summed, 2, 10)
    needed = time.monotonic() - start
    with pytest.raises(RankFailedError, match=r"ranks \[0\] of 2 did not end in time(.|\n)*in sleeps"):
        run_ranks(sleeps, 2, timeout=1.0 + 4 * needed)


def last_dies(rank, world_size):
    if rank == world_size - 1:
        os._exit(7)
    return rank


def test_a_death_is_an_error_unless_expected():
    with pytest.raises(RankFailedError, match="exit code 7"):
        run_ranks(last_dies, 2)
    assert run_ranks(last_dies, 2, may_die=(1,)) == [0, None]


@pytest.mark.skipif(torch.cuda.device_count() >= 64, reason="has 64 GPUs")
def test_nccl_needs_a_gpu_for_each_rank():
    with pytest.raises(ValueError, match="needs a GPU for each of 64 ranks"):
        run_ranks(summed, 64, 0, backend="nccl")
