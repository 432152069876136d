"""The blockwise quantizer of weights gives the reference's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from compile_case import E4M3, E5M2, FNUZ, INT8, cases, each_format, empty
from far_memory import far_along
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.formats import FORMATS, RECIPES
from moequant.kernels.quantization.quantize_weight import quantize_weight
from moequant.testing import assert_bit_equal, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_same(w: torch.Tensor, dtype: torch.dtype, recipe: str = "default", segments: int = 1, block_size: int = 128) -> None:
    """The kernel's outputs, poisoned before, against the reference's. w: (E, N, K_dim)."""
    experts, rows, columns = w.shape
    values = torch.full(w.shape, 0x55, dtype=torch.uint8, device=w.device).view(dtype)
    shape = experts, segments * ceil_div(rows // segments, block_size), ceil_div(columns, block_size)
    scales = poison(torch.empty(shape, device=w.device))
    quantize_weight(w, values, scales, ops.quant_spec(dtype, recipe), segments=segments, block_size=block_size)
    expected = reference.quantize_weight(w, dtype=dtype, recipe=recipe, segments=segments, group_size=block_size)
    assert_bit_equal(values, expected.values, "values")
    assert_bit_equal(scales, expected.scales, "scales")


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_segments_with_tails_match_the_reference_bit_for_bit(name, recipe, input_dtype, device):
    w = (torch.randn(2, 2 * 70, 140) * torch.randn(2, 140, 1).exp()).to(device, input_dtype)
    assert_same(w, FORMATS[name].dtype, recipe, 2, 64)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 130, 257), (1, 256, 128), (3, 0, 64), (0, 4, 4), (1, 5, 0)], ids=str)
def test_tails_and_empty_weights_match_the_reference(shape, block_size, device):
    assert_same(torch.randn(shape, device=device), torch.float8_e4m3fn, block_size=block_size)


@pytest.mark.parametrize("segments", [2, 3])
def test_a_segment_ends_its_blocks(segments, device):
    w = torch.randn(2, segments * 40, 70, device=device) * torch.arange(segments * 40, device=device)[:, None]
    assert_same(w, torch.int8, segments=segments, block_size=32)


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)], ids=str)
def test_strided_weights_match_the_reference(order, device):
    assert_same(torch.randn(4, 140, 30, device=device).permute(order)[:, :, 1::2], torch.float8_e4m3fn)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weights_of_any_strides_past_2_to_the_31_match_the_reference(dim, device):
    assert_same(far_along(dim, torch.randn(3, 3, 3, device=device)), torch.float8_e4m3fn, block_size=32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_spoil_their_block_alone(bad, device):
    w = torch.randn(1, 70, 70, device=device)
    w[0, 40, 33] = bad
    assert_same(w, torch.float8_e4m3fn, block_size=32)
    assert reference.quantize_weight(w, group_size=32).scales.isnan().nonzero().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("recipe", ["default", "deepgemm"])
def test_quotients_at_rounding_ties_match_the_reference(recipe, device):
    """Numbers in the middle of two float8 neighbours times a scale with an inexact reciprocal, and an ulp beside it."""
    grid = torch.arange(0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (grid[1:] + grid[:-1]) / 2
    amax = 1 + torch.arange(6) / 6 + 1 / 97
    w = torch.zeros(6, 3, 128)
    for shift in range(3):
        products = (amax / 448)[:, None] * middles
        w[:, shift, : middles.numel()] = (products.view(torch.int32) + (shift - 1)).view(torch.float32)
    w[:, 0, 127] = amax
    assert_same(w.to(device), torch.float8_e4m3fn, recipe)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(FORMATS))
)
def test_any_numbers_match_the_reference_bit_for_bit(numbers, rows, columns, name):
    w = torch.tensor(numbers, device=DEVICE).repeat(-(-rows * columns // len(numbers)))[: rows * columns]
    assert_same(w.view(1, rows, columns), FORMATS[name].dtype, block_size=32)


@pytest.mark.gpu
def test_large_weights_match_the_reference_on_the_gpu():
    w = torch.randn(2, 4096, 7168, dtype=torch.bfloat16, device="cuda")
    for dtype in (torch.float8_e4m3fn, torch.int8):
        assert_same(w, dtype, segments=2)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_count_on_the_gpu():
    w = torch.ones(1, 300_032, 7168, dtype=torch.bfloat16, device="cuda")
    w[0, -1, -1] = 4.0
    values = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty(1, 2344, 56, device="cuda")
    quantize_weight(w, values, scales, ops.quant_spec(values.dtype, "default"), segments=1, block_size=128)
    codes = values.view(torch.uint8)
    assert scales[0, -1, -1] == torch.tensor(4.0) / 448 and codes[0, -1, -1] == 0x7E
    assert (codes[0, -128:, -128:] == 0x6E).sum() == 128 * 128 - 1 and (codes[0, :-128] == 0x7E).all()


FP8 = torch.float8_e4m3fn


def call_quantize_weight(
    dtype: torch.dtype, recipe: str = "default", columns: int = 7168, segments: int = 1, block: int = 128
) -> None:
    shape = 4, segments * ceil_div(4096 // segments, block), ceil_div(columns, block)
    outputs = empty(4, 4096, columns, dtype=dtype), empty(*shape, dtype=torch.float32)
    ops.quantize_weight(empty(4, 4096, columns), *outputs, recipe, segments, block)


COMPILE_CASES = [
    *cases(call_quantize_weight, *each_format(E5M2), *each_format(recipe="ue8m0", segments=2), {"dtype": E4M3, "block": 32}),
    *cases(call_quantize_weight, {"dtype": FNUZ}, anywhere=True),
    *cases(call_quantize_weight, *({"dtype": INT8, "columns": columns} for columns in (2890, 1)), wide=False, may_spill=True),
]


OPERATION_CASES = {
    "quantize_weight": {
        "int8, two segments": lambda: (
            torch.randn(2, 6, 140).half(),
            torch.zeros(2, 6, 140, dtype=torch.int8),
            torch.zeros(2, 2, 2),
            "ue8m0",
            2,
            128,
        ),
        "and its transpose": lambda: (
            torch.randn(2, 260, 140).bfloat16(),
            torch.zeros(2, 260, 140).to(FP8),
            torch.zeros(2, 4, 2),
            "ue8m0",
            2,
            128,
            torch.zeros(2, 140, 260).to(FP8),
            torch.zeros(2, 2, 3),
        ),
        "fp8 in small blocks": lambda: (
            torch.randn(1, 40, 70),
            torch.zeros(1, 40, 70).to(FP8),
            torch.zeros(1, 2, 3),
            "default",
            1,
            32,
        ),
    },
}
