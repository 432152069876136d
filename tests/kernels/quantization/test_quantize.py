"""The 3-D quantize kernel gives the reference's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from compile_case import E4M3, E5M2, FNUZ, INT8, cases, counted, each_format, empty, quantized
from far_memory import far_along
from moequant import ops, reference
from moequant.batch import ceil_div, empty_scales, empty_transposed_scales
from moequant.formats import FORMATS, RECIPES
from moequant.kernels.library.common import convert_e4m3fnuz, round_e4m3fnuz
from moequant.kernels.quantization.quantize import quantize_expert_batch
from moequant.quantization import per_token_group_quant_fp8
from moequant.testing import assert_bit_equal, poison
from operation_case import COUNTS, quantize_outputs

FORMAT_NAMES = list(FORMATS)


def quantize_both(x, num_tokens, dtype, recipe="default", group_size=128, eps=None, row_scales=False):
    """Kernel and reference on poisoned outputs."""
    experts, rows, columns = x.shape
    results = []
    for use_kernel in (True, False):
        values = torch.full(x.shape, 0x55, dtype=torch.uint8, device=x.device).view(dtype)
        scales = empty_transposed_scales(experts, rows, ceil_div(columns, group_size), x.device)
        scales = poison(scales.contiguous() if row_scales else scales)
        if use_kernel:
            quantize_expert_batch(x, num_tokens, None, values, scales, ops.quant_spec(dtype, recipe, eps), group_size=group_size)
        else:
            reference.quantize_rows(x, num_tokens, None, values, scales, group_size, recipe, eps)
        results.append((values, scales))
    return results


def assert_same(results) -> None:
    (values, scales), (expected_values, expected_scales) = results
    assert_bit_equal(values, expected_values, "values")
    assert_bit_equal(scales, expected_scales, "scales")


def special_rows(device: str) -> torch.Tensor:
    """(1, 12, 256) float32: zeros, NaN, Inf of both signs, subnormals, the largest finite, a lone value, both signs of zero."""
    x = torch.randn(1, 12, 256)
    x[0, 0] = 0.0
    x[0, 1, 3] = float("nan")
    x[0, 2, 200] = float("inf")
    x[0, 3, 7] = float("-inf")
    x[0, 4] = 1e-40
    x[0, 5, 0] = torch.finfo(torch.float32).max
    x[0, 6] = 0.0
    x[0, 6, 130] = -3.0
    x[0, 7] = -0.0
    x[0, 8] = 1e-12
    x[0, 9] *= 1e30
    x[0, 10] *= 1e-30
    x[0, 11, ::2] = torch.finfo(torch.float32).min
    return x.to(device)


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_counted_rows_with_tails_match_the_reference_bit_for_bit(name, recipe, input_dtype, device):
    x = (torch.randn(3, 13, 300) * torch.randn(3, 13, 1).exp()).to(device, input_dtype)
    num_tokens = torch.tensor([13, 0, 9], dtype=torch.int32, device=device)
    assert_same(quantize_both(x, num_tokens, FORMATS[name].dtype, recipe))


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_special_values_match_the_reference_bit_for_bit(name, recipe, device):
    results = quantize_both(special_rows(device), None, FORMATS[name].dtype, recipe)
    assert_same(results)
    values, scales = results[0]
    bad = scales.isnan().nonzero()[:, 1:].tolist()
    assert bad == [[1, 0], [2, 1], [3, 0]]
    assert not values.view(torch.int8)[0, 1, :128].any()


def tied_rows() -> torch.Tensor:
    """(1, 64, 384) float32 whose quotients lie in the middle of two float8 neighbours, or an ulp beside it, by scales with an inexact
    reciprocal: the only place where x / s and x * (1 / s) differ in float8."""
    grid = torch.arange(0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (grid[1:] + grid[:-1]) / 2
    amax = 1 + torch.arange(64) / 64 + 1 / 97
    products = (amax / 448).unsqueeze(1) * middles
    x = torch.zeros(1, 64, 3, 128)
    for shift in range(3):
        x[0, :, shift, : middles.numel()] = (products.view(torch.int32) + (shift - 1)).view(torch.float32)
        x[0, :, shift, 127] = amax
    return x.flatten(2)


@pytest.mark.parametrize("recipe", ["default", "deepgemm"])
def test_quotients_at_rounding_ties_match_the_reference(recipe, device):
    assert_same(quantize_both(tied_rows().to(device), None, torch.float8_e4m3fn, recipe))


def test_division_and_reciprocal_differ_on_the_ties():
    """Otherwise the ties prove nothing."""
    division, reciprocal = (
        reference.quantize_groups(tied_rows(), 128, torch.float8_e4m3fn, name, 1e-4)[0] for name in ("default", "deepgemm")
    )
    assert (division.view(torch.uint8) != reciprocal.view(torch.uint8)).any()


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_scale_by_a_product_is_the_quotient_for_every_mantissa(name):
    """What group_scale computes, step by step: q = amax * (1 / MAX), then
    fma(fma(q, -MAX, amax), 1 / MAX, q). Exponents only shift it."""
    largest = np.float32(FORMATS[name].max)
    reciprocal = np.float32(1.0 / FORMATS[name].max)
    amax = (np.arange(2**23, dtype=np.uint32) | 0x3F800000).view(np.float32)
    q = amax * reciprocal
    # products of two float32 are exact in 64 bits of mantissa
    remainder = (amax.astype(np.longdouble) - q.astype(np.longdouble) * largest).astype(np.float32)
    scale = (q.astype(np.longdouble) + remainder.astype(np.longdouble) * reciprocal).astype(np.float32)
    assert np.array_equal(scale, amax / largest)
    # without the correction it is not
    assert name == "int8" or not np.array_equal(q, amax / largest)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_quotients_by_each_power_of_two_match_the_reference(name, device):
    """A reciprocal of exponents alone: amax from below the floor to the largest finite number, with quotients down to subnormal ones."""
    x = (1 + torch.rand(1, 162, 128)) * torch.arange(-34, 128).exp2().unsqueeze(1) * torch.randint(-16, 1, (128,)).exp2()
    x[..., 0] = torch.arange(-34, 128).exp2() * 1.5
    assert_same(quantize_both(x.to(device), None, FORMATS[name].dtype, "ue8m0"))


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_other_group_sizes_match_the_reference(group_size, device):
    x = torch.randn(2, 9, 330, dtype=torch.bfloat16).to(device)
    assert_same(quantize_both(x, None, torch.float8_e4m3fn, group_size=group_size))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 129), (5, 3, 16), (2, 0, 64), (1, 100, 128)], ids=str)
def test_small_and_empty_shapes_match_the_reference(shape, device):
    assert_same(quantize_both(torch.randn(shape, dtype=torch.bfloat16).to(device), None, torch.float8_e4m3fn))


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_permuted_and_sliced_inputs_match_the_reference(order, device):
    base = torch.randn(7, 150, 20, dtype=torch.bfloat16).to(device)
    x = base.permute(order)[:, 1:, ::2]
    assert_same(quantize_both(x, None, torch.float8_e4m3fn))


def test_row_major_scales_are_the_transposed_ones(device):
    x = torch.randn(2, 10, 260, dtype=torch.bfloat16).to(device)
    transposed = quantize_both(x, None, torch.float8_e4m3fn)[0]
    rows = quantize_both(x, None, torch.float8_e4m3fn, row_scales=True)[0]
    assert rows[1].is_contiguous() and transposed[1].stride() == (30, 1, 10)
    assert_bit_equal(rows[1], transposed[1].contiguous())


def test_a_negative_count_is_none_and_costs_no_other_expert_its_rows(device):
    x = torch.randn(3, 8, 128, dtype=torch.bfloat16).to(device)
    num_tokens = torch.tensor([-100, 5, 8], dtype=torch.int32, device=device)
    results = quantize_both(x, num_tokens, torch.float8_e4m3fn)
    assert_same(results)
    assert (~results[0][1].isnan()).sum((1, 2)).tolist() == [0, 5, 8]


def test_counts_above_the_buffer_are_cut_and_eps_is_the_floor(device):
    x = torch.full((1, 4, 128), 1e-6, dtype=torch.float32, device=device)
    results = quantize_both(x, torch.tensor([99], dtype=torch.int32, device=device), torch.float8_e4m3fn, eps=0.5)
    assert_same(results)
    assert (results[0][1] == 0.5 / 448).all()


def rounded_e4m3fnuz(numbers: np.ndarray) -> np.ndarray:
    """float32 in -240..240 to the bytes of float8_e4m3fnuz, to nearest even, by integers: a number is m * 2**(e - 23), and the step
    between neighbours 2**(max(e, -7) - 3)."""
    bits = numbers.view(np.uint32).astype(np.int64)
    stored = (bits >> 23) & 0xFF
    m = np.where(stored == 0, 0, 1 << 23) | (bits & 0x7FFFFF)
    e = np.maximum(stored, 1) - 127
    shift = np.minimum(20 + np.maximum(-7 - e, 0), 40)
    steps, rest, half = m >> shift, m & ((1 << shift) - 1), 1 << (shift - 1)
    steps += (rest > half) | ((rest == half) & (steps & 1 == 1))
    # eight steps to an exponent; what is rounded up to the next one carries
    code = steps + 8 * (np.maximum(e, -7) + 7)
    return np.where(code == 0, 0, code | ((bits >> 24) & 0x80)).astype(np.uint8)


def test_e4m3fnuz_is_rounded_as_by_integers(device):
    """The cast that the reference takes is torch's, as the interpreter's is. A group's maximum of 240 makes its scale 1."""
    grid = torch.arange(0x80, dtype=torch.uint8).view(torch.float8_e4m3fnuz).float()
    middles = ((grid[1:] + grid[:-1]) / 2).view(torch.int32)
    near = [(bits + shift).view(torch.float32) for bits in (middles, grid[1:].view(torch.int32)) for shift in (-1, 0, 1)]
    numbers = torch.cat([*near, torch.randn(2000) * 10 ** (-6 * torch.rand(2000)), torch.tensor([0.0, 1e-40, 2.0**-11])])
    numbers = torch.cat([numbers, -numbers]).clamp(-240, 240)
    groups = torch.full((1, -(-numbers.numel() // 127), 128), 240.0)
    groups[..., :127] = torch.cat([numbers, numbers.new_zeros(-numbers.numel() % 127)]).view(1, -1, 127)
    values, scales = quantize_both(groups.to(device), None, torch.float8_e4m3fnuz)[0]
    assert (scales == 1).all()
    expected = torch.from_numpy(rounded_e4m3fnuz(groups.numpy()))
    assert_bit_equal(values.view(torch.uint8).cpu(), expected)


@triton.jit
def round_kernel(x_ptr, codes_ptr, count, BY_CONVERSION: tl.constexpr):
    at = tl.program_id(0) * 16384 + tl.arange(0, 16384)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    codes = convert_e4m3fnuz(x * 2.0) if BY_CONVERSION else round_e4m3fnuz(x)
    tl.store(codes_ptr + at, codes, mask=at < count)


@pytest.mark.parametrize("by_conversion", [True, False])
def test_both_ways_to_e4m3fnuz_round_as_integers_do(by_conversion, device):
    """All bfloat16 and float16 numbers up to 240, and float32 ones at every tie, an ulp beside it, and anywhere."""
    if by_conversion and device == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("needs a GPU that converts to float8_e4m3fn")
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    grid = torch.arange(0x80, dtype=torch.uint8).view(torch.float8_e4m3fnuz).float()
    ties = ((grid[1:] + grid[:-1]) / 2).view(torch.int32)
    ties = torch.cat([(ties + shift).view(torch.float32) for shift in (-1, 0, 1)])
    anywhere = torch.randint(0, 0x43700000, (100_000,), dtype=torch.int32).view(torch.float32)
    numbers = torch.cat([every.view(torch.bfloat16).float(), every.view(torch.float16).float(), ties, -ties, anywhere, -anywhere])
    # what exceeds 240 by the rounding of a quotient is 240
    numbers = torch.cat([numbers[numbers.abs() <= 240], torch.tensor([240.00002, -240.00002])])
    codes = torch.full(numbers.shape, 0x55, dtype=torch.uint8, device=device)
    round_kernel[(ceil_div(numbers.numel(), 16384),)](numbers.to(device), codes, numbers.numel(), by_conversion)
    assert_bit_equal(codes.cpu(), torch.from_numpy(rounded_e4m3fnuz(numbers.clamp(-240, 240).numpy())))


@pytest.mark.parametrize("group_size", [32, 128, 256])
@pytest.mark.parametrize("columns", [100, 1300])
def test_packed_exponents_are_those_of_the_scales(columns, group_size, device):
    x = torch.randn(2, 11, columns, device=device) * torch.randn(2, 11, 1, device=device).exp()
    x[0, 3, 5], x[1, 0, columns - 1] = float("nan"), float("inf")
    num_tokens = torch.tensor([11, 7], dtype=torch.int32, device=device)
    results = []
    groups = ceil_div(columns, group_size)
    for scales in (empty_scales(2, 11, groups, "ue8m0_packed", device), empty_transposed_scales(2, 11, groups, device)):
        values = torch.full(x.shape, 0x55, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        spec = ops.quant_spec(values.dtype, "ue8m0")
        quantize_expert_batch(x, num_tokens, None, values, scales.fill_(7), spec, group_size=group_size)
        results.append((values, scales))
    (values, packed), (plain_values, scales) = results
    assert_bit_equal(values, plain_values)
    assert_bit_equal(packed[0], reference.pack_exponents(scales.contiguous())[0])
    assert_bit_equal(packed[1, :7], reference.pack_exponents(scales.contiguous())[1, :7])
    assert (packed[1, 7:] == 7).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["x", "values", "scales"])
def test_tensors_of_any_strides_past_2_to_the_31_match_the_reference(name, dim, device):
    # the last column is the first of a tile
    tensors = {
        "x": torch.randn(3, 3, 513, device=device),
        "values": torch.zeros(3, 3, 513, dtype=torch.int8, device=device),
        "scales": torch.zeros(3, 3, 5, device=device),
    }
    expected = reference.quantize_expert_batch(tensors["x"], dtype=torch.int8)
    tensors[name] = far_along(dim, tensors[name])
    x, values, scales = tensors.values()
    quantize_expert_batch(x, None, None, values, scales, ops.quant_spec(values.dtype, "default"))
    assert_bit_equal(values.contiguous(), expected.values)
    assert_bit_equal(scales.contiguous(), expected.scales.contiguous())


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_count_on_the_gpu():
    x = torch.ones(300_000, 7168, dtype=torch.bfloat16, device="cuda")
    x[-1], x[0] = -4.0, 2.0
    q = per_token_group_quant_fp8(x, scale_layout="transposed")
    assert x.numel() > 2**31 and (q.scales[-1] == torch.tensor(4.0) / 448).all() and (q.scales[1:-1] == q.scales[1, 0]).all()
    codes = q.values.view(torch.uint8)
    assert (codes[-1] == 0xFE).all() and (codes[:-1] == 0x7E).all()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_large_batch_matches_the_reference_bit_for_bit_on_the_gpu(recipe):
    x = torch.randn(8, 1000, 7168, dtype=torch.bfloat16, device="cuda") * torch.randn(8, 1000, 1, device="cuda").exp()
    num_tokens = torch.tensor([1000, 0, 1, 999, 17, 512, 8, 300], dtype=torch.int32, device="cuda")
    assert_same(quantize_both(x.bfloat16(), num_tokens, torch.float8_e4m3fn, recipe))


@pytest.mark.gpu
def test_the_fma_division_is_the_correctly_rounded_quotient_on_the_gpu():
    """2**26 random quotients, rounded to e4m3 and to int8, against torch's division."""
    x = torch.randn(1, 4096, 16384, device="cuda")
    assert_same(quantize_both(x, None, torch.float8_e4m3fn))
    assert_same(quantize_both(x, None, torch.int8))


FP8 = torch.float8_e4m3fn


def call_quantize(dtype: torch.dtype, columns: int = 7168, recipe: str = "default", rows: int = 256) -> None:
    x = empty(4, rows, columns)
    values, scales = quantized(4, rows, columns, dtype)
    assert scales is not None
    ops.quantize_expert_batch(x, counted(x), None, values, scales, recipe=recipe)


def call_quantize_packed(dtype: torch.dtype) -> None:
    outputs = empty(1, 256, 7168, dtype=dtype), empty_scales(1, 256, 56, "ue8m0_packed", "cpu")
    ops.quantize_expert_batch(empty(1, 256, 7168), None, None, *outputs, recipe="ue8m0")


COMPILE_CASES = [
    *cases(call_quantize, *each_format(E5M2), *each_format(recipe="deepgemm"), *each_format(recipe="ue8m0")),
    # rounded by hand, so that any GPU can do it
    *cases(call_quantize, {"dtype": FNUZ}, anywhere=True),
    # few numbers: small tiles
    *cases(call_quantize, *each_format(columns=1024, rows=1)),
    *cases(call_quantize_packed, {"dtype": E4M3}),
    # H = 2890: few rows begin on a 16-byte boundary
    *cases(call_quantize, {"dtype": INT8, "columns": 2890}, wide=False, may_spill=True),
]


def quantize_arguments(dtype: torch.dtype, counts: torch.Tensor | None) -> tuple:
    return torch.randn(2, 4, 140), counts, None, *quantize_outputs(dtype), 128, "ue8m0", 1e-4


OPERATION_CASES = {
    "quantize_expert_batch": {
        "int8, counted": lambda: quantize_arguments(torch.int8, COUNTS),
        "fp8": lambda: quantize_arguments(FP8, None),
        "packed exponents": lambda: (
            torch.randn(2, 4, 140),
            COUNTS,
            None,
            quantize_outputs(FP8)[0],
            empty_scales(2, 4, 2, "ue8m0_packed", "cpu").zero_(),
            128,
            "ue8m0",
            None,
        ),
    },
}
