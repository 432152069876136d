"""Random settings of single operations for `fuzz_gpu.py`. A family shares what kernels are compiled for; a call draws the rest.

Letters: L experts, M rows of an expert's buffer, N columns, K_dim contraction, H hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guarded import Guarded
from moequant import ops, reference
from moequant.batch import QuantizedTensor, ceil_div
from moequant.config import ROW_ALIGNMENT
from moequant.formats import FORMATS
from moequant.kernels.gemm.grouped_gemm import grouped_gemm_blockscale as plain_gemm
from moequant.kernels.library import hopper
from moequant.testing import assert_bit_equal, relative_error
from ragged_rows import Ragged, ragged

# rounding to bfloat16 is 1.66e-3, fp8 tensor cores add with about 14 bits; of few numbers the error scatters
TOLERANCE = 1.75e-3


class Place(NamedTuple):
    """Where settings run. tiny: in the interpreter, which takes a second for what a GPU does in microseconds."""

    device: str
    tiny: bool
    rank: int = 0
    ranks: int = 1


@contextlib.contextmanager
def by_reference() -> Iterator[None]:
    """While it lasts, a CPU runs the reference and not interpreted kernels."""
    before = os.environ.pop("MOEQUANT_CPU_KERNELS", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MOEQUANT_CPU_KERNELS"] = before


def draw_columns(rng: random.Random, place: Place, most: int) -> int:
    """A hidden or intermediate size: of any residue modulo 128, half of them such as TMA takes, gpt-oss's now and then."""
    most = 140 if place.tiny else most
    kind = rng.random()
    if kind < 0.1 and most >= 2880:
        return 2880
    columns = 128 * rng.randrange(max(1, most // 128)) + rng.randrange(1, 129)
    return max(16, columns // 16 * 16) if kind < 0.5 else max(8, columns // 8 * 8) if kind < 0.6 else columns


def draw_counts(rng: random.Random, experts: int, rows: int) -> list[int]:
    """Valid rows of each expert; some draws have counts below zero and past the buffer."""
    kind = rng.random()
    counts = [rng.randint(0, rows) for _ in range(experts)]
    if kind < 0.2:
        counts = [rng.choice([0, 1, rows, rng.randint(0, rows)]) for _ in counts]
    elif kind < 0.3:
        counts = [0] * experts
        counts[rng.randrange(experts)] = rows
    elif kind < 0.4:
        counts = [rng.choice([0, 1, 63, 64, 65, 127, 128, 129]) for _ in counts]
    elif kind < 0.45:
        counts = [rng.choice([-1, rows + 1, 2**31 - 1, rows]) for _ in counts]
    elif kind < 0.5:
        counts = [0] * experts
    return counts


def valid_rows(counts: list[int], rows: int, device: str) -> Tensor:
    """(L, M)"""
    limits = torch.tensor([max(0, min(count, rows)) for count in counts], device=device)
    return torch.arange(rows, device=device) < limits.unsqueeze(1)


def draw_ragged(rng: random.Random, counts: list[int], rows: int, device: str) -> Ragged | None:
    """Half of the time where ragged rows of these counts lie, of which some may be cut off at R."""
    if rng.random() < 0.5:
        return None
    bounded = [max(-1, min(count, rows)) for count in counts]
    needed = sum(ceil_div(max(count, 0), ROW_ALIGNMENT) * ROW_ALIGNMENT for count in bounded)
    kind = rng.random()
    if kind < 0.3 or not needed:
        return ragged(bounded, device, spare=ROW_ALIGNMENT * rng.randint(not needed, 9))
    return ragged(bounded, device, cut=None if kind < 0.8 else ROW_ALIGNMENT * rng.randint(1, needed // ROW_ALIGNMENT))


def spoil(x: Tensor, valid: Tensor) -> None:
    """Rows past the counts hold NaN."""
    if x.itemsize == 1:
        # float8 can't be selected
        x.view(torch.int8)[~valid] = 0x7F
    else:
        x[~valid] = torch.nan


class Products:
    """Grouped GEMMs: each row at its place and at an address of its own, with the same bits, near a float32 product. Rows are padded or
    ragged."""

    name = family = "product"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place = place
        formats = [torch.float8_e4m3fn, torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16, torch.float8_e5m2]
        self.dtype = rng.choice(formats)
        self.experts = 1 if rng.random() < 0.1 else rng.randint(2, 4 if place.tiny else 12)
        self.columns = draw_columns(rng, place, 3072)
        self.depth = draw_columns(rng, place, min(2900, 2**25 // (self.experts * self.columns) + 1))
        self.kernel = rng.choice(["wide", "narrow", "plain", "operation"])
        self.most = 40 if place.tiny else rng.choice([40, 200, 400])
        w = torch.randn(self.experts, self.columns, self.depth, device=place.device).bfloat16()
        self.plain = self.dtype in (torch.bfloat16, torch.float16)
        self.b = w.to(self.dtype) if self.plain else reference.quantize_weight(w, dtype=self.dtype)

    def check(self, rng: random.Random) -> None:
        device, experts, columns = self.place.device, self.experts, self.columns
        rows = rng.randint(1, self.most)
        rows = ceil_div(rows, 16) * 16 if rng.random() < 0.7 else rows
        counts = draw_counts(rng, experts, rows)
        x = torch.randn(experts, rows, self.depth, device=device).bfloat16()
        a = x.to(self.dtype) if self.plain else reference.quantize_expert_batch(x, dtype=self.dtype)
        valid, num_tokens = valid_rows(counts, rows, device), torch.tensor(counts, dtype=torch.int32, device=device)
        layout, starts = draw_ragged(rng, counts, rows, device), None
        if layout is None:
            for tensor in parts(a):
                if tensor is not None:
                    spoil(tensor, valid)
        else:
            a, valid, num_tokens, starts = layout.operand(a), layout.mask(), layout.num_tokens, layout.expert_start
        expected_rows = rng.choice([1, 40, rows])
        num_sms = rng.choice([None, None, rng.randint(1, 64)])
        settings: dict[str, Any] = {"expected_rows": expected_rows, "num_sms": num_sms}
        # rows whose addresses are no multiples of 16
        skew = rng.randint(0, 7) if columns % 8 else 0
        wide = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        stored = Guarded(*valid.shape, columns, dtype=wide, device=device)
        self._launch(a, (num_tokens, starts), stored.tensor, None, settings)
        stored.assert_only(valid.unsqueeze(-1), "the product")
        pushed = Guarded(valid.numel(), columns, dtype=wide, device=device, skew=skew)
        places = torch.randperm(valid.numel(), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        places = places.to(device).view(valid.shape)
        destinations = pushed.tensor.data_ptr() + places * (2 * columns)
        # nothing that is not valid is an address
        destinations[~valid] = 8
        self._launch(a, (num_tokens, starts), None, destinations, settings)
        written = torch.zeros(valid.numel(), dtype=torch.bool, device=device)
        written[places[valid]] = True
        pushed.assert_only(written.unsqueeze(1), "the pushed product")
        mine = stored.tensor[valid]
        if self._same_kernel(a, stored.tensor):
            assert_bit_equal(pushed.tensor[places[valid]], mine, "pushed rows")
        expected = reference.grouped_gemm_blockscale(a, self.b, num_tokens, starts, out_dtype=torch.float32)[valid]
        for result in (mine, pushed.tensor[places[valid]]):
            assert_near(result, expected)

    def _kernel(self, a: Any, out: Tensor | None) -> Any:
        """A kernel that was asked for and takes the arguments, or the operation's own choice."""
        if self.kernel in ("wide", "narrow") and hopper.supports(*parts(a), *parts(self.b), out):
            from moequant.kernels.gemm import grouped_gemm_hopper as module

            config = module.WIDE if self.kernel == "wide" else module.NARROW
            return lambda *args, **settings: module.grouped_gemm_blockscale_hopper(*args, config=config, **settings)
        return plain_gemm if self.kernel == "plain" else None

    def _same_kernel(self, a: Any, out: Tensor) -> bool:
        return (self._kernel(a, out) is None) == (self._kernel(a, None) is None)

    def _launch(
        self,
        a: Any,
        counts: tuple[Tensor, Tensor | None],
        out: Tensor | None,
        destinations: Tensor | None,
        settings: dict[str, Any],
    ) -> None:
        operands, kernel = (*parts(a), *parts(self.b)), self._kernel(a, out)
        if kernel is not None:
            kernel(*operands, *counts, out, destinations=destinations, **settings)
        elif destinations is not None:
            ops.grouped_gemm_push(*operands, *counts, destinations, settings["expected_rows"], settings["num_sms"])
        else:
            assert out is not None
            ops.grouped_gemm_blockscale(*operands, *counts, out, 1, settings["expected_rows"], settings["num_sms"])


def parts(x: Any) -> tuple[Tensor, Tensor | None]:
    return (x.values, x.scales) if isinstance(x, QuantizedTensor) else (x, None)


def assert_near(result: Tensor, expected: Tensor) -> None:
    """Rows against their float32 product: together as near as is promised, and each one by far not wrong."""
    if not len(result):
        return
    error = relative_error(result, expected)
    assert error <= TOLERANCE * (1 if result.numel() >= 4096 else 2), f"relative error {error:.2e}"
    norms = expected.float().norm(dim=1).clamp_min(1e-20)
    rows = (result.float() - expected.float()).norm(dim=1) / norms
    # few columns may cancel
    assert bool((rows <= (0.02 if result.shape[1] >= 64 else 0.2)).all()), f"row {int(rows.argmax())}: {float(rows.max()):.2e}"


class FusedGemm1:
    """GEMM 1 with SwiGLU and quantization: the bits of the two kernels that it replaces. Hopper alone."""

    name = family = "gemm1_swiglu"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place = place
        self.experts, self.inner = rng.randint(1, 6), 128 * rng.choice([1, 2, 3, 5, 8])
        self.hidden = max(16, draw_columns(rng, place, 2900) // 16 * 16)
        self.recipe = rng.choice(["default", "default", "ue8m0", "deepgemm"])
        w13 = torch.randn(self.experts, 2 * self.inner, self.hidden, device=place.device).bfloat16()
        self.w13 = reference.quantize_weight(w13, segments=2, recipe=self.recipe)

    def check(self, rng: random.Random) -> None:
        from moequant.kernels.gemm.gemm1_swiglu_hopper import gemm1_swiglu_hopper, supports_gemm1_swiglu
        from moequant.kernels.gemm.grouped_gemm_hopper import NARROW, WIDE, grouped_gemm_blockscale_hopper

        device, experts, inner = self.place.device, self.experts, self.inner
        rows = 16 * rng.randint(1, 20)
        counts = draw_counts(rng, experts, rows)
        x = torch.randn(experts, rows, self.hidden, device=device).bfloat16() * self.hidden**-0.5
        a = reference.quantize_expert_batch(x, recipe=self.recipe)
        valid, num_tokens = valid_rows(counts, rows, device), torch.tensor(counts, dtype=torch.int32, device=device)
        layout, starts = draw_ragged(rng, counts, rows, device), None
        if layout is None:
            spoil(a.values, valid)
            spoil(a.scales, valid)
        else:
            a, valid, num_tokens, starts = layout.operand(a), layout.mask(), layout.num_tokens, layout.expert_start
        *there, last = valid.shape
        operands, results = (a.values, a.scales, self.w13.values, self.w13.scales), []
        for fused in (True, False):
            values = Guarded(*there, last, inner, dtype=torch.float8_e4m3fn, device=device)
            scales = Guarded(*there, inner // 128, last, dtype=torch.float32, device=device)
            by_row = scales.tensor.mT
            if fused:
                assert supports_gemm1_swiglu(*operands, values.tensor, by_row)
                spec = ops.quant_spec(values.tensor.dtype, self.recipe)
                settings = {name: getattr(number, "value", number) for name, number in spec._asdict().items()}
                counted = *operands, num_tokens, starts
                gemm1_swiglu_hopper(*counted, values.tensor, by_row, num_sms=rng.choice([None, 7]), **settings)
            else:
                gate_up = Guarded(*there, last, 2 * inner, dtype=torch.bfloat16, device=device)
                config = rng.choice([WIDE, NARROW])
                grouped_gemm_blockscale_hopper(*operands, num_tokens, starts, gate_up.tensor, segments=2, config=config)
                gate_up.assert_only(valid.unsqueeze(-1), "gate and up")
                ops.silu_mul_quantize(gate_up.tensor, num_tokens, starts, values.tensor, by_row, self.recipe)
            values.assert_only(valid.unsqueeze(-1), f"values, fused={fused}")
            scales.assert_only(valid.unsqueeze(-2), f"scales, fused={fused}")
            results.append((values.tensor[valid], by_row[valid]))
        assert_bit_equal(results[0][0], results[1][0], "values")
        assert_bit_equal(results[0][1], results[1][1], "scales")


class Quantizers:
    """Quantization of an expert batch: the reference's bits, and nothing outside."""

    name = family = "quantize"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place = place
        fmt = rng.choice([FORMATS["fp8_e4m3fn"], *FORMATS.values()])
        self.dtype, self.recipe = fmt.dtype, rng.choice(["default", "ue8m0", "deepgemm"])
        self.input = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.columns = draw_columns(rng, place, 2900)
        self.group = rng.choice([128, 128, 64, 32])

    def check(self, rng: random.Random) -> None:
        device, columns, dtype = self.place.device, self.columns, self.dtype
        experts, rows = rng.randint(1, 4), rng.randint(1, 20 if self.place.tiny else 120)
        counts = draw_counts(rng, experts, rows)
        valid, num_tokens = valid_rows(counts, rows, device), torch.tensor(counts, dtype=torch.int32, device=device)
        x = torch.randn(experts, rows, columns + rng.choice([0, 0, 1, 8]), device=device).to(self.input)
        layout, starts = draw_ragged(rng, counts, rows, device), None
        if layout is not None:
            x, valid, num_tokens, starts = layout.pack(x), layout.mask(), layout.num_tokens, layout.expert_start
        *there, last = valid.shape
        x, groups = x[..., :columns], ceil_div(columns, self.group)
        values = Guarded(*there, last, columns, dtype=dtype, device=device, skew=rng.choice([0, 0, rng.randint(1, 15)]))
        scales = Guarded(*there, groups, last, dtype=torch.float32, device=device, skew=rng.choice([0, 0, 1]))
        by_row = scales.tensor.mT
        # of all rows, as if each matrix had as many
        x_cpu = x.cpu() if layout is None else x.cpu().unsqueeze(0)
        ops.quantize_expert_batch(x, num_tokens, starts, values.tensor, by_row, self.group, self.recipe)
        expected = torch.empty(*x_cpu.shape[:2], columns, dtype=dtype), torch.empty(*x_cpu.shape[:2], groups)
        reference.quantize_rows(x_cpu, None, None, *expected, self.group, self.recipe)
        values.assert_only(valid.unsqueeze(-1), "values")
        scales.assert_only(valid.unsqueeze(-2), "scales")
        chosen = valid.cpu().view(x_cpu.shape[:2])
        assert_bit_equal(selected(values.tensor, valid), selected(expected[0], chosen), "values")
        assert_bit_equal(by_row[valid].cpu(), expected[1][chosen], "scales")


def selected(x: Tensor, valid: Tensor) -> Tensor:
    """Rows on a CPU; float8 can't be selected."""
    return x.view(torch.int8)[valid].view(x.dtype).cpu() if x.itemsize == 1 else x[valid].cpu()
