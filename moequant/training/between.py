"""What a backward does between its two products with weights. Letters as in `moequant.training.functions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moequant import ops
from moequant.training.precision import Operand, again
from moequant.training.rows import Rows
from moequant.training.slopes import activated_with_slopes

if TYPE_CHECKING:
    from moequant.training.functions import Plan


class Given(NamedTuple):
    """What it starts from.

    Attributes:
        d_inner: (L, M, I), ragged (R, I): the gradient of GEMM 2's operand before the routing weight. May be overwritten.
        h: (L, M, 2I), ragged (R, 2I), not gated I for 2I: GEMM 1's result.
        bias13: (L, 2I), or None.
        weights: (T, K), the routing weights of this rank's tokens.
        ids: (T, K).
        more: (R,) float32, added to each row's gradient of its routing weight, or None.
    """

    d_inner: Tensor
    h: Tensor
    bias13: Tensor | None
    weights: Tensor
    ids: Tensor
    more: Tensor | None


class Wanted(NamedTuple):
    """Which results are asked for.

    Attributes:
        plain: the gradient of h.
        operand: what of the gradient is multiplied.
        inner: GEMM 2's operand times the routing weights.
        weights: the gradient of the routing weights.
        keep: h stays as it is.
    """

    plain: bool
    operand: bool
    inner: bool
    weights: bool
    keep: bool


class Slopes(NamedTuple):
    """The results, None where they weren't asked for.

    Attributes:
        of_h: (R, 2I) the gradient of h, with zeros where products contract, as `Rows.contracted` says.
        operand: (L, M, 2I), ragged (R, 2I): the same to be multiplied.
        inner: (R, I), the activation's value times the routing weights, with the same zeros.
        of_weights: (T, K), the gradient of the routing weights.
    """

    of_h: Tensor | None
    operand: Operand | None
    inner: Tensor | None
    of_weights: Tensor | None


def slopes(plan: Plan, rows: Rows, given: Given, wanted: Wanted) -> Slopes:
    """From the gradient of GEMM 2's operand to all that follows from it before the next product. Collective.

    Args:
        plan: the layer's.
        rows: whose gradients they are.
        given: what it starts from.
        wanted: what is made.

    Returns:
        The results.
    """
    if ops.uses_kernels(given.h) and given.h.dtype == torch.bfloat16 and not plan.kind.interleaved:
        return by_kernel(plan, rows, given, wanted)
    return by_torch(plan, rows, given, wanted)


def by_kernel(plan: Plan, rows: Rows, given: Given, wanted: Wanted) -> Slopes:
    """`slopes` in one pass over the rows that there are. What it makes of h lies in h, and inner in d_inner.

    Args:
        plan: as for `slopes`.
        rows: as for `slopes`.
        given: as for `slopes`.
        wanted: as for `slopes`.

    Returns:
        The results, of_h and inner in bfloat16.
    """
    routes, precision, kind = plan.routes, plan.precision, plan.kind
    d_inner, h = given.d_inner, given.h
    everyones = routes.everyones(given.weights)
    of_everyones = torch.zeros_like(everyones) if wanted.weights else None
    operand = None
    quantized = wanted.operand and precision.quant != "none"
    # a group of gate and up together is for a pass of its own
    if quantized and (d_inner.shape[-1] % 128 == 0 or not kind.gated):
        operand = precision.empty_rows(h.shape, h.device)
    of_h = None
    if wanted.plain or (wanted.operand and operand is None):
        of_h = torch.empty_like(h) if wanted.keep else h
    again(
        ops.silu_mul_backward,
        (d_inner, h, None if given.bias13 is None else given.bias13.contiguous()),
        (rows.num_tokens, rows.expert_start, rows.sources.contiguous()),
        (everyones, of_everyones, given.more),
        of_h,
        d_inner if wanted.inner else None,
        None if operand is None else (operand.values, operand.scales),
        precision.recipe,
        kind.text,
    )
    flat = None if of_h is None else of_h.flatten(0, -2)
    if flat is not None and wanted.operand and operand is None:
        operand = precision.operand(flat, rows)
    of_weights = None if of_everyones is None else routes.returned(of_everyones, given.ids)
    return Slopes(flat if wanted.plain else None, operand, d_inner.flatten(0, -2) if wanted.inner else None, of_weights)


def by_torch(plan: Plan, rows: Rows, given: Given, wanted: Wanted) -> Slopes:
    """`slopes` in float32 or wider, on all rows of the buffer.

    Args:
        plan: as for `slopes`.
        rows: as for `slopes`.
        given: as for `slopes`.
        wanted: as for `slopes`.

    Returns:
        The results.
    """
    wide = torch.promote_types(torch.float32, given.h.dtype)
    s = plan.routes.at_rows(given.weights, rows).unsqueeze(1)
    x, d_inner = (rows.only(tensor).to(wide) for tensor in (given.h, given.d_inner))
    if given.bias13 is not None:
        x = x + given.bias13.to(wide)[rows.experts]
    inner, of_h = activated_with_slopes(x, plan.kind, s * d_inner)
    of_weights = None
    if wanted.weights:
        of_rows = (d_inner * inner).sum(1)
        of_weights = plan.routes.to_entries(of_rows if given.more is None else of_rows + given.more, rows, given.ids)
    operand = plan.precision.operand(of_h, rows) if wanted.operand else None
    return Slopes(of_h if wanted.plain else None, operand, s * inner if wanted.inner else None, of_weights)


def keeps_graph() -> bool:
    """Whether the backward that is under way may come once more, as with `retain_graph=True`, so that what was saved has to stay.

    Returns:
        The answer; True where torch doesn't say.
    """
    # torch's own name for it is private
    asked: Any = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()
