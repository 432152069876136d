"""Valid rows are copied, bit for bit, to another buffer or each to its address; nothing else is read or written."""

from __future__ import annotations

import pytest
import torch

from compile_case import cases, counted, empty
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


def make_rows(shape: tuple[int, int, int, list[int]], dtype: torch.dtype, device: str):
    """y, of which rows that are not valid are NaN; counts; and the flat numbers of the valid rows."""
    experts, capacity, columns, counts = shape
    y = torch.randint(-(2**15), 2**15, (experts, capacity, columns), dtype=torch.int16).view(dtype)
    valid = torch.arange(capacity) < torch.tensor(counts).unsqueeze(1)
    y[~valid] = float("nan")
    return y.to(device), torch.tensor(counts, dtype=torch.int32, device=device), valid.flatten().nonzero().flatten().tolist()


def run(y: torch.Tensor, counts: torch.Tensor, out: torch.Tensor | None, destinations: torch.Tensor | None) -> None:
    from moequant.kernels.symmetric.push_rows import push_rows

    push_rows(y, counts, out, destinations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_valid_rows_are_copied(shape, dtype, device):
    y, counts, valid = make_rows(shape, dtype, device)
    blocks = PeerBlocks(1, device, out=(y.shape, dtype))
    expected = blocks.snapshot()
    expected["out"][0].flatten(0, 1)[valid] = y.flatten(0, 1)[valid]
    run(y, counts, blocks["out"][0], None)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_valid_rows_go_to_their_addresses(shape, dtype, device):
    """In blocks of three ranks, in no order; destinations of rows that are not valid are never read."""
    y, counts, valid = make_rows(shape, dtype, device)
    experts, capacity, columns = y.shape
    entries = experts * capacity
    blocks = PeerBlocks(3, device, returns=((entries, columns), dtype))
    expected = blocks.snapshot()
    destinations = poison(torch.empty(experts, capacity, dtype=torch.int64))
    for flat, place in zip(valid, torch.randperm(3 * entries).tolist(), strict=False):
        rank, entry = divmod(place, entries)
        destinations.view(-1)[flat] = blocks["returns"][rank, entry].data_ptr()
        expected["returns"][rank, entry] = y.flatten(0, 1)[flat]
    run(y, counts, None, destinations.to(device))
    assert_same_blocks(blocks, expected)


def test_counts_out_of_range_stay_in_the_buffer(device):
    y, _, valid = make_rows((3, 5, 40, [0, 5, 5]), torch.bfloat16, device)
    blocks = PeerBlocks(1, device, out=(y.shape, torch.bfloat16))
    expected = blocks.snapshot()
    expected["out"][0].flatten(0, 1)[valid] = y.flatten(0, 1)[valid]
    run(y, torch.tensor([-3, 6, 2**31 - 1], dtype=torch.int32, device=device), blocks["out"][0], None)
    assert_same_blocks(blocks, expected)


def test_rows_past_2_to_the_31_elements(device):
    """Memory that is reserved, but on a CPU not filled: only the last of three experts has a row."""
    capacity, columns = 2**20 + 1, 1024
    y = torch.empty(3, capacity, columns, dtype=torch.bfloat16, device=device)
    y[2, 0] = torch.randn(columns)
    blocks = PeerBlocks(1, device, returns=((1, columns), torch.bfloat16))
    expected = blocks.snapshot()
    expected["returns"][0, 0] = y[2, 0]
    destinations = torch.empty(3, capacity, dtype=torch.int64, device=device)
    destinations[2, 0] = blocks["returns"].data_ptr()
    run(y, torch.tensor([0, 0, 1], dtype=torch.int32, device=device), None, destinations)
    assert_same_blocks(blocks, expected)


def call_push_rows(remote: bool) -> None:
    from moequant.kernels.symmetric.push_rows import push_rows as kernel

    y, destinations = empty(32, 1024, 7168), empty(32, 1024, dtype=torch.int64)
    kernel(y, counted(y), None, None if remote else y, destinations if remote else None)


COMPILE_CASES = cases(call_push_rows, {"remote": False}, {"remote": True})
