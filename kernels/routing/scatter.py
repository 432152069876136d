"""Places each token's row into the buffers of its experts, quantizing it on the way where that is wanted.

T tokens, K top-k, L local experts, M rows of an expert's buffer, R rows of a rank's (ragged), H hidden size, G = ceil(H / 128) groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moequant.kernels.library.arguments import QuantSpec, Shape
from moequant.kernels.library.common import num_sms, quantize_group, storable
from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div, next_power_of_2

COPY, QUANTIZE, COPY_SCALES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Given(NamedTuple):
    """What tokens bring besides: scales, if they are quantized already, and where they come from, if that isn't their place in x; and the
    elements from one token to the next of each, of x and of the ids."""

    scales: torch.Tensor | None
    sources: torch.Tensor | None
    x_row: int
    ids_row: int
    scales_row: int
    sources_row: int


class Routes(NamedTuple):
    """Where tokens go, as `moequant.reference.scatter` has it. rows are written. starts: of the experts' rows, ragged."""

    rows_in_expert: torch.Tensor
    offsets: torch.Tensor | None
    capacity: int
    rows: torch.Tensor | None
    starts: torch.Tensor | None


class Batch(NamedTuple):
    """The buffers of the experts: rows (L, M, H) contiguous, scales (L, M, G) of any strides, sources (L, M) with contiguous rows.
    Ragged, they are one expert's of R rows."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    sources: torch.Tensor | None
    scales_expert: int
    scales_row: int
    scales_group: int
    sources_expert: int


class Tile(NamedTuple):
    """groups: of a program's tile. lanes: top-k, rounded up to a power of two."""

    groups: int
    top_k: int
    lanes: int


@launchable
@triton.jit
def scatter_kernel(
    x_ptr,
    ids_ptr,
    given,
    routes,
    batch,
    shape,
    spec,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (t, b) reads groups b * TILE.groups.. of token t once, and writes them to the row of each of the token's experts.

    Example: M=4, L=2, ids[t] [1, 3, -1], rows_in_expert[t] [1, 0, -1]: the token goes to row 1 of expert 1, flat row 1 * 4 + 1 = 5;
    expert 3 is another rank's and -1 nobody's: rows[t] is [5, -1, -1]. Ragged, with starts [0, 16], it goes to row 16 + 1.
    """
    K: tl.constexpr = TILE.top_k
    experts, limit, columns = shape
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE.groups + tl.arange(0, TILE.groups)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < columns
    x = tl.load(x_ptr + token * given.x_row + column, mask=inside, other=0.0)

    lane = tl.arange(0, TILE.lanes)
    ids = tl.load(ids_ptr + token * given.ids_row + lane, mask=lane < K, other=-1).to(tl.int64)
    rows_in_expert = tl.load(routes.rows_in_expert + token * K + lane, mask=lane < K, other=-1)
    placed = (ids >= 0) & (ids < experts) & (rows_in_expert >= 0) & (rows_in_expert < limit)
    if routes.offsets is not None:
        placed = placed & (tl.load(routes.offsets + ids, mask=placed, other=0) + rows_in_expert < routes.capacity)
    # int32 holds a row's number, not its offset in elements
    if routes.starts is None:
        flat = tl.where(placed, ids * limit + rows_in_expert, -1).to(tl.int32)
    else:
        row = tl.load(routes.starts + ids, mask=placed, other=0).to(tl.int64) + rows_in_expert
        placed = placed & (row < limit)
        flat = tl.where(placed, row, -1).to(tl.int32)
    if tl.program_id(1) == 0:
        if routes.rows is not None:
            tl.store(routes.rows + token * K + lane, flat, mask=lane < K)
        if batch.sources is not None:
            base = token * K
            if given.sources is not None:
                base = tl.load(given.sources + token * given.sources_row)
            if routes.starts is None:
                tl.store(batch.sources + ids * batch.sources_expert + rows_in_expert, base + lane, mask=placed)
            else:
                tl.store(batch.sources + flat, base + lane, mask=placed)

    if MODE == QUANTIZE:
        values, scales = quantize_group(x.to(tl.float32), spec, 1, batch.rows.dtype.element_ty)
    elif MODE == COPY_SCALES:
        values = x
        scales = tl.load(given.scales + token * given.scales_row + group, mask=group * 128 < columns, other=0.0)
    else:
        values = x.to(batch.rows.dtype.element_ty)
    for k in tl.static_range(K):
        row = tl.sum(tl.where(lane == k, flat, 0), axis=0).to(tl.int64)
        if row >= 0:
            tl.store(batch.rows + row * columns + column, values, mask=inside)
            if MODE != COPY:
                at = (
                    (row // limit) * batch.scales_expert
                    + (row % limit) * batch.scales_row
                    + group.to(tl.int64) * batch.scales_group
                )
                tl.store(batch.scales + at, scales, mask=group * 128 < columns)


def scatter(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    rows_in_expert: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    sources: torch.Tensor | None = None,
    row_sources: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    capacity: int | None = None,
    spec: QuantSpec | None = None,
    expert_start: torch.Tensor | None = None,
) -> None:
    """As `moequant.reference.scatter`. x, x_scales, topk_ids, sources: rows contiguous, any row stride; scales, row_sources: any strides;
    the others contiguous. spec: the format's and the recipe's, where x is quantized here."""
    (tokens, columns), (*experts, limit, _), top_k = x.shape, values.shape, rows_in_expert.shape[1]
    if tokens == 0:
        return
    copies = x_scales is not None
    groups = ceil_div(columns, 128)
    # whole tokens where they fill the device, so that routing is read once a token; parts of 8 groups where they don't
    block_g = min(next_power_of_2(groups), 64 if tokens >= 4 * num_sms(x.device) else 8)
    scatter_kernel[(tokens, ceil_div(groups, block_g))](
        x.view(torch.uint8) if copies else x,
        topk_ids,
        Given(
            x_scales,
            row_sources,
            x_row=x.stride(0),
            ids_row=topk_ids.stride(0),
            scales_row=0 if x_scales is None else x_scales.stride(0),
            sources_row=0 if row_sources is None else row_sources.stride(0),
        ),
        Routes(rows_in_expert, offsets, 0 if capacity is None else capacity, rows, expert_start),
        Batch(
            values.view(torch.uint8) if copies else storable(values),
            scales,
            sources,
            *((0, 0, 0) if scales is None else (0, *scales.stride()[-2:]) if expert_start is not None else scales.stride()),
            sources_expert=0 if sources is None else sources.stride(0),
        ),
        shape=Shape(experts[0] if expert_start is None else expert_start.shape[0], limit, columns),
        spec=spec,
        MODE=COPY if scales is None else COPY_SCALES if copies else QUANTIZE,
        TILE=Tile(block_g, top_k, next_power_of_2(top_k)),
        num_warps=8 if block_g == 64 else 4,
        # as in the quantize kernel
        enable_fp_fusion=False,
    )
