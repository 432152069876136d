"""`reduce_split_k` against sums in torch, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compile_case import E4M3, INT8, cases
from moequant.kernels.gemm.reduce_split_k import reduce_split_k
from moequant.kernels.library.pdl import uses_pdl
from moequant.testing import assert_bit_equal, poison
from product_calls import call_grouped_gemm

COUNTS = [3, 0, 5]


def partials(parts: int, columns: int, device: str) -> Tensor:
    """Of 3 experts of 5 rows. What lies past the counts is NaN."""
    x = torch.randn(parts, 3, 5, columns, device=device)
    for expert, count in enumerate(COUNTS):
        x[:, expert, count:] = torch.nan
    return x


def in_order(x: Tensor) -> Tensor:
    total = x[0].clone()
    for part in x[1:]:
        total += part
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("parts", "columns"), [(2, 512), (3, 600), (7, 1)], ids=str)
def test_parts_are_added_in_order_and_other_rows_left(parts: int, columns: int, dtype: torch.dtype, device: str) -> None:
    x = partials(parts, columns, device)
    out = torch.full((3, 5, columns), 77.0, dtype=dtype, device=device)
    expected = out.clone()
    for expert, count in enumerate(COUNTS):
        expected[expert, :count] = in_order(x)[expert, :count].to(dtype)
    pdl = uses_pdl(torch.device(device))
    reduce_split_k(x, out, None, torch.tensor(COUNTS, dtype=torch.int32, device=device), None, pdl)
    assert_bit_equal(out, expected)


@pytest.mark.parametrize("columns", [136, 100], ids=["aligned", "odd"])
def test_rows_go_to_their_addresses_and_nowhere_else(columns: int, device: str) -> None:
    x = partials(4, columns, device)
    elsewhere = torch.full((15, columns), 77.0, dtype=torch.bfloat16, device=device)
    places = torch.randperm(15, device=device).view(3, 5)
    destinations = elsewhere.data_ptr() + places * (2 * columns)
    expected = elsewhere.clone()
    for expert, count in enumerate(COUNTS):
        expected[places[expert, :count]] = in_order(x)[expert, :count].bfloat16()
        # nothing that is not valid is an address
        destinations[expert, count:] = 8
    reduce_split_k(x, None, destinations, torch.tensor(COUNTS, dtype=torch.int32, device=device), None, False)
    assert_bit_equal(elsewhere, expected)


def test_without_counts_all_rows_are_added(device: str) -> None:
    x = torch.randn(2, 2, 3, 40, device=device)
    out = poison(torch.empty(2, 3, 40, device=device))
    reduce_split_k(x, out, None, None, None, False)
    assert_bit_equal(out, in_order(x))


# few tiles: several programs share one. On sm_80 int8 leaves no register for one scalar
COMPILE_CASES = [
    *cases(call_grouped_gemm, *({"dtype": E4M3, "experts": 1, "columns": 512, "push": push} for push in (False, True))),
    *cases(call_grouped_gemm, {"dtype": E4M3, "experts": 2, "columns": 128, "starts": True}),
    *cases(call_grouped_gemm, {"dtype": INT8, "experts": 1, "columns": 512}, may_spill=True),
]
