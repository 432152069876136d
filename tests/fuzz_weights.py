"""Random weights that are quantized in blocks for `fuzz_gpu.py`: between guards, and with the reference's bits.

E experts, N rows and K_dim columns of a weight.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fuzz_operations import Place, draw_columns
from guarded import Guarded
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.formats import FORMATS, RECIPES
from moequant.testing import assert_bit_equal


class Weights:
    """A weight, or the weight and its transpose, of any strides: part of a larger one, every other expert, rows or columns side by
    side."""

    name = family = "weight"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place = place
        self.wide = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.dtype = rng.choice([torch.float8_e4m3fn, torch.float8_e4m3fn, FORMATS[rng.choice(list(FORMATS))].dtype])
        self.recipe, self.both = rng.choice(list(RECIPES)), rng.random() < 0.5
        self.block = rng.choice([128, 128, 128, 64, 32])
        self.segments = rng.choice([1, 1, 2, 3])

    def check(self, rng: random.Random) -> None:
        device, experts = self.place.device, rng.randint(1, 3 if self.place.tiny else 20)
        rows, columns = self.segments * draw_columns(rng, self.place, 900), draw_columns(rng, self.place, 1500)
        whole = rng.random() < 0.5
        if whole:
            # what every kernel takes
            rows, columns = (ceil_div(size, 128) * 128 for size in (rows // self.segments, columns))
            rows *= self.segments
        w = self._weight(rng, experts, rows, columns, device)
        made = [self._room(w.shape, self.segments)]
        if self.both:
            made.append(self._room(w.mT.shape, 1))
        outputs = [(values.tensor, scales.tensor) for values, scales in made]
        across = outputs[1] if self.both else (None, None)
        ops.quantize_weight(w, *outputs[0], self.recipe, self.segments, self.block, *across)
        for way, (values, scales), x, segments in zip(("w", "its transpose"), made, (w, w.mT), (self.segments, 1), strict=False):
            options = {"dtype": self.dtype, "recipe": self.recipe, "segments": segments, "group_size": self.block}
            expected = reference.quantize_weight(x, **options)
            for what, buffer, numbers in (("values", values, expected.values), ("scales", scales, expected.scales)):
                buffer.assert_only(name=f"{what} of {way}")
                assert_bit_equal(buffer.tensor, numbers, f"{what} of {way}")

    def _weight(self, rng: random.Random, experts: int, rows: int, columns: int, device: str) -> Tensor:
        """(E, N, K_dim), with some numbers that are none."""
        turned, step = rng.random() < 0.5, rng.choice([1, 1, 2])
        extra = [rng.choice([0, 0, 16, 3]) for _ in range(2)]
        sizes = (columns + extra[1], rows + extra[0]) if turned else (rows + extra[0], columns + extra[1])
        large = torch.randn(step * experts, *sizes, device=device) * torch.randn(step * experts, sizes[0], 1, device=device).exp()
        large = large.to(self.wide)
        for odd in rng.sample([torch.nan, torch.inf, -torch.inf, 0.0], rng.randint(0, 2)):
            large[rng.randrange(len(large)), rng.randrange(sizes[0]), rng.randrange(sizes[1])] = odd
        w = (large.mT if turned else large)[::step]
        return w[:, extra[0] :, : w.shape[2] - extra[1]]

    def _room(self, shape: torch.Size, segments: int) -> tuple[Guarded, Guarded]:
        experts, rows, columns = shape
        blocks = segments * ceil_div(rows // segments, self.block), ceil_div(columns, self.block)
        device = self.place.device
        return Guarded(*shape, dtype=self.dtype, device=device), Guarded(experts, *blocks, dtype=torch.float32, device=device)
