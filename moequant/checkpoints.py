"""Expert weights as checkpoints have them: narrow numbers and their scales, in blocks of other sizes than ours, or two numbers a byte.

L experts, N rows and K_dim columns of a weight, H hidden size, I intermediate size.

The formats are those of DeepSeek-V3 (`weight` in float8_e4m3fn with `weight_scale_inv`, which is what values are multiplied by, one for
128x128, float32 or e8m0), of compressed-tensors (`weight_scale`, multiplied by as well, for a tensor, a channel or a block), and of the
OCP Microscaling Formats (MX) specification 1.0: e8m0 is a byte b for 2**(b - 127), 255 for NaN, and e2m1 four bits, sign, two of exponent
and one of mantissa, with a scale for 32 of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from moequant import ops
from moequant.activations import Activation
from moequant.batch import NARROW_DTYPES, QuantizedTensor, ceil_div
from moequant.checks import (
    check_choice,
    check_format,
    check_has_numbers,
    check_int,
    check_is,
    check_no_grad,
    check_tensor,
    check_weight_shapes,
)
from moequant.config import PLAIN_DTYPES, QUANT_DTYPES
from moequant.errors import LayoutError
from moequant.formats import FLOAT_DTYPES, recipe_of

# by the code without its sign
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PACKED_DTYPES = (torch.uint8, torch.float4_e2m1fn_x2)
EXPONENT_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
BLOCK = 128


@dataclass(frozen=True, eq=False)
class CheckpointWeight:
    """One weight of all experts of a rank, for `GroupedExperts.from_checkpoint`: its numbers are values * scales.

        CheckpointWeight(weight, weight_scale_inv)                        DeepSeek-V3, in blocks of 128x128
        CheckpointWeight(blocks, scales, block=(1, 32))                   MXFP4: gpt-oss, DeepSeek-V4
        CheckpointWeight(weight, weight_scale, block=(1, None))           compressed-tensors, a scale for each channel
        CheckpointWeight(weight, weight_scale, block=(None, None))        a scale for each expert, or one for all

    Attributes:
        values: (L, N, K_dim) float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8, any strides. Or e2m1, in uint8 or float4_e2m1fn_x2:
            (L, N, K_dim / 2), or (L, N, K_dim / 32, 16), two numbers a byte, the first in the lower four bits. Pairs that a checkpoint
            has in int8 are given as `values.view(torch.uint8)`.
        scales: (L, row blocks, column blocks) float32, bfloat16 or float16, or e8m0 in float8_e8m0fnu or uint8, any strides. (L, row
            blocks) and (L,) where there is one for what is left out, () or (1,) where there is one for all.
        block: rows and columns that have one scale, None for all. The last ones of a row or column may be partial.
        segments: the rows are this many equal parts, each in blocks of its own, as gate and up are where each was quantized by itself.
            None: 2 of a w13 of gate and up apart, if the scales have as many rows, otherwise 1.
        transposed: values are (L, K_dim, N), and scales of three dimensions (L, column blocks, row blocks); not of e2m1.

    Raises:
        LayoutError: the scales' shape is not what values, block and segments ask for.
        ValueError: another wrong argument.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int | None, int | None] = (BLOCK, BLOCK)
    segments: int | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        remedy = "weights in plain numbers are for GroupedExperts.from_weights"
        check_tensor("values", self.values, dtypes=(*NARROW_DTYPES, *PACKED_DTYPES), remedy=remedy)
        check_tensor("scales", self.scales, dtypes=(*FLOAT_DTYPES, *EXPONENT_DTYPES), device=self.values.device)
        check_has_numbers("values", self.values)
        check_is("block", self.block, (tuple, list))
        if len(self.block) != 2:
            raise ValueError(f"block must be rows and columns, got {self.block!r}")
        for size in self.block:
            if size is not None:
                check_int("block", size, 1)
        if self.segments is not None:
            check_int("segments", self.segments, 1)
        check_choice("transposed", self.transposed, (False, True))
        if self.transposed and self.packed:
            raise ValueError("values of two numbers a byte lie along K_dim and can't be transposed; give (L, N, K_dim / 2)")
        dims = (3, 4) if self.packed else (3,)
        if self.values.dim() not in dims:
            form = "(L, N, K_dim / 2) or (L, N, K_dim / 32, 16)" if self.packed else "(L, N, K_dim)"
            raise ValueError(f"values must be {form}, got shape {tuple(self.values.shape)}; torch.stack puts experts together")
        if not any(self._fits(parts) for parts in ((1, 2) if self.segments is None else (self.segments,))):
            self._refuse()

    @property
    def packed(self) -> bool:
        """Whether a byte has two numbers."""
        return self.values.dtype in PACKED_DTYPES

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, N, K_dim)."""
        experts, rows, *columns = self.values.shape
        if self.packed:
            return experts, rows, 2 * math.prod(columns)
        return (experts, columns[0], rows) if self.transposed else (experts, rows, columns[0])

    def _fits(self, parts: int) -> bool:
        """Whether the scales are those of so many parts."""
        rows = self.shape[1]
        return rows % parts == 0 and self._scale_shape() == (self.shape[0], parts * self._count(0, rows // parts), self._count(1))

    def _scale_shape(self) -> tuple[int, ...]:
        """Of `scales_of`."""
        shape = self.scales.shape
        if self.scales.numel() == 1:
            return self.shape[0], 1, 1
        if len(shape) == 3:
            return (shape[0], shape[2], shape[1]) if self.transposed else tuple(shape)
        return (*shape, *(1,) * (3 - len(shape)))

    def _count(self, dim: int, extent: int | None = None) -> int:
        """Blocks along N, of a part, or along K_dim."""
        extent, size = self.shape[1 + dim] if extent is None else extent, self.block[dim]
        return ceil_div(extent, size) if size is not None else min(extent, 1)

    def _refuse(self) -> NoReturn:
        experts, rows, columns = self.shape
        parts = self.segments or 1
        down, across = parts * self._count(0, rows // parts), self._count(1)
        # as they are given
        expected = (experts, across, down) if self.transposed else (experts, down, across)
        also = " or of gate and up each" if self.segments is None else ""
        lies = ", transposed" if self.transposed else ""
        hint = "; pairs of e2m1 are given as values.view(torch.uint8)" if self.values.dtype == torch.int8 else ""
        raise LayoutError(
            f"values of {rows} rows and {columns} columns with block={tuple(self.block)} and segments={self.segments} need scales of "
            f"shape {expected}{also}, got {tuple(self.scales.shape)}{lies}; give the block that has one scale{hint}"
        )


Both = tuple[CheckpointWeight, CheckpointWeight]


def parts_of(w: CheckpointWeight, most: int) -> int:
    """The equal parts of the rows that are blocked apart.

    Args:
        w: a weight.
        most: 2 of a w13 of gate and up apart, 1 of anything else.

    Returns:
        segments, or what the scales say.

    Raises:
        LayoutError: the scales have rows for another number of parts.
    """
    for parts in range(most, 0, -1) if w.segments is None else (w.segments,):
        if w._fits(parts):
            return parts
    w._refuse()


def scales_of(w: CheckpointWeight) -> Tensor:
    """The scales as they are multiplied by.

    Args:
        w: a weight.

    Returns:
        (L, row blocks, column blocks) float32, (L, 1, 1) of one for each expert.
    """
    scales = w.scales
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.float()
    if scales.numel() == 1:
        return scales.reshape(1, 1, 1).expand(w.shape[0], 1, 1)
    if scales.dim() == 3:
        return scales.transpose(1, 2) if w.transposed else scales
    return scales.reshape(scales.shape[0], -1, 1)


def made_of_checkpoint(
    w13: CheckpointWeight | Both, w2: CheckpointWeight, quant: str, recipe: str | None, activation: Activation
) -> tuple[QuantizedTensor | Tensor, QuantizedTensor | Tensor, Activation]:
    """The weights of `GroupedExperts.from_checkpoint`.

    Args:
        w13: of (L, 2I, H), not gated (L, I, H); or gate and up.
        w2: of (L, H, I).
        quant: the dispatcher's.
        recipe: of what is quantized anew; None: "ue8m0" if the scales are exponents, otherwise "default".
        activation: what w13's rows are for.

    Returns:
        w13, w2, and the activation of w13's rows as they lie now.

    Raises:
        LayoutError: scales of other segments than there are.
        ValueError: wrong weights or settings.
        RuntimeError: a weight requires grad under grad mode.
    """
    check_choice("quant", quant, tuple(QUANT_DTYPES))
    if recipe is not None:
        recipe_of(recipe)
    hint = "CheckpointWeight(values, scales) is one weight; w13 may be two, gate and up"
    check_is("w13", w13, (CheckpointWeight, tuple, list), hint)
    pair = (w13,) if isinstance(w13, CheckpointWeight) else w13
    for name, weight in (("w2", w2), *(("w13", weight) for weight in pair)):
        check_is(name, weight, CheckpointWeight, hint)
        check_no_grad(**{f"{name}.values": weight.values, f"{name}.scales": weight.scales})
        if weight.values.device != w2.values.device:
            raise ValueError(f"w13 and w2 must be on one device, got {weight.values.device} and {w2.values.device}")
    check_format(quant, w2.values.device)
    apart = len(pair) == 2
    if apart and (not activation.gated or activation.interleaved or pair[0].shape != pair[1].shape):
        raise ValueError(
            "w13 must be gate and up of one shape, for an activation that is gated and not interleaved, or one weight, got "
            f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)} for {activation}"
        )
    if len(pair) not in (1, 2):
        raise ValueError(f"w13 must be one weight, or gate and up, got {len(pair)} weights")
    experts, rows, hidden = pair[0].shape
    check_weight_shapes((experts, len(pair) * rows, hidden), w2.shape, activation.gated)
    dtype, interleaved, parts = QUANT_DTYPES[quant], activation.interleaved, 1 if apart else activation.width
    # wrong segments of the last are heard of before the first is made
    for weight in pair:
        parts_of(weight, 1 if interleaved else parts)
    parts_of(w2, 1)
    if quant in PLAIN_DTYPES:
        halves = [dequantized(weight, dtype, parts, interleaved) for weight in pair]
        return (torch.cat(halves, 1) if apart else halves[0]), dequantized(w2, dtype, 1), replace(activation, interleaved=False)
    made = [in_blocks(weight, dtype, recipe, parts, interleaved) for weight in pair]
    first = joined(made[0][0], made[1][0]) if apart else made[0][0]
    return first, in_blocks(w2, dtype, recipe, 1)[0], replace(activation, interleaved=made[0][1])


def joined(gate: QuantizedTensor, up: QuantizedTensor) -> QuantizedTensor:
    """Gate and up as one weight of two segments.

    Args:
        gate: (L, I, H), layout "block".
        up: the same.

    Returns:
        (L, 2I, H).
    """
    values, scales = ([getattr(w, name) for w in (gate, up)] for name in ("values", "scales"))
    # bytes, which every version of torch puts together
    return QuantizedTensor(
        torch.cat([x.view(torch.uint8) for x in values], 1).view(gate.values.dtype),
        torch.cat(scales, 1),
        "block",
        gate.recipe,
        segments=2,
    )


def scale_places(extent: int, parts: int, block: int | None) -> Tensor:
    """The scale of each row, or of each column.

    Example: 6 rows in 2 parts, blocks of 2: [0, 0, 1, 2, 2, 3].

    Args:
        extent: rows or columns.
        parts: equal parts, blocked apart.
        block: rows of one scale, None: those of a part.

    Returns:
        (extent,) int64, on the CPU.
    """
    length = max(extent // parts, 1)
    size = length if block is None else block
    number = torch.arange(extent, device="cpu")
    return number // length * ceil_div(length, size) + number % length // size


def tile_ends(extent: int, parts: int) -> tuple[Tensor, Tensor]:
    """The first and the last row, or column, of each block of ours.

    Args:
        extent: rows or columns.
        parts: equal parts, blocked apart.

    Returns:
        Two of (blocks,) int64, on the CPU.
    """
    length = extent // parts
    first = [part * length + start for part in range(parts) for start in range(0, length, BLOCK)]
    last = [part * length + min(start + BLOCK, length) - 1 for part in range(parts) for start in range(0, length, BLOCK)]
    return torch.tensor(first, dtype=torch.int64, device="cpu"), torch.tensor(last, dtype=torch.int64, device="cpu")


def unpacked(pairs: Tensor) -> Tensor:
    """The numbers of e2m1.

    Example: the byte 0xF1 is 0.5, of the lower four bits, and then -6.

    Args:
        pairs: (..., n) uint8.

    Returns:
        (..., 2n) float32.
    """
    table = torch.tensor([*E2M1, *(-number for number in E2M1)], device=pairs.device)
    return table[torch.stack((pairs & 0xF, pairs >> 4), -1).flatten(-2).int()]


def halves_apart(x: Tensor, dim: int = 1) -> Tensor:
    """Interleaved rows with those of even numbers first.

    Args:
        x: (L, 2I, ...).
        dim: which the rows are along.

    Returns:
        A copy.
    """
    even = torch.arange(0, x.shape[dim], 2, device=x.device)
    return x.index_select(dim, torch.cat((even, even + 1)))


def in_blocks(
    w: CheckpointWeight, dtype: torch.dtype, recipe: str | None, parts: int, interleaved: bool = False
) -> tuple[QuantizedTensor, bool]:
    """A weight in blocks of 128x128: values as they are where each of our blocks has one scale, otherwise quantized anew.

    Args:
        w: of any format.
        dtype: of the result.
        recipe: of what is quantized anew; None: "ue8m0" if the scales are exponents, otherwise "default".
        parts: equal parts of the result's rows, blocked apart, once interleaved ones are.
        interleaved: gate and up alternate, and are laid apart where they are quantized anew. As they are, they are one part.

    Returns:
        The weight, and whether its rows are still interleaved.
    """
    experts, rows, columns = w.shape
    exponents = w.scales.dtype in EXPONENT_DTYPES
    kept_parts = 1 if interleaved else parts
    source = parts_of(w, kept_parts)
    places = scale_places(rows, source, w.block[0]), scale_places(columns, 1, w.block[1])
    ends = tile_ends(rows, kept_parts), tile_ends(columns, 1)
    scales = scales_of(w)
    alike = all(torch.equal(place[first], place[last]) for place, (first, last) in zip(places, ends, strict=True))
    if alike and w.values.dtype == dtype:
        values = w.values.transpose(1, 2) if w.transposed else w.values
        row, column = (place[first].to(scales.device) for place, (first, _) in zip(places, ends, strict=True))
        taken = scales.index_select(1, row).index_select(2, column).contiguous()
        made = "ue8m0" if exponents else "default"
        return QuantizedTensor(values.contiguous(), taken, "block", made, segments=kept_parts), interleaved
    recipe = ("ue8m0" if exponents else "default") if recipe is None else recipe
    values = torch.empty(experts, rows, columns, dtype=dtype, device=w.values.device)
    blocks = parts * ceil_div(rows // parts, BLOCK), ceil_div(columns, BLOCK)
    new = torch.empty(experts, *blocks, dtype=torch.float32, device=w.values.device)
    for expert in range(experts):
        one = slice(expert, expert + 1)
        ops.quantize_weight(_numbers(w, scales, places, expert, interleaved), values[one], new[one], recipe, parts, BLOCK)
    return QuantizedTensor(values, new, "block", recipe, segments=parts), False


def dequantized(w: CheckpointWeight, dtype: torch.dtype, parts: int, interleaved: bool = False) -> Tensor:
    """A weight's numbers.

    Args:
        w: of any format.
        dtype: of the result.
        parts: 2 of a w13 of gate and up apart.
        interleaved: gate and up alternate, and are laid apart.

    Returns:
        (L, N, K_dim).
    """
    experts, rows, columns = w.shape
    places = scale_places(rows, parts_of(w, parts), w.block[0]), scale_places(columns, 1, w.block[1])
    scales, out = scales_of(w), torch.empty(w.shape, dtype=dtype, device=w.values.device)
    for expert in range(experts):
        out[expert] = _numbers(w, scales, places, expert, interleaved)[0]
    return out


def _numbers(w: CheckpointWeight, scales: Tensor, places: tuple[Tensor, Tensor], expert: int, interleaved: bool) -> Tensor:
    """(1, N, K_dim) float32: one expert's. scales: of `scales_of`. places: of rows and columns in them."""
    values = w.values[expert]
    values = unpacked(values.view(torch.uint8).flatten(1)) if w.packed else values.float()
    values = values.T if w.transposed else values
    row, column = (place.to(scales.device) for place in places)
    wide = values * scales[expert].index_select(0, row).index_select(1, column)
    return (halves_apart(wide, 0) if interleaved else wide).unsqueeze(0)
