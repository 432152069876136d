"""Quantization, and what is fused with it. Letters as in `moequant.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moequant.activations import Activation, activation_of
from moequant.batch import QuantizedTensor, ceil_div, empty_scales_of, scale_layout
from moequant.formats import format_of, max_of, recipe_of
from moequant.reference.activations import activated

__all__ = [
    "INF_BITS",
    "add_bias",
    "blocks_of",
    "counted_rows",
    "dequantize",
    "dequantize_blocks",
    "expert_places",
    "group_scales",
    "pack_exponents",
    "quantize_expert_batch",
    "quantize_groups",
    "quantize_rows",
    "quantize_weight",
    "rms_norm",
    "round_to",
    "rows_activated",
    "silu_mul",
    "silu_mul_quantize",
    "write_rows",
]

INF_BITS = 0x7F800000


def group_scales(groups: Tensor, dtype: torch.dtype, recipe: str = "default", eps: float | None = None) -> Tensor:
    """The scale of each group. groups: (..., group_size) float32. Returns (...) float32; NaN where a group holds NaN or Inf.

    The absolute maximum is an integer maximum over the bits of |x|, which no NaN can slip through.
    """
    rule = recipe_of(recipe)
    bits = groups.contiguous().abs().view(torch.int32).amax(-1)
    amax = bits.view(torch.float32).clamp_min(rule.eps if eps is None else eps)
    # by a tensor: CUDA's division by a number is a product with its reciprocal
    scale = amax / torch.full_like(amax, max_of(dtype, recipe))
    if rule.power_of_two:
        # the next power of two: a mantissa that is not zero carries into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & INF_BITS).view(torch.float32)
    return torch.where(bits >= INF_BITS, torch.nan, scale)


def round_to(quotient: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to a narrow type: clamp to the format's range, round to nearest even. NaN becomes 0 (its group's scale is NaN)."""
    fmt = format_of(dtype)
    bounded = torch.nan_to_num(quotient, nan=0.0, posinf=fmt.max, neginf=-fmt.max).clamp(-fmt.max, fmt.max)
    return (bounded.round() if dtype == torch.int8 else bounded).to(dtype)


def quantize_groups(x: Tensor, group_size: int, dtype: torch.dtype, recipe: str, eps: float | None) -> tuple[Tensor, Tensor]:
    """Quantizes along the last dimension. x: (..., columns). Returns values (..., columns) and scales (..., groups), both contiguous."""
    columns = x.shape[-1]
    groups = ceil_div(columns, group_size)
    padded = F.pad(x.float(), (0, groups * group_size - columns)).unflatten(-1, (groups, group_size))
    scales = group_scales(padded, dtype, recipe, eps)
    divisor = scales.unsqueeze(-1)
    quotient = padded * (1.0 / divisor) if recipe_of(recipe).reciprocal else padded / divisor
    return round_to(quotient, dtype).flatten(-2)[..., :columns].contiguous(), scales


def pack_exponents(scales: Tensor) -> Tensor:
    """Powers of two (..., G) float32 to their exponents (..., ceil(G / 4)) int32, as in layout "ue8m0_packed": NaN's is 0xFF."""
    if not scales.shape[-1]:
        return torch.empty(scales.shape, dtype=torch.int32, device=scales.device)
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return F.pad(exponents, (0, -scales.shape[-1] % 4)).view(torch.int32)


def counted_rows(num_tokens: Tensor | None, x: Tensor, expert_start: Tensor | None = None) -> Tensor:
    """(L, M) bool: which rows of x (L, M, ...) are valid; with expert_start (R,), of x (R, ...)."""
    if expert_start is not None:
        assert num_tokens is not None
        rows, starts = torch.arange(x.shape[0], device=x.device), expert_start.long().unsqueeze(1)
        return ((rows >= starts) & (rows < starts + num_tokens.unsqueeze(1))).any(0)
    experts, rows = x.shape[:2]
    if num_tokens is None:
        return torch.ones(experts, rows, dtype=torch.bool, device=x.device)
    return torch.arange(rows, device=x.device) < num_tokens.unsqueeze(1)


