"""int8 in blocks: quantizers, GEMMs and GELU, on bare pairs of values and scales.

One float32 scale for each row and 128 columns of an activation, and for each 128x128 block of a weight; a partial last block has a
scale of its own. A scale is max(amax, 1e-10) / 127, so that a block of zeros has scale 1e-10 / 127 and values 0, and nothing is
divided by 0. Values are x / scale, rounded to nearest even; a block with an Inf or NaN gets a NaN scale and values 0.

Letters: M rows (all leading dimensions together), N columns, K_dim contraction, G = ceil(K_dim / 128) blocks of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import QuantizedTensor, ceil_div
from moequant.checks import check_choice, check_contiguous, check_int, check_no_grad, check_tensor
from moequant.errors import LayoutError
from moequant.formats import FLOAT_DTYPES
from moequant.group_quant import dequantize, quantize_blocks

BLOCK_SIZES = (32, 64, 128, 256)
OUT_BLOCK_SIZES = (32, 64, 128)


def act_quant(x: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes activations to int8 in blocks of block_size columns.

    Args:
        x: (..., K_dim) bfloat16, float16 or float32, any strides.
        block_size: 32, 64, 128 or 256.

    Returns:
        Values (..., K_dim) int8 and scales (..., ceil(K_dim / block_size)) float32, both contiguous. A block of zeros has values 0
        and scale 1e-10 / 127.

    Raises:
        ValueError: a wrong dtype or block size.
        RuntimeError: x requires grad under grad mode.
    """
    _check_float("x", x, 1)
    check_choice("block_size", block_size, BLOCK_SIZES)
    shape = (1, math.prod(x.shape[:-1]), x.shape[-1])
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(*x.shape[:-1], ceil_div(shape[2], block_size), dtype=torch.float32, device=x.device)
    out = values.view(shape), scales.view(*shape[:2], scales.shape[-1])
    ops.quantize_expert_batch(x.reshape(shape), None, None, *out, block_size, "default", None)
    return values, scales


def act_dequant(x: Tensor, s: Tensor, block_size: int = 128, output_dtype: torch.dtype = torch.float16) -> Tensor:
    """x * s in float32, rounded once.

    Args:
        x: (..., K_dim) int8.
        s: (..., ceil(K_dim / block_size)) float32.
        block_size: columns of a block, any positive number.
        output_dtype: float16, bfloat16 or float32.

    Returns:
        (..., K_dim) of output_dtype, contiguous.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    return _dequantize(x, s, "row", block_size, output_dtype)


def weight_quant(x: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes weights to int8 in blocks of block_size x block_size.

    Args:
        x: (..., N, K_dim) bfloat16, float16 or float32, any strides.
        block_size: any positive number; others than 32, 64 and 128 run in plain torch on any device.

    Returns:
        Values (..., N, K_dim) int8 and scales (..., ceil(N / block_size), ceil(K_dim / block_size)) float32, both contiguous. A
        block of zeros has values 0 and scale 1e-10 / 127.

    Raises:
        ValueError: a wrong dtype, shape or block size.
        RuntimeError: x requires grad under grad mode.
    """
    _check_float("x", x, 2)
    _check_block_size(block_size)
    q = quantize_blocks(x, torch.int8, "default", 1, block_size)
    return q.values, q.scales


def weight_dequant(x: Tensor, s: Tensor, block_size: int = 128, output_dtype: torch.dtype = torch.float16) -> Tensor:
    """x * s in float32, rounded once.

    Args:
        x: (..., N, K_dim) int8.
        s: (..., ceil(N / block_size), ceil(K_dim / block_size)) float32.
        block_size: rows and columns of a block, any positive number.
        output_dtype: float16, bfloat16 or float32.

    Returns:
        (..., N, K_dim) of output_dtype, contiguous.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    return _dequantize(x, s, "block", block_size, output_dtype)


def int8_gelu(x: Tensor, s_x: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """GELU from int8 to int8: y * (1 + erf(y / sqrt(2))) / 2 with y = x * s_x, in float32, quantized as by `act_quant`.

    Args:
        x: (..., N) int8 contiguous.
        s_x: (..., ceil(N / block_size)) float32.
        block_size: 32, 64, 128 or 256.

    Returns:
        Values and scales of the shapes of x and s_x, contiguous. Scales are within 4 units in the last place of the exact
        formula's, and values at most one step from it.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    check_choice("block_size", block_size, BLOCK_SIZES)
    _check_activations("x", x, "s_x", s_x, block_size)
    values, scales = torch.empty_like(x), torch.empty(s_x.shape, dtype=torch.float32, device=x.device)
    pair = _rows(x), _rows(s_x).contiguous()
    ops.int8_gelu(*pair, _rows(values), _rows(scales), block_size)
    return values, scales


def int8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
    """act_dequant(a, a_s) @ weight_dequant(b, b_s).T, summed in int32 inside a block of 128 and in float32 across blocks.

    Args:
        a: (..., K_dim) int8 contiguous.
        a_s: (..., G) float32.
        b: (N, K_dim) int8 contiguous.
        b_s: (ceil(N / 128), G) float32.
        out_dtype: float16 (past 65504 it is Inf), bfloat16 or float32.

    Returns:
        (..., N) of out_dtype.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    return int8_addmm(a, a_s, b, b_s, None, out_dtype)


def int8_addmm(
    a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float16
) -> Tensor:
    """`int8_gemm` plus bias, added in float32 and rounded once.

    Args:
        a: (..., K_dim) int8 contiguous.
        a_s: (..., G) float32.
        b: (N, K_dim) int8 contiguous.
        b_s: (ceil(N / 128), G) float32.
        bias: (N,) bfloat16, float16 or float32, or None.
        out_dtype: float16 (past 65504 it is Inf), bfloat16 or float32.

    Returns:
        (..., N) of out_dtype.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    check_choice("out_dtype", out_dtype, FLOAT_DTYPES)
    _check_product(a, a_s, b, b_s, bias)
    out = torch.empty(*a.shape[:-1], b.shape[0], dtype=out_dtype, device=a.device)
    ops.int8_addmm(_rows(a), _rows(a_s), b, b_s.contiguous(), bias, _rows(out), None, 128)
    return out


