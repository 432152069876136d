"""Rows as products contract them: the reference's bits, zeros behind an expert's rows, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compile_case import BF16, E4M3, INT8, PLAIN, cases, empty
from guarded import Guarded
from moequant import ops, quantize_expert_batch, reference
from moequant.batch import empty_scales_of
from moequant.kernels.library.arguments import Valid
from moequant.kernels.quantization.plain_rows import plain_rows
from moequant.reference.backward import contracted_rows
from moequant.reference.quantization import counted_rows
from moequant.testing import assert_bit_equal
from operation_case import COUNTS
from ragged_rows import ragged

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])


def batch(layout: str, counts: list[int], columns: int, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows in bfloat16, NaN where there is none, and how many each expert has from where on."""
    x, rows = torch.randn(len(counts), max([*counts, 0]) + 5, columns).bfloat16(), ragged(counts, device, spare=20)
    if layout == "ragged":
        return rows.pack(x.to(device)), rows.num_tokens, rows.expert_start
    x[~counted_rows(torch.tensor(counts, dtype=torch.int32), x)] = torch.nan
    return x.to(device), rows.num_tokens, None


def check(layout: str, counts: list[int], columns: int, dtype: torch.dtype, device: str) -> None:
    x, num_tokens, expert_start = batch(layout, counts, columns, device)
    placed = num_tokens, expert_start
    q = quantize_expert_batch(x, *placed, dtype=dtype, recipe="ue8m0")
    made, expected = (Guarded(*x.shape, dtype=BF16, device=device) for _ in range(2))
    plain_rows(made.tensor, Valid(*placed), q.values, q.scales)
    reference.plain_rows(expected.tensor, *placed, q.values, q.scales)
    contracted = contracted_rows(num_tokens, x, expert_start).unsqueeze(-1)
    for out in (made, expected):
        out.assert_only(contracted)
    assert_bit_equal(made.tensor, expected.tensor)
    # in place: the rows that are there stay
    blanked = Guarded(*x.shape, dtype=BF16, device=device)
    blanked.tensor.copy_(x)
    plain_rows(blanked.tensor, Valid(*placed), None, None)
    blanked.assert_only()
    valid = counted_rows(num_tokens, x, expert_start)
    assert_bit_equal(blanked.tensor, x.masked_fill(contracted & ~valid.unsqueeze(-1), 0))


@LAYOUTS
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
@pytest.mark.parametrize("columns", [8, 512, 700], ids=str)
def test_rows_are_those_of_the_reference_and_zeros_behind_them(columns, dtype, layout, device):
    check(layout, [9, 0, 16, 3], columns, dtype, device)


@LAYOUTS
@pytest.mark.parametrize("counts", [[], [0, 0, 0], [1], [32, 48]], ids=str)
def test_no_rows_and_full_blocks(counts, layout, device):
    check(layout, counts, 256, E4M3, device)


def test_bad_groups_are_nan_and_stay_in_their_row(device):
    x, *placed = batch("ragged", [3], 256, device)
    x[1, 200] = torch.inf
    q = quantize_expert_batch(x, *placed)
    out = torch.ones_like(x)
    plain_rows(out, Valid(*placed), q.values, q.scales)
    assert out[1, 128:].isnan().all() and out.isfinite().sum() == out.numel() - 128 and not out[3:16].any() and out[16:].all()


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("seed", range(6))
def test_random_batches_match_the_reference_on_the_gpu(seed, layout):
    torch.manual_seed(seed)
    counts = torch.randint(0, 300, (int(torch.randint(1, 40, ())),)).tolist()
    check(layout, counts, int(torch.randint(1, 900, ())) * 8, (E4M3, INT8)[seed % 2], "cuda")


def call_plain_rows(dtype: torch.dtype, columns: int = 7168, layout: str = "padded") -> None:
    shape = (4, 256) if layout == "padded" else (1024,)
    out, counts = empty(*shape, columns, dtype=dtype if dtype in PLAIN else BF16), torch.zeros(4, dtype=torch.int32)
    narrow = (None, None) if dtype in PLAIN else (empty(*out.shape, dtype=dtype), empty_scales_of(out.shape, 128, "cpu"))
    ops.plain_rows(out, counts, None if layout == "padded" else counts, *narrow)


COMPILE_CASES = [
    *cases(call_plain_rows, {"dtype": E4M3}, {"dtype": INT8}, {"dtype": E4M3, "layout": "ragged"}),
    # in place, where nothing is loaded
    *cases(call_plain_rows, {"dtype": BF16}, {"dtype": BF16, "layout": "ragged"}, wide=False),
    *cases(call_plain_rows, {"dtype": INT8, "columns": 1445}, wide=False, may_spill=True),
]


def arguments(dtype: torch.dtype) -> tuple:
    out = torch.ones(2, 4, 140).bfloat16()
    narrow = () if dtype == BF16 else (torch.ones(2, 4, 140).to(dtype), empty_scales_of(out.shape, 128, "cpu").fill_(2.0))
    return out, COUNTS, None, *narrow


OPERATION_CASES = {
    "plain_rows": {"fp8": lambda: arguments(E4M3), "int8": lambda: arguments(INT8), "in place": lambda: arguments(BF16)}
}
