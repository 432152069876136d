"""The generators, comparisons and the worker launcher."""

from __future__ import annotations

import math
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from moequant.errors import InvalidExpertIdError
from moequant.models import MODELS, model_shape
from moequant.testing import (
    RankFailedError,
    assert_bit_equal,
    cosine_difference,
    in_one_process,
    poison,
    relative_error,
    routing,
    run_ranks,
)

ALL_DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("kind", ["uniform", "zipf:1.2", "zipf:0", "one-hot", "half"])
def test_routing_gives_distinct_experts_and_normalised_weights(kind):
    ids, weights = routing(64, 6, 16, kind, torch.Generator().manual_seed(1))
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (64, 6)
    assert int(ids.min()) >= 0 and int(ids.max()) < 16
    assert all(len(set(row)) == 6 for row in ids.tolist())
    assert float(weights.min()) > 0
    torch.testing.assert_close(weights.sum(1), torch.ones(64))


def test_routing_repeats_with_the_same_seed():
    first, second = (routing(8, 2, 8, "uniform", torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_uniform_routing_loads_experts_evenly_and_zipf_does_not():
    def loads(kind):
        ids, _ = routing(4096, 2, 16, kind, torch.Generator().manual_seed(0))
        return ids.flatten().long().bincount(minlength=16).sort(descending=True).values

    assert loads("uniform")[0] < 1.25 * loads("uniform")[-1]
    zipf = loads("zipf:1.0")
    assert zipf[0] > 4 * zipf[-1]


def test_one_hot_routing_sends_every_first_choice_to_expert_0():
    ids, _ = routing(32, 3, 8, "one-hot")
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] != 0).all()


def test_half_routing_sends_half_of_the_tokens_to_expert_0():
    ids, _ = routing(33, 3, 8, "half")
    assert (ids[::2, 0] == 0).all() and (ids[1::2] != 0).all() and (ids[::2, 1:] != 0).all()


def test_routing_of_no_tokens():
    ids, weights = routing(0, 4, 8)
    assert ids.shape == weights.shape == (0, 4)


@pytest.mark.parametrize("kind", ["", "zipf", "zipf:x", "zipf:-1", "uniform:2", "nan"])
def test_routing_refuses_an_unknown_kind(kind):
    with pytest.raises(ValueError, match="kind must be"):
        routing(4, 2, 8, kind)


def test_routing_refuses_more_choices_than_experts():
    with pytest.raises(ValueError, match="top_k"):
        routing(4, 9, 8)


def test_relative_error_and_cosine_difference():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0 == cosine_difference(reference, reference)
    # 1 - 2 * 2 * 25 / (25 + 100)
    assert cosine_difference(2 * reference, reference) == pytest.approx(0.2)
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), reference))
    assert math.isnan(cosine_difference(torch.tensor([math.nan, 4.0]), reference))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.empty(0), torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_assert_bit_equal_takes_every_dtype_and_any_strides(dtype):
    x = (torch.arange(12).view(3, 4) % 5).to(dtype)
    assert_bit_equal(x, x.t().contiguous().t())
    changed = x.clone()
    changed.view(torch.uint8).view(3, 4, -1)[1, 2, 0] ^= 1
    with pytest.raises(AssertionError, match=r"1 of 12 elements, first at \[1, 2\]"):
        assert_bit_equal(changed, x)


def test_assert_bit_equal_compares_bits_not_numbers():
    nan = torch.tensor([math.nan, 1.0])
    assert_bit_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match=r"first at \[0\]: -0.0 \(0x80000000\) against 0.0 \(0x00000000\)"):
        assert_bit_equal(torch.tensor([-0.0]), torch.tensor([0.0]))
    with pytest.raises(AssertionError, match="scales differ: torch.float32"):
        assert_bit_equal(torch.ones(2), torch.ones(2, dtype=torch.bfloat16), "scales")
    with pytest.raises(AssertionError, match=r"\(2,\) against .*\(1, 2\)"):
        assert_bit_equal(torch.ones(2), torch.ones(1, 2))
    assert_bit_equal(torch.tensor(1.0), torch.tensor(1.0))
    assert_bit_equal(torch.empty(0, 3), torch.empty(0, 3))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_poison_fills_in_place_with_what_shows(dtype):
    x = torch.zeros(3, 4, dtype=dtype).t()
    assert poison(x) is x
    if dtype.is_floating_point:
        assert x.float().isnan().all()
    else:
        assert (x.contiguous().view(torch.uint8) == (1 if dtype == torch.bool else 0x7F)).all()


def test_model_shapes_are_found_by_name():
    assert model_shape("deepseek-v3") == MODELS["deepseek-v3"]
    with pytest.raises(ValueError, match="model must be one of deepseek-v3"):
        model_shape("deepseek")


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


def test_comparisons_refuse_other_shapes_which_would_be_broadcast():
    for compare in (relative_error, cosine_difference):
        for shape in ((4,), (1, 4), (3, 1), ()):
            with pytest.raises(ValueError, match=r"x must have shape \(3, 4\), got"):
                compare(torch.ones(shape), torch.ones(3, 4))


def test_in_one_process_refuses_ids_that_no_expert_has():
    settings = {"num_experts": 4, "top_k": 2, "hidden_size": 8, "max_tokens_per_rank": 4}
    for wrong in (4, -2):
        ids = torch.tensor([[0, 1], [wrong, -1]])
        with pytest.raises(InvalidExpertIdError, match=r"topk_ids must be in -1..3"):
            in_one_process(settings, [(torch.ones(2, 8), ids, torch.ones(2, 2))], lambda batch: batch.values.bfloat16())


@pytest.mark.parametrize("sizes", [(-1, 2, 8), (1.0, 2, 8), (1, True, 8), (1, 2, 2**31)], ids=str)
def test_routing_of_other_numbers_is_refused(sizes):
    with pytest.raises(ValueError, match="must be"):
        routing(*sizes)
