"""Rows that end inside a tile, or a tile before the end of a block of them: nothing is stored behind a row, or behind the last.

Where a tile's columns are all there its mask is left out at compile time. Whether that was right shows in the guards: of the last row in
those behind the buffer, of the last valid one in the rows that follow.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from guarded import Guarded
from moequant import ops
from moequant.batch import ceil_div

# valid rows of each expert: all, so that the last row lies before the guard; and one, so that a row that is not valid follows
COUNTS, ROWS = [5, 1, 5], 5
# of groups of 128: a part of one, and parts of tiles of 2 and 4 groups and whole ones
COLUMNS = [100, 384, 512, 640]


@pytest.fixture
def kernels(device, monkeypatch):
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1" if device == "cpu" else "0")
    return device


def quantize(device: str, columns: int, group: int = 128, gated: bool = False, packed: bool = False) -> None:
    num_tokens = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    valid = torch.arange(ROWS, device=device) < num_tokens[:, None]
    x = torch.randn(3, ROWS, columns * (1 + gated), device=device).bfloat16()
    groups = ceil_div(columns, group)
    values = Guarded(3, ROWS, columns, dtype=torch.int8, device=device)
    if packed:
        scales = Guarded(3, ceil_div(groups, 4), 8, dtype=torch.int32, device=device)
    else:
        scales = Guarded(3, groups, 8, dtype=torch.float32, device=device)
    by_row = scales.tensor[:, :, :ROWS].transpose(1, 2)
    if gated:
        ops.silu_mul_quantize(x, num_tokens, None, values.tensor, by_row)
    else:
        ops.quantize_expert_batch(x, num_tokens, None, values.tensor, by_row, group, "ue8m0" if packed else "default")
    values.assert_only(valid.unsqueeze(2), "values")
    written = torch.zeros(scales.tensor.shape, dtype=torch.bool, device=device)
    written[:, :, :ROWS] = valid.unsqueeze(1)
    scales.assert_only(written, "scales")


def silu_mul(device: str, columns: int) -> None:
    num_tokens = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    out = Guarded(3, ROWS, columns, dtype=torch.bfloat16, device=device)
    ops.silu_mul(torch.randn(3, ROWS, 2 * columns, device=device).bfloat16(), num_tokens, None, out.tensor)
    out.assert_only((torch.arange(ROWS, device=device) < num_tokens[:, None]).unsqueeze(2))


def dequantize(device: str, columns: int, group: int = 128, group_rows: int = 1) -> None:
    values = torch.ones(3, ROWS, columns, dtype=torch.int8, device=device)
    scales = torch.ones(3, ceil_div(ROWS, group_rows), ceil_div(columns, group), device=device)
    out = Guarded(3, ROWS, columns, dtype=torch.bfloat16, device=device)
    ops.dequantize_blocks(values, scales, out.tensor, group_rows, group)
    out.assert_only()
    assert bool((out.tensor == 1).all())


def int8_gelu(device: str, columns: int, group: int = 128) -> None:
    x, groups = torch.ones(ROWS, columns, dtype=torch.int8, device=device), ceil_div(columns, group)
    values = Guarded(ROWS, columns, dtype=torch.int8, device=device)
    scales = Guarded(ROWS, groups, dtype=torch.float32, device=device)
    ops.int8_gelu(x, torch.ones(ROWS, groups, device=device), values.tensor, scales.tensor, group)
    values.assert_only()
    scales.assert_only()
    # all numbers are equal, and so each group's largest
    assert bool((values.tensor == 127).all())


def fused_rms(device: str, columns: int) -> None:
    x = torch.randn(ROWS, columns, device=device).bfloat16()
    summed = Guarded(ROWS, columns, dtype=torch.bfloat16, device=device)
    values = Guarded(ROWS, columns, dtype=torch.int8, device=device)
    scales = Guarded(ROWS, ceil_div(columns, 128), dtype=torch.float32, device=device)
    weight = torch.ones(columns, device=device).bfloat16()
    ops.fused_rms_quantize(x, weight, x, None, summed.tensor, values.tensor, scales.tensor)
    for buffer in (summed, values, scales):
        buffer.assert_only()
    assert bool(summed.tensor.isfinite().all()) and bool(scales.tensor.isfinite().all())


def quantize_weight(device: str, columns: int) -> None:
    w = torch.randn(1, 130, columns, device=device).bfloat16()
    values = Guarded(*w.shape, dtype=torch.int8, device=device)
    scales = Guarded(1, 2, ceil_div(columns, 128), dtype=torch.float32, device=device)
    ops.quantize_weight(w, values.tensor, scales.tensor)
    values.assert_only()
    scales.assert_only()
    assert bool(scales.tensor.isfinite().all())


def sum_of_parts(device: str, columns: int) -> None:
    """Rows of their own address, of a product in two parts."""
    from moequant.kernels.gemm.reduce_split_k import reduce_split_k

    partials = torch.ones(2, 3, ROWS, columns, device=device)
    num_tokens = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    valid = torch.arange(ROWS, device=device) < num_tokens[:, None]
    out = Guarded(3, ROWS, columns, dtype=torch.bfloat16, device=device)
    places = torch.arange(3 * ROWS, device=device).flip(0).view(3, ROWS)
    destinations = out.tensor.data_ptr() + places * (2 * columns)
    destinations[~valid] = 8
    reduce_split_k(partials, None, destinations, num_tokens, None, False)
    written = torch.zeros(3 * ROWS, 1, dtype=torch.bool, device=device)
    written[places[valid]] = True
    out.assert_only(written.view(3, ROWS, 1))
    assert bool((out.tensor.view(3 * ROWS, columns)[places[valid]] == 2).all())


CASES: list[tuple[Callable[..., None], dict[str, int]]] = [
    (quantize, {}),
    (quantize, {"packed": True}),
    (quantize, {"gated": True}),
    (silu_mul, {}),
    (dequantize, {}),
    (dequantize, {"group_rows": 4}),
    (int8_gelu, {}),
    (fused_rms, {}),
    (quantize_weight, {}),
    (sum_of_parts, {}),
]


NAMES = ["-".join((case.__name__, *settings)) for case, settings in CASES]


@pytest.mark.parametrize("case, settings", CASES, ids=NAMES)
def test_nothing_is_stored_behind_a_row(case, settings, kernels):
    for columns in COLUMNS:
        case(kernels, columns, **settings)


@pytest.mark.parametrize("case", [quantize, dequantize, int8_gelu], ids=lambda case: case.__name__)
def test_nothing_is_stored_behind_a_row_of_small_groups(case, kernels):
    """16 groups of 32 columns are a tile of most kernels."""
    for columns in (96, 512, 544):
        case(kernels, columns, group=32)
