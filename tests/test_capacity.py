"""When rows without room are heard of: at once on a CPU, on a GPU by the next dispatch that can know, by check() and on leaving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moequant import CapacityOverflowError, ClosedError, ExpertBatch, MoEQuantDispatcher

SETTINGS: dict[str, Any] = {"num_experts": 6, "top_k": 3, "hidden_size": 40, "max_tokens_per_rank": 20, "quant": "none"}
FULL: dict[str, Any] = SETTINGS | {"capacity": 16}


def inputs(device: str, *ids: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """20 tokens that all name these experts."""
    hidden = torch.randn(20, 40, device=device).bfloat16()
    return hidden, torch.tensor([ids] * 20, device=device), torch.ones(20, 3, device=device)


def stand_in(batch: ExpertBatch) -> torch.Tensor:
    return batch.values


def spread(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """10 rows for each expert."""
    hidden, _, weights = inputs(device, 0, 1, 2)
    return hidden, torch.arange(60, device=device).view(20, 3) % 6, weights


@pytest.fixture
def on_gpu() -> Iterator[MoEQuantDispatcher]:
    dispatcher = MoEQuantDispatcher(**FULL, device="cuda")
    yield dispatcher
    dispatcher.close()


def test_rows_past_capacity_are_an_error_at_once_on_a_cpu_and_the_next_call_is_as_good_as_any():
    with MoEQuantDispatcher(**FULL, device="cpu") as dispatcher:
        with pytest.raises(CapacityOverflowError, match=r"12 rows .* raise capacity"):
            dispatcher.dispatch(*inputs("cpu", 0, 1, 2))
        assert dispatcher.check() == 0
        hidden, ids, weights = spread("cpu")
        assert torch.equal(dispatcher(hidden, ids, weights, stand_in), hidden * 3)


def test_tokens_that_name_an_expert_twice_are_an_error_where_their_rows_have_no_room():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        with pytest.raises(
            CapacityOverflowError, match=r"28 rows .* buffer of 32 rows and .* twice give capacity a number\), or accept"
        ):
            dispatcher.dispatch(*inputs("cpu", 0, 0, 0))
        assert dispatcher(*inputs("cpu", 0, 1, 2), stand_in).isfinite().all()
    # what the message names
    remedies: list[dict[str, Any]] = [{"capacity": 60}, {"layout": "ragged"}]
    for remedy in remedies:
        with MoEQuantDispatcher(**SETTINGS, **remedy, device="cpu") as dispatcher:
            assert dispatcher(*inputs("cpu", 0, 0, 0), stand_in).isfinite().all()


@pytest.mark.gpu
def test_rows_past_capacity_are_raised_by_the_next_dispatch_that_can_know_and_by_check(on_gpu):
    on_gpu(*inputs("cuda", 0, 1, 2), stand_in)
    torch.cuda.synchronize()
    with pytest.raises(CapacityOverflowError, match=r"12 rows .* raise capacity"):
        on_gpu.dispatch(*spread("cuda"))
    # said once
    assert on_gpu.check(wait=False) == 0
    on_gpu.dispatch(*inputs("cuda", 0, 1, 2))
    with pytest.raises(CapacityOverflowError, match=r"12 rows .* raise capacity"):
        on_gpu.check()


@pytest.mark.gpu
def test_leaving_without_check_reports_what_was_dropped(on_gpu):
    with pytest.raises(CapacityOverflowError), on_gpu:
        on_gpu(*inputs("cuda", 0, 1, 2), stand_in)
    with pytest.raises(ClosedError):
        on_gpu.check()
