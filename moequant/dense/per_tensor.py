"""float8_e4m3fn with one scale for a whole tensor, by which its numbers are multiplied (the other way round than the blocks' scales)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moequant import ops, reference
from moequant.checks import (
    check_choice,
    check_contiguous,
    check_has_numbers,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
)
from moequant.errors import NumericalOverflowError
from moequant.formats import FLOAT_DTYPES

E4M3 = torch.float8_e4m3fn
SCALED_DTYPES = (*FLOAT_DTYPES, torch.float64)
MIN_FLOAT32, MAX_FLOAT32 = 2.0**-149, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class FP8Format:
    """The range of an 8-bit float, float8_e4m3fn's unless given, and the scales that bring tensors into it.

    Attributes:
        max_value: the largest finite number.
        min_normal: the smallest normal one.

    Raises:
        ValueError: one of them is not positive and finite.
    """

    max_value: float = 448.0
    min_normal: float = 2.0**-6

    def __post_init__(self) -> None:
        for name, value in (("max_value", self.max_value), ("min_normal", self.min_normal)):
            check_number(name, value)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    def compute_scale(self, tensor: Tensor) -> Tensor:
        """max_value / max(abs(tensor)): the factor that fills the range.

        Args:
            tensor: bfloat16, float16, float32 or float64, any shape.

        Returns:
            () float32: 1 for zeros and for no numbers at all, NaN for a tensor with an Inf or NaN.

        Raises:
            ValueError: another dtype.
        """
        check_tensor("tensor", tensor, dtypes=SCALED_DTYPES)
        return self._scale(tensor.detach().abs().flatten())

    def compute_scale_per_channel(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """`compute_scale` of each slice along dim.

        Args:
            tensor: bfloat16, float16, float32 or float64, of at least one dimension.
            dim: which; from -tensor.dim() to tensor.dim() - 1.

        Returns:
            (tensor.shape[dim],) float32.

        Raises:
            ValueError: another dtype, a scalar, or a dimension that is not there.
        """
        check_tensor("tensor", tensor, dtypes=SCALED_DTYPES)
        if not tensor.dim():
            raise ValueError("tensor must have at least 1 dimension, got a scalar; compute_scale is for it")
        check_int("dim", dim, -tensor.dim(), tensor.dim() - 1)
        return self._scale(tensor.detach().abs().movedim(dim, 0).unsqueeze(-1).flatten(1))

    def is_in_range(self, tensor: Tensor, scale: float | Tensor | None = None) -> bool:
        """Whether every magnitude, times the scale if one is given, is at most max_value; a NaN is not. Waits for the device.

        Args:
            tensor: bfloat16, float16, float32 or float64, any shape.
            scale: a positive number, a tensor of one, or None for 1; NaN is accepted.

        Returns:
            The answer.

        Raises:
            ValueError: a wrong dtype or scale.
        """
        check_tensor("tensor", tensor, dtypes=SCALED_DTYPES)
        check_has_numbers("tensor", tensor)
        magnitudes = tensor.detach().abs()
        if scale is not None:
            magnitudes = magnitudes.float() * _scalar_scale("scale", scale, tensor.device, may_be_nan=True)
        return bool((magnitudes <= self.max_value).all())

    def _scale(self, magnitudes: Tensor) -> Tensor:
        if magnitudes.shape[-1] == 0:
            return torch.ones(magnitudes.shape[:-1], dtype=torch.float32, device=magnitudes.device)
        return reference.fp8_scale(magnitudes.amax(-1).float(), self.max_value)


def quantize_fp8(
    x: Tensor,
    scale: float | Tensor | None = None,
    storage: Literal["float8", "uint8"] = "float8",
    encoding: Literal["e4m3", "offset"] = "e4m3",
) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor with one scale, as a multiplier: x * scale, clamped to -448..448, rounded to nearest even.

    With an Inf or NaN in x a computed scale is NaN, and the values are 0 (offset: 128). With a given scale an Inf is clamped and a
    NaN stays NaN (offset: 128).

    Args:
        x: bfloat16, float16 or float32, any shape; strided ones are copied first.
        scale: a positive number, or a tensor of one, on the CPU or on x's device; one on a GPU is not read by the host, and so not
            checked. None: 448 / max(abs(x)), and 1.0 for all zeros. The maximum counts as at least 2**-118, to keep the scale
            finite.
        storage: "float8" for float8_e4m3fn, or "uint8".
        encoding: "e4m3": under uint8 the bits of float8_e4m3fn. "offset", uint8 only: 128 + round(clamp(x * scale) * 127 / 448),
            linear codes 1..255.

    Returns:
        The values, of x's shape and contiguous, and the scale, () float32.

    Raises:
        ValueError: a wrong dtype, scale or option.
        RuntimeError: x requires grad under grad mode.
    """
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    check_choice("storage", storage, ("float8", "uint8"))
    check_choice("encoding", encoding, ("e4m3", "offset"))
    if encoding == "offset" and storage != "uint8":
        raise ValueError(f'encoding "offset" is unsigned codes: pass storage="uint8", got storage={storage!r}')
    check_no_grad(x=x)
    values = torch.empty(x.numel(), dtype=torch.uint8 if encoding == "offset" else E4M3, device=x.device)
    computed = scale is None
    factor = torch.empty((), dtype=torch.float32, device=x.device) if scale is None else _scalar_scale("scale", scale, x.device)
    ops.quantize_fp8(_flat(x), values, factor, computed)
    return values.view(x.shape).view(torch.uint8 if storage == "uint8" else E4M3), factor


