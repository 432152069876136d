"""Places each token's row into the buffers of its experts, quantizing it on the way where that is wanted.

T tokens, K top-k, L local experts, M rows of an expert's buffer, H hidden size, G = ceil(H / 128) groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.common import num_sms, quantize_group, storable
from moequant.kernels.library.launch import launchable

COPY, QUANTIZE, COPY_SCALES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@launchable
@triton.jit
def scatter_kernel(
    x_ptr,
    x_scales_ptr,
    ids_ptr,
    slots_ptr,
    values_ptr,
    scales_ptr,
    rows_ptr,
    sources_ptr,
    row_sources_ptr,
    offsets_ptr,
    experts,
    limit,
    columns,
    first_expert,
    capacity,
    x_stride_t,
    xs_stride_t,
    ids_stride_t,
    sources_stride_l,
    row_sources_stride,
    s_stride_l,
    s_stride_m,
    s_stride_g,
    eps,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Program (t, b) reads groups b * BLOCK_G.. of token t once, and writes them to the row of each of the token's experts.

    Example: M=4, first_expert=2, ids[t] [3, 5, -1], slots[t] [1, 0, -1], L=2: expert 3 is local expert 1, so the token goes to flat
    row 1 * 4 + 1 = 5; expert 5 is another rank's and -1 nobody's: rows[t] is [5, -1, -1].
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < columns
    x = tl.load(x_ptr + token * x_stride_t + column, mask=inside, other=0.0)

    lane = tl.arange(0, LANES)
    ids = tl.load(ids_ptr + token * ids_stride_t + lane, mask=lane < K, other=-1).to(tl.int64)
    slots = tl.load(slots_ptr + token * K + lane, mask=lane < K, other=-1)
    local = ids - first_expert
    placed = (local >= 0) & (local < experts) & (slots >= 0) & (slots < limit)
    if offsets_ptr is not None:
        placed = placed & (tl.load(offsets_ptr + ids, mask=placed, other=0) + slots < capacity)
    # int32 holds a row's number, not its offset in elements
    flat = tl.where(placed, local * limit + slots, -1).to(tl.int32)
    if tl.program_id(1) == 0:
        if rows_ptr is not None:
            tl.store(rows_ptr + token * K + lane, flat, mask=lane < K)
        if sources_ptr is not None:
            base = token * K
            if row_sources_ptr is not None:
                base = tl.load(row_sources_ptr + token * row_sources_stride)
            tl.store(sources_ptr + local * sources_stride_l + slots, base + lane, mask=placed)

    if MODE == QUANTIZE:
        values, scales = quantize_group(x.to(tl.float32), eps, 1, MAX, POWER_OF_TWO, RECIPROCAL, values_ptr.dtype.element_ty)
    elif MODE == COPY_SCALES:
        values = x
        scales = tl.load(x_scales_ptr + token * xs_stride_t + group, mask=group * 128 < columns, other=0.0)
    else:
        values = x.to(values_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        row = tl.sum(tl.where(lane == k, flat, 0), axis=0).to(tl.int64)
        if row >= 0:
            tl.store(values_ptr + row * columns + column, values, mask=inside)
            if MODE != COPY:
                at = (row // limit) * s_stride_l + (row % limit) * s_stride_m + group.to(tl.int64) * s_stride_g
                tl.store(scales_ptr + at, scales, mask=group * 128 < columns)


def scatter(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    rows: torch.Tensor | None,
    sources: torch.Tensor | None,
    row_sources: torch.Tensor | None,
    first_expert: int,
    offsets: torch.Tensor | None,
    capacity: int | None,
    *,
    max_value: float = 0.0,
    eps: float = 0.0,
    power_of_two: bool = False,
    reciprocal: bool = False,
) -> None:
    """As `moequant.reference.scatter`. x, x_scales, topk_ids, sources: rows contiguous, any row stride; scales, row_sources: any strides;
    the others contiguous. max_value, eps, power_of_two, reciprocal: the format's and the recipe's, where x is quantized here."""
    (tokens, columns), (experts, limit) = x.shape, values.shape[:2]
    if tokens == 0:
        return
    copies = x_scales is not None
    mode = COPY if scales is None else COPY_SCALES if copies else QUANTIZE
    groups = triton.cdiv(columns, 128)
    # whole tokens where they fill the device, so that routing is read once a token; parts of 8 groups where they don't
    block_g = min(triton.next_power_of_2(groups), 64 if tokens >= 4 * num_sms(x.device) else 8)
    bytes_only = torch.uint8 if copies else x.dtype
    scatter_kernel[(tokens, triton.cdiv(groups, block_g))](
        x.view(bytes_only),
        x_scales,
        topk_ids,
        slots,
        values.view(torch.uint8) if copies else storable(values),
        scales,
        rows,
        sources,
        row_sources,
        offsets,
        experts,
        limit,
        columns,
        first_expert,
        0 if capacity is None else capacity,
        x.stride(0),
        0 if x_scales is None else x_scales.stride(0),
        topk_ids.stride(0),
        0 if sources is None else sources.stride(0),
        0 if row_sources is None else row_sources.stride(0),
        *((0, 0, 0) if scales is None else scales.stride()),
        eps,
        MODE=mode,
        MAX=max_value,
        POWER_OF_TWO=power_of_two,
        RECIPROCAL=reciprocal,
        K=slots.shape[1],
        LANES=triton.next_power_of_2(slots.shape[1]),
        BLOCK_G=block_g,
        num_warps=8 if block_g == 64 else 4,
        # as in the quantize kernel
        enable_fp_fusion=False,
    )
