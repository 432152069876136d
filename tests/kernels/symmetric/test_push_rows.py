"""Valid rows are copied, bit for bit, to another buffer or each to its address; nothing else is read or written."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from compile_case import cases, empty
from moequant.testing import poison
from peer_blocks import PeerBlocks, assert_same_blocks

# L, M, H, counts
SHAPES = [
    (1, 16, 1, [16]),
    (3, 20, 130, [3, 0, 17]),
    (2, 9, 1100, [9, 1]),
    (4, 16, 64, [0, 0, 0, 0]),
    (1, 40, 520, [13]),
]


class Rows(NamedTuple):
    """y: (L, M, H), or (R, H) with expert_start, of which rows that are not valid are NaN. valid: their flat numbers."""

    y: torch.Tensor
    counts: torch.Tensor
    expert_start: torch.Tensor | None
    valid: list[int]


def make_rows(shape: tuple[int, int, int, list[int]], dtype: torch.dtype, device: str, ragged: bool) -> Rows:
    """ragged: the experts' rows lie in one buffer, a few rows apart, in which M rows of the last have room."""
    experts, capacity, columns, counts = shape
    starts = [expert * capacity for expert in range(experts)]
    if ragged:
        starts = [sum(counts[:expert]) + 3 * expert for expert in range(experts)]
    valid = [first + row for first, count in zip(starts, counts, strict=True) for row in range(count)]
    rows = torch.full((starts[-1] + capacity, columns), float("nan"), dtype=dtype)
    rows[valid] = torch.randint(-(2**15), 2**15, (len(valid), columns), dtype=torch.int16).view(dtype)
    y = (rows if ragged else rows.view(experts, capacity, columns)).to(device)
    numbers, expert_start = (torch.tensor(x, dtype=torch.int32, device=device) for x in (counts, starts))
    return Rows(y, numbers, expert_start if ragged else None, valid)


def run(rows: Rows, out: torch.Tensor | None, destinations: torch.Tensor | None) -> None:
    from moequant.kernels.symmetric.push_rows import push_rows

    push_rows(rows.y, rows.counts, rows.expert_start, out, destinations)


@pytest.fixture(params=[False, True], ids=["padded", "ragged"])
def ragged(request) -> bool:
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_valid_rows_are_copied(shape, dtype, ragged, device):
    check_copy(make_rows(shape, dtype, device, ragged))


def check_copy(rows: Rows) -> None:
    y, valid = rows.y, rows.valid
    blocks = PeerBlocks(1, str(y.device), out=(y.shape, y.dtype))
    expected = blocks.snapshot()
    expected["out"][0].view(-1, y.shape[-1])[valid] = y.view(-1, y.shape[-1])[valid]
    run(rows, blocks["out"][0], None)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_valid_rows_go_to_their_addresses(shape, dtype, ragged, device):
    """In blocks of three ranks, in no order; destinations of rows that are not valid are never read."""
    rows = make_rows(shape, dtype, device, ragged)
    y, columns = rows.y, rows.y.shape[-1]
    entries = y.shape[:-1].numel()
    blocks = PeerBlocks(3, device, returns=((entries, columns), dtype))
    expected = blocks.snapshot()
    destinations = poison(torch.empty(y.shape[:-1], dtype=torch.int64))
    for flat, place in zip(rows.valid, torch.randperm(3 * entries).tolist(), strict=False):
        rank, entry = divmod(place, entries)
        destinations.view(-1)[flat] = blocks["returns"][rank, entry].data_ptr()
        expected["returns"][rank, entry] = y.view(-1, columns)[flat]
    run(rows, None, destinations.to(device))
    assert_same_blocks(blocks, expected)


def test_counts_out_of_range_stay_in_the_buffer(device):
    rows = make_rows((3, 5, 40, [0, 5, 5]), torch.bfloat16, device, ragged=False)
    check_copy(rows._replace(counts=torch.tensor([-3, 6, 2**31 - 1], dtype=torch.int32, device=device)))


def test_counts_that_the_buffer_has_no_room_for_stay_in_it(device):
    """An expert that begins behind it has no rows; of the last there are as many as there is room for."""
    rows = make_rows((3, 5, 40, [0, 5, 5]), torch.bfloat16, device, ragged=True)
    assert rows.expert_start is not None
    rows.expert_start[0] = len(rows.y) + 7
    check_copy(rows._replace(counts=torch.tensor([6, 5, 2**31 - 1], dtype=torch.int32, device=device)))


def test_rows_past_2_to_the_31_elements(ragged, device):
    """Memory that is reserved, but on a CPU not filled: only the last of three experts has a row."""
    capacity, columns = 2**20 + 1, 1024
    y = torch.empty(3, capacity, columns, dtype=torch.bfloat16, device=device)
    y[2, 0] = torch.randn(columns)
    blocks = PeerBlocks(1, device, returns=((1, columns), torch.bfloat16))
    expected = blocks.snapshot()
    expected["returns"][0, 0] = y[2, 0]
    destinations = torch.empty(3, capacity, dtype=torch.int64, device=device)
    destinations[2, 0] = blocks["returns"].data_ptr()
    rows = Rows(y, torch.tensor([0, 0, 1], dtype=torch.int32, device=device), None, [])
    if ragged:
        rows = rows._replace(y=y.flatten(0, 1), expert_start=torch.tensor([0, 9, 2 * capacity], dtype=torch.int32, device=device))
    run(rows, None, destinations)
    assert_same_blocks(blocks, expected)


def call_push_rows(remote: bool, ragged: bool = False) -> None:
    from moequant.kernels.symmetric.push_rows import push_rows as kernel

    y, destinations, counts = empty(32, 1024, 7168), empty(32, 1024, dtype=torch.int64), empty(32, dtype=torch.int32)
    if ragged:
        y, destinations = y[0], destinations[0]
    kernel(y, counts, counts if ragged else None, None if remote else y, destinations if remote else None)


COMPILE_CASES = cases(
    call_push_rows, *({"remote": remote, "ragged": ragged} for ragged in (False, True) for remote in (False, True))
)
