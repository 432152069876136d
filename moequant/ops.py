"""One function an operation, on any device: tensors on a CPU go to `moequant.reference`, others to `moequant.kernels`.

Every function writes into tensors that its caller owns, and is registered with torch.library under its name (`torch.ops.moequant.*`),
so that torch.compile and torch.export see one opaque operation. The public functions call the registered form; the transports, which
torch.compile does not trace, call the plain one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from moequant import reference
from moequant.batch import QuantizedTensor
from moequant.formats import format_of, recipe_of

Function = TypeVar("Function", bound=Callable[..., None])


def uses_kernels(x: Tensor) -> bool:
    """Whether operations on x run as Triton kernels. With Triton's interpreter they can on a CPU too; tests ask for it by setting
    MOEQUANT_CPU_KERNELS."""
    return x.is_cuda or os.environ.get("MOEQUANT_CPU_KERNELS") == "1"


def registered(mutates: tuple[str, ...]) -> Callable[[Function], Function]:
    """Registers a function that only writes into its arguments as `torch.ops.moequant.<its name>`, and returns its plain form.

    Kernels are launched on the device of the first argument, whichever is current.
    """

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def on_device(x: Tensor, *args: Any, **kwargs: Any) -> None:
            with torch.cuda.device_of(x):
                function(x, *args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        operation = torch.library.custom_op(f"moequant::{function.__name__}", on_device, mutates_args=mutates, schema=schema)
        operation.register_fake(lambda *args, **kwargs: None)
        return cast(Function, on_device)

    return register


def quantize_settings(values: Tensor, recipe: str, eps: float | None) -> dict[str, Any]:
    """A format and a recipe as the plain numbers that the kernels take."""
    rule = recipe_of(recipe)
    return {
        "max_value": format_of(values.dtype).max,
        "eps": rule.eps if eps is None else eps,
        "power_of_two": rule.power_of_two,
        "reciprocal": rule.reciprocal,
    }


@registered(mutates=("values", "scales"))
def quantize_expert_batch(
    x: Tensor,
    num_tokens: Tensor | None,
    values: Tensor,
    scales: Tensor,
    group_size: int = 128,
    recipe: str = "default",
    eps: float | None = None,
) -> None:
    """`reference.quantize_expert_batch` into given outputs."""
    if not uses_kernels(x):
        reference.quantize_rows(x, num_tokens, values, scales, group_size, recipe, eps)
        return
    from moequant.kernels.quantize import quantize_expert_batch as kernel

    kernel(x, num_tokens, values, scales, group_size=group_size, **quantize_settings(values, recipe, eps))


@registered(mutates=("values", "scales"))
def silu_mul_quantize(
    x: Tensor,
    num_tokens: Tensor | None,
    values: Tensor,
    scales: Tensor,
    recipe: str = "default",
    eps: float | None = None,
) -> None:
    """`reference.silu_mul_quantize` into given outputs."""
    if not uses_kernels(x):
        reference.quantize_rows(reference.swiglu(x), num_tokens, values, scales, 128, recipe, eps)
        return
    from moequant.kernels.silu_mul_quantize import silu_mul_quantize as kernel

    kernel(x, num_tokens, values, scales, **quantize_settings(values, recipe, eps))


@registered(mutates=("out",))
def silu_mul(x: Tensor, num_tokens: Tensor | None, out: Tensor) -> None:
    """`reference.silu_mul` into a given output."""
    if not uses_kernels(x):
        reference.silu_mul(x, num_tokens, out=out)
        return
    from moequant.kernels.silu_mul_quantize import silu_mul as kernel

    kernel(x, num_tokens, out)


def gemm_kernel(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, out: Tensor, segments: int, expected_rows: int | None
) -> Callable[..., None]:
    """The kernel for a grouped GEMM: Hopper's in Gluon where it takes the arguments and is faster, plain Triton's everywhere else."""
    from moequant.kernels import common

    if common.runs_gluon(a.device):
        from moequant.kernels import hopper

        small = hopper.too_small(b.shape[0], b.shape[1], a.shape[1] if expected_rows is None else expected_rows, a.device)
        if not small and hopper.supports(a, a_scales, b, b_scales, out, segments=segments):
            from moequant.kernels.grouped_gemm_hopper import grouped_gemm_blockscale_hopper

            return grouped_gemm_blockscale_hopper
    from moequant.kernels.grouped_gemm import grouped_gemm_blockscale as plain

    return plain


@registered(mutates=("out",))
def grouped_gemm_blockscale(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    num_tokens: Tensor | None,
    out: Tensor,
    segments: int = 1,
    expected_rows: int | None = None,
) -> None:
    """`reference.grouped_gemm_blockscale` into a given output. Scales are None together, for bfloat16 operands."""
    if not uses_kernels(a):
        left = a if a_scales is None else QuantizedTensor(a, a_scales, "transposed")
        right = b if b_scales is None else QuantizedTensor(b, b_scales, "block", segments=segments)
        reference.grouped_gemm_blockscale(left, right, num_tokens, out=out)
        return
    kernel = gemm_kernel(a, a_scales, b, b_scales, out, segments, expected_rows)
    kernel(a, a_scales, b, b_scales, num_tokens, out, segments=segments, expected_rows=expected_rows)


def fuses_gemm1(
    a: Tensor, a_scales: Tensor, w13: Tensor, w13_scales: Tensor, values: Tensor, scales: Tensor, expected_rows: int
) -> bool:
    """Whether `gemm1_swiglu` is one kernel for these arguments, and faster than its two parts."""
    from moequant.kernels import common

    if not common.runs_gluon(a.device):
        return False
    from moequant.kernels import gemm1_swiglu_hopper as fused

    if fused.faster_apart(w13.shape[0], w13.shape[1] // 2, expected_rows, a.device):
        return False
    return fused.supports_gemm1_swiglu(a, a_scales, w13, w13_scales, values, scales)


@registered(mutates=("values", "scales"))
def gemm1_swiglu(
    a: Tensor,
    a_scales: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    num_tokens: Tensor | None,
    values: Tensor,
    scales: Tensor,
    recipe: str = "default",
    expected_rows: int | None = None,
) -> None:
    """`grouped_gemm_blockscale` in bfloat16, then `silu_mul_quantize`: the same bits in one kernel, where `fuses_gemm1` says so.

    a: (L, M, H), a_scales: (L, M, G), as for the GEMM. w13: (L, 2I, H), gate first, with scales of two segments. values (L, M, I) and
    scales (L, M, ceil(I / 128)) are written for the valid rows.
    """
    rows = a.shape[1] if expected_rows is None else expected_rows
    if uses_kernels(a) and fuses_gemm1(a, a_scales, w13, w13_scales, values, scales, rows):
        from moequant.kernels.gemm1_swiglu_hopper import gemm1_swiglu_hopper as kernel

        settings = quantize_settings(values, recipe, None)
        kernel(a, a_scales, w13, w13_scales, num_tokens, values, scales, **settings)
        return
    gate_up = torch.empty(*a.shape[:2], w13.shape[1], dtype=torch.bfloat16, device=a.device)
    grouped_gemm_blockscale(a, a_scales, w13, w13_scales, num_tokens, gate_up, 2, expected_rows)
    silu_mul_quantize(gate_up, num_tokens, values, scales, recipe)


@registered(mutates=("slots", "counts", "num_tokens", "status"))
def route(
    topk_ids: Tensor,
    slots: Tensor,
    counts: Tensor,
    capacity: int | None = None,
    num_tokens: Tensor | None = None,
    status: Tensor | None = None,
) -> None:
    """`reference.route` into given outputs; the number of experts is counts.shape[0]."""
    if not uses_kernels(topk_ids):
        reference.route(topk_ids, slots, counts, capacity, num_tokens, status)
        return
    from moequant.kernels.route import route as kernel

    kernel(topk_ids, slots, counts, capacity, num_tokens, status)


@registered(mutates=("offsets", "num_tokens", "status"))
def expert_offsets(
    counts: Tensor,
    first_expert: int,
    capacity: int,
    rows_per_source: int,
    offsets: Tensor,
    num_tokens: Tensor,
    status: Tensor | None = None,
) -> None:
    """`reference.expert_offsets`."""
    if not uses_kernels(counts):
        reference.expert_offsets(counts, first_expert, capacity, rows_per_source, offsets, num_tokens, status)
        return
    from moequant.kernels.expert_offsets import expert_offsets as kernel

    kernel(counts, first_expert, capacity, rows_per_source, offsets, num_tokens, status)


@registered(mutates=("send_tokens", "send_counts"))
def plan_sends(topk_ids: Tensor, local_experts: int, send_tokens: Tensor, send_counts: Tensor) -> None:
    """`reference.plan_sends`."""
    if not uses_kernels(topk_ids):
        reference.plan_sends(topk_ids, local_experts, send_tokens, send_counts)
        return
    from moequant.kernels.plan_sends import plan_sends as kernel

    kernel(topk_ids, local_experts, send_tokens, send_counts)


@registered(mutates=("rows",))
def plan_returns(
    topk_ids: Tensor, slots: Tensor, offsets: Tensor, capacity: int, local_experts: int, starts: Tensor, rows: Tensor
) -> None:
    """`reference.plan_returns`."""
    if not uses_kernels(topk_ids):
        reference.plan_returns(topk_ids, slots, offsets, capacity, local_experts, starts, rows)
        return
    from moequant.kernels.plan_sends import plan_returns as kernel

    kernel(topk_ids, slots, offsets, capacity, local_experts, starts, rows)


@registered(mutates=("values", "scales", "rows", "sources"))
def scatter(
    x: Tensor,
    topk_ids: Tensor,
    slots: Tensor,
    values: Tensor,
    scales: Tensor | None = None,
    x_scales: Tensor | None = None,
    rows: Tensor | None = None,
    sources: Tensor | None = None,
    row_sources: Tensor | None = None,
    first_expert: int = 0,
    offsets: Tensor | None = None,
    capacity: int | None = None,
    recipe: str = "default",
) -> None:
    """`reference.scatter`."""
    if not uses_kernels(x):
        reference.scatter(
            x, topk_ids, slots, values, scales, x_scales, rows, sources, row_sources, first_expert, offsets, capacity, recipe
        )
        return
    from moequant.kernels.scatter import scatter as kernel

    settings = quantize_settings(values, recipe, None) if scales is not None else {}
    kernel(x, topk_ids, slots, values, scales, x_scales, rows, sources, row_sources, first_expert, offsets, capacity, **settings)


@registered(mutates=("padded", "merged", "merged_scales", "merged_sources"))
def move_source_rows(
    padded: Tensor,
    merged: Tensor,
    offsets: Tensor,
    counts: Tensor,
    first_expert: int,
    to_merged: bool,
    padded_scales: Tensor | None = None,
    merged_scales: Tensor | None = None,
    padded_sources: Tensor | None = None,
    merged_sources: Tensor | None = None,
) -> None:
    """`reference.move_source_rows`."""
    if not uses_kernels(padded):
        move = reference.move_source_rows
    else:
        from moequant.kernels.move_source_rows import move_source_rows as move

    move(
        padded,
        merged,
        offsets,
        counts,
        first_expert,
        to_merged,
        padded_scales,
        merged_scales,
        padded_sources,
        merged_sources,
    )


@registered(mutates=("out",))
def combine(expert_output: Tensor, rows: Tensor, topk_weights: Tensor, out: Tensor) -> None:
    """`reference.combine`."""
    if not uses_kernels(expert_output):
        reference.combine(expert_output, rows, topk_weights, out)
        return
    from moequant.kernels.combine import combine as kernel

    kernel(expert_output, rows, topk_weights, out)
