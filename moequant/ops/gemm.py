"""Products of quantized operands."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moequant.batch import ceil_div
from moequant.ops import on_cpu
from moequant.ops.quantization import quant_spec, silu_mul_quantize
from moequant.ops.registration import registered, uses_kernels

__all__ = [
    "fuses_gemm1",
    "gemm1_swiglu",
    "gemm_kernel",
    "grouped_gemm_blockscale",
    "grouped_gemm_push",
    "rows_side_by_side",
]

# Bytes of gate and up, of all rows that there is room for, up to which two kernels may be taken for their speed. Chosen, not measured.
MOST_APART = 128 * 2**20


def gemm_kernel(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    out: Tensor | None,
    segments: int = 1,
    expected_rows: int | None = None,
) -> Callable[..., None]:
    """The kernel for a grouped GEMM: Hopper's in Gluon where it takes the arguments and is faster, plain Triton's everywhere else."""
    from moequant.kernels.library import common

    if common.runs_gluon(a.device):
        from moequant.kernels.library import hopper

        rows = buffer_rows(a, b)
        small = hopper.too_small(b.shape[0], rows, b.shape[1], rows if expected_rows is None else expected_rows, a.device)
        if not small and hopper.supports(a, a_scales, b, b_scales, out, segments=segments):
            from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper

            return grouped_gemm_blockscale_hopper
    from moequant.kernels.gemm.grouped_gemm import grouped_gemm_blockscale as plain

    return plain


def buffer_rows(a: Tensor, b: Tensor) -> int:
    """Rows of an expert's buffer, by which kernels are chosen; of ragged rows the mean, as any expert may have all."""
    return a.shape[1] if a.dim() == 3 else ceil_div(a.shape[0], max(b.shape[0], 1))


def rows_side_by_side(scales: Tensor) -> Tensor:
    """Scales (M, G) in the order in which the grouped GEMM reads them, element strides (1, any); those of one row as they are."""
    rows, groups = scales.shape
    if rows == 1 or scales.stride(0) == 1:
        return scales
    # groups 16 bytes apart, so that TMA can read them
    buffer = torch.empty(groups, ceil_div(rows, 4) * 4, dtype=torch.float32, device=scales.device)
    return buffer[:, :rows].transpose(0, 1).copy_(scales)


@registered(mutates=("out",))
def grouped_gemm_blockscale(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    out: Tensor,
    segments: int = 1,
    expected_rows: int | None = None,
    num_sms: int | None = None,
) -> None:
    """`reference.grouped_gemm_blockscale` into a given output. Scales are None together, for bfloat16 or float16 operands.

    expert_start: (L,) int32, with a (R, K_dim), its scales (R, G) and out (R, N): the first row of each expert. None: padded.
    num_sms: multiprocessors to use, so that others' kernels have the rest; None for all.
    """
    if not uses_kernels(a):
        on_cpu.grouped_gemm_blockscale(a, a_scales, b, b_scales, num_tokens, expert_start, out, segments)
        return
    kernel = gemm_kernel(a, a_scales, b, b_scales, out, segments, expected_rows)
    kernel(a, a_scales, b, b_scales, num_tokens, expert_start, out, segments=segments, expected_rows=expected_rows, num_sms=num_sms)


def grouped_gemm_push(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    num_tokens: Tensor,
    expert_start: Tensor | None,
    destinations: Tensor,
    expected_rows: int,
    num_sms: int | None,
) -> None:
    """`grouped_gemm_blockscale` in bfloat16, of float16 operands in float16, to the bit, whose row (l, m) goes to the address
    destinations[l, m]; with expert_start row r of the buffer to destinations[r].

    Not registered: torch.library can't know of memory that has an address only. It runs as a kernel alone.
    """
    kernel = gemm_kernel(a, a_scales, b, b_scales, None, expected_rows=expected_rows)
    with torch.cuda.device_of(a):
        kernel(
            a,
            a_scales,
            b,
            b_scales,
            num_tokens,
            expert_start,
            None,
            destinations=destinations,
            expected_rows=expected_rows,
            num_sms=num_sms,
        )


def fuses_gemm1(
    a: Tensor, a_scales: Tensor, w13: Tensor, w13_scales: Tensor, values: Tensor, scales: Tensor, expected_rows: int
) -> bool:
    """Whether `gemm1_swiglu` is one kernel for these arguments, and faster than its two parts."""
    # asked first: a CPU needs no Triton
    if not uses_kernels(a):
        return False
    from moequant.kernels.library import common

    if not common.runs_gluon(a.device):
        return False
    from moequant.kernels.gemm import gemm1_swiglu_hopper as fused
    from moequant.kernels.gemm.grouped_gemm import few_tiles

    experts, columns, _ = w13.shape
    # where programs share tiles, and add in another order
    if few_tiles(experts, buffer_rows(a, w13), ceil_div(columns, 128), common.multiprocessors(a.device)):
        return False
    if better_apart(a, w13, expected_rows):
        return False
    return fused.supports_gemm1_swiglu(a, a_scales, w13, w13_scales, values, scales)


def better_apart(a: Tensor, w13: Tensor, expected_rows: int) -> bool:
    """Whether GEMM 1 and SwiGLU are faster in two kernels, and what passes between them is no large buffer of which few rows are used, as
    with few tokens in a dispatcher that is made for many."""
    from moequant.kernels.gemm.gemm1_swiglu_hopper import faster_apart

    experts, columns, _ = w13.shape
    gate_up = math.prod(a.shape[:-1]) * columns * 2
    return gate_up <= MOST_APART and faster_apart(experts, columns // 2, expected_rows, a.device)


@registered(mutates=("values", "scales"))
def gemm1_swiglu(
    a: Tensor,
    a_scales: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    recipe: str = "default",
    expected_rows: int | None = None,
    num_sms: int | None = None,
) -> None:
    """`grouped_gemm_blockscale` in bfloat16, then `silu_mul_quantize`: the same bits in one kernel, where `fuses_gemm1` says so.

    a: (L, M, H), a_scales: (L, M, G), as for the GEMM. w13: (L, 2I, H), gate first, with scales of two segments. values (L, M, I) and
    scales (L, M, ceil(I / 128)) are written for the valid rows. expert_start, num_sms: as for the GEMM.
    """
    rows = buffer_rows(a, w13) if expected_rows is None else expected_rows
    if uses_kernels(a) and fuses_gemm1(a, a_scales, w13, w13_scales, values, scales, rows):
        from moequant.kernels.gemm.gemm1_swiglu_hopper import gemm1_swiglu_hopper as kernel

        spec = quant_spec(values.dtype, recipe)
        kernel(
            a,
            a_scales,
            w13,
            w13_scales,
            num_tokens,
            expert_start,
            values,
            scales,
            max_value=spec.max_value.value,
            eps=spec.eps,
            power_of_two=spec.power_of_two.value,
            reciprocal=spec.reciprocal.value,
            num_sms=num_sms,
        )
        return
    gate_up = torch.empty(*a.shape[:-1], w13.shape[1], dtype=torch.bfloat16, device=a.device)
    grouped_gemm_blockscale(a, a_scales, w13, w13_scales, num_tokens, expert_start, gate_up, 2, expected_rows, num_sms)
    silu_mul_quantize(gate_up, num_tokens, expert_start, values, scales, recipe)
