"""Operands that lie along the tokens and weight gradients from them, worked by hand."""

from __future__ import annotations

import pytest
import torch

from moequant import ops, reference
from moequant.columnwise import Columnwise, empty_columnwise, most_blocks

E4M3 = torch.float8_e4m3fn
COUNTS = torch.tensor([2, 0], dtype=torch.int32)
# 2 experts of 3 rows, 2 columns; what belongs to no expert is NaN
X = torch.tensor([[[1.0, 3.0], [896.0, -6.0], [torch.nan] * 2], [[torch.nan] * 2] * 3]).bfloat16()
# the smallest power of two that isn't below 1e-10 / 448
FLOOR = 2.0**-42


def quantized(x: torch.Tensor, blocks: bool, counts: torch.Tensor = COUNTS) -> Columnwise:
    made = empty_columnwise(x.shape[-1], x.shape[:-1].numel(), len(counts), blocks=blocks, device="cpu")
    reference.quantize_columnwise(x, None, counts, None, *made, recipe="ue8m0", blocks=blocks)
    return made


def test_memory_is_laid_out_as_tma_reads_it():
    rows = empty_columnwise(6, 300, 3, blocks=False, device="cpu")
    assert most_blocks(300, 3) == 5
    assert (rows.values.shape, rows.values.dtype, rows.values.is_contiguous()) == ((6, 640), E4M3, True)
    assert (rows.scales.shape, rows.scales.stride(), rows.scales.dtype) == ((5, 6), (8, 1), torch.float32)
    assert (rows.block_ends.shape, rows.block_ends.dtype) == ((3,), torch.int32)
    square = empty_columnwise(130, 300, 3, blocks=True, device="cpu", dtype=torch.int8)
    assert (square.scales.shape, square.scales.is_contiguous(), square.values.dtype) == ((2, 5), True, torch.int8)


def test_each_column_of_a_block_has_a_scale_of_its_own():
    values, scales, block_ends = quantized(X, blocks=False)
    assert block_ends.tolist() == [1, 2] and values.shape == (2, 256)
    # 896 / 448, and 6 / 448 rounded up
    assert scales.tolist() == [[2.0, 2.0**-6], [FLOOR] * 2]
    assert values[:, :2].tolist() == [[0.5, 448.0], [192.0, -384.0]] and not values[:, 2:].float().any()


def test_or_all_columns_of_a_block_have_one():
    values, scales, block_ends = quantized(X, blocks=True)
    assert block_ends.tolist() == [1, 2] and scales.tolist() == [[2.0, FLOOR]]
    assert values[:, :2].tolist() == [[0.5, 448.0], [1.5, -3.0]] and not values[:, 2:].float().any()


def test_weight_gradients_are_sums_over_an_experts_tokens():
    (a, a_scales, ends), (b, b_scales, _) = quantized(X, blocks=False), quantized(X, blocks=True)
    out = torch.full((2, 2, 2), torch.nan)
    with torch.autocast("cpu", torch.bfloat16):
        reference.weight_gradient(a, a_scales, b, b_scales, ends, out)
    assert out.tolist() == [[[1 + 896**2, 3 - 6 * 896], [3 - 6 * 896, 9 + 36]], [[0.0] * 2] * 2]


def test_weight_gradients_add_the_blocks_of_each_expert():
    counts = torch.tensor([300, 0, 128, 5], dtype=torch.int32)
    # small integers: all sums are exact
    x, y = (torch.randint(-8, 9, (4, 300, columns)).bfloat16() for columns in (70, 140))
    (a, a_scales, ends), (b, b_scales, _) = quantized(x, False, counts), quantized(y, True, counts)
    assert ends.tolist() == [3, 4, 5, 6]
    out = torch.full((4, 70, 140), torch.nan)
    reference.weight_gradient(a, a_scales, b, b_scales, ends, out)
    for expert, count in enumerate(counts.tolist()):
        assert torch.equal(out[expert], x[expert, :count].float().T @ y[expert, :count].float())


def test_bad_numbers_are_nan_in_the_gradients_of_their_columns_alone():
    x = X.clone()
    x[0, 1, 1] = torch.inf
    (a, a_scales, ends), (b, b_scales, _) = quantized(x, blocks=False), quantized(X, blocks=True)
    out = torch.zeros(2, 2, 2)
    reference.weight_gradient(a, a_scales, b, b_scales, ends, out)
    assert out.isnan().tolist() == [[[False] * 2, [True] * 2], [[False] * 2] * 2]


def test_rows_that_overlap_fill_no_more_blocks_than_there_are():
    counts, starts = (torch.tensor(x, dtype=torch.int32) for x in ([256, 256, 256, 9], [0, 16, 32, 0]))
    made = empty_columnwise(3, 256, 2, blocks=False, device="cpu")
    ends = torch.zeros(4, dtype=torch.int32)
    reference.quantize_columnwise(torch.ones(256, 3).bfloat16(), None, counts, starts, *made[:2], ends)
    assert ends.tolist() == [2, 4, 4, 4]


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("recipe", ["default", "deepgemm"])
def test_a_recipe_without_powers_of_two_is_refused_in_words(recipe):
    device = torch.get_default_device()
    made = empty_columnwise(2, 6, 2, blocks=False, device=device)
    with pytest.raises(ValueError, match=f'recipe must be one whose scales are powers of two, "ue8m0", .*got "{recipe}"'):
        ops.quantize_columnwise(X.to(device), None, COUNTS.to(device), None, *made, recipe=recipe)
