"""`grouped_gemm_push`: the grouped GEMM's bits, each row at an address of its own."""

from __future__ import annotations

import pytest
import torch

from guarded import Guarded
from moequant import ops, reference
from moequant.kernels.gemm import grouped_gemm
from moequant.testing import assert_bit_equal

COUNTS, ROWS = [70, 0, 1], 72
# of a bfloat16, and of a float16, a NaN that no computation makes
POISON = 0x7FD1


def poisoned(columns: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((3, ROWS, columns), POISON, dtype=torch.int16, device=device).view(dtype)


def check(a: tuple[torch.Tensor, torch.Tensor | None], b: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Rows are stored in a random order, and nothing else is."""
    device, columns = str(a[0].device), b[0].shape[1]
    num_tokens = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    # what quantized operands give is bfloat16
    dtype = torch.bfloat16 if a[1] is not None else a[0].dtype
    expected, elsewhere = poisoned(columns, device, dtype), poisoned(columns, device, dtype).view(-1, columns)
    ops.grouped_gemm_blockscale(*a, *b, num_tokens, None, expected, 1, 40)
    places = torch.randperm(len(elsewhere), device=device).view(3, ROWS)
    destinations = elsewhere.data_ptr() + places * (2 * columns)
    for expert, count in enumerate(COUNTS):
        # nothing that is not valid is an address
        destinations[expert, count:] = 8
    ops.grouped_gemm_push(*a, *b, num_tokens, None, destinations, 40, None)
    assert torch.equal(elsewhere[places].view(torch.int16), expected.view(torch.int16))


@pytest.fixture
def kernels(device, monkeypatch):
    """The device; on a CPU the interpreter runs the kernels."""
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1" if device == "cpu" else "0")
    return device


@pytest.mark.parametrize("columns", [136, 100], ids=["aligned", "odd"])
def test_quantized_rows_have_the_bits_of_the_gemm(columns, kernels):
    a = reference.quantize_expert_batch(torch.randn(3, ROWS, 256, device=kernels).bfloat16(), dtype=torch.int8)
    b = reference.quantize_weight(torch.randn(3, columns, 256, device=kernels).bfloat16(), dtype=torch.int8)
    check((a.values, a.scales), (b.values, b.scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_whose_product_is_done_in_parts_have_the_bits_of_the_gemm(dtype, kernels, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "choose_config", lambda *_: grouped_gemm.SMALL_TILES._replace(parts=2))
    a, b = (torch.randn(3, rows, 256, device=kernels).to(dtype) for rows in (ROWS, 136))
    check((a, None), (b, None))


@pytest.mark.parametrize("columns", [136, 100], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_rows_have_the_bits_of_the_gemm(dtype, columns, kernels):
    a, b = (torch.randn(3, rows, 256, device=kernels).to(dtype) for rows in (ROWS, columns))
    check((a, None), (b, None))


def test_no_rows_and_no_columns_are_no_launch(kernels):
    counts = torch.zeros(2, dtype=torch.int32, device=kernels)
    for rows, columns in ((0, 8), (4, 0)):
        a, b = (torch.zeros(2, n, 16, dtype=torch.bfloat16, device=kernels) for n in (rows, columns))
        ops.grouped_gemm_push(a, None, b, None, counts, None, torch.zeros(2, rows, dtype=torch.int64, device=kernels), 1, None)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [2880, 2944, 3008, 200])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_rows_that_are_no_whole_tiles_wide_are_stored_between_guards(columns, dtype):
    """gpt-oss's 2880 columns are half a tile more than 22 of 128; 2944 half of a wide one."""
    counts, rows = [200, 130, 1], 200
    a = reference.quantize_expert_batch(torch.randn(3, rows, 256, device="cuda").bfloat16(), dtype=dtype)
    b = reference.quantize_weight(torch.randn(3, columns, 256, device="cuda").bfloat16(), dtype=dtype)
    operands, num_tokens = (a.values, a.scales, b.values, b.scales), torch.tensor(counts, dtype=torch.int32, device="cuda")
    valid = torch.arange(rows, device="cuda") < num_tokens[:, None]
    stored = Guarded(3, rows, columns, dtype=torch.bfloat16, device="cuda")
    ops.grouped_gemm_blockscale(*operands, num_tokens, None, stored.tensor, 1, 110)
    stored.assert_only(valid.unsqueeze(2))
    pushed = Guarded(3 * rows, columns, dtype=torch.bfloat16, device="cuda")
    places = torch.randperm(3 * rows, device="cuda").view(3, rows)
    destinations = pushed.tensor.data_ptr() + places * (2 * columns)
    destinations[~valid] = 8
    ops.grouped_gemm_push(*operands, num_tokens, None, destinations, 110, None)
    written = torch.zeros(3 * rows, 1, dtype=torch.bool, device="cuda")
    written[places[valid]] = True
    pushed.assert_only(written)
    assert_bit_equal(pushed.tensor[places[valid]], stored.tensor[valid], "pushed rows")
