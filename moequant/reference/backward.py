"""The specification of what a layer's backward does with rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.activations import Activation, activation_of
from moequant.config import ROW_ALIGNMENT, round_up
from moequant.reference.quantization import biases, counted_rows, quantize_groups, write_rows
from moequant.training.slopes import activated_with_slopes

__all__ = ["plain_rows", "silu_mul_backward"]


def contracted_rows(num_tokens: Tensor, x: Tensor, expert_start: Tensor | None) -> Tensor:
    """Which rows of x (L, M, ..), with expert_start (R, ..), a product contracts: ragged, those of each expert up to the next multiple of
    ROW_ALIGNMENT; padded, all."""
    if expert_start is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for first, count in zip(expert_start.tolist(), num_tokens.tolist(), strict=True):
        mask[first : first + round_up(max(count, 0), ROW_ALIGNMENT)] = True
    return mask


def plain_rows(
    out: Tensor, num_tokens: Tensor, expert_start: Tensor | None, values: Tensor | None = None, scales: Tensor | None = None
) -> None:
    """Writes values * scales of the valid rows, in float32 and rounded once, and zeros into rows that belong to no expert and that a
    product contracts. values: (L, M, H), with expert_start (R, H), and scales with one column for 128 of values; None: the valid rows
    stay as they are."""
    valid = counted_rows(num_tokens, out, expert_start)
    out[contracted_rows(num_tokens, out, expert_start) & ~valid] = 0
    if values is not None:
        assert scales is not None
        # float8 travels as bytes, since torch can't select it
        narrow = values.view(torch.int8)[valid].view(values.dtype).float()
        out[valid] = (narrow * scales[valid].repeat_interleave(128, -1)[:, : out.shape[-1]]).to(out.dtype)


def silu_mul_backward(
    given: tuple[Tensor, Tensor, Tensor | None],
    placed: tuple[Tensor, Tensor | None, Tensor],
    entries: tuple[Tensor, Tensor | None, Tensor | None],
    gradient: Tensor | None = None,
    inner: Tensor | None = None,
    narrow: tuple[Tensor, Tensor] | None = None,
    recipe: str = "default",
    activation: Activation | str = "silu",
) -> None:
    """From the gradient of what an activation makes, before the routing weight, that of what it is made of. Writes gradient, and the
    activation's value times the routing weight, inner, both zero in rows that belong to no expert and that a product contracts; narrow,
    the values and scales of the gradient's valid rows; and the gradients of the routing weights.

    given: the gradient (L, M, I), x (L, M, 2I), and a bias (L, 2I) or None, added to x. Not gated: I for 2I. gradient and inner may be
    these. placed: num_tokens (L,), expert_start (L,) or None, with which all have R rows, and sources (L, M),
    `source_rank << 32 | token * top_k + k`. entries: the routing weights (W, room) of each rank's entries, float32, their gradients or
    None, and a number for each row (L, M), added to its gradient, or None.
    """
    (d_inner, x, bias), (num_tokens, expert_start, sources), (weights, of_weights, more) = given, placed, entries
    valid = counted_rows(num_tokens, x, expert_start)
    wide, grad = x[valid].float(), d_inner[valid].float()
    if bias is not None:
        wide = wide + biases(bias, valid, num_tokens, expert_start)
    source = sources[valid]
    place = (source >> 32) * weights.shape[1] + (source & 0xFFFFFFFF)
    weight = weights.flatten()[place].unsqueeze(1)
    made, of_x = activated_with_slopes(wide, activation_of(activation), grad * weight)
    zeros = contracted_rows(num_tokens, x, expert_start) & ~valid
    of_x = of_x.to(x.dtype if gradient is None else gradient.dtype)
    if gradient is not None:
        gradient[valid], gradient[zeros] = of_x, 0
    if inner is not None:
        inner[valid], inner[zeros] = (made * weight).to(inner.dtype), 0
    if narrow is not None:
        write_rows(quantize_groups(of_x, 128, narrow[0].dtype, recipe, None), valid, *narrow)
    if of_weights is not None:
        of_rows = (grad * made).sum(1)
        of_weights.view(-1)[place] = of_rows if more is None else of_rows + more[valid]
