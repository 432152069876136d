"""Ranks in another call, against the worked example, `moequant.transport.calls` and the reference."""

from __future__ import annotations

import random

import pytest
import torch

from compile_case import cases, empty
from moequant import ops, reference
from moequant.transport.calls import Call, unlike
from operation_case import integers


def kernel(*args):
    from moequant.kernels.routing.count_mismatched import count_mismatched

    count_mismatched(*args)


COUNTS = pytest.mark.parametrize("function", [reference.count_mismatched, kernel], ids=["reference", "kernel"])


def mismatched(function, words, rank, device):
    status = torch.tensor([5, 6, 7], device=device)
    function(torch.tensor(words, dtype=torch.int32, device=device), rank, status)
    assert status[:2].tolist() == [5, 6]
    return int(status[2]) - 7


@COUNTS
def test_the_worked_example(function, device):
    assert [mismatched(function, [[5, 9], [4, 9]], rank, device) for rank in (0, 1)] == [1, 1]


@COUNTS
@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_all_that_differ_from_this_rank_are_counted(function, ranks, device):
    draw = random.Random(ranks)
    for _ in range(5):
        words = [[draw.randrange(2) - 1, Call(draw.randrange(2), 0, layer=draw.randrange(3)).word] for _ in range(ranks)]
        rank = draw.randrange(ranks)
        number, word = words[rank]
        expected = sum(number != other or unlike(word, call) for other, call in words)
        assert mismatched(function, words, rank, device) == expected


def test_words_may_lie_in_rows_of_a_table(device):
    table = torch.tensor([[0, 4, 9, 0], [0, 4, 9, 1], [1, 4, 8 << 10, 0]], dtype=torch.int32, device=device)
    for function in (reference.count_mismatched, kernel):
        status = torch.zeros(3, dtype=torch.int64, device=device)
        function(table[:, 1:3], 0, status)
        assert status.tolist() == [0, 0, 1]


def call_count_mismatched() -> None:
    ops.count_mismatched(empty(8, 2, dtype=torch.int32), 3, empty(3, dtype=torch.int64))


COMPILE_CASES = cases(call_count_mismatched, {}, wide=False)


OPERATION_CASES = {
    "count_mismatched": {
        "one": lambda: (integers([4, 9], [5, 9], [4, 9]), 0, torch.zeros(3, dtype=torch.int64)),
        "another layer": lambda: (integers([4, 9], [4, 8]), 1, torch.zeros(3, dtype=torch.int64)),
    },
}