def int8_gemm_quant(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, out_block_size: int = 128) -> tuple[Tensor, Tensor]:
    """`int8_gemm` whose float32 result is quantized as by `act_quant`, without passing through memory: the next GEMM's activations.

    Args:
        a: (..., K_dim) int8 contiguous.
        a_s: (..., G) float32.
        b: (N, K_dim) int8 contiguous.
        b_s: (ceil(N / 128), G) float32.
        out_block_size: 32, 64 or 128.

    Returns:
        Values (..., N) int8 and scales (..., ceil(N / out_block_size)) float32, both contiguous.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    return int8_addmm_quant(a, a_s, b, b_s, None, out_block_size)


def int8_addmm_quant(
    a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, bias: Tensor | None = None, out_block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """`int8_gemm_quant` with bias, added in float32 before quantization.

    Args:
        a: (..., K_dim) int8 contiguous.
        a_s: (..., G) float32.
        b: (N, K_dim) int8 contiguous.
        b_s: (ceil(N / 128), G) float32.
        bias: (N,) bfloat16, float16 or float32, or None.
        out_block_size: 32, 64 or 128.

    Returns:
        Values (..., N) int8 and scales (..., ceil(N / out_block_size)) float32, both contiguous.

    Raises:
        LayoutError: scales of another shape.
        ValueError: another wrong shape, dtype, device or option.
        RuntimeError: an operand requires grad under grad mode.
    """
    check_choice("out_block_size", out_block_size, OUT_BLOCK_SIZES)
    _check_product(a, a_s, b, b_s, bias)
    values = torch.empty(*a.shape[:-1], b.shape[0], dtype=torch.int8, device=a.device)
    scales = torch.empty(*a.shape[:-1], ceil_div(b.shape[0], out_block_size), dtype=torch.float32, device=a.device)
    ops.int8_addmm(_rows(a), _rows(a_s), b, b_s.contiguous(), bias, _rows(values), _rows(scales), out_block_size)
    return values, scales


def _rows(x: Tensor) -> Tensor:
    """(..., columns) as a matrix."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_float(name: str, x: Tensor, dims: int) -> None:
    check_tensor(name, x, dtypes=FLOAT_DTYPES)
    if x.dim() < dims:
        raise ValueError(f"{name} must have at least {dims} dimensions, got shape {tuple(x.shape)}")
    check_no_grad(**{name: x})


def _check_block_size(block_size: int) -> None:
    check_int("block_size", block_size, 1)


def _check_scales(name: str, s: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_tensor(name, s, dtypes=(torch.float32,), device=device)
    if tuple(s.shape) != shape:
        raise LayoutError(f"{name} must have shape {shape}, one scale for each block, got {tuple(s.shape)}")
    check_no_grad(**{name: s})


def _check_activations(name: str, x: Tensor, scales_name: str, s: Tensor, block_size: int) -> None:
    check_tensor(name, x, dtypes=(torch.int8,), remedy="act_quant makes it, and its scales")
    if x.dim() < 1:
        raise ValueError(f"{name} must have at least 1 dimension, got a scalar")
    check_contiguous(name, x)
    _check_scales(scales_name, s, (*x.shape[:-1], ceil_div(x.shape[-1], block_size)), x.device)


def _check_product(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, bias: Tensor | None) -> None:
    _check_activations("a", a, "a_s", a_s, 128)
    check_tensor("b", b, dims=2, dtypes=(torch.int8,), device=a.device, remedy="weight_quant makes it, and its scales")
    columns = b.shape[0]
    check_tensor("b", b, shape=(columns, a.shape[-1]))
    check_contiguous("b", b)
    _check_scales("b_s", b_s, (ceil_div(columns, 128), a_s.shape[-1]), a.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(columns,), dtypes=FLOAT_DTYPES, device=a.device)
        check_contiguous("bias", bias)
        check_no_grad(bias=bias)


def _dequantize(x: Tensor, s: Tensor, layout: str, block_size: int, output_dtype: torch.dtype) -> Tensor:
    check_tensor("x", x, dtypes=(torch.int8,))
    _check_block_size(block_size)
    check_choice("output_dtype", output_dtype, FLOAT_DTYPES)
    if x.dim() < (1 if layout == "row" else 2):
        raise ValueError(f"x must be {'(..., K_dim)' if layout == 'row' else '(..., N, K_dim)'}, got shape {tuple(x.shape)}")
    blocks = tuple(ceil_div(extent, block_size) for extent in x.shape[-1 if layout == "row" else -2 :])
    _check_scales("s", s, (*x.shape[: -len(blocks)], *blocks), x.device)
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    scales = s.unsqueeze(0) if x.dim() == 1 else s
    q = QuantizedTensor(rows, scales.contiguous(), "row" if layout == "row" else "block", group_size=block_size)
    return dequantize(q, output_dtype).view(x.shape)
