"""A layer that is trained, by torch's own operations alone in bfloat16, for `bench_training.py` to be beside: `grouped_mm` of rows in the
order of their experts, `all_to_all_single` between ranks, and autograd.

T tokens of this rank, K top-k, W ranks, L local experts, H hidden size, I intermediate size, R rows of this rank's experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.10 has it under another name
grouped_mm: Any = getattr(F, "grouped_mm", None)
# how tokens get to their rows, and rows back to their tokens
WAYS = ("index_add", "gather")


class AllToAll(torch.autograd.Function):
    """Rows (sum of sends, H) to the ranks, from which come (sum of receives, H)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        ctx.sizes = sends, receives
        out = rows.new_empty(sum(receives), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receives, sends)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        sends, receives = ctx.sizes
        return AllToAll.apply(grad_outputs[0], receives, sends), None, None


class Gather(torch.autograd.Function):
    """x (N, H) at places, each of which is there `times` times. back (N * times,): where they are, side by side. No atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor, times: int) -> Tensor:
        ctx.times = times
        ctx.save_for_backward(back)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        rows = grad_outputs[0].index_select(0, back)
        return rows if ctx.times == 1 else rows.unflatten(0, (len(back) // ctx.times, ctx.times)).sum(1), None, None, None


def inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def experts_of(rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor) -> Tensor:
    """SwiGLU experts of rows (R, H) in the order of the experts, whose last ones end at ends (L,) int32."""
    gate, up = grouped_mm(rows, w13.mT, offs=ends).chunk(2, dim=-1)
    return grouped_mm(F.silu(gate) * up, w2.mT, offs=ends)


def exchanged_experts(rows: Tensor, counts: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`experts_of` on the experts' ranks. counts: (W * L,) rows of each expert. Syncs with the host, which has to know the sizes."""
    local = len(w13)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    # from each rank come the rows of expert after expert
    sends, receives = (x.view(-1, local).sum(1).tolist() for x in (counts, theirs))
    owners = torch.arange(len(theirs), device=rows.device).remainder(local).repeat_interleave(theirs, output_size=sum(receives))
    order = owners.argsort(stable=True)
    back = inverse(order)
    ends = theirs.view(-1, local).sum(0).cumsum(0).int()
    arrived = Gather.apply(AllToAll.apply(rows, sends, receives), order, back, 1)
    return AllToAll.apply(Gather.apply(experts_of(arrived, w13, w2, ends), back, order, 1), receives, sends)


def torch_layer(hidden: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, way: str = "gather") -> Tensor:
    """The layer. Collective where there is a group.

    hidden: (T, H) bfloat16. ids: (T, K). weights: (T, K) float32. w13: (L, 2I, H) bfloat16, gate first. w2: (L, H, I).
    way: one of WAYS. Returns (T, H).
    """
    top_k, ranks = ids.shape[1], dist.get_world_size() if dist.is_initialized() else 1
    chosen, order = ids.flatten().sort(stable=True)
    every = torch.arange(ranks * len(w13), dtype=chosen.dtype, device=ids.device)
    ends = torch.searchsorted(chosen, every, right=True)
    token, back = order // top_k, inverse(order)
    gathers = way == "gather"
    rows = Gather.apply(hidden, token, back, top_k) if gathers else hidden.index_select(0, token)
    if ranks > 1:
        made = exchanged_experts(rows, ends.diff(prepend=ends.new_zeros(1)), w13, w2)
    else:
        made = experts_of(rows, w13, w2, ends.int())
    factors = weights.to(hidden.dtype)
    if gathers:
        apart = Gather.apply(made, back, order, 1).unflatten(0, ids.shape)
        return torch.bmm(factors.unsqueeze(1), apart).squeeze(1)
    return torch.zeros_like(hidden).index_add(0, token, made * factors.flatten()[order].unsqueeze(1))
