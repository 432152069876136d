"""The backward of an activation between two products: within rounding of the reference, zeros where products contract and nothing else
touched, and its fp8 rows bit for bit those of its own bfloat16 ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from activation_cases import CASES
from compile_case import BF16, E4M3, cases, empty
from guarded import Guarded
from moequant import Activation, ops, quantize_expert_batch, reference
from moequant.batch import ceil_div, empty_scales_of
from moequant.reference.backward import contracted_rows
from moequant.reference.quantization import counted_rows
from moequant.testing import assert_bit_equal
from ragged_rows import ragged

KINDS = {name: kind for name, (kind, _, _) in CASES.items() if not kind.interleaved}
RANKS, ROOM = 2, 50


class Rows(NamedTuple):
    """A batch's rows. Those of no expert are NaN, and their sources -1."""

    d_inner: Tensor
    x: Tensor
    num_tokens: Tensor
    expert_start: Tensor | None
    sources: Tensor
    weights: Tensor

    @property
    def placed(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.num_tokens, self.expert_start, self.sources

    @property
    def valid(self) -> Tensor:
        return counted_rows(self.num_tokens, self.x, self.expert_start)

    @property
    def contracted(self) -> Tensor:
        return contracted_rows(self.num_tokens, self.x, self.expert_start)


def rows_of(layout: str, counts: list[int], columns: int, width: int, device: str, spare: int = 24) -> Rows:
    most = max([*counts, 1]) + 3
    padded = len(counts), most
    d_inner, x = torch.randn(*padded, columns), torch.randn(*padded, width * columns) * 3
    # every entry of all ranks has one row at most
    entries = torch.randperm(RANKS * ROOM)[: sum(counts)]
    sources = torch.full(padded, -1)
    sources[torch.arange(most) < torch.tensor(counts)[:, None]] = ((entries // ROOM) << 32) + entries % ROOM
    weights = torch.rand(RANKS, ROOM).to(device)
    batch = ragged(counts, spare=spare)
    tensors = d_inner.bfloat16(), x.bfloat16(), sources
    if layout == "ragged":
        d_inner, x, sources = (batch.pack(tensor).to(device) for tensor in tensors)
        return Rows(d_inner, x, batch.num_tokens.to(device), batch.expert_start.to(device), sources, weights)
    d_inner, x, sources = (tensor.to(device) for tensor in tensors)
    d_inner[sources < 0] = x[sources < 0] = torch.nan
    return Rows(d_inner, x, batch.num_tokens.to(device), None, sources, weights)


class Made(NamedTuple):
    gradient: Tensor
    inner: Tensor
    of_weights: Tensor
    values: Tensor | None
    scales: Tensor | None


def run(
    rows: Rows,
    kind: Activation,
    device: str,
    *,
    kernel: bool,
    quantized: bool,
    bias: Tensor | None = None,
    more: Tensor | None = None,
) -> Made:
    """What the kernel or the reference writes, between guards: nothing else."""
    gradient, inner = (Guarded(*x.shape, dtype=BF16, device=device) for x in (rows.x, rows.d_inner))
    of_weights = Guarded(RANKS, ROOM, dtype=torch.float32, device=device)
    values = Guarded(*rows.x.shape, dtype=E4M3, device=device)
    groups = ceil_div(rows.x.shape[-1], 128)
    scales = Guarded(*rows.x.shape[:-2], groups, rows.x.shape[-2], dtype=torch.float32, device=device)
    narrow = (values.tensor, scales.tensor.mT) if quantized else None
    given, entries = (rows.d_inner, rows.x, bias), (rows.weights, of_weights.tensor, more)
    made = gradient.tensor, inner.tensor, narrow, "ue8m0"
    if kernel:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOEQUANT_CPU_KERNELS", "1")
            ops.silu_mul_backward(given, rows.placed, entries, *made, kind.text)
    else:
        reference.silu_mul_backward(given, rows.placed, entries, *made, kind)
    contracted, valid = rows.contracted.unsqueeze(-1), rows.valid
    gradient.assert_only(contracted, "the gradient")
    inner.assert_only(contracted, "inner")
    places = torch.zeros(RANKS * ROOM, dtype=torch.bool, device=device)
    sources = rows.sources[valid]
    places[(sources >> 32) * ROOM + (sources & 0xFFFFFFFF)] = True
    of_weights.assert_only(places.view(RANKS, ROOM), "gradients of routing weights")
    values.assert_only(valid.unsqueeze(-1) & quantized, "values")
    scales.assert_only(valid.unsqueeze(-2) & quantized, "scales")
    return Made(gradient.tensor, inner.tensor, of_weights.tensor, *(narrow or (None, None)))


def assert_close(made: Tensor, expected: Tensor, bits: int, name: str) -> None:
    """Within a unit in the last of `bits` bits, or of what rounding of float32 leaves of numbers that cancel."""
    assert_bit_equal(made.isnan(), expected.isnan(), name)
    assert torch.allclose(made.float(), expected.float(), rtol=2.0**-bits, atol=1e-5, equal_nan=True), name


def check(rows: Rows, kind: Activation, device: str, **options: Any) -> Made:
    made, expected = (run(rows, kind, device, kernel=kernel, **options) for kernel in (True, False))
    for name in ("gradient", "inner"):
        assert_close(getattr(made, name), getattr(expected, name), 7, name)
        zeros = getattr(made, name)[rows.contracted & ~rows.valid]
        assert not zeros.any() and not zeros.isnan().any()
    assert_close(made.of_weights, expected.of_weights, 14, "gradients of routing weights")
    if made.values is not None and made.scales is not None:
        # of the very numbers that came out in bfloat16
        again = quantize_expert_batch(made.gradient, rows.num_tokens, rows.expert_start, dtype=E4M3, recipe="ue8m0")
        assert_bit_equal(made.values[rows.valid].view(torch.int8), again.values[rows.valid].view(torch.int8))
        assert_bit_equal(made.scales[rows.valid], again.scales[rows.valid])
    return made


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("name", KINDS)
def test_every_activation_has_the_gradients_of_the_reference(name, layout, device):
    kind = KINDS[name]
    rows = rows_of(layout, [11, 0, 5], 256, kind.width, device)
    bias = torch.randn(3, 256 * kind.width, device=device) if kind.limit else None
    check(rows, kind, device, quantized=True, bias=bias)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("columns", [100, 384], ids=str)
def test_columns_that_are_no_groups_and_numbers_added_to_the_rows(columns, layout, device):
    rows = rows_of(layout, [16, 1, 0, 20], columns, 2, device)
    more = torch.randn(rows.sources.shape, device=device)
    made = check(rows, Activation(), device, quantized=False, more=more)
    without = check(rows, Activation(), device, quantized=False)
    place = (rows.sources[rows.valid] >> 32) * ROOM + (rows.sources[rows.valid] & 0xFFFFFFFF)
    added = made.of_weights.flatten()[place] - without.of_weights.flatten()[place]
    torch.testing.assert_close(added, more[rows.valid], rtol=0, atol=1e-4)
    # without a gate a group may be a partial one
    check(rows_of(layout, [3, 2], columns, 1, device), Activation("relu2", gated=False), device, quantized=True)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_results_may_lie_where_the_inputs_do(layout, device, monkeypatch):
    rows = rows_of(layout, [9, 0, 17], 256, 2, device)
    apart = run(rows, Activation(), device, kernel=True, quantized=True)
    scales = empty_scales_of(rows.x.shape, 128, device)
    values = torch.empty(rows.x.shape, dtype=E4M3, device=device)
    of_weights = torch.zeros_like(rows.weights)
    given = rows.d_inner.clone(), rows.x.clone()
    entries = rows.weights, of_weights, None
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")
    ops.silu_mul_backward((*given, None), rows.placed, entries, given[1], given[0], (values, scales), "ue8m0")
    contracted, valid = rows.contracted, rows.valid
    assert_bit_equal(given[1][contracted], apart.gradient[contracted])
    assert_bit_equal(given[0][contracted], apart.inner[contracted])
    assert apart.values is not None and apart.scales is not None
    assert_bit_equal(values[valid].view(torch.int8), apart.values[valid].view(torch.int8))
    assert_bit_equal(scales[valid], apart.scales[valid])


def test_gates_of_any_size_have_finite_gradients(device):
    gates = torch.tensor([-1e4, -100.0, -88.5, -20.0, 0.0, 20.0, 100.0, 1e4], device=device)
    for kind in KINDS.values():
        rows = rows_of("ragged", [8], 128, kind.width, device)
        rows.x[:8, :128] = gates[:, None] + 0.1 * rows.x[:8, :128]
        made = check(rows, kind, device, quantized=True)
        assert made.gradient[:8].isfinite().all() and made.inner[:8].isfinite().all()


def test_a_bad_number_stays_in_its_row(device):
    rows = rows_of("ragged", [4], 128, 2, device)
    rows.x[0, 3], rows.d_inner[2, 7] = torch.nan, torch.nan
    made = run(rows, Activation(), device, kernel=True, quantized=True)
    bad = made.gradient[:4].isnan()
    assert bad[0, 3] and bad[2, 7] and bad[2, 128 + 7] and not bad[1].any() and not bad[3].any()
    assert made.scales is not None and made.scales[:4].isnan().any(1).tolist() == [True, False, True, False]
    place = (rows.sources[:4] >> 32) * ROOM + (rows.sources[:4] & 0xFFFFFFFF)
    assert made.of_weights.flatten()[place].isnan().tolist() == [True, False, True, False]


def test_no_rows_no_experts_and_no_columns_are_no_work(device):
    for counts in ([0, 0], []):
        rows = rows_of("ragged", counts, 128, 2, device, spare=16)
        check(rows, Activation(), device, quantized=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("seed", range(8))
def test_random_batches_match_the_reference_on_the_gpu(seed, layout):
    torch.manual_seed(seed)
    experts, columns = int(torch.randint(1, 40, ())), int(torch.randint(1, 24, ())) * (128 if seed % 2 else 40)
    counts = torch.randint(0, 2 * (RANKS * ROOM) // (2 * experts) + 1, (experts,)).tolist()
    kind = list(KINDS.values())[seed % len(KINDS)]
    bias = torch.randn(experts, columns * kind.width, device="cuda") if seed % 3 == 0 else None
    check(rows_of(layout, counts, columns, kind.width, "cuda"), kind, "cuda", quantized=columns % 128 == 0, bias=bias)


def call_backward(
    dtype: torch.dtype, columns: int = 2048, activation: str = "SwiGLU", biased: bool = False, layout: str = "padded"
) -> None:
    kind = KINDS[activation]
    shape = (4, 256) if layout == "padded" else (1024,)
    x, inner = empty(*shape, columns * kind.width), empty(*shape, columns)
    narrow = (empty(*x.shape, dtype=E4M3), empty_scales_of(x.shape, 128, "cpu")) if dtype == E4M3 else None
    weights = empty(1, 8192, dtype=torch.float32)
    counts = torch.zeros(4, dtype=torch.int32)
    placed = counts, None if layout == "padded" else counts, torch.empty(shape, dtype=torch.int64)
    bias = empty(4, x.shape[-1]) if biased else None
    entries = weights, empty(1, 8192, dtype=torch.float32), None
    ops.silu_mul_backward((inner, x, bias), placed, entries, x, inner, narrow, "ue8m0", kind.text)


COMPILED = ("SwiGLU", "MiniMax-M3", "gelu by erf", "Inkling-2", "Nemotron-H")
COMPILE_CASES = [
    *cases(call_backward, *({"dtype": E4M3, "activation": name} for name in COMPILED), {"dtype": E4M3, "biased": True}),
    *cases(call_backward, *({"dtype": dtype, "layout": "ragged"} for dtype in (E4M3, BF16))),
    *cases(call_backward, {"dtype": BF16}, {"dtype": BF16, "activation": "MiniMax-M3", "biased": True}),
    *cases(call_backward, {"dtype": BF16, "columns": 1445}, {"dtype": BF16, "columns": 1}, wide=False, may_spill=True),
]
