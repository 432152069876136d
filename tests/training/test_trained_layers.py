"""Layers on dispatchers under grad: against autograd on a dense computation, on one rank and on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fuzz_training import Tape
from moequant import Activation, ExpertBatch, GroupedExperts, MoEQuantDispatcher
from moequant.nn import MoEExperts
from moequant.testing import assert_bit_equal, relative_error, run_ranks
from moequant.training.layer import train
from training_cases import (
    ACTIVATIONS,
    HIDDEN,
    INNER,
    LARGEST,
    Tokens,
    check_layer,
    dense_gradients,
    leaves,
    run_layer,
    tokens_of,
    tokens_of_rank,
    weights_of,
)

BACKEND = "cpu:gloo,cuda:nccl"
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
# of activations with kinks, or a square, in bfloat16: GEMM 1's result is rounded, and lies on the other side of some
KINKED = 0.0125


def kinked(kind: Activation) -> bool:
    return kind.limit is not None or kind.function.startswith("relu")


class Factors(torch.nn.Module):
    """Experts of one's own: each row times its expert's factors, and then something that isn't linear."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = torch.nn.Parameter(factors)

    def forward(self, batch: ExpertBatch) -> Tensor:
        assert not isinstance(batch.activations, tuple)
        return (batch.values.float() * self.factors[batch.experts_of_rows()]).tanh().bfloat16()


def trained(
    ranks: int, settings: dict[str, Any], sizes: tuple[int, int, int] = (HIDDEN, INNER, 24), largest: float = 0.0, **options: Any
) -> None:
    call = "cpu", settings, sizes, options
    results = run_ranks(run_layer, ranks, *call) if ranks > 1 else [run_layer(0, 1, *call)]
    check_layer(results, sizes, options, largest or LARGEST[settings["quant"]])


