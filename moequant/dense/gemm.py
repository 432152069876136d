"""The GEMM of two float8 matrices. Letters: M rows, N columns, K_dim contraction, G = ceil(K_dim / 128) groups of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant import batch, ops
from moequant.batch import QuantizedTensor, ScaleLayout
from moequant.checks import check_choice, check_contiguous, check_format, check_no_grad, check_tensor
from moequant.errors import LayoutError
from moequant.formats import FLOAT8_DTYPES, FLOAT_DTYPES, format_of

ACTIVATION_LAYOUTS = ("row", "transposed", "tma_aligned", "transposed_flat")


def mm_fp8_blockscale(
    a: QuantizedTensor | Tensor,
    a_scales: Tensor | None,
    b: QuantizedTensor | Tensor,
    b_scales: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    scale_layout: ScaleLayout | None = None,
) -> Tensor:
    """dequantize(a) @ dequantize(b).T of 1x128 activations and 128x128 weights: the grouped GEMM with one group.

    Args:
        a: (M, K_dim) float8 contiguous with its scales in a_scales; or a QuantizedTensor, of which a_scales and scale_layout are
            None.
        a_scales: (M, G) float32. With the rows of a group side by side ("transposed", "tma_aligned", "transposed_flat") they are
            read where they lie; contiguous ones ("row") are copied into that order first, unless M is 1. On Hopper TMA reads groups
            a multiple of 4 rows apart; others go to the slower plain kernel.
        b: (N, K_dim) of a's dtype, contiguous, with its scales in b_scales; or a QuantizedTensor of layout "block".
        b_scales: (ceil(N / 128), G) float32 contiguous.
        out_dtype: bfloat16, float16 or float32.
        scale_layout: how a_scales lie. None: "row" or "transposed", by their strides. "transposed_flat" can't be told from "row" by
            its strides and has to be named.

    Returns:
        (M, N) of out_dtype.

    Raises:
        LayoutError: scales of another layout or shape.
        ValueError: a wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    check_choice("out_dtype", out_dtype, FLOAT_DTYPES)
    left = _operand("a", a, a_scales, scale_layout, ACTIVATION_LAYOUTS)
    right = _operand("b", b, b_scales, "block" if isinstance(b, Tensor) else None, ("block",))
    (rows, depth), columns = left.shape, right.shape[0]
    check_tensor("b", right.values, shape=(columns, depth), dtypes=(left.values.dtype,), device=left.device)
    out = torch.empty(rows, columns, dtype=out_dtype, device=left.device)
    operands = left.values, ops.rows_side_by_side(left.scales_by_row()), right.values, right.scales
    a_values, a_rows, b_values, b_blocks = (x.unsqueeze(0) for x in operands)
    ops.grouped_gemm_blockscale(a_values, a_rows, b_values, b_blocks, None, None, out.unsqueeze(0), right.segments, None, None)
    return out


def _operand(
    name: str, x: QuantizedTensor | Tensor, scales: Tensor | None, layout: ScaleLayout | None, layouts: tuple[ScaleLayout, ...]
) -> QuantizedTensor:
    """An operand as a QuantizedTensor, checked. layouts: those that it may have."""
    if not isinstance(x, QuantizedTensor):
        check_tensor(name, x, dims=2, dtypes=FLOAT8_DTYPES)
        if layout is not None and (not isinstance(layout, str) or layout not in layouts):
            raise LayoutError(f"scale_layout must be one of {', '.join(layouts)}, got {layout!r}")
        if scales is None:
            raise ValueError(f"{name} is a bare tensor: {name}_scales must be given")
        check_tensor(f"{name}_scales", scales, dims=2, device=x.device)
        x = QuantizedTensor(x, scales, layout or batch.scale_layout(scales.unsqueeze(0)))
    elif scales is not None or layout is not None:
        raise ValueError(f"{name} is a QuantizedTensor, which knows its scales and their layout: give neither beside it")
    if x.layout not in layouts or x.group_size != 128:
        raise LayoutError(
            f"{name} must have layout {' or '.join(layouts)} and group size 128, got layout {x.layout} and group size {x.group_size}"
        )
    check_tensor(f"the values of {name}", x.values, dims=2, dtypes=FLOAT8_DTYPES)
    check_contiguous(f"the values of {name}", x.values)
    if not torch.compiler.is_compiling():
        check_format(format_of(x.values.dtype).name, x.device)
    check_no_grad(**{f"{name}_scales": x.scales})
    return x
