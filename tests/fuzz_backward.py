"""Random settings of the kernels of a backward for `fuzz_gpu.py`: against the reference, between guards.

L experts, M rows of an expert's buffer, R rows of all experts together, I intermediate size, W ranks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzz_activations import bias_of, draw_activation, slack
from fuzz_operations import Place, draw_columns, draw_counts, draw_ragged, selected, valid_rows
from guarded import Guarded
from moequant import Activation, ops, reference
from moequant.batch import ceil_div
from moequant.columnwise import most_blocks
from moequant.formats import FLOAT_DTYPES, FORMATS
from moequant.reference.backward import contracted_rows
from moequant.reference.quantization import biases
from moequant.testing import assert_bit_equal
from moequant.training.slopes import function_with_slope

E4M3 = torch.float8_e4m3fn
# the distance of neighbouring bfloat16 numbers, as a part of a number
STEP = 2.0**-7


class Rows(NamedTuple):
    """Which rows there are, of which some are valid, and some have to be zero for a product that contracts them. On a device."""

    valid: Tensor
    contracted: Tensor
    num_tokens: Tensor
    expert_start: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """(L, M, ...) of numbers, as the rows lie, with NaN in all that aren't valid."""
        packed = torch.full((*self.valid.shape, *x.shape[2:]), torch.nan, dtype=x.dtype, device=x.device)
        # of padded rows as many as there are; of ragged ones any numbers do
        packed[self.valid] = x.flatten(0, 1)[: int(self.valid.sum())]
        return packed

    def blanked(self, x: Tensor) -> Tensor:
        """x with zeros in rows that aren't valid and that a product contracts."""
        return x.masked_fill((self.contracted & ~self.valid).unsqueeze(-1), 0)


