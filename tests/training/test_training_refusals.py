"""What a call under grad refuses, in words and before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moequant import GroupedExperts, MoEQuantDispatcher, OutOfStepError
from moequant.nn import MoEExperts
from moequant.testing import run_ranks
from training_cases import HIDDEN, INNER, tokens_of, weights_of

EXPERTS, TOKENS = 4, 8


def dispatcher_of(quant: str = "none", **settings: Any) -> MoEQuantDispatcher:
    common: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 2, "hidden_size": HIDDEN, "max_tokens_per_rank": TOKENS}
    return MoEQuantDispatcher(**common | settings, quant=quant, device="cpu")


def given(rank: int = 0, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    hidden, ids, weights, _ = tokens_of(TOKENS, 2, EXPERTS, HIDDEN, seed=rank)
    return hidden.requires_grad_(grad), ids, weights


@pytest.mark.parametrize(
    ("quant", "of_experts", "experts", "hidden", "found"),
    [
        ("none", "none", 8, HIDDEN, "8 of hidden size 64 in torch.bfloat16"),
        ("none", "none", 2, HIDDEN, "2 of hidden size 64 in torch.bfloat16"),
        ("none", "none", EXPERTS, 128, "4 of hidden size 128 in torch.bfloat16"),
        ("none", "float16", EXPERTS, HIDDEN, "4 of hidden size 64 in torch.float16"),
        ("fp8_e4m3fn", "none", EXPERTS, HIDDEN, "4 of hidden size 64 in torch.bfloat16"),
    ],
    ids=["too many", "too few", "another hidden size", "float16", "unquantized"],
)
def test_experts_of_another_dispatcher_are_refused_in_the_words_of_inference(quant, of_experts, experts, hidden, found):
    dtype = torch.float16 if of_experts == "float16" else torch.bfloat16
    made = GroupedExperts.from_weights(*(w.to(dtype) for w in weights_of(experts, hidden, INNER)[:2]), quant=of_experts)
    messages = []
    for grad in (True, False):
        with dispatcher_of(quant) as dispatcher, torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=f"the experts are {found}, the batch has values of shape") as refused:
                dispatcher(*given(grad=grad), made)
            messages.append(str(refused.value))
            # with a gradient nothing was sent
            assert dispatcher._slots[0].generation == (0 if grad else 1)
    assert messages[0] == messages[1]


def test_parameters_in_place_of_a_modules_own_have_to_fit_its_dispatcher():
    other = {
        "w13": [
            (torch.zeros(8, 2 * INNER, HIDDEN), r"w13 must be \(L, 2 \* I, H\), gate first, and w2"),
            (torch.zeros(EXPERTS, 2 * INNER, HIDDEN, device="meta"), "the experts are on meta, the batch on cpu"),
            (torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.int8), "in torch.int8, the batch has values"),
            (torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.float64), "in torch.float64, the batch has values"),
        ],
        "w2": [
            (torch.zeros(EXPERTS, HIDDEN, 2 * INNER), r"w13 must be \(L, 2 \* I, H\), gate first, and w2"),
            (torch.zeros(EXPERTS, HIDDEN, INNER, device="meta"), "w2 must be on cpu, got meta"),
            (torch.zeros(EXPERTS, HIDDEN, INNER, dtype=torch.complex64), "w2 must be .*, got torch.complex64"),
        ],
        "bias13": [(torch.zeros(EXPERTS, INNER), r"bias13 must have shape \(4, 64\), got \(4, 32\)")],
        "bias2": [(torch.zeros(EXPERTS, HIDDEN, dtype=torch.int64), "bias2 must be .*, got torch.int64")],
    }
    for name, cases in other.items():
        for parameter, message in cases:
            with dispatcher_of() as dispatcher:
                experts = MoEExperts(dispatcher, INNER, bias=True)
                setattr(experts, name, nn.Parameter(parameter, requires_grad=False))
                with pytest.raises(ValueError, match=message):
                    experts(*given())
                assert dispatcher._slots[0].generation == 0
    with dispatcher_of() as dispatcher, pytest.raises(ValueError, match="the experts are on meta, the batch on cpu"):
        MoEExperts(dispatcher, INNER, device="meta")(*given())


def run_refused(rank: int, ranks: int) -> None:
    """Rank 0 gives the experts of all ranks, once; after that it is out of step, and both hear of it."""
    with dispatcher_of(timeout=60.0) as dispatcher:
        every = weights_of(EXPERTS, HIDDEN, INNER)[:2]
        own = GroupedExperts.from_weights(*(w[2 * rank : 2 * rank + 2] for w in every), quant="none")
        if rank == 0:
            with pytest.raises(ValueError, match=r"the experts are 4 .* each rank its own experts"):
                dispatcher(*given(rank), GroupedExperts.from_weights(*every, quant="none"))
        with pytest.raises(OutOfStepError, match="are at different calls"):
            dispatcher(*given(rank), own)


def test_a_rank_whose_experts_are_refused_is_at_another_call():
    run_ranks(run_refused, 2)


def test_experts_whose_dispatch_knew_of_no_gradient_are_told_where_there_is_one():
    w = torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    message = (
        r"combine has one if hidden states or weights required grad in its dispatch, .*give that hidden_states.requires_grad_\(\)"
    )
    with dispatcher_of() as dispatcher:
        with pytest.raises(RuntimeError, match=message):
            dispatcher(*given(grad=False), lambda batch: batch.values @ w)
        batch, handle = dispatcher.dispatch(*given(grad=False))
        with pytest.raises(RuntimeError, match=message):
            dispatcher.combine(batch.values @ w, handle)
        # which are the ways that the words name
        dispatcher(*given(), lambda batch: batch.values @ w).sum().backward()
        batch, handle = dispatcher.dispatch(*given())
        dispatcher.combine(batch.values @ w, handle).sum().backward()
        assert w.grad is not None and w.grad.any()


def test_the_gradient_of_a_quantizing_dispatchers_own_experts_is_refused_by_the_name_of_what_wants_it():
    (hidden, ids, weights), experts = given(grad=False), nn.Linear(HIDDEN, HIDDEN)
    with dispatcher_of("fp8_e4m3fn") as dispatcher:
        with pytest.raises(
            RuntimeError, match="^a parameter of the experts requires grad, and a batch in fp8_e4m3fn has no gradient"
        ) as own:
            dispatcher(hidden, ids, weights, experts)
        assert "detach" not in str(own.value)
        with pytest.raises(RuntimeError, match=r"^topk_weights requires grad, .* or topk_weights.detach\(\)"):
            dispatcher(hidden, ids, weights.requires_grad_(), experts)
        with pytest.raises(RuntimeError, match=r"^hidden_states requires grad, .* or hidden_states.detach\(\)"):
            dispatcher.dispatch(hidden.requires_grad_(), ids, weights)


def by_hand(dispatcher: MoEQuantDispatcher, combined: bool) -> Tensor:
    batch, handle = dispatcher.dispatch(*given())
    return dispatcher.combine(batch.values * 2, handle) if combined else batch.values


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize(
    ("quant", "forward"),
    [
        ("none", lambda dispatcher: MoEExperts(dispatcher, INNER)(*given())),
        ("fp8_e4m3fn", lambda dispatcher: MoEExperts(dispatcher, INNER)(*given())),
        ("fp8_e4m3fn", lambda dispatcher: MoEExperts(dispatcher, INNER, keep_quantized=True)(*given())),
        ("none", lambda dispatcher: by_hand(dispatcher, combined=True)),
        ("none", lambda dispatcher: by_hand(dispatcher, combined=False)),
    ],
    ids=["bfloat16", "fp8", "kept in fp8", "by hand", "dispatch alone"],
)
def test_a_backward_says_that_the_dispatcher_has_grown_since_its_forward(layout, quant, forward):
    with dispatcher_of(quant, layout=layout, recipe="ue8m0") as dispatcher:
        out = forward(dispatcher)
        dispatcher.ensure(100)
        with pytest.raises(RuntimeError, match=r"the dispatcher has grown since the forward \(ensure\)"):
            out.sum().backward()
        # what comes next is as ever
        forward(dispatcher).sum().backward()


@pytest.mark.parametrize(("settings", "recompute"), [({}, True), ({"capacity": 16}, False)], ids=["recomputed", "as many rows"])
def test_a_dispatcher_may_grow_where_no_rows_are_kept_or_there_are_as_many(settings, recompute):
    grads = []
    for grows in (False, True):
        torch.manual_seed(0)
        with dispatcher_of(**settings) as dispatcher:
            x, ids, weights = given()
            out = MoEExperts(dispatcher, INNER, recompute=recompute)(x, ids, weights)
            if grows:
                dispatcher.ensure(100)
            out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