@LAYOUTS
@pytest.mark.parametrize("quant", LARGEST)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_one_rank_are_those_of_autograd(layout, quant, recompute):
    trained(1, {"quant": quant, "layout": layout}, (256, 128, 40), recompute=recompute)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_every_activation_with_biases_are_those_of_autograd(name):
    kind = ACTIVATIONS[name]
    trained(1, {"quant": "none", "layout": "ragged"}, largest=KINKED if kinked(kind) else 0.0, kind=kind, biases=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tokens_of_other_types_get_gradients_of_theirs(dtype):
    trained(1, {"quant": "none", "reduce": "per_rank"}, dtype=dtype)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_of_several_ranks_are_those_of_autograd(ranks):
    settings = [{"layout": "ragged", "exchange": "packed"}, {"exchange": "padded"}, {"layout": "ragged", "exchange": "padded"}]
    trained(ranks, settings[ranks - 2] | {"quant": "none"}, biases=ranks == 3)


@LAYOUTS
def test_fp8_gradients_of_two_ranks_are_those_of_autograd(layout):
    trained(2, {"quant": "fp8_e4m3fn", "layout": layout, "reduce": "per_rank"}, (256, 128, 40))


def run_shared(rank: int, ranks: int, reduce: str) -> dict[str, Tensor]:
    """This rank's results for tokens that all ranks hold."""
    of = leaves(weights_of(4, HIDDEN, INNER, biases=True).each(lambda w: w[4 * rank // ranks : 4 * (rank + 1) // ranks]))
    tokens = tokens_of(13, 2, 4, HIDDEN)
    x, s = tokens.hidden.requires_grad_(), tokens.weights.requires_grad_()
    common: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": HIDDEN, "max_tokens_per_rank": 13, "quant": "none"}
    with MoEQuantDispatcher(**common, shared_batch=True, reduce=reduce) as dispatcher:
        out = train(dispatcher, (x, tokens.ids, s), (of.w13, of.w2, of.bias13, of.bias2), Activation())
        out.backward(tokens.grad)
    made = {"output": out.detach(), "hidden": x.grad, "weights": s.grad} | {name: w.grad for name, w in of._asdict().items()}
    return {name: gradient for name, gradient in made.items() if gradient is not None}


@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_ranks_that_share_a_batch_all_get_the_gradients_of_its_tokens(reduce):
    results = run_ranks(run_shared, 2, reduce)
    (each,), of_weights = dense_gradients([tokens_of(13, 2, 4, HIDDEN)], weights_of(4, HIDDEN, INNER, biases=True))
    for name, expected in each.items():
        assert_bit_equal(results[1][name], results[0][name])
        assert relative_error(results[0][name], expected) < LARGEST["none"], name
    for name, expected in of_weights.items():
        assert relative_error(torch.cat([result[name] for result in results]), expected) < LARGEST["none"], name


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("quant", LARGEST)
def test_gradients_on_a_gpu_are_those_of_autograd(layout, quant):
    sizes, options = (1024, 384, 700), {"recompute": True}
    check_layer([run_layer(0, 1, "cuda", {"quant": quant, "layout": layout}, sizes, options)], sizes, options, LARGEST[quant])


def check_steps(device: str, layout: str, quant: str, name: str) -> None:
    """Each step against a CPU's of the same operands, and the gradients against those that a CPU makes of the same steps. A number that
    is rounded to the other side of a limit has another gradient: one in fifty of GEMM 1's makes a hundredth of the tokens'."""
    call = {"quant": quant, "layout": layout}, (256, 128, 100), {"kind": ACTIVATIONS[name], "biases": True}
    tape = Tape()
    with tape.recording():
        found = run_layer(0, 1, device, *call)
    with tape.checking():
        expected = run_layer(0, 1, "cpu", *call)
    for of, grad in found.items():
        assert relative_error(grad, expected[of]) < LARGEST["none"], (of, relative_error(grad, expected[of]))


@LAYOUTS
@pytest.mark.parametrize("quant", LARGEST)
def test_a_layer_taken_step_by_step_has_its_own_gradients(layout, quant):
    check_steps("cpu", layout, quant, "limit")


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("quant", LARGEST)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_every_activation_on_a_gpu_are_those_of_a_cpu(layout, quant, name):
    check_steps("cuda", layout, quant, name)


@pytest.mark.multigpu
@LAYOUTS
@pytest.mark.parametrize("quant", LARGEST)
@pytest.mark.parametrize(
    "settings",
    [{"transport": "symmetric"}, {"transport": "symmetric", "reduce": "per_rank"}, {"transport": "collective"}],
    ids=["symmetric", "symmetric per rank", "collective"],
)
def test_gradients_on_two_gpus_are_those_of_autograd(layout, quant, settings):
    sizes, options = (1024, 384, 700), {"biases": True}
    call = "cuda:{rank}", settings | {"quant": quant, "layout": layout}, sizes, options
    check_layer(run_ranks(run_layer, 2, *call, backend=BACKEND), sizes, options, LARGEST[quant])


def one_rank(**settings: Any) -> MoEQuantDispatcher:
    common: dict[str, Any] = {
        "num_experts": 4,
        "top_k": 2,
        "hidden_size": HIDDEN,
        "max_tokens_per_rank": 24,
        "quant": "none",
        "recipe": "ue8m0",
    }
    return MoEQuantDispatcher(**common | settings, device="cpu")


@pytest.mark.parametrize("settings", [{"capacity": 16}, {"layout": "ragged", "rank_capacity": 32}], ids=["padded", "ragged"])
def test_rows_without_room_have_no_gradient_and_the_others_have_theirs(settings):
    tokens = tokens_of(24, 2, 4, HIDDEN, absent=0.0)
    # more for expert 0 than a buffer holds
    tokens.ids[:20, 0], tokens.ids[:20, 1] = 0, 3
    of = leaves(weights_of(4, HIDDEN, INNER))
    x, s = tokens.hidden.clone().requires_grad_(), tokens.weights.clone().requires_grad_()
    with one_rank(**settings, on_overflow="drop") as dispatcher:
        batch, _ = dispatcher.dispatch(tokens.hidden, tokens.ids, tokens.weights)
        placed = torch.zeros(24, 2, dtype=torch.bool)
        for expert in range(4):
            placed.view(-1)[batch.rows_of(batch.sources, expert)] = True
        assert 0 < int((~placed).sum()) == dispatcher.check()
        train(dispatcher, (x, tokens.ids, s), (of.w13, of.w2, None, None), Activation()).backward(tokens.grad)
    kept = tokens._replace(ids=torch.where(placed, tokens.ids, -1))
    (each,), of_weights = dense_gradients([kept], of)
    assert s.grad is not None and x.grad is not None and of.w13.grad is not None and of.w2.grad is not None
    assert not s.grad[~placed].any() and s.grad[placed].all()
    mine = x.grad, s.grad, of.w13.grad, of.w2.grad
    expected = each["hidden"], each["weights"], of_weights["w13"], of_weights["w2"]
    assert max(map(relative_error, mine, expected)) < LARGEST["none"]


def test_gradients_of_1e_6_of_their_size_are_as_right_in_fp8():
    tokens = tokens_of(24, 2, 4, HIDDEN)
    small = tokens._replace(grad=(tokens.grad.float() * 2.0**-20).bfloat16())
    results = []
    for given in (tokens, small):
        of, x = leaves(weights_of(4, HIDDEN, INNER)), given.hidden.clone().requires_grad_()
        with one_rank(quant="fp8_e4m3fn") as dispatcher:
            train(dispatcher, (x, given.ids, given.weights), (of.w13, of.w2, None, None), Activation()).backward(given.grad)
        results.append((x.grad, of.w13.grad, of.w2.grad))
    for large, small_one in zip(*results, strict=True):
        # powers of two change no rounding, as long as no scale is a floor
        assert torch.equal(large * 2.0**-20, small_one)


@pytest.mark.parametrize("quant", LARGEST)
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_the_forward_has_the_bits_of_inference(quant, layout):
    tokens, of = tokens_of(24, 2, 4, HIDDEN), leaves(weights_of(4, HIDDEN, INNER, biases=True))
    with one_rank(quant=quant, layout=layout) as dispatcher:
        out = train(dispatcher, tokens[:3], (of.w13, of.w2, of.bias13, of.bias2), Activation())
        with torch.no_grad():
            experts = GroupedExperts.from_weights(*of[:2], quant=quant, recipe="ue8m0", bias13=of.bias13, bias2=of.bias2)
            assert_bit_equal(out.detach(), dispatcher(*tokens[:3], experts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant": "fp8_e4m3fn", "recipe": "deepgemm"},
            'recipe "deepgemm" takes every group .* with recipe="ue8m0"',
        ),
        ({"quant": "int8"}, 'trained with quant="none" or "fp8_e4m3fn", got "int8"'),
        ({"quant": "fp8_e5m2"}, 'got "fp8_e5m2"'),
    ],
)
def test_what_would_destroy_gradients_is_refused(settings, message):
    tokens, of = tokens_of(4, 2, 4, HIDDEN), leaves(weights_of(4, HIDDEN, INNER))
    with one_rank(**settings) as dispatcher, pytest.raises(ValueError, match=message):
        train(dispatcher, tokens[:3], (of.w13, of.w2, None, None), Activation())


@LAYOUTS
def test_a_dispatcher_that_is_called_with_experts_has_their_gradients(layout):
    tokens, every = tokens_of(24, 2, 4, HIDDEN), weights_of(4, HIDDEN, INNER, biases=True)
    of, x, s = leaves(every), tokens.hidden.clone().requires_grad_(), tokens.weights.clone().requires_grad_()
    with one_rank(layout=layout) as dispatcher:
        experts = GroupedExperts.from_weights(of.w13, of.w2, quant="none", bias13=of.bias13, bias2=of.bias2)
        dispatcher(x, tokens.ids, s, experts).backward(tokens.grad)
    (each,), of_weights = dense_gradients([tokens], every)
    made = {"hidden": x.grad, "weights": s.grad} | {name: w.grad for name, w in of._asdict().items()}
    del each["output"]
    for name, expected in (each | of_weights).items():
        gradient = made[name]
        assert gradient is not None and relative_error(gradient, expected) < LARGEST["none"], name


def dense_factors(tokens: Tokens, factors: Tensor) -> list[Tensor]:
    x, s, f = (t.double().requires_grad_() for t in (tokens.hidden, tokens.weights, factors))
    rows = (x[:, None] * f[tokens.ids.clamp_min(0)]).tanh() * (tokens.ids >= 0)[..., None]
    return list(torch.autograd.grad((rows * s[..., None]).sum(1), (x, s, f), tokens.grad.double()))


def run_factors(rank: int, ranks: int, layout: str, steps: bool, device: str = "cpu") -> list[Tensor]:
    """The gradients of experts of one's own: by a call of the dispatcher, or by dispatch and combine, with another dispatch before the
    backward."""
    tokens, factors = tokens_of_rank(rank, ranks, 4, HIDDEN, 24), torch.rand(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    device = device.format(rank=rank)
    x, ids, s, grad = (t.to(device) for t in tokens)
    for leaf in (x, s):
        leaf.requires_grad_()
    settings: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": HIDDEN, "max_tokens_per_rank": 24, "quant": "none"}
    experts = Factors(factors[rank * 4 // ranks : (rank + 1) * 4 // ranks].to(device))
    with MoEQuantDispatcher(**settings, layout=layout, device=device) as dispatcher:
        if steps:
            batch, handle = dispatcher.dispatch(x, ids, s)
            out = dispatcher.combine(experts(batch), handle)
        else:
            out = dispatcher(x, ids, s, experts)
        dispatcher.dispatch(x.detach(), ids, s.detach())
        out.backward(grad)
    made = x.grad, s.grad, experts.factors.grad
    return [g.cpu() for g in made if g is not None]


def check_factors(ranks: list[list[Tensor]]) -> None:
    factors = torch.rand(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = [dense_factors(tokens_of_rank(rank, len(ranks), 4, HIDDEN, 24), factors) for rank in range(len(ranks))]
    for mine, theirs in zip(ranks, expected, strict=True):
        assert max(map(relative_error, mine[:2], theirs[:2])) < LARGEST["none"]
    of_factors = torch.cat([made[2] for made in ranks])
    assert relative_error(of_factors, torch.stack([made[2] for made in expected]).sum(0)) < LARGEST["none"]


@LAYOUTS
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("steps", [False, True], ids=["called", "step by step"])
def test_experts_of_ones_own_have_the_gradients_of_autograd(layout, steps, device):
    check_factors([run_factors(0, 1, layout, steps, device)])


def test_experts_of_ones_own_on_two_ranks_have_the_gradients_of_autograd():
    check_factors(run_ranks(run_factors, 2, "ragged", True))


@pytest.mark.multigpu
@LAYOUTS
@pytest.mark.parametrize("steps", [False, True], ids=["called", "step by step"])
def test_experts_of_ones_own_on_two_gpus_have_the_gradients_of_autograd(layout, steps):
    check_factors(run_ranks(run_factors, 2, layout, steps, "cuda:{rank}", backend=BACKEND))


def test_a_dispatch_whose_combine_is_not_in_the_graph_returns_unweighted_rows():
    """As the sum of a token's rows is no weighted one, the gradient isn't."""
    tokens = tokens_of(24, 2, 4, HIDDEN, absent=0.0)
    x = tokens.hidden.clone().requires_grad_()
    with one_rank() as dispatcher:
        batch, _ = dispatcher.dispatch(x, tokens.ids, tokens.weights)
        batch.values.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2.0))


def test_a_batch_that_is_trained_on_is_nobodys_buffer():
    tokens = tokens_of(24, 2, 4, HIDDEN)
    with one_rank() as dispatcher:
        batch, _ = dispatcher.dispatch(tokens.hidden.clone().requires_grad_(), tokens.ids, tokens.weights)
        kept = [t.detach().clone() for t in (batch.values, batch.num_tokens, batch.sources)]
        other = tokens_of(24, 2, 4, HIDDEN, seed=1)
        dispatcher.dispatch(*other[:3])
        for now, before in zip((batch.values, batch.num_tokens, batch.sources), kept, strict=True):
            assert_bit_equal(now.detach(), before)
        # no row, no number
        assert batch.values.isfinite().all()


def test_two_combines_of_a_dispatch_with_a_backward_in_between_are_both_weighted():
    tokens = tokens_of(24, 2, 4, HIDDEN)
    x = tokens.hidden.clone().requires_grad_()
    with one_rank(slots=2) as dispatcher:
        batch, handle = dispatcher.dispatch(x, tokens.ids, tokens.weights)
        first = dispatcher.combine(batch.values * 2, handle)
        second = dispatcher.combine(batch.values * 2, handle)
        assert_bit_equal(first.detach(), second.detach())
        first.backward(tokens.grad, retain_graph=True)
        with pytest.raises(RuntimeError, match="whose buffers a later dispatch, or ensure, has taken"):
            dispatcher.combine(batch.values * 2, handle)
        second.backward(tokens.grad)


def test_what_has_no_backward_says_so():
    tokens, of = tokens_of(4, 2, 4, HIDDEN), weights_of(4, HIDDEN, INNER)
    x = tokens.hidden.clone().requires_grad_()
    with one_rank(quant="fp8_e4m3fn") as dispatcher:
        with pytest.raises(RuntimeError, match="hidden_states requires grad, and a batch in fp8_e4m3fn has no gradient"):
            dispatcher.dispatch(x, *tokens[1:3])
        experts = GroupedExperts.from_weights(of.w13, of.w2, recipe="ue8m0")
        with pytest.raises(RuntimeError, match="quantized experts have no backward: use moequant.nn.MoEExperts"):
            dispatcher(x, *tokens[1:3], experts)
    with one_rank() as dispatcher:
        batch, handle = dispatcher.dispatch(x, *tokens[1:3])
        with pytest.raises(RuntimeError, match="out is not written under grad"):
            dispatcher.combine(batch.values, handle, out=torch.empty(4, HIDDEN).bfloat16())
        with pytest.raises(ValueError, match="expert_output must have shape"):
            dispatcher.combine(batch.values[:1], handle)
        with pytest.raises(RuntimeError, match="hidden_states requires grad, and this call has no backward"):
            dispatcher.dispatch_send(x, *tokens[1:3])
        twice = torch.autograd.grad(dispatcher(x, *tokens[1:3], Factors(torch.rand(4, HIDDEN))).sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            twice.sum().backward()


@LAYOUTS
def test_a_result_that_is_kept_in_fp8_gives_near_gradients_and_the_same_output(layout):
    call = {"quant": "fp8_e4m3fn", "layout": layout}, (256, 128, 40)
    whole, narrow = (run_layer(0, 1, "cpu", *call, {"keep_quantized": keep, "passes": 1}) for keep in (False, True))
    assert_bit_equal(narrow.pop("output"), whole["output"])
    for name, grad in narrow.items():
        # by one more rounding, and so by no more than all the others are worth
        assert 0.02 < relative_error(grad, whole[name]) < LARGEST["fp8_e4m3fn"], name


def test_fp8_is_kept_of_layers_that_quantize_and_nothing_recompute():
    with one_rank(quant="none") as plain, one_rank(quant="fp8_e4m3fn") as quantizing:
        for dispatcher, recompute in ((plain, False), (quantizing, True)):
            with pytest.raises(ValueError, match="keep_quantized is of a dispatcher that quantizes, without recompute"):
                MoEExperts(dispatcher, INNER, keep_quantized=True, recompute=recompute)
        assert MoEExperts(quantizing, INNER, keep_quantized=True).keep_quantized