def draw_rows(rng: random.Random, place: Place, columns: int, most: tuple[int, int] = (20, 120)) -> tuple[Rows, tuple[int, int]]:
    """And (L, M), of as many numbers as a CPU computes in a fraction of a second. most: M, where it is tiny and elsewhere."""
    experts = rng.randint(1, 4 if place.tiny else 40)
    rows = rng.randint(1, most[0] if place.tiny else min(most[1], 2**20 // (experts * columns) + 1))
    counts = draw_counts(rng, experts, rows)
    layout = draw_ragged(rng, counts, rows, place.device)
    if layout is None:
        valid, num_tokens = valid_rows(counts, rows, place.device), torch.tensor(counts, dtype=torch.int32, device=place.device)
        return Rows(valid, torch.ones_like(valid), num_tokens, None), (experts, rows)
    valid = layout.mask()
    contracted = contracted_rows(layout.num_tokens, valid, layout.expert_start)
    return Rows(valid, contracted, layout.num_tokens, layout.expert_start), (experts, rows)


def edges(x: Tensor, kind: Activation) -> Tensor:
    """Where a limit of f itself is so near that rounding decides on which side, and with it whether there is a gradient. x: (..., 2I),
    not gated (..., I), of gate and up apart."""
    near = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    if kind.limit_after and kind.limit is not None:
        gates = x[..., : x.shape[-1] // kind.width].double()
        f, _ = function_with_slope(gates, replace(kind, limit=None, limit_after=False))
        near[..., : gates.shape[-1]] = (f - kind.limit).abs() <= 1e-5 * kind.limit
    return near


def assert_close(
    found: Tensor, expected: Tensor, off: float | Tensor, name: str, but: Tensor | None = None, step: float = STEP
) -> None:
    """Within a step, of bfloat16, of expected numbers, or off. but: numbers that may be anything."""
    found, expected = found.cpu().float(), expected.float()
    wrong = ~((found - expected).abs() <= step * expected.abs() + off)
    wrong &= True if but is None else ~but
    first = wrong.nonzero()[:1].tolist()
    assert not first, f"{name}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong, from {first} on"


def assert_sums(found: Tensor, expected: Tensor, terms: tuple[Tensor, Tensor], off: float, more: Tensor | None) -> None:
    """Gradients of routing weights (rows,). terms: whose products are added up, (rows, I) each; the second are off by as much. more: what
    was added."""
    left, right = terms[0].double(), terms[1].double()
    bound = 1e-5 * left.norm(dim=1) * right.norm(dim=1) + off * left.abs().sum(1) + 1e-30
    if more is not None and more.numel():
        bound = bound + 1e-5 * float(more.abs().max())
    wrong = ~((found.cpu().double() - expected.double()).abs() <= bound)
    assert not wrong.any(), f"gradients of routing weights: {int(wrong.sum())} of {wrong.numel()} are wrong"


class Backward:
    """The backward of an activation between two products, apart from its inputs and in their place."""

    name = family = "silu_mul_backward"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        self.kind, self.columns = replace(draw_activation(rng), interleaved=False), draw_columns(rng, place, 2900)
        if rng.random() < 0.5:
            self.columns = ceil_div(self.columns, 128) * 128
        self.bias = rng.choice([None, None, *FLOAT_DTYPES])
        # a group has no numbers of gate and up both
        self.quantized = (self.columns % 128 == 0 or not self.kind.gated) and rng.random() < 0.7
        self.recipe = rng.choice(["ue8m0", "ue8m0", "default"])

    def check(self, rng: random.Random) -> None:
        device, kind, columns = self.place.device, self.kind, self.columns
        rows, (experts, most) = draw_rows(rng, self.place, columns * kind.width)
        valid = rows.valid
        d_inner = (torch.randn(experts, most, columns, device=device) * rng.choice([1.0, 1e-3, 1e-6])).bfloat16()
        x = (torch.randn(experts, most, kind.width * columns, device=device) * rng.choice([1.0, 3.0])).bfloat16()
        d_inner, x = rows.pack(d_inner), rows.pack(x)
        bias = bias_of(experts, x.shape[-1], self.bias, device)
        count, ranks = int(valid.sum()), rng.randint(1, 3)
        room = ceil_div(count, ranks) + rng.randint(1, 9)
        # every entry of all ranks has one row at most
        entries = torch.randperm(ranks * room, generator=torch.Generator().manual_seed(rng.randrange(2**31)))[:count].to(device)
        sources = torch.full(valid.shape, -1, dtype=torch.int64, device=device)
        sources[valid] = (entries // room << 32) + entries % room
        weights = torch.rand(ranks, room, device=device)
        more = torch.randn(valid.shape, device=device) if rng.random() < 0.3 else None
        wanted = rng.random() < 0.8, rng.random() < 0.8

        skews = [rng.choice([0, 0, rng.randint(1, 15)]) for _ in range(4)]
        gradient = Guarded(*x.shape, dtype=torch.bfloat16, device=device, skew=skews[0])
        inner = Guarded(*d_inner.shape, dtype=torch.bfloat16, device=device, skew=skews[1])
        of_weights = Guarded(ranks, room, dtype=torch.float32, device=device, skew=skews[2] % 4)
        values = Guarded(*x.shape, dtype=E4M3, device=device, skew=skews[3])
        groups = ceil_div(x.shape[-1], 128)
        scales = Guarded(*x.shape[:-2], groups, x.shape[-2], dtype=torch.float32, device=device)
        narrow = (values.tensor, scales.tensor.mT) if self.quantized else None
        placed = rows.num_tokens, rows.expert_start, sources

        def run(d_inner: Tensor, x: Tensor, gradient: Tensor, inner: Tensor, of_weights: Tensor) -> None:
            numbers = weights, of_weights if wanted[1] else None, more
            outputs = gradient, inner if wanted[0] else None, narrow, self.recipe, kind.text
            ops.silu_mul_backward((d_inner, x, bias), placed, numbers, *outputs)

        run(d_inner, x, gradient.tensor, inner.tensor, of_weights.tensor)
        contracted, there = rows.contracted.unsqueeze(-1), torch.zeros(ranks * room, dtype=torch.bool, device=device)
        there[entries] = wanted[1]
        gradient.assert_only(contracted, "the gradient")
        inner.assert_only(contracted & wanted[0], "inner")
        of_weights.assert_only(there.view(ranks, room), "gradients of routing weights")
        values.assert_only(valid.unsqueeze(-1) & self.quantized, "values")
        scales.assert_only(valid.unsqueeze(-2) & self.quantized, "scales")
        for name, made in (("the gradient", gradient.tensor), ("inner", inner.tensor))[: 1 + wanted[0]]:
            # zeros of either sign
            assert not made[rows.contracted & ~rows.valid].any(), (
                f"zeros of {name} are none, in rows that products contract and nobody has"
            )

        on_cpu: list[Any] = [None if tensor is None else tensor.cpu() for tensor in (d_inner, x, bias, *placed, weights, more)]
        expected = torch.empty(x.shape), torch.empty(d_inner.shape), torch.zeros(ranks, room)
        numbers = on_cpu[6], expected[2], on_cpu[7]
        reference.silu_mul_backward(tuple(on_cpu[:3]), tuple(on_cpu[3:6]), numbers, *expected[:2], activation=kind)
        chosen, wide = valid.cpu(), on_cpu[1].float()
        if bias is not None:
            wide[chosen] += biases(on_cpu[2], chosen, *on_cpu[3:5])
        d_rows, off = on_cpu[0][chosen], slack(wide)
        largest = float(d_rows.float().abs().max()) if d_rows.numel() else 0.0
        assert_close(gradient.tensor[valid], expected[0][chosen], 2 * largest * off, "the gradient", edges(wide[chosen], kind))
        if wanted[0]:
            assert_close(inner.tensor[valid], expected[1][chosen], off, "inner")
        if wanted[1]:
            terms: Any = torch.empty(d_inner.shape)
            reference.silu_mul(on_cpu[1], *on_cpu[3:5], activation=kind, bias=on_cpu[2], out=terms)
            mine, theirs = (tensor.view(-1)[entries.to(tensor.device)] for tensor in (of_weights.tensor, expected[2]))
            assert_sums(mine, theirs, (d_rows, terms[chosen]), off, on_cpu[7])
        if narrow is not None:
            assert_quantized(narrow, gradient.tensor, valid, self.recipe)
        if rng.random() < 0.5:
            self.drawn.add("in place")
            before = Guarded.of(d_inner, device), Guarded.of(x, device)
            again = Guarded(ranks, room, dtype=torch.float32, device=device)
            run(before[0].tensor, before[1].tensor, before[1].tensor, before[0].tensor, again.tensor)
            for part, given, made in ((before[0], d_inner, inner), (before[1], x, gradient)):
                part.assert_only(name="a tensor in place")
                written = contracted & (wanted[0] or made is gradient)
                assert_bit_equal(part.tensor, torch.where(written, made.tensor, given), "a tensor in place")
            assert_bit_equal(again.tensor, of_weights.tensor, "gradients of routing weights, in place")


def assert_quantized(narrow: tuple[Tensor, Tensor], x: Tensor, valid: Tensor, recipe: str) -> None:
    """Values and scales of valid rows are those of x, to the bit."""
    on_cpu, chosen = x[valid].cpu().unsqueeze(0), torch.ones(1, int(valid.sum()), dtype=torch.bool)
    expected = torch.empty(on_cpu.shape, dtype=narrow[0].dtype), torch.empty(*on_cpu.shape[:2], ceil_div(x.shape[-1], 128))
    reference.quantize_rows(on_cpu, None, None, *expected, 128, recipe)
    assert_bit_equal(selected(narrow[0], valid), selected(expected[0], chosen), "values of the gradient")
    assert_bit_equal(narrow[1][valid].cpu(), expected[1][chosen], "scales of the gradient")


class PlainRows:
    """Rows as products contract them: the reference's bits from quantized ones, and zeros behind those that are there."""

    name = family = "plain_rows"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        fmt = rng.choice([FORMATS["fp8_e4m3fn"], *FORMATS.values()])
        self.dtype, self.columns = fmt.dtype, draw_columns(rng, place, 2900)
        self.output = rng.choice([torch.bfloat16, torch.bfloat16, torch.float32])

    def check(self, rng: random.Random) -> None:
        device, columns = self.place.device, self.columns
        rows, (experts, most) = draw_rows(rng, self.place, columns)
        counts, contracted = (rows.num_tokens, rows.expert_start), rows.contracted.unsqueeze(-1)
        numbers = rows.pack(torch.randn(experts, most, columns, device=device) * 30)
        values = Guarded(*numbers.shape, dtype=self.dtype, device=device)
        values.tensor.copy_(numbers if self.dtype.is_floating_point else numbers.nan_to_num(-1).clamp(-127, 127))
        scales = Guarded(*numbers.shape[:-2], ceil_div(columns, 128), numbers.shape[-2], dtype=torch.float32, device=device)
        scales.tensor.mT[rows.valid] = torch.rand(int(rows.valid.sum()), scales.tensor.shape[-2], device=device) + 0.1
        out = Guarded(*numbers.shape, dtype=self.output, device=device, skew=rng.choice([0, 0, rng.randint(1, 7)]))
        ops.plain_rows(out.tensor, *counts, values.tensor, scales.tensor.mT)
        out.assert_only(contracted, "plain rows")
        given: Any = [None if tensor is None else tensor.cpu() for tensor in (*counts, values.tensor, scales.tensor.mT)]
        expected = Guarded(*numbers.shape, dtype=self.output)
        reference.plain_rows(expected.tensor, *given)
        assert_bit_equal(out.tensor.cpu(), expected.tensor, "plain rows")
        # rows that are there already
        x = numbers.to(self.output)
        blanked = Guarded.of(x, device)
        ops.plain_rows(blanked.tensor, *counts)
        blanked.assert_only(name="rows in place")
        assert_bit_equal(blanked.tensor, rows.blanked(x), "rows in place")
        for memory in (values, scales):
            memory.assert_only(name="what is only read")


class Columnwise:
    """Rows quantized along the tokens: the reference's bits, and nothing behind the blocks that are there."""

    name = family = "columnwise"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.drawn = place, set[str]()
        self.dtype, self.made = rng.choice([(E4M3, E4M3), (E4M3, E4M3), (torch.bfloat16, E4M3), (torch.int8, torch.int8)])
        self.columns, self.blocks = draw_columns(rng, place, 2900), rng.random() < 0.5

    def check(self, rng: random.Random) -> None:
        device, columns, blocks = self.place.device, self.columns, self.blocks
        # a few long experts now and then
        rows, (experts, most) = draw_rows(rng, self.place, columns, rng.choice([(20, 120), (300, 2000)]))
        counts, groups = (rows.num_tokens, rows.expert_start), ceil_div(columns, 128)
        sizes = torch.randint(-12, 3, (columns,), device=device).exp2()
        x = rows.pack((torch.randn(experts, most, columns, device=device) * sizes).bfloat16())
        x_scales = None
        if self.dtype != torch.bfloat16:
            values = Guarded(*x.shape, dtype=self.dtype, device=device)
            scales = Guarded(*x.shape[:-2], groups, x.shape[-2], dtype=torch.float32, device=device)
            ops.quantize_expert_batch(x, *counts, values.tensor, scales.tensor.mT, recipe="ue8m0")
            x, x_scales = values.tensor, scales.tensor.mT
        room = most_blocks(rows.valid.numel(), experts) + rng.choice([0, 0, 3])
        shape = (groups, room) if blocks else (room, columns + rng.choice([0, -columns % 4, 5]))

        def outputs(device: str) -> tuple[Guarded, Guarded, Guarded]:
            made = Guarded(columns, 128 * room, dtype=self.made, device=device)
            factors = Guarded(*shape, dtype=torch.float32, device=device)
            return made, factors, Guarded(experts, dtype=torch.int32, device=device)

        def tensors(made: tuple[Guarded, Guarded, Guarded]) -> tuple[Tensor, Tensor, Tensor]:
            return made[0].tensor, made[1].tensor if blocks else made[1].tensor[:, :columns], made[2].tensor

        found, expected = outputs(device), outputs("cpu")
        given = x, x_scales, *counts
        ops.quantize_columnwise(*given, *tensors(found), blocks=blocks)
        on_cpu: Any = *(None if tensor is None else tensor.cpu() for tensor in given), *tensors(expected)
        reference.quantize_columnwise(*on_cpu, blocks=blocks)
        # what the reference left as it was is left too
        for name, mine, theirs in zip(("values", "scales", "ends of blocks"), found, expected, strict=True):
            mine.assert_only(name=name)
            assert_bit_equal(mine.tensor.cpu(), theirs.tensor, name)
        if int(expected[2].tensor[-1]) > experts:
            self.drawn.add("several blocks")
