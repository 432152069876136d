"""Random weights in the formats of checkpoints, for `fuzz_gpu.py`: what a device makes of them has the bits that a CPU's reference makes.

L experts, N rows and K_dim columns of a weight, H hidden size, I intermediate size.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuzz_activations import bias_of, draw_activation
from fuzz_operations import Place, by_reference, draw_columns
from guarded import guarded_buffers
from moequant import CheckpointWeight, GroupedExperts, QuantizedTensor
from moequant.batch import NARROW_DTYPES, ceil_div
from moequant.formats import FLOAT_DTYPES
from moequant.testing import assert_bit_equal

Block = tuple[int | None, int | None]
SCALES = (*FLOAT_DTYPES, torch.float8_e8m0fnu, torch.uint8)
BLOCKS: list[Block] = [
    (128, 128),
    (128, 128),
    (64, 64),
    (256, 128),
    (None, 128),
    (1, None),
    (None, None),
    (1, 32),
    (96, 40),
    (1, 128),
]
FORMS = ("narrow", "narrow", "pairs", "groups of 16 bytes", "float4_e2m1fn_x2")


def draw_scales(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Near each other, or as far apart as floats of the type are; of exponents now and then a NaN."""
    if dtype in (torch.float8_e8m0fnu, torch.uint8):
        low, high = rng.choice([(118, 122), (100, 150), (127, 127)])
        bits = torch.randint(low, high + 1, shape).to(torch.uint8)
        if bits.numel() and rng.random() < 0.1:
            bits.view(-1)[rng.randrange(bits.numel())] = 255
        return bits.view(dtype)
    return (torch.rand(shape) + 0.5).mul_(2.0 ** rng.choice([-8, 0, 3])).to(dtype)


