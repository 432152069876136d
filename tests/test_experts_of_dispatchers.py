"""GroupedExperts that several dispatchers use: workspaces for each of them, subclasses, parts, and what is refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from moequant import ExpertBatch, GroupedExperts, MoEQuantDispatcher
from moequant.batch import Owner
from moequant.experts import can_push
from moequant.testing import assert_bit_equal
from test_experts import EXPERTS, HIDDEN, ROWS, make_batch, valid, weights


def owned(owner: Owner | None, slot: int = 0) -> ExpertBatch:
    return replace(make_batch("fp8_e4m3fn", torch.randn(EXPERTS, ROWS, HIDDEN)), owner=owner, slot=slot)


def test_batches_of_two_dispatchers_have_workspaces_of_their_own():
    experts, (mine, theirs) = GroupedExperts.from_weights(*weights()), (Owner(), Owner())
    batches = [owned(owner, slot) for owner in (mine, theirs, None) for slot in (0, 1)]
    outs = [experts(batch) for batch in batches]
    assert len({out.data_ptr() for out in outs}) == len(outs)
    for batch, out in zip(batches, outs, strict=True):
        kept = valid(out).clone()
        assert_bit_equal(valid(experts(batch)), kept)
        assert experts(batch).data_ptr() == out.data_ptr()


def test_two_dispatchers_that_share_experts_in_flight_get_their_own_sums():
    first, second = (
        MoEQuantDispatcher(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, max_tokens_per_rank=ROWS, device="cpu") for _ in "AB"
    )
    experts = GroupedExperts.from_weights(*weights())
    calls = [(d, torch.randn(5, HIDDEN), torch.randint(0, EXPERTS, (5, 2)), torch.rand(5, 2)) for d in (first, second)]
    expected = [d(x, ids, chosen, experts).clone() for d, x, ids, chosen in calls]
    dispatched = [d.dispatch(x, ids, chosen) for d, x, ids, chosen in calls]
    outputs = [experts(batch) for batch, _ in dispatched]
    for (d, *_), (_, handle), output, sums in zip(calls, dispatched, outputs, expected, strict=True):
        assert_bit_equal(d.combine(output, handle), sums)


def test_workspaces_go_when_their_dispatcher_is_gone():
    experts, owner = GroupedExperts.from_weights(*weights()), Owner()
    freed = weakref.ref(experts._workspace(owned(owner)))
    experts(owned(owner))
    experts.part(0, 2)(owned(owner).part(0, 2))
    experts(owned(None))
    assert len(owner.workspaces) == 2 and len(experts._owner.workspaces) == 1 and freed() is not None
    del owner
    gc.collect()
    assert freed() is None


def test_experts_share_the_workspaces_of_a_dispatcher_and_no_others():
    experts, other = GroupedExperts.from_weights(*weights()), GroupedExperts.from_weights(*weights())
    for owner, shared in ((None, False), (Owner(), True)):
        batch = owned(owner)
        assert (experts(batch).data_ptr() == other(batch).data_ptr()) == shared


class Doubled(GroupedExperts):
    def __call__(self, batch: ExpertBatch, **options: Any) -> torch.Tensor:
        return super().__call__(batch, **options) * 2


class Biased(GroupedExperts):
    def gemm1(self, batch: ExpertBatch, **options: Any) -> torch.Tensor:
        return super().gemm1(batch, **options) + 1


class Named(GroupedExperts):
    """Overrides no step."""

    name = "layer 0"


def test_experts_can_push_unless_a_step_of_theirs_is_overridden():
    kinds = {kind: kind.from_weights(*weights()) for kind in (GroupedExperts, Named, Doubled, Biased)}
    assert [can_push(experts) for experts in kinds.values()] == [True, True, False, False]
    assert not can_push(lambda batch: batch) and not can_push(GroupedExperts)
    kinds[Named].activation = lambda gate_up, batch: gate_up  # pyright: ignore[reportAttributeAccessIssue]
    assert not can_push(kinds[Named])


def test_a_subclass_is_called_by_a_dispatcher_that_could_push():
    d = MoEQuantDispatcher(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, max_tokens_per_rank=ROWS, device="cpu")
    tokens = torch.randn(5, HIDDEN), torch.randint(0, EXPERTS, (5, 2)), torch.rand(5, 2)
    w13, w2 = weights()
    plain, doubled = (d(*tokens, kind.from_weights(w13, w2)) for kind in (GroupedExperts, Doubled))
    assert torch.allclose(doubled, 2 * plain)


def test_an_overridden_step_is_not_left_out_by_the_fused_kernel(monkeypatch):
    monkeypatch.setattr("moequant.ops.fuses_gemm1", lambda *arguments: True)
    batch = owned(None)
    assert GroupedExperts.from_weights(*weights()).fuses(batch)
    assert not Biased.from_weights(*weights()).fuses(batch)


def test_parts_of_experts_whose_steps_are_overridden_are_refused():
    with pytest.raises(RuntimeError, match="Biased overrides steps of GroupedExperts, which a part would not have"):
        Biased.from_weights(*weights()).part(0, 1)


@pytest.mark.parametrize("begin, end", [(-1, 2), (0, 4), (2, 1), (1, 1), (0, 10**30), (0.0, 1), (True, 2), (None, 2)], ids=str)
def test_parts_that_are_no_range_of_experts_are_refused(begin, end):
    for whole in (GroupedExperts.from_weights(*weights()), owned(None)):
        with pytest.raises(ValueError, match="begin must|end must"):
            whole.part(begin, end)


def test_a_batch_with_its_handle_is_refused_in_words():
    d = MoEQuantDispatcher(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, max_tokens_per_rank=ROWS, device="cpu")
    dispatched: Any = d.dispatch(torch.randn(5, HIDDEN), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2))
    with pytest.raises(ValueError, match="batch must be ExpertBatch, got tuple; dispatch returns the batch and a handle"):
        GroupedExperts.from_weights(*weights())(dispatched)


def test_outputs_are_checked_before_anything_is_computed(monkeypatch):
    experts, batch = GroupedExperts.from_weights(*weights()), owned(None)
    monkeypatch.setattr(GroupedExperts, "gemm1_swiglu", lambda *arguments, **options: pytest.fail("a product was computed"))
    with pytest.raises(ValueError, match="out must be contiguous"):
        experts(batch, out=torch.zeros(EXPERTS, HIDDEN, ROWS).bfloat16().transpose(1, 2))
    with pytest.raises(ValueError, match="num_sms must be at least 1"):
        experts(batch, num_sms=0)


@pytest.mark.parametrize("experts", [None, "experts", 3, torch.ones(2)], ids=repr)
def test_experts_that_can_not_be_called_are_refused_before_anything_is_sent(experts, monkeypatch):
    d = MoEQuantDispatcher(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, max_tokens_per_rank=ROWS, device="cpu")
    monkeypatch.setattr(d, "dispatch", lambda *arguments, **options: pytest.fail("tokens were sent"))
    tokens = torch.randn(5, HIDDEN), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
    with pytest.raises(ValueError, match="experts must be callable with an ExpertBatch, as GroupedExperts are, got"):
        d(*tokens, experts)
    several: list[dict[str, Any]] = [{"chunks": "2"}, {"first_experts": []}, {"chunks": 1.0}]
    for wrong in several:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer"):
            d(*tokens, lambda batch: batch.values, **wrong)


def test_buffers_without_room_are_an_error_in_words(monkeypatch):
    def no_room(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(torch, "empty", no_room)
    with pytest.raises(RuntimeError, match="cpu has no room for 0.0 GiB of buffers: can't allocate memory.*lower capacity or"):
        MoEQuantDispatcher(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, max_tokens_per_rank=ROWS, device="cpu")