def dequantize_fp8(
    values: Tensor,
    scale: float | Tensor,
    output_dtype: torch.dtype = torch.float16,
    encoding: Literal["e4m3", "offset"] = "e4m3",
) -> Tensor:
    """values * (1 / scale) in float32, rounded once: the way back from `quantize_fp8`, with the scale and the encoding of the way
    there.

    Args:
        values: float8_e4m3fn, or uint8 with its bits or with offset codes, which stand for (code - 128) * (448 / 127).
        scale: as for `quantize_fp8`; NaN is accepted.
        output_dtype: float16 (past 65504 it is Inf), bfloat16 or float32.
        encoding: "e4m3" or "offset", as for `quantize_fp8`.

    Returns:
        A contiguous tensor of values' shape in output_dtype.

    Raises:
        ValueError: a wrong dtype, scale or option.
        RuntimeError: scale requires grad under grad mode.
    """
    check_tensor("values", values, dtypes=(E4M3, torch.uint8))
    check_choice("output_dtype", output_dtype, FLOAT_DTYPES)
    check_choice("encoding", encoding, ("e4m3", "offset"))
    if encoding == "offset" and values.dtype != torch.uint8:
        raise ValueError(f'values must be torch.uint8 with encoding "offset", got {values.dtype}')
    check_no_grad(scale=scale if isinstance(scale, Tensor) else None)
    factor = _scalar_scale("scale", scale, values.device, may_be_nan=True)
    out = torch.empty(values.shape, dtype=output_dtype, device=values.device)
    flat = _flat(values)
    ops.dequantize_fp8(flat.view(E4M3) if encoding == "e4m3" else flat, factor, out.view(-1))
    return out


