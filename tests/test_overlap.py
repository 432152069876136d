"""How layers choose their way, with stand-ins for dispatcher and experts: slots, buffers, multiprocessors, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moequant import GroupedExperts
from moequant.config import DispatcherConfig
from moequant.kernels import common
from moequant.layer import check_overlap, run_layer
from moequant.overlap import side_sms

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 16, "max_tokens_per_rank": 4, "transport": "symmetric"}


def config(**changes: Any) -> DispatcherConfig:
    return DispatcherConfig(**SETTINGS | changes)


def experts() -> GroupedExperts:
    return GroupedExperts.from_weights(torch.ones(4, 16, 16).bfloat16(), torch.ones(4, 16, 8).bfloat16(), quant="none")


def refused(chunks: int = 1, first_experts: Any = 0, pushes: bool = True, **changes: Any) -> str:
    """What is said of an overlap, if it is refused."""
    try:
        check_overlap(chunks, first_experts, config(**changes), pushes, "GroupedExperts")
    except ValueError as error:
        return str(error)
    return ""


def test_halves_need_two_slots_and_experts_that_push():
    assert refused(chunks=2, slots=2) == ""
    for reason in (refused(chunks=2, slots=1), refused(chunks=2, slots=2, pushes=False), refused(chunks=3, slots=2)):
        assert reason.startswith("chunks must be 1, or 2 with GroupedExperts") and "slots=2" in reason


def test_waves_need_experts_on_both_sides_and_experts_that_push():
    assert all(refused(first_experts=first) == "" for first in range(4))
    for reason in (
        refused(first_experts=4),
        refused(first_experts=-1),
        refused(first_experts=1.0),
        refused(first_experts=1, pushes=False),
        refused(first_experts=1, chunks=2, slots=2),
    ):
        assert reason.startswith("first_experts must be from 0 to 3")


class Recorder:
    """A dispatcher on a CPU that says what is asked of it, and with which slots and buffers."""

    def __init__(self, **changes: Any) -> None:
        self.config, self.device = config(slots=2, **changes), torch.device("cpu")
        self.buffers = [torch.zeros(4, 16, 16).bfloat16() for _ in range(2)]
        self.slots: list[int] = []
        self.combined: list[torch.Tensor] = []

    def dispatch(self, *tokens: Any, slot: int, layer: int | None) -> tuple[Any, Any]:
        self.slots.append(slot)
        return SimpleNamespace(), SimpleNamespace(slot=slot)

    def output_buffer(self, slot: int = 0) -> torch.Tensor:
        return self.buffers[slot]

    def combine(self, output: torch.Tensor, handle: Any) -> torch.Tensor:
        self.combined.append(output)
        return output


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("changes", [{"reduce": "per_rank"}, {"overlap": False}], ids=str)
def test_experts_that_do_not_push_write_into_the_buffer_of_the_slot(slot, changes, monkeypatch):
    dispatcher, writing = Recorder(**changes), experts()
    # writes where it is told to, or else into a buffer of its own
    monkeypatch.setattr(GroupedExperts, "__call__", lambda self, batch, *, out=None: torch.zeros(4, 16, 16) if out is None else out)
    run_layer(cast(Any, dispatcher), cast(Any, ()), writing, slot, None, 1, 0, None)
    assert dispatcher.slots == [slot]
    assert [output.data_ptr() for output in dispatcher.combined] == [dispatcher.buffers[slot].data_ptr()]


@pytest.mark.parametrize(("all_sms", "kept", "left"), [(132, 8, 124), (132, 1, 131), (8, 8, 1), (4, 20, 1)])
def test_the_side_leaves_num_sms_alone_and_keeps_one(monkeypatch, all_sms, kept, left):
    monkeypatch.setattr(common, "multiprocessors", lambda device: all_sms)
    assert side_sms(cast(Any, Recorder(num_sms=kept))) == left