def expert_places(x: Tensor, num_tokens: Tensor | None, expert_start: Tensor | None) -> list[tuple[int | slice, ...]]:
    """With what to index x (L, M, ...), or with expert_start x (R, ...), for the valid rows of each expert."""
    rows = x.shape[0 if expert_start is not None else 1]
    counts = [rows] * x.shape[0] if num_tokens is None else num_tokens.tolist()
    if expert_start is None:
        return [(expert, slice(min(max(0, count), rows))) for expert, count in enumerate(counts)]
    pairs = zip(expert_start.tolist(), counts, strict=True)
    return [(slice(start, min(start + max(0, count), rows)),) for start, count in pairs]


def quantize_expert_batch(
    x: Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
    eps: float | None = None,
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> QuantizedTensor:
    """As `moequant.quantize_expert_batch`."""
    values, scales = outputs(x.shape, group_size, x.device, dtype, values, scales)
    quantize_rows(x, num_tokens, expert_start, values, scales, group_size, recipe, eps)
    return QuantizedTensor(values, scales, scale_layout(scales), recipe, group_size)


def outputs(
    shape: Sequence[int], group_size: int, device: torch.device, dtype: torch.dtype, values: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The values and scales of shape (L, M, H) or (R, H) that were given, or new ones."""
    return (
        torch.empty(shape, dtype=dtype, device=device) if values is None else values,
        empty_scales_of(shape, group_size, device) if scales is None else scales,
    )


def quantize_rows(
    x: Tensor,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    values: Tensor,
    scales: Tensor,
    group_size: int = 128,
    recipe: str = "default",
    eps: float | None = None,
) -> None:
    """Quantizes the valid rows of x (L, M, H) into values (L, M, H) and scales (L, M, G) of any strides, or, if they are int32, packed
    (L, M, ceil(G / 4)); with expert_start those of x (R, H). Other rows stay as they are."""
    valid = counted_rows(num_tokens, x, expert_start)
    write_rows(quantize_groups(x[valid], group_size, values.dtype, recipe, eps), valid, values, scales)


def write_rows(quantized: tuple[Tensor, Tensor], valid: Tensor, values: Tensor, scales: Tensor) -> None:
    """Writes what `quantize_groups` made of the valid rows, one after the other, to where they belong; packed if scales are int32."""
    new_values, new_scales = quantized
    # float8 travels as bytes, since torch can't select it
    values.view(torch.int8)[valid] = new_values.view(torch.int8)
    scales[valid] = pack_exponents(new_scales) if scales.dtype == torch.int32 else new_scales


def quantize_weight(
    w: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, recipe: str = "default", segments: int = 1, group_size: int = 128
) -> QuantizedTensor:
    """As `moequant.quantize_weight`."""
    rows, columns = w.shape[-2] // segments, w.shape[-1]
    blocks = ceil_div(rows, group_size), ceil_div(columns, group_size)
    # of a block that is larger than the weight, what there is
    height, width = min(group_size, max(rows, 1)), min(group_size, max(columns, 1))
    # each segment is padded to whole blocks; a block is then the (height, width) tile of (..., segment, i, row, j, column)
    pad = (0, blocks[1] * width - columns, 0, blocks[0] * height - rows)
    tiles = F.pad(w.float().unflatten(-2, (segments, rows)), pad)
    tiles = tiles.unflatten(-2, (blocks[0], height)).unflatten(-1, (blocks[1], width)).transpose(-3, -2)
    scales = group_scales(tiles.flatten(-2), dtype, recipe)
    divisor = scales[..., None, None]
    quotient = tiles * (1.0 / divisor) if recipe_of(recipe).reciprocal else tiles / divisor
    values = round_to(quotient.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :rows, :columns], dtype)
    return QuantizedTensor(
        values.flatten(-3, -2).contiguous(), scales.flatten(-3, -2).contiguous(), "block", recipe, group_size, segments
    )


def dequantize_blocks(values: Tensor, scales: Tensor, group_rows: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """values (..., M, H) times scales (..., ceil(M / group_rows), ceil(H / group_size)), in float32, rounded once to dtype."""
    rows, columns = values.shape[-2:]
    # no more than there is, of a group that is larger
    wide = scales.repeat_interleave(min(group_size, columns), -1)[..., :columns]
    if group_rows > 1:
        wide = wide.repeat_interleave(min(group_rows, rows), -2)[..., :rows, :]
    return (values.float() * wide).to(dtype)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `moequant.dequantize`."""
    values, scales, group_rows = blocks_of(q)
    return dequantize_blocks(values, scales, group_rows, q.group_size, dtype).view(q.shape)


def blocks_of(q: QuantizedTensor) -> tuple[Tensor, Tensor, int]:
    """values (L, M, H) and scales as `dequantize_blocks` takes them, a weight's segments each a matrix, and the rows of a scale."""
    rows, columns = q.shape[-2:]
    matrices = math.prod(q.shape[:-2]) * q.segments
    scales = q.scales_by_row()
    scales = scales.reshape(matrices, scales.shape[-2] // q.segments, scales.shape[-1])
    return q.values.reshape(matrices, rows // q.segments, columns), scales, q.group_size if q.layout == "block" else 1


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x + residual) / sqrt(mean of its squares + eps) * weight * silu(gate), along the last dimension. Returns that and x + residual,
    both float32; the former is computed in float64 and rounded once."""
    summed = x.float() if residual is None else x.float() + residual.float()
    wide = summed.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    return (normed if gate is None else normed * F.silu(gate.double())).float(), summed


def add_bias(x: Tensor, num_tokens: Tensor | None, expert_start: Tensor | None, bias: Tensor) -> None:
    """Adds each expert's bias to its valid rows, in float32, rounded once. x: (L, M, N), with expert_start (R, N). bias: (L, N)."""
    valid = counted_rows(num_tokens, x, expert_start)
    x[valid] = (x[valid].float() + biases(bias, valid, num_tokens, expert_start)).to(x.dtype)


def biases(bias: Tensor, valid: Tensor, num_tokens: Tensor | None, expert_start: Tensor | None) -> Tensor:
    """Each valid row's bias, float32. bias: (L, N). valid: of `counted_rows`."""
    if expert_start is None:
        return bias.float()[valid.nonzero()[:, 0]]
    assert num_tokens is not None
    if not valid.any():
        return bias.float()[:0]
    # the last expert that has rows and begins no later than a row
    rows = valid.nonzero()
    begun = (rows >= expert_start) & (num_tokens > 0)
    return bias.float()[torch.where(begun, expert_start, -1).argmax(1)]


def rows_activated(
    x: Tensor, num_tokens: Tensor | None, expert_start: Tensor | None, activation: str | Activation, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which rows of x are valid, and what the activation makes of them, one after the other, float32."""
    valid = counted_rows(num_tokens, x, expert_start)
    rows = None if bias is None else biases(bias, valid, num_tokens, expert_start)
    return valid, activated(x[valid], activation, rows)


def inner_shape(x: Tensor, activation: str | Activation) -> torch.Size:
    """The shape of what an activation makes of x."""
    return torch.Size((*x.shape[:-1], x.shape[-1] // activation_of(activation).width))


def silu_mul(
    x: Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    activation: str | Activation = "silu",
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `moequant.silu_mul`."""
    if out is None:
        out = torch.empty(inner_shape(x, activation), dtype=torch.bfloat16, device=x.device)
    valid, rows = rows_activated(x, num_tokens, expert_start, activation, bias)
    out[valid] = rows.to(out.dtype)
    return out


def silu_mul_quantize(
    x: Tensor,
    num_tokens: Tensor | None = None,
    expert_start: Tensor | None = None,
    *,
    activation: str | Activation = "silu",
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    recipe: str = "default",
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> QuantizedTensor:
    """As `moequant.silu_mul_quantize`."""
    values, scales = outputs(inner_shape(x, activation), 128, x.device, dtype, values, scales)
    valid, rows = rows_activated(x, num_tokens, expert_start, activation, bias)
    write_rows(quantize_groups(rows, 128, values.dtype, recipe, None), valid, values, scales)
    return QuantizedTensor(values, scales, scale_layout(scales), recipe)