def quantize_fp8_with_overflow_handling(
    x: Tensor, scale: float | Tensor | None = None, max_attempts: int = 3
) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` that clamps nothing: where x * scale leaves -448..448 it tries again with half the scale. Waits for the device.

    What leaves the range by rounding alone, as with a computed scale, does not count.

    Args:
        x: as for `quantize_fp8`.
        scale: as for `quantize_fp8`.
        max_attempts: how many scales are tried, the given one included.

    Returns:
        Values float8_e4m3fn and the scale that was used.

    Raises:
        NumericalOverflowError: the last attempt leaves the range too, as it does for an Inf or NaN in x.
        ValueError: a wrong dtype, scale or number of attempts.
        RuntimeError: x requires grad under grad mode.
    """
    check_int("max_attempts", max_attempts, 1)
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    check_has_numbers("x", x)
    check_no_grad(x=x)
    amax = float(x.detach().abs().amax()) if x.numel() else 0.0
    if scale is None and math.isfinite(amax):
        return quantize_fp8(x)
    if isinstance(scale, Tensor):
        check_tensor("scale", scale)
        check_has_numbers("scale", scale)
    given = scale.cpu() if isinstance(scale, Tensor) else scale
    factor = 1.0 if given is None else float(_scalar_scale("scale", given, torch.device("cpu")))
    for attempt in range(max_attempts):
        if amax * factor * 0.5**attempt <= FP8Format.max_value * (1 + 2.0**-22):
            return quantize_fp8(x, factor * 0.5**attempt)
    raise NumericalOverflowError(
        f"max(abs(x)) = {amax:g} leaves -448..448 with scale {factor:g} and with its halves in {max_attempts} attempts; pass a smaller "
        "scale, more attempts, or scale=None"
    )


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: float | Tensor | None = None,
    b_scale: float | Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    bias: Tensor | None = None,
) -> Tensor:
    """(a / a_scale) @ (b / b_scale).T + bias of float8 operands with scales as multipliers, as `quantize_fp8` gives them.

    Args:
        a: (M, K_dim) float8_e4m3fn contiguous; or bfloat16, float16 or float32, which is quantized first, with a_scale if that is
            given.
        b: (N, K_dim), likewise.
        a_scale: a positive scalar; or, for a float8 operand, one for each row, (M,) or (M, 1) float32
            (`FP8Format.compute_scale_per_channel`); None: 1 for a float8 operand.
        b_scale: likewise, (N,) or (N, 1).
        out_dtype: float16 (past 65504 it is Inf), bfloat16 or float32.
        bias: (N,) bfloat16, float16 or float32, added in float32.

    Returns:
        (M, N) of out_dtype, scaled and rounded once.

    Raises:
        ValueError: a wrong shape, dtype, device or scale.
        RuntimeError: an operand requires grad under grad mode.
    """
    check_choice("out_dtype", out_dtype, FLOAT_DTYPES)
    check_tensor("a", a, dims=2)
    check_tensor("b", b, dims=2)
    check_tensor("b", b, shape=(b.shape[0], a.shape[1]), device=a.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(b.shape[0],), dtypes=FLOAT_DTYPES, device=a.device)
        check_contiguous("bias", bias)
        check_no_grad(bias=bias)
    left, right = _float8("a", a, a_scale), _float8("b", b, b_scale)
    out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    ops.fp8_gemm(*left, *right, bias, out)
    return out


def _flat(x: Tensor) -> Tensor:
    """x as (count,) contiguous: `reshape` alone keeps a stride."""
    return x.reshape(-1).contiguous()


def _scalar_scale(name: str, scale: float | Tensor, device: torch.device, may_be_nan: bool = False) -> Tensor:
    """A scale as () float32 on a device. Raises ValueError unless it is one positive number, as far as the host can see."""
    if isinstance(scale, Tensor):
        check_tensor(name, scale)
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(f"{name} must be a positive scalar, got {scale.dtype} of shape {tuple(scale.shape)}")
        if scale.device.type != "cpu" or torch.compiler.is_compiling():
            check_tensor(name, scale, device=device)
            return scale.detach().reshape(()).float()
    else:
        check_number(name, scale)
    number = float(scale)
    if not (MIN_FLOAT32 <= number <= MAX_FLOAT32 or (may_be_nan and math.isnan(number))):
        raise ValueError(f"{name} must be a positive scalar, got {number}{' which float32 can not hold' * (0 < number < math.inf)}")
    return torch.full((), number, dtype=torch.float32, device=device)


def _float8(name: str, x: Tensor, scale: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """An operand as float8 (rows, K_dim), and by what each of its rows has to be multiplied, (rows,)."""
    check_tensor(name, x, dtypes=(E4M3, *FLOAT_DTYPES))
    check_no_grad(**{name: x})
    rows = x.shape[0]
    each_row = isinstance(scale, Tensor) and tuple(scale.shape) in ((rows,), (rows, 1)) and scale.numel() != 1
    if x.dtype != E4M3:
        if each_row:
            raise ValueError(f"{name} is {x.dtype} and quantized with one scale: {name}_scale must be a positive scalar or None")
        x, scale = quantize_fp8(x, None if scale is None else _scalar_scale(f"{name}_scale", scale, x.device))
    check_contiguous(name, x)
    if isinstance(scale, Tensor) and each_row:
        check_tensor(f"{name}_scale", scale, dtypes=(torch.float32,), device=x.device)
        check_no_grad(**{f"{name}_scale": scale})
        return x, scale.reshape(-1).reciprocal()
    factor = _scalar_scale(f"{name}_scale", 1.0 if scale is None else scale, x.device, may_be_nan=True).reciprocal()
    return x, factor.expand(rows)
