"""Products of quantized operands.

With ANY_ROWS in place of expected_rows, kernel and tiles follow from types and lengths of rows alone, and nothing is added in parts: a
row's bits depend neither on how many rows, experts and ranks there are nor on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moequant.batch import ANY_ROWS, ceil_div
from moequant.ops import on_cpu
from moequant.ops.quantization import quant_spec, silu_mul_quantize
from moequant.ops.registration import registered, uses_kernels
from moequant.reference.columnwise import weight_gradient as reference_weight_gradient
from moequant.reference.quantization import dequantize_blocks

__all__ = [
    "fuses_gemm1",
    "gemm1_swiglu",
    "gemm_kernel",
    "grouped_gemm_blockscale",
    "grouped_gemm_push",
    "rows_side_by_side",
    "weight_gradient",
]

# torch 2.10 may have it under another name only
GROUPED_MM: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
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

    invariant = expected_rows == ANY_ROWS
    if invariant:
        for name, x in {"a": a, "b": b, "out": b if out is None else out}.items():
            check_address(name, x)
    if common.runs_gluon(a.device):
        from moequant.kernels.library import hopper

        rows = buffer_rows(a, b)
        hint = rows if expected_rows is None else expected_rows
        small = not invariant and hopper.too_small(b.shape[0], rows, b.shape[1], hint, a.device)
        if not small and hopper.supports(a, a_scales, b, b_scales, out, segments=segments):
            from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper

            return grouped_gemm_blockscale_hopper
        if invariant and a_scales is not None and a.numel() and b.numel() and hopper.takes_rows(a, b, out, segments):
            raise ValueError(
                "batch_invariant=True chooses kernels whatever the number of rows is: the scales of a must begin at a multiple of 16 "
                "bytes and have groups a multiple of 4 numbers apart, as moequant.batch.empty_scales_of makes them, got strides "
                f"{a_scales.stride()}"
            )
    from moequant.kernels.gemm.grouped_gemm import grouped_gemm_blockscale as plain

    return plain


def check_address(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor whose rows TMA could read, if it didn't begin where it does: that must not choose the kernel."""
    if x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16:
        raise ValueError(
            f"batch_invariant=True chooses kernels wherever tensors lie: {name} must begin at a multiple of 16 bytes, got "
            f"{x.data_ptr():#x}; clone it"
        )


def too_many(b: Tensor, expected_rows: int | None) -> bool:
    """Whether a launch must not have all experts: with so many, ANY_ROWS would choose another kernel."""
    from moequant.kernels.library.common import MOST_EXPERTS

    return expected_rows == ANY_ROWS and b.shape[0] > MOST_EXPERTS


def some_at_a_time(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    *outputs: Tensor,
) -> Iterator[tuple[Any, ...]]:
    """A product's arguments as several, each of as many experts as one launch may have."""
    from moequant.kernels.library.common import MOST_EXPERTS

    for begin in range(0, b.shape[0], MOST_EXPERTS):
        some = slice(begin, begin + MOST_EXPERTS)
        of_rows = [x if x is None or a.dim() == 2 else x[some] for x in (a, a_scales, *outputs)]
        of_experts = [None if x is None else x[some] for x in (b, b_scales, num_tokens, expert_start)]
        yield *of_rows[:2], *of_experts, *of_rows[2:]


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
        invariant = expected_rows == ANY_ROWS
        on_cpu.grouped_gemm_blockscale(a, a_scales, b, b_scales, num_tokens, expert_start, out, segments, invariant)
        return
    if too_many(b, expected_rows):
        for some in some_at_a_time(a, a_scales, b, b_scales, num_tokens, expert_start, out):
            grouped_gemm_blockscale(*some, segments=segments, expected_rows=expected_rows, num_sms=num_sms)
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
    if too_many(b, expected_rows):
        for some in some_at_a_time(a, a_scales, b, b_scales, num_tokens, expert_start, destinations):
            grouped_gemm_push(*some, expected_rows=expected_rows, num_sms=num_sms)
        return
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

    if too_many(w13, expected_rows):
        pieces = some_at_a_time(a, a_scales, w13, w13_scales, None, None, values, scales)
        a, a_scales, w13, w13_scales, _, _, values, scales = next(pieces)
    if expected_rows != ANY_ROWS:
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
    if uses_kernels(a) and too_many(w13, expected_rows):
        for some in some_at_a_time(a, a_scales, w13, w13_scales, num_tokens, expert_start, values, scales):
            gemm1_swiglu(*some, recipe=recipe, expected_rows=expected_rows, num_sms=num_sms)
        return
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


@registered(mutates=("out",))
def weight_gradient(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block_ends: Tensor, out: Tensor) -> None:
    """`reference.columnwise.weight_gradient` of operands that `quantize_columnwise` made, into a given output. On a GPU the host waits
    for nothing, unless torch's `grouped_mm` does, which multiplies in bfloat16 what Hopper's kernel does not take.

    a: (N, C) float8_e4m3fn contiguous, a_scales: (B, N). b: (K_dim, C) float8_e4m3fn contiguous, b_scales: (ceil(K_dim / 128), B)
    contiguous. block_ends: (L,) int32: blocks of the experts up to and with each. out: (L, N, K_dim) contiguous bfloat16, float16 or
    float32; where no kernel of this package multiplies, rounded to bfloat16 first.
    """
    # asked first: a CPU needs no Triton
    if uses_kernels(a):
        from moequant.kernels.library import common

        if common.runs_gluon(a.device):
            from moequant.kernels.gemm.weight_gradient_hopper import supports_weight_gradient, weight_gradient_hopper

            if supports_weight_gradient(a, a_scales, b, b_scales, block_ends, out):
                weight_gradient_hopper(a, a_scales, b, b_scales, block_ends, out)
                return
    if a.is_cuda and GROUPED_MM is not None:
        # exact: scales are powers of two
        left = dequantize_blocks(a, a_scales.mT, 1, 128, torch.bfloat16)
        right = dequantize_blocks(b, b_scales, 128, 128, torch.bfloat16)
        out.copy_(GROUPED_MM(left, right.mT, offs=block_ends * 128))
    else:
        reference_weight_gradient(a, a_scales, b, b_scales, block_ends, out)
