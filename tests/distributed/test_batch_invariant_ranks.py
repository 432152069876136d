"""`batch_invariant=True` on several ranks: a token has the bits that it has alone on one, on every transport and in both layouts."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from trials import install_interpreter

import interpreter
from invariance import Model, differing, one_by_one, some
from moequant import ConfigMismatchError, MoEQuantDispatcher
from moequant.nn import MoEExperts
from moequant.testing import run_ranks

# a dispatcher's settings, and how it is called
Way = tuple[dict[str, Any], list[dict[str, Any]]]
COLLECTIVE: list[Way] = [
    ({"transport": "collective", "exchange": "padded"}, [{}]),
    ({"transport": "collective", "exchange": "padded", "layout": "ragged"}, [{}]),
    ({"transport": "collective", "exchange": "packed"}, [{}]),
    ({"transport": "collective", "exchange": "packed", "layout": "ragged"}, [{}]),
    ({"shared_batch": True}, [{}]),
]
SYMMETRIC: list[Way] = [
    ({"transport": "symmetric", "slots": 2, "layout": layout}, [{}, {"chunks": 2}, {"first_experts": 1}])
    for layout in ("padded", "ragged")
] + [({"transport": "symmetric", "overlap": False, "layout": layout}, [{}]) for layout in ("padded", "ragged")]


def run_batches(rank: int, ranks: int, model: Model, ways: list[Way], pool: int, batches: int, device: str) -> list[str]:
    """What was wrong of batches: tokens of a pool, all or random ones, of which each rank has some, or with shared_batch all."""
    device = on_own(device, rank)
    tokens, wrong = model.tokens(pool, 5, device), []
    with MoEQuantDispatcher(**model.settings(1), transport="local", device=device) as alone:
        expected = one_by_one(alone, tokens, model.experts_of(device))
    experts = model.experts_of(device, rank, ranks)
    for settings, calls in ways:
        with MoEQuantDispatcher(**model.settings(pool), **settings, device=device) as dispatcher:
            for number, call in itertools.product(range(batches), calls):
                generator = torch.Generator().manual_seed(number)
                # all of them first
                count = int(pool ** float(torch.rand((), generator=generator))) if number else pool
                order = torch.randperm(pool, generator=generator)[:count]
                # other numbers on other ranks, and often none
                owner = torch.randint(-1, ranks, (count,), generator=generator).clamp_min(0)
                mine = (order if "shared_batch" in settings else order[owner == rank]).to(device)
                if differing(dispatcher(*some(tokens, mine), experts, **call), expected[mine]):
                    wrong.append(f"{model.quant} {settings} {call} batch {number}")
    return wrong


def on_own(device: str, rank: int) -> str:
    """The rank's device, which becomes the current one."""
    device = device.format(rank=rank)
    if device != "cpu":
        torch.cuda.set_device(rank)
    return device


def run_training(rank: int, ranks: int, model: Model, pool: int, device: str) -> list[str]:
    """What was wrong of forwards in training, of all tokens and of tokens on one rank alone."""
    device = on_own(device, rank)
    tokens, wrong = model.tokens(pool, 6, device), []
    with MoEQuantDispatcher(**model.settings(1, recipe="ue8m0"), transport="local", device=device) as alone, torch.no_grad():
        whole = MoEExperts(alone, model.inner, dtype=torch.bfloat16)
        for parameter, weight in zip((whole.w13, whole.w2), model.weights(device), strict=True):
            parameter.copy_(weight)
        expected = one_by_one(alone, tokens, whole.grouped_experts())
    with MoEQuantDispatcher(**model.settings(pool, recipe="ue8m0", layout="ragged"), device=device) as dispatcher:
        for recompute in (False, True):
            experts = MoEExperts(dispatcher, model.inner, dtype=torch.bfloat16, recompute=recompute)
            with torch.no_grad():
                for parameter, weight in zip((experts.w13, experts.w2), model.weights(device, rank, ranks), strict=True):
                    parameter.copy_(weight)
            for mine in (slice(rank, None, ranks), slice(0, pool if rank == ranks - 1 else 0)):
                out = experts(*some(tokens, mine))
                assert out.requires_grad
                if differing(out.detach(), expected[mine]):
                    wrong.append(f"{model.quant} {recompute=} {mine}")
    return wrong


def run_on_cpu(rank: int, ranks: int, quant: str) -> list[str]:
    model = Model(520, 264, 12, 3, quant)
    wrong = run_batches(rank, ranks, model, COLLECTIVE, 48, 2, "cpu")
    return wrong if quant == "int8" else wrong + run_training(rank, ranks, model, 40, "cpu")


@pytest.mark.parametrize(("ranks", "quant"), [(1, "fp8_e4m3fn"), (2, "none"), (3, "int8"), (4, "fp8_e4m3fn")])
def test_a_token_has_its_bits_on_any_number_of_ranks_and_any_exchange(ranks, quant):
    assert run_ranks(run_on_cpu, ranks, quant) == [[]] * ranks


def interpret_row_by_row() -> None:
    """`setup` of ranks whose interpreted products have no place."""
    install_interpreter()
    interpreter.product = interpreter.product_by_rows


@pytest.mark.usefixtures("interpreted")
def test_a_token_has_its_bits_where_kernels_push_it():
    model = Model(520, 72, 4, 2, "fp8_e4m3fn")
    ways = [(SYMMETRIC[0][0], [{}]), (SYMMETRIC[1][0], [{"first_experts": 1}]), SYMMETRIC[2]]
    assert run_ranks(run_batches, 2, model, ways, 9, 1, "cpu", setup=interpret_row_by_row) == [[]] * 2


def run_unlike(rank: int, ranks: int) -> None:
    with pytest.raises(ConfigMismatchError, match="batch_invariant: (True and False|False and True)"):
        MoEQuantDispatcher(**Model(64, 64, 4, 2, "int8").settings(4, batch_invariant=rank == 0), device="cpu")


def test_ranks_that_disagree_on_it_learn_it_in_the_constructor():
    run_ranks(run_unlike, 2)


SHAPES = {"qwen3-30b": (2048, 768, 16, 8), "odd": (1000, 328, 6, 3)}


def run_on_gpus(rank: int, ranks: int, shape: str, quant: str) -> list[str]:
    model = Model(*SHAPES[shape], quant=quant)
    wrong = run_batches(rank, ranks, model, SYMMETRIC + COLLECTIVE, 600, 20, "cuda:{rank}")
    trained = quant in ("none", "fp8_e4m3fn")
    return wrong + run_training(rank, ranks, model, 200, "cuda:{rank}") if trained else wrong


@pytest.mark.multigpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_its_bits_on_one_gpu_and_on_two(shape):
    """In each way, and where it is trained. `fuzz_gpu.py --ranks 2 --families invariant` has more batches."""
    # the formats at the same time, as most of it goes to compilers
    with ThreadPoolExecutor() as pool:
        quants = ("fp8_e4m3fn", "int8", "none", "float16")
        runs = [pool.submit(run_ranks, run_on_gpus, 2, shape, quant, backend="cpu:gloo,cuda:nccl") for quant in quants]
    assert [run.result() for run in runs] == [[[]] * 2] * len(quants)
