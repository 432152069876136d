"""The way back from `kernels/dense/quantize_tensor.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moequant.kernels.library.launch import launchable
from moequant.sizes import ceil_div


@launchable
@triton.jit
def dequantize_tensor_kernel(values_ptr, scale_ptr, out_ptr, count, MAX: tl.constexpr, BLOCK: tl.constexpr):
    """A program has BLOCK numbers. Example: 10 numbers, BLOCK=4: program 2 has numbers 8..9."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    values = tl.load(values_ptr + at, mask=mask, other=0.0)
    if values_ptr.dtype.element_ty == tl.uint8:
        x = (values.to(tl.int32) - 128).to(tl.float32) * (MAX / 127.0)
    else:
        x = values.to(tl.float32)
    x = x * tl.div_rn(tl.full([], 1.0, tl.float32), tl.load(scale_ptr))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_tensor(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, *, max_value: float) -> None:
    """Writes values * (1 / scale), or of codes (code - 128) * (max_value / 127) * (1 / scale).

    values: (count,) float8_e4m3fn, or uint8 for codes around 128. scale: () float32. out: (count,) float.
    """
    count = values.numel()
    block = 4096
    if count:
        dequantize_tensor_kernel[(ceil_div(count, block),)](
            values, scale, out, count, MAX=max_value, BLOCK=block, num_warps=4, enable_fp_fusion=False
        )
