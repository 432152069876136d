"""What a CPU runs instead of the reference has the reference's bits: products, widened numbers, rows that were picked before."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moequant import ops, reference
from moequant.batch import QuantizedTensor, ceil_div, empty_transposed_scales
from moequant.formats import FORMAT_OF_DTYPE
from moequant.ops import on_cpu

DTYPES = (*FORMAT_OF_DTYPE, torch.bfloat16)
# of counts, rows, columns, K_dim and segments: blocks that are whole, that are not, and that are larger than the weight
SHAPES = [(7, 40, 256, 384, 2), (5, 19, 210, 200, 1), (3, 9, 74, 33, 2), (4, 3, 1, 1, 1), (2, 4, 128, 0, 1), (3, 0, 16, 8, 1)]


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether bits are equal; a NaN is as good as any other."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num().view(torch.uint8), y.nan_to_num().view(torch.uint8))


def operand(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Numbers of every size that the type has, some NaN and Inf among those of some experts."""
    if dtype == torch.bfloat16:
        return torch.randn(shape, generator=rng).bfloat16()
    values = torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8).view(dtype)
    wild = ~values.float().isfinite()
    # none among the first ones, for which there is a faster way
    wild[shape[0] // 2 :] = False
    return torch.where(wild, torch.zeros((), dtype=torch.int8), values.view(torch.int8)).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_have_the_bits_of_the_reference(shape, dtype, out_dtype):
    experts, rows, columns, depth, segments = shape
    rng, choice = torch.Generator().manual_seed(sum(shape)), random.Random(str((shape, dtype)))
    a, b = operand((experts, rows, depth), dtype, rng), operand((experts, columns, depth), dtype, rng)
    a_scales = b_scales = None
    left, right = a, b
    if dtype != torch.bfloat16:
        a_scales = empty_transposed_scales(experts, rows, ceil_div(depth, 128), "cpu").normal_(generator=rng)
        blocks = segments * ceil_div(columns // segments, 128), ceil_div(depth, 128)
        # of every size too
        b_scales = torch.randn(experts, *blocks, generator=rng) * 2.0 ** choice.choice((-130, 0, 120))
        left = QuantizedTensor(a, a_scales, "transposed")
        right = QuantizedTensor(b, b_scales, "block", segments=segments)
    drawn = [choice.choice((0, 1, rows // 2, rows, rows + 5, -3)) for _ in range(experts)]
    for num_tokens in (None, torch.tensor(drawn, dtype=torch.int32)):
        found, expected = (torch.full((experts, rows, columns), 7.0, dtype=out_dtype) for _ in range(2))
        reference.grouped_gemm_blockscale(left, right, num_tokens, out=expected)
        with torch.autocast("cpu", torch.bfloat16):
            ops.grouped_gemm_blockscale(a, a_scales, b, b_scales, num_tokens, None, found, segments)
        assert same_bits(found, expected)


def test_experts_without_rows_are_passed_over(monkeypatch):
    widened, widen = [], on_cpu.widen

    def seen(x: Tensor, *rest: Tensor) -> float:
        widened.append(x.data_ptr())
        return widen(x, *rest)

    monkeypatch.setattr(on_cpu, "widen", seen)
    a, b = torch.randn(4, 3, 8).bfloat16(), torch.randn(4, 5, 8).bfloat16()
    counts = torch.tensor([0, 2, 0, 1], dtype=torch.int32)
    ops.grouped_gemm_blockscale(a, None, b, None, counts, None, torch.empty(4, 3, 5))
    assert widened == [x.data_ptr() for x in (a[1], b[1], a[3], b[3])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_widened_to_itself(dtype):
    bits = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).repeat(20)
    numbers = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype)
    # all, and those without NaN, which take another way
    for x in (numbers, numbers.view(torch.int8 if dtype.itemsize == 1 else torch.int16)[~numbers.float().isnan()].view(dtype)):
        out = torch.empty(x.shape)
        power = on_cpu.widen(x, torch.empty(x.shape, dtype=torch.int16), out)
        assert same_bits(out * power, x.float())


@pytest.mark.parametrize("columns", [256, 250, 3])
@pytest.mark.parametrize("dtype", FORMAT_OF_DTYPE, ids=str)
def test_rows_are_quantized_as_if_all_were(dtype, columns):
    x = torch.randn(5, 33, 2 * columns, generator=torch.Generator().manual_seed(columns)).bfloat16() * 3
    x[1, 2, 3], x[4, 1, 0] = torch.nan, torch.inf
    counts = torch.tensor([0, 33, 7, 40, 2], dtype=torch.int32)
    valid = reference.counted_rows(counts, x)
    plain, halved = x[..., :columns], reference.swiglu(x)
    for source, quantized in (
        (plain, reference.quantize_expert_batch(plain, counts, dtype=dtype)),
        (halved, reference.silu_mul_quantize(x, counts, dtype=dtype)),
    ):
        values, scales = reference.quantize_groups(source, 128, dtype, "default", None)
        assert torch.equal(quantized.values.view(torch.int8)[valid], values.view(torch.int8)[valid])
        assert same_bits(quantized.scales[valid], scales[valid])
    assert same_bits(reference.silu_mul(x, counts)[valid], halved[valid].bfloat16())
