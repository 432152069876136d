"""How layers choose their way, with stand-ins for dispatcher and experts: slots, buffers, multiprocessors, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moequant import GroupedExperts
from moequant.config import DispatcherConfig
from moequant.kernels.library import common
from moequant.layer import Options, check_overlap, run_layer
from moequant.overlap import run_in_halves, run_in_waves, side_sms

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

    def dispatch(self, *tokens: Any, slot: int, layer: int | None, expected_tokens: int | None) -> tuple[Any, Any]:
        self.slots.append(slot)
        return SimpleNamespace(), SimpleNamespace(slot=slot)

    def output_buffer(self, slot: int = 0) -> torch.Tensor:
        return self.buffers[slot]

    def combine(self, output: torch.Tensor, handle: Any, *, out: torch.Tensor | None) -> torch.Tensor:
        self.combined.append(output)
        return output


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("changes", [{"reduce": "per_rank"}, {"overlap": False}], ids=str)
def test_experts_that_do_not_push_write_into_the_buffer_of_the_slot(slot, changes, monkeypatch):
    dispatcher, writing = Recorder(**changes), experts()
    # writes where it is told to, or else into a buffer of its own
    monkeypatch.setattr(GroupedExperts, "__call__", lambda self, batch, *, out=None: torch.zeros(4, 16, 16) if out is None else out)
    run_layer(cast(Any, dispatcher), cast(Any, ()), writing, None, Options(slot))
    assert dispatcher.slots == [slot]
    assert [output.data_ptr() for output in dispatcher.combined] == [dispatcher.buffers[slot].data_ptr()]


@pytest.mark.parametrize(("all_sms", "kept", "left"), [(132, 8, 124), (132, 1, 131), (8, 8, 1), (4, 20, 1)])
def test_the_side_leaves_num_sms_alone_and_keeps_one(monkeypatch, all_sms, kept, left):
    monkeypatch.setattr(common, "multiprocessors", lambda device: all_sms)
    assert side_sms(cast(Any, Recorder(num_sms=kept))) == left


class Streamed(Recorder):
    """Writes down the steps of a layer whose rows are pushed, in order, with the tokens of each dispatch and the slot."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.steps: list[tuple[Any, ...]] = []

    def handle(self, step: str, tokens: tuple[torch.Tensor, ...], slot: int, *more: Any) -> tuple[Any, Any]:
        self.steps.append((step, *(len(x) for x in tokens), slot, *more))
        return SimpleNamespace(slot=slot), SimpleNamespace(slot=slot)

    def dispatch(self, *tokens: Any, slot: int, layer: int | None, expected_tokens: int | None) -> tuple[Any, Any]:
        return self.handle("dispatch", tokens, slot, layer, expected_tokens)

    def dispatch_first(self, *arguments: Any) -> tuple[Any, Any]:
        return self.handle("dispatch_first", arguments[:3], *arguments[3:])

    def dispatch_second(self, handle: Any) -> Any:
        self.steps.append(("dispatch_second", handle.slot))
        return SimpleNamespace(slot=handle.slot)

    def begin_push(self, handle: Any) -> torch.Tensor:
        """Rows of addresses that say whose they are: the slot and the expert."""
        return 10 * handle.slot + torch.arange(4)[:, None].expand(4, 16)

    def combine_pushed(self, handle: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        self.steps.append(("combine_pushed", handle.slot, None if out is None else len(out)))
        return torch.empty(0) if out is None else out


@pytest.fixture
def streamed(monkeypatch) -> Streamed:
    dispatcher = Streamed(num_sms=3)
    monkeypatch.setattr(common, "multiprocessors", lambda device: 10)

    def push(part: GroupedExperts, batch: Any, destinations: torch.Tensor, *, num_sms: int | None = None) -> None:
        dispatcher.steps.append(("push", batch.slot, part.w13.shape[0], destinations[:, 0].tolist(), num_sms))

    monkeypatch.setattr(GroupedExperts, "push", push)
    return dispatcher


TOKENS = torch.zeros(5, 16), torch.zeros(5, 2), torch.zeros(5, 2)


@pytest.mark.parametrize("slot", [0, 1])
def test_waves_push_the_first_experts_beside_the_second_dispatch(streamed, slot):
    run_in_waves(cast(Any, streamed), TOKENS, experts(), Options(slot, 6, first_experts=1, expected_tokens=9), None)
    assert streamed.steps == [
        ("dispatch_first", 5, 5, 5, slot, 1, 6, 9),
        # of 10 multiprocessors 3 are left alone
        ("push", slot, 1, [10 * slot], 7),
        ("dispatch_second", slot),
        ("push", slot, 3, [10 * slot + expert for expert in (1, 2, 3)], None),
        ("combine_pushed", slot, None),
    ]


def test_halves_take_a_slot_each_and_write_one_output(streamed):
    out = run_in_halves(cast(Any, streamed), TOKENS, experts(), Options(layer=6, expected_tokens=9), None)
    assert streamed.steps == [
        ("dispatch", 3, 3, 3, 0, 6, 5),
        ("push", 0, 4, [0, 1, 2, 3], 7),
        ("dispatch", 2, 2, 2, 1, 6, 5),
        ("combine_pushed", 0, 3),
        ("push", 1, 4, [10, 11, 12, 13], None),
        ("combine_pushed", 1, 2),
    ]
    assert out.shape == (5, 16)


def test_a_layer_in_one_piece_pushes_all_of_it(streamed):
    layer = experts()
    run_layer(cast(Any, streamed), TOKENS, layer, layer, Options(1, expected_tokens=9))
    assert streamed.steps == [
        ("dispatch", 5, 5, 5, 1, None, 9),
        ("push", 1, 4, [10, 11, 12, 13], None),
        ("combine_pushed", 1, None),
    ]
