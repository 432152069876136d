"""A layer, a dispatch and a combine that autograd knows.

T tokens of this rank, K top-k, L local experts, M rows of an expert's buffer, R rows of a rank's, H hidden size, I intermediate size.

Given dO, the gradient of a layer's output, with rows r of expert e that come from entry (t, k):

    G_r = dO_t                          dispatch of dO
    dA_r = G_r w2_e                     grouped GEMM with w2 transposed
    ds_tk = <dA_r, A_r>                 back to the token, one number a row
    dw2_e = sum of s_r G_r^T A_r        over the expert's rows
    dh_r from s_r dA_r                  the activation's derivative
    dX_r = dh_r w13_e                   grouped GEMM with w13 transposed
    dx_t = sum of dX_r                  combine with weights of one
    dw13_e = sum of dh_r^T X_r          X dispatched again

h is GEMM 1's result, A = activation(h), and s_r = s_tk the routing weight, which this rank asks of the token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moequant.activations import Activation
from moequant.batch import QuantizedTensor, scale_layout
from moequant.training.between import Given, Wanted, keeps_graph, slopes
from moequant.training.operands import Operands
from moequant.training.precision import Operand, Precision
from moequant.training.routes import TOKENS, TOKENS_AGAIN, Kind, Routes, check_kept, gradients
from moequant.training.rows import Rows


@dataclass(frozen=True, eq=False)
class Plan:
    """How a layer is computed.

    Attributes:
        routes: between tokens and rows.
        precision: of the products.
        kind: the activation, gate and up apart.
        recompute: h is not kept for the backward, which makes it again.
        keep_quantized: h is kept as the precision has its operands.
        operands: of weights that stay as they are, or None: they are made anew.
    """

    routes: Routes
    precision: Precision
    kind: Activation
    recompute: bool = False
    keep_quantized: bool = False
    operands: Operands | None = None

    def weight(self, name: str, w: Tensor) -> Operand:
        """What a product with a weight transposed takes.

        Args:
            name: "w13" or "w2".
            w: that weight.

        Returns:
            The operand, or the weight, of which the product makes one.
        """
        return w if self.operands is None else self._kept_weights(self.operands, name, w)[0]

    def back_weight(self, name: str, w: Tensor) -> Operand:
        """What a product with a weight takes, as a backward has it.

        Args:
            name: "w13" or "w2".
            w: that weight.

        Returns:
            As `weight`.
        """
        return w if self.operands is None else self._kept_weights(self.operands, name, w)[1]

    def _kept_weights(self, operands: Operands, name: str, w: Tensor) -> tuple[Operand, Operand]:
        return operands.both(name, w, self.kind.halves if name == "w13" else 1)

    def kept(self, h: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """What stays of h until the backward.

        Args:
            h: of `first_product`.
            rows: whose it is.

        Returns:
            The tensors.
        """
        made = self.precision.operand(h.flatten(0, -2), rows) if self.keep_quantized else h
        return (made.values, made.scales) if isinstance(made, QuantizedTensor) else (made,)

    def restored(self, kept: Sequence[Tensor], rows: Rows) -> Tensor:
        """h from what `kept` has kept, rounded by that.

        Args:
            kept: the tensors.
            rows: of another dispatch of the same ids.

        Returns:
            (L, M, 2I), ragged (R, 2I).
        """
        if len(kept) == 1:
            return kept[0]
        values, scales = kept
        q = QuantizedTensor(values, scales, scale_layout(scales), self.precision.recipe)
        return rows.shaped(replace(rows, values=q).contracted())

    def first_product(
        self, hidden: Tensor, ids: Tensor, weights: Tensor | None, w13: Tensor, kind: Kind = TOKENS
    ) -> tuple[Rows, Tensor]:
        """Dispatch and GEMM 1.

        Args:
            hidden: (T, H).
            ids: (T, K).
            weights: (T, K), or None for ones.
            w13: (L, 2I, H), not gated (L, I, H).
            kind: of the dispatch.

        Returns:
            The rows, and h.
        """
        rows = self.routes.dispatch(hidden, ids, weights, kind)
        return rows, self.precision.product(rows.values, self.weight("w13", w13), rows, self.kind.halves)

    def second_product(self, inner: Operand, rows: Rows, w2: Tensor, bias2: Tensor | None) -> Tensor:
        """GEMM 2.

        Args:
            inner: (L, M, I), ragged (R, I), the activation's value, an operand.
            rows: whose it is.
            w2: (L, H, I).
            bias2: (L, H), or None.

        Returns:
            (L, M, H), ragged (R, H).
        """
        output = self.precision.product(inner, self.weight("w2", w2), rows)
        if bias2 is not None:
            self.precision.add_bias(output, rows, bias2)
        return output


class LayerFunction(torch.autograd.Function):
    """The layer: hidden states (T, H), ids and weights (T, K), w13, w2, their biases or None, and a `Plan`, to (T, H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        bias13: Tensor | None,
        bias2: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        ctx.plan = plan
        # asked here, where the parameters are: what autograd hands back may be another tensor
        ctx.dtypes = [dtype_of_gradient(parameter) for parameter in (w13, w2, bias13, bias2)]
        if plan.recompute:
            ctx.save_for_backward(hidden, ids, weights, w13, w2, bias13, bias2)
            made = plan.precision.experts(plan.weight("w13", w13), plan.weight("w2", w2), bias13, bias2, plan.kind)
            return plan.routes.run((hidden, ids, weights), made)
        rows, h = plan.first_product(hidden, ids, weights, w13)
        ctx.save_for_backward(hidden, ids, weights, w13, w2, bias13, bias2, *plan.kept(h, rows))
        inner = plan.precision.activation(h, rows, plan.kind, bias13)
        # where it isn't kept, its memory is for GEMM 2
        del h
        return plan.routes.sum(plan.second_product(inner, rows, w2, bias2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grad_outputs
        # the products choose their types themselves
        with torch.autocast(grad.device.type, enabled=False):
            return _layer_backward(ctx, grad)


def _layer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, ids, weights, w13, w2, bias13, bias2, *kept = ctx.saved_tensors
    for_hidden, _, for_weights, for_w13, for_w2, for_bias13, for_bias2, _ = ctx.needs_input_grad
    of_w13, of_w2, of_bias13, of_bias2 = ctx.dtypes
    plan: Plan = ctx.plan
    routes, precision = plan.routes, plan.precision
    d_hidden = d_weights = d_w13 = d_w2 = d_bias13 = d_bias2 = None
    h = None if kept else plan.first_product(hidden, ids, None, w13, TOKENS_AGAIN)[1]
    rows = routes.dispatch(grad, ids, kind=gradients(hidden=for_hidden, weights=for_weights, w13=for_w13, bias2=for_bias2))
    if h is None:
        check_kept(kept[0], rows.sources.numel())
        h = plan.restored(kept, rows)
    d_inner = precision.back_product(rows.values, plan.back_weight("w2", w2), rows)
    of_output = more = None
    if bias2 is not None and (for_weights or for_bias2):
        of_output = rows.contracted()
        plain = rows.only(of_output).to(torch.promote_types(torch.float32, of_output.dtype))
        more = (plain @ bias2.to(plain.dtype).T).gather(1, rows.experts.unsqueeze(1)).squeeze(1)
        if for_bias2:
            d_bias2 = sums(routes.at_rows(weights, rows).unsqueeze(1) * plain, rows).to(of_bias2)
        del plain
    narrow = precision.columnwise
    wanted = Wanted(
        plain=for_bias13 or (for_w13 and not narrow),
        operand=for_hidden or (for_w13 and narrow),
        inner=for_w2,
        weights=for_weights,
        keep=len(kept) == 1 and keeps_graph(),
    )
    made = slopes(plan, rows, Given(d_inner, h, bias13, weights, ids, more), wanted)
    memory = h.untyped_storage()
    if len(kept) == 1 and precision.quant != "none" and not (wanted.keep or wanted.plain) and memory.nbytes() == h.nbytes:
        # autograd would hold it to the end, and nothing that was made lies there
        memory.resize_(0)
    del d_inner, h, memory, kept
    if made.of_weights is not None:
        d_weights = made.of_weights.to(weights.dtype)
    if made.inner is not None:
        grads = of_output if of_output is not None and not narrow else precision.contracted(rows)
        d_w2 = precision.weight_gradient(grads, made.inner, rows, of_w2)
        del grads
    if made.of_h is not None and for_bias13:
        d_bias13 = sums(rows.only(made.of_h), rows).to(of_bias13)
    of_h, operand = made.operand if narrow else made.of_h, made.operand
    # what comes next takes the memory of what isn't used any more
    del made, of_output
    if operand is not None and for_hidden:
        d_hidden = routes.sum(precision.back_product(operand, plan.back_weight("w13", w13), rows)).to(hidden.dtype)
    del operand
    if of_h is not None and for_w13:
        tokens = routes.dispatch(hidden, ids, kind=TOKENS_AGAIN)
        d_w13 = precision.weight_gradient(of_h, precision.contracted(tokens), rows, of_w13)
    return d_hidden, None, d_weights, d_w13, d_w2, d_bias13, d_bias2, None


class DispatchFunction(torch.autograd.Function):
    """Hidden states (T, H), ids and weights (T, K) to the rows of this rank's experts, a copy with zeros where there is no row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ids: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        rows = routes.dispatch(hidden, ids, weights)
        ctx.routes, ctx.dtype = routes, hidden.dtype
        ctx.save_for_backward(ids)
        return rows.shaped(rows.plain())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grad_outputs
        (ids,) = ctx.saved_tensors
        return ctx.routes.return_sum(grad, ids, ctx.dtype), None, None, None


class CombineFunction(torch.autograd.Function):
    """Expert output (L, M, H), ragged (R, H), ids and weights (T, K) to each token's weighted sum (T, H)."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, ids: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        # one that is in no graph may lie in a buffer
        ctx.save_for_backward(output if ctx.needs_input_grad[0] else output.clone(), ids, weights)
        return routes.sum(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grad_outputs
        output, ids, weights = ctx.saved_tensors
        routes: Routes = ctx.routes
        for_output, _, for_weights, _ = ctx.needs_input_grad
        rows = routes.dispatch(grad, ids, kind=gradients(hidden=for_output, weights=for_weights))
        check_kept(output, rows.sources.numel())
        plain = rows.plain()
        wide = torch.promote_types(torch.float32, plain.dtype)
        d_output = d_weights = None
        if for_output:
            d_output = rows.shaped((routes.at_rows(weights, rows).unsqueeze(1) * plain).to(output.dtype))
        if for_weights:
            of_rows = (plain.to(wide) * rows.only(output).to(wide)).sum(1)
            d_weights = routes.to_entries(of_rows, rows, ids).to(weights.dtype)
        return d_output, None, d_weights, None


def sums(x: Tensor, rows: Rows) -> Tensor:
    """The sum of each expert's rows, in an order that doesn't change from run to run.

    Args:
        x: (R, N) float, 0 in rows that belong to no expert.
        rows: whose they are.

    Returns:
        (L, N), float32 or wider.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    owners = torch.arange(len(rows.num_tokens), device=x.device).unsqueeze(1) == rows.experts
    return owners.to(wide) @ x.to(wide)


def dtype_of_gradient(parameter: Tensor | None) -> torch.dtype | None:
    """The type in which a parameter wants its gradient: its own, or `grad_dtype`.

    Args:
        parameter: a weight, or None.

    Returns:
        The type, or None for no parameter.
    """
    if parameter is None:
        return None
    # torch 2.10 has it; of tensors that are results it can't be asked
    wanted = getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None
    return parameter.dtype if wanted is None else wanted
