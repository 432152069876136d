"""GEMMs of quantized operands.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together, N columns, K_dim contraction, G = ceil(K_dim / 128)
groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ANY_ROWS, QuantizedTensor
from moequant.checks import check_choice, check_counts, check_int, check_is, check_no_grad, check_num_sms, check_tensor
from moequant.dense.gemm import mm_fp8_blockscale
from moequant.dense.int8 import int8_addmm, int8_addmm_quant, int8_gemm, int8_gemm_quant
from moequant.dense.per_tensor import fp8_gemm
from moequant.errors import LayoutError
from moequant.formats import FLOAT_DTYPES

__all__ = [
    "fp8_gemm",
    "grouped_gemm_blockscale",
    "int8_addmm",
    "int8_addmm_quant",
    "int8_gemm",
    "int8_gemm_quant",
    "mm_fp8_blockscale",
]


def grouped_gemm_blockscale(
    a: QuantizedTensor | Tensor,
    b: QuantizedTensor | Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    expected_rows: int | None = None,
    batch_invariant: bool = False,
    num_sms: int | None = None,
) -> Tensor:
    """One GEMM for each expert, over its valid rows: out[l, m] = dequantize(a[l, m]) @ dequantize(b[l]).T for m < num_tokens[l].

    Each 128 of K_dim is multiplied in the narrow type, then scaled and added in float32.

    Args:
        a: (L, M, K_dim) values with layout "transposed", group size 128; or plain bfloat16 or float16. With expert_start (R, K_dim).
        b: (L, N, K_dim) values of a's dtype with layout "block", 128x128; or a plain tensor if a is one.
        num_tokens: (L,) int32, or None for all M. Rows from num_tokens[l] on are never written, and whatever they hold in `a` has
            no influence on the others.
        expert_start: (L,) int32, where the rows of all experts lie in one buffer, layout "ragged": expert l's are those from
            expert_start[l] on, num_tokens[l] of them, but none past R. Rows of no expert are never written. None: each expert has M.
        out: (L, M, N) contiguous, with expert_start (R, N), or None to allocate; rows past num_tokens are then uninitialised.
        out_dtype: bfloat16, float16 or float32; out's own dtype if out is given.
        expected_rows: a host-side guess of the mean of num_tokens, for the choice of tiles; None takes M, ragged R / L. Results
            don't depend on its being right; their last bits may depend on the choice.
        batch_invariant: kernel and tiles are chosen by columns, K_dim and types alone, whatever expected_rows is, and no sum is split:
            a row of `a` has the same bits in any place of any batch. On GPUs operands, their scales and out then have to begin at
            multiples of 16 bytes.
        num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

    Returns:
        out.

    Raises:
        LayoutError: scales of another layout or group size.
        ValueError: a wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    a_values, a_scales = _operand("a", a, "transposed", 3 if expert_start is None else 2)
    b_values, b_scales = _operand("b", b, "block", 3)
    check_no_grad(a=a_values, b=b_values, out=out)
    if a_values.dtype != b_values.dtype:
        raise ValueError(
            f"a and b must have the same dtype, got {a_values.dtype} and {b_values.dtype}; quantize both to one format"
        )
    experts = a_values.shape[0] if expert_start is None else b_values.shape[0]
    check_tensor("b", b_values, shape=(experts, b_values.shape[1], a_values.shape[-1]), device=a_values.device)
    for name, values in (("a", a_values), ("b", b_values)):
        if not values.is_contiguous():
            raise ValueError(f"the values of {name} must be contiguous, got strides {values.stride()}; call .contiguous()")
    check_counts(num_tokens, expert_start, experts, a_values.device)
    check_num_sms(num_sms)
    if expected_rows is not None:
        check_int("expected_rows", expected_rows)
    check_is("batch_invariant", batch_invariant, bool)
    shape = (*a_values.shape[:-1], b_values.shape[1])
    check_choice("out_dtype", out_dtype, FLOAT_DTYPES)
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=a_values.device)
    check_tensor("out", out, shape=shape, dtypes=FLOAT_DTYPES, device=a_values.device)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    segments = b.segments if isinstance(b, QuantizedTensor) else 1
    counts = num_tokens, expert_start
    hint = ANY_ROWS if batch_invariant else expected_rows
    ops.grouped_gemm_blockscale(a_values, a_scales, b_values, b_scales, *counts, out, segments, hint, num_sms)
    return out


def _operand(name: str, x: QuantizedTensor | Tensor, layout: str, dims: int) -> tuple[Tensor, Tensor | None]:
    """The values and scales of an operand, checked. dims: of the values."""
    if isinstance(x, QuantizedTensor):
        if x.layout != layout or x.group_size != 128:
            raise LayoutError(
                f'{name} must have layout "{layout}" and group size 128, got layout "{x.layout}" and group size {x.group_size}'
            )
        check_tensor(f"the values of {name}", x.values, dims=dims)
        check_no_grad(**{f"the scales of {name}": x.scales})
        return x.values, x.scales
    check_tensor(name, x, dims=dims, dtypes=(torch.bfloat16, torch.float16))
    return x, None
