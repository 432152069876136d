"""The steps of a layer's backward in float64, by gradcheck, and against autograd on a dense computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moequant import Activation
from moequant.reference.training import Exact, LocalRoutes
from moequant.training.functions import CombineFunction, DispatchFunction, LayerFunction, Plan
from moequant.training.slopes import activated_with_slopes
from training_cases import ACTIVATIONS, dense_activation, dense_layer, tokens_of, weights_of

EXPERTS, HIDDEN, INNER = 4, 5, 3
# rows of an expert's buffer: ragged, padded with room for all, and one in which rows are dropped
CAPACITIES = {"ragged": None, "padded": 16, "dropped": 3}


def wide(x: Tensor) -> Tensor:
    return x.double().requires_grad_()


def inputs(twice: bool = False):
    """Tokens of which some entries are absent and expert 2 has none. twice: tokens name an expert twice, too."""
    tokens = tokens_of(7, 3, EXPERTS, HIDDEN)
    ids = torch.where(tokens.ids == 2, 1 if twice else -1, tokens.ids)
    return wide(tokens.hidden), ids, wide(tokens.weights)


def placed_entries(ids: torch.Tensor, capacity: int | None) -> torch.Tensor:
    """The first entries of each expert, as many as have room."""
    placed = ids.flatten() >= 0
    for expert in range(EXPERTS):
        if capacity is not None:
            placed[(ids.flatten() == expert).nonzero().flatten()[capacity:]] = False
    return placed.view(ids.shape)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_slopes_of_every_activation_are_those_of_autograd(name):
    kind = ACTIVATIONS[name]
    x, grad = torch.randn(40, 4 * kind.width).double().requires_grad_(), torch.randn(40, 4).double()
    expected = dense_activation(x, kind)
    (of_x,) = torch.autograd.grad(expected, x, grad)
    value, slope = activated_with_slopes(x.detach(), kind, grad)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(slope, of_x, rtol=1e-12, atol=1e-14)


def test_interleaved_columns_have_the_slopes_of_columns_apart():
    x, grad = torch.randn(8, 10), torch.randn(8, 5)
    mixed = torch.stack(x.chunk(2, 1), 2).flatten(1)
    value, slope = activated_with_slopes(x, Activation(limit=0.7, offset=1.0), grad)
    kind = Activation(limit=0.7, offset=1.0, interleaved=True)
    of_mixed = activated_with_slopes(mixed, kind, grad)
    assert torch.equal(of_mixed[0], value) and torch.equal(of_mixed[1], torch.stack(slope.chunk(2, 1), 2).flatten(1))


def test_slopes_of_gates_where_exp_overflows_are_finite():
    for kind in ACTIVATIONS.values():
        x = torch.tensor([-1e4, -200.0, -89.0, 0.0, 89.0, 1e4])[:, None].expand(-1, kind.width)
        value, slope = activated_with_slopes(x.contiguous(), kind, torch.ones(6, 1))
        assert value.isfinite().all() and slope.isfinite().all(), kind


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("name", ["silu", "gpt-oss", "relu2, not gated"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_gradcheck_of_a_layer_in_float64(name, capacity, biases):
    plan = Plan(LocalRoutes(EXPERTS, CAPACITIES[capacity]), Exact(), ACTIVATIONS[name])
    hidden, ids, weights = inputs(twice=True)
    of = weights_of(EXPERTS, HIDDEN, INNER, ACTIVATIONS[name], biases).each(wide)
    leaves = (hidden, weights, *(w for w in of if w is not None))

    def layer(x: Tensor, s: Tensor, *of: Tensor) -> Tensor:
        return LayerFunction.apply(x, ids, s, *of, *[None] * (4 - len(of)), plan)

    # by random projections of the Jacobian
    assert gradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_layer_in_float64_has_the_gradients_of_a_dense_computation(capacity, recompute):
    kind, room = ACTIVATIONS["gpt-oss"], CAPACITIES[capacity]
    plan = Plan(LocalRoutes(EXPERTS, room), Exact(), kind, recompute)
    hidden, ids, weights = inputs()
    of = weights_of(EXPERTS, HIDDEN, INNER, kind, biases=True).each(wide)
    grad = torch.randn(7, HIDDEN).double()
    leaves = hidden, weights, *(w for w in of if w is not None)
    out = LayerFunction.apply(hidden, ids, weights, *of, plan)
    expected = dense_layer(hidden, ids, weights, of, kind, placed_entries(ids, room))
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
        # of the expert without rows, exactly
        assert mine.shape[0] != EXPERTS or not mine[2].any()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_gradcheck_of_dispatch_and_combine_around_experts_of_ones_own(capacity):
    hidden, ids, weights = inputs(twice=True)
    factors = torch.rand(EXPERTS, HIDDEN).double().requires_grad_()

    def layer(x, s, factors):
        routes = LocalRoutes(EXPERTS, CAPACITIES[capacity])
        values = DispatchFunction.apply(x, ids, s, routes)
        rows = routes.dispatch(x.detach(), ids, s.detach())
        return CombineFunction.apply(rows.shaped(values.flatten(0, -2).sin() * factors[rows.experts]), ids, s, routes)

    assert gradcheck(layer, (hidden, weights, factors), fast_mode=True)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_gradcheck_of_dispatch_alone(capacity):
    """Its way back is one that nothing has dispatched before."""
    hidden, ids, weights = inputs()

    def rows(x):
        return DispatchFunction.apply(x, ids, weights.detach(), LocalRoutes(EXPERTS, CAPACITIES[capacity]))

    assert gradcheck(rows, (hidden,))


def test_gradients_are_linear_in_the_gradient_of_the_output_and_follow_permuted_experts():
    kind = ACTIVATIONS["silu"]
    hidden, ids, weights = inputs()
    of = weights_of(EXPERTS, HIDDEN, INNER).each(wide)

    def gradients(of, ids, grad):
        leaves = (hidden, weights, of.w13, of.w2)
        out = LayerFunction.apply(hidden, ids, weights, *of, Plan(LocalRoutes(EXPERTS, None), Exact(), kind))
        return torch.autograd.grad(out, leaves, grad)

    first, second = torch.randn(2, 7, HIDDEN).double()
    both = zip(gradients(of, ids, first), gradients(of, ids, second), gradients(of, ids, first + second), strict=True)
    for a, b, together in both:
        torch.testing.assert_close(a + b, together)
    order = torch.tensor([2, 0, 3, 1])
    moved = of.each(lambda w: w.detach()[order].requires_grad_())
    permuted = gradients(moved, torch.where(ids < 0, -1, order.argsort()[ids.clamp_min(0)]), first)
    for name, (a, b) in enumerate(zip(gradients(of, ids, first), permuted, strict=True)):
        torch.testing.assert_close(a if name < 2 else a[order], b)