def draw_narrow(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits: the least numbers, the largest, and now and then a NaN. In integers no -128, which nothing quantizes to."""
    bits = torch.randint(-127, 128, shape, dtype=torch.int8)
    if dtype != torch.int8:
        wild = bits.view(dtype).float()
        # most of them finite
        bits = torch.where(wild.isfinite() | (torch.rand(shape) < 1e-4), bits, 0)
    return bits.view(dtype)


def draw_weight(rng: random.Random, sizes: tuple[int, int, int], parts: int) -> CheckpointWeight:
    """(L, N, K_dim), blocked in one of the ways that `CheckpointWeight` takes. parts: 2 of gate and up apart."""
    experts, rows, columns = sizes
    form = rng.choice(FORMS) if columns % 32 == 0 else "narrow"
    block: Block = (1, 32) if form != "narrow" else rng.choice(BLOCKS)
    segments = rng.choice([parts, parts, 1])
    length = rows // segments
    counts = [1 if size is None else ceil_div(extent, size) for extent, size in zip((length, columns), block, strict=True)]
    shape: tuple[int, ...] = (experts, segments * counts[0], counts[1])
    kind = rng.choice(["whole", "whole", "short"])
    if kind == "short" and block == (None, None) and segments == 1:
        shape = rng.choice([(experts,), (1,), ()])
    elif kind == "short" and block[1] is None:
        shape = shape[:2]
    scales = draw_scales(rng, shape, rng.choice(SCALES if form == "narrow" else SCALES[-2:]))
    if form == "narrow":
        values, transposed = draw_narrow(sizes, rng.choice([torch.float8_e4m3fn, torch.float8_e4m3fn, *NARROW_DTYPES])), False
        if rng.random() < 0.2:
            # as they lie in the other order, and not contiguous
            values, transposed = values.mT.contiguous(), True
            scales = scales.mT.contiguous() if scales.dim() == 3 else scales
        elif rng.random() < 0.2:
            values = values.mT.contiguous().mT
        return CheckpointWeight(values, scales, block, segments, transposed)
    pairs = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    if form == "groups of 16 bytes":
        pairs = pairs.unflatten(2, (-1, 16))
    return CheckpointWeight(pairs.view(torch.float4_e2m1fn_x2) if form == "float4_e2m1fn_x2" else pairs, scales, block, segments)


def moved(w: Any, device: str) -> Any:
    """A weight, or two, on a device, with the same strides."""
    if isinstance(w, tuple):
        return tuple(moved(part, device) for part in w)
    return replace(w, values=to_device(w.values, device), scales=to_device(w.scales, device))


def to_device(x: Tensor, device: str) -> Tensor:
    """By bytes, whatever type it is."""
    return x.view(torch.uint8).to(device).view(x.dtype) if x.itemsize == 1 else x.to(device)


def assert_same_numbers(found: Tensor, expected: Tensor, name: str) -> None:
    """The same bits, but any NaN for a NaN."""
    bad, wrong = found.float().isnan().cpu(), expected.float().isnan()
    assert_bit_equal(bad, wrong, f"NaNs of {name}")
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert found.dtype == expected.dtype, f"{name}: {found.dtype} against {expected.dtype}"
    mine, theirs = (x.contiguous().view(bits).cpu().masked_fill(wrong, 0) for x in (found, expected))
    assert_bit_equal(mine.view(expected.dtype), theirs.view(expected.dtype), name)


class Checkpoints:
    """`GroupedExperts.from_checkpoint` on a device and on a CPU."""

    name = family = "checkpoint"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        self.hidden, self.inner = (draw_columns(rng, place, 700) for _ in range(2))
        if rng.random() < 0.6:
            # where e2m1 can be
            self.hidden, self.inner = (max(32, n // 32 * 32) for n in (self.hidden, self.inner))
        self.quant = rng.choice(["fp8_e4m3fn", "fp8_e4m3fn", "int8", "none", "float16", "fp8_e5m2"])

    def check(self, rng: random.Random) -> None:
        torch.manual_seed(rng.randrange(2**31))
        experts, activation = rng.randint(1, 4), draw_activation(rng)
        rows = self.inner * activation.width
        parts = activation.halves
        w13: Any = None
        if parts == 2 and rng.random() < 0.3:
            w13 = tuple(draw_weight(rng, (experts, self.inner, self.hidden), 1) for _ in range(2))
        else:
            w13 = draw_weight(rng, (experts, rows, self.hidden), parts)
        w2 = draw_weight(rng, (experts, self.hidden, self.inner), 1)
        biases = [bias_of(experts, n, rng.choice([None, *FLOAT_DTYPES]), "cpu") for n in (rows, self.hidden)]
        recipe = rng.choice([None, None, "default", "ue8m0", "deepgemm"])
        settings: dict[str, Any] = {"quant": self.quant, "activation": activation, "recipe": recipe}
        given = w2, *(w13 if isinstance(w13, tuple) else (w13,))
        self.drawn |= {"mxfp4" if w.packed else f"blocks of {w.block}" for w in given}
        self.drawn |= {f"scales in {str(w.scales.dtype)[6:]}" for w in given}
        with by_reference():
            expected = GroupedExperts.from_checkpoint(w13, w2, **settings, bias13=biases[0], bias2=biases[1])
        device = self.place.device
        first, second = moved(w13, device), moved(w2, device)
        mine = [None if bias is None else bias.to(device) for bias in biases]
        with guarded_buffers(device) as buffers:
            made = GroupedExperts.from_checkpoint(first, second, **settings, bias13=mine[0], bias2=mine[1])
            for name in ("w13", "w2", "bias13", "bias2"):
                self._same(getattr(made, name), getattr(expected, name), name)
        buffers.check()
        assert made.kind == expected.kind, f"{made.kind} against {expected.kind}"
        # what was given stays as it is
        for after, before in zip((second, *(first if isinstance(first, tuple) else (first,))), given, strict=True):
            assert_bit_equal(to_device(after.values, "cpu").view(torch.uint8), before.values.view(torch.uint8), "given values")

    @staticmethod
    def _same(made: Any, expected: Any, name: str) -> None:
        assert type(made) is type(expected), f"{name}: {type(made)} against {type(expected)}"
        if isinstance(made, QuantizedTensor):
            settings = [(w.layout, w.recipe, w.group_size, w.segments) for w in (made, expected)]
            assert settings[0] == settings[1], f"{name}: {settings[0]} against {settings[1]}"
            assert_same_numbers(made.values, expected.values, f"values of {name}")
            assert_same_numbers(made.scales, expected.scales, f"scales of {name}")
        elif made is not None:
            assert_same_numbers(made, expected, name)
