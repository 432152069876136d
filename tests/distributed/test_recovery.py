"""After a rank is lost the others build a group and a dispatcher without it, as docs/use.md says, and go on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trials import stand_in

from moequant import MoEQuantDispatcher, PeerTimeoutError
from moequant.testing import assert_bit_equal, in_one_process, routing, run_ranks

SETTINGS: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden_size": 96, "max_tokens_per_rank": 8}


def tokens_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(8, 96, generator=generator).bfloat16(), *routing(8, 2, 6, generator=generator)]


def check_layer(dispatcher: MoEQuantDispatcher, members: list[int], rank: int) -> None:
    """One layer, against one process with the tokens of all members."""
    first = members.index(rank) * dispatcher.config.num_local_experts
    hidden, ids, weights = tokens_of(rank)
    out = dispatcher(hidden, ids, weights, lambda batch: stand_in(batch, first))
    _, outputs, _ = in_one_process(SETTINGS, [tokens_of(member) for member in members], stand_in)
    assert_bit_equal(out, outputs[members.index(rank)])


def run_recovery(rank: int, ranks: int, exchange: str) -> None:
    # not the last rank: group ranks differ from global ones afterwards
    everyone, left = list(range(ranks)), [0, 2]
    dispatcher = MoEQuantDispatcher(**SETTINGS, exchange=exchange)
    check_layer(dispatcher, everyone, rank)
    if rank not in left:
        os._exit(1)
    with pytest.raises(PeerTimeoutError):
        check_layer(dispatcher, everyone, rank)
    dispatcher.close()
    group: Any = dist.new_group(left, use_local_synchronization=True)
    with MoEQuantDispatcher(group, **SETTINGS, exchange=exchange) as dispatcher:
        check_layer(dispatcher, left, rank)


@pytest.mark.parametrize("exchange", ["padded", "packed"])
def test_ranks_that_are_left_go_on_in_a_group_of_their_own(exchange):
    run_ranks(run_recovery, 3, exchange, may_die=(1,))
