"""The reference against the specification worked by hand, or by exact rational arithmetic that shares no code with it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from moequant import reference
from moequant.batch import QuantizedTensor
from moequant.testing import assert_bit_equal, poison

DTYPES = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
LARGEST = {"fp8_e4m3fn": 448, "fp8_e4m3fnuz": 240, "fp8_e5m2": 57344, "int8": 127}
# exponent bias and explicit digits of the mantissa
ENCODING = {"fp8_e4m3fn": (7, 3), "fp8_e4m3fnuz": (8, 3), "fp8_e5m2": (15, 2)}
FLOOR = {"default": 1e-10, "deepgemm": 1e-4, "ue8m0": 1e-10}
FORMATS = list(DTYPES)
RECIPES = list(FLOOR)


def float32(x: Fraction | float) -> float:
    """The nearest float32. Rounding a quotient or a product of two float32 to float64 first does no harm."""
    return float(np.float32(float(x)))


def narrow_bits(x: float, name: str) -> int:
    """The byte of x in a format, rounded to nearest even as an integer number of the format's steps."""
    if name == "int8":
        return round(Fraction(x)) & 0xFF
    bias, digits = ENCODING[name]
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    code = 0
    if x:
        # of the leading digit; the numbers below the smallest normal one share its step
        exponent = max(math.frexp(x)[1] - 1, 1 - bias)
        code = round(Fraction(abs(x)) / Fraction(2) ** (exponent - digits)) + ((exponent + bias - 1) << digits)
    return 0 if name == "fp8_e4m3fnuz" and code == 0 else sign + code


def expected_scale(group: list[float], name: str, recipe: str, eps: float | None = None) -> float:
    amax = max(Fraction(abs(x)) for x in group)
    ratio = max(amax, Fraction(float32(FLOOR[recipe] if eps is None else eps))) / LARGEST[name]
    if recipe != "ue8m0":
        return float32(ratio)
    power = Fraction(2) ** -140
    while power < ratio:
        power *= 2
    return float(power)


def expected_group(group: list[float], name: str, recipe: str, eps: float | None = None) -> tuple[list[int], float]:
    """The bytes and the scale of a group of finite float32."""
    scale = expected_scale(group, name, recipe, eps)
    inverse = float32(1 / Fraction(scale))
    quotients = [
        float32(x * inverse) if recipe == "deepgemm" else math.copysign(float32(Fraction(x) / Fraction(scale)), x) for x in group
    ]
    largest = LARGEST[name]
    return [narrow_bits(min(max(q, -largest), largest), name) for q in quotients], scale


def as_bytes(values: torch.Tensor) -> list[int]:
    return values.contiguous().view(torch.uint8).flatten().tolist()


def quantize_row(row: list[float], name: str, recipe: str = "default", **options) -> tuple[list[int], list[float]]:
    """Bytes and scales of a single row in float32."""
    q = reference.quantize_expert_batch(torch.tensor([[row]]), dtype=DTYPES[name], recipe=recipe, **options)
    return as_bytes(q.values), q.scales.flatten().tolist()


def assert_row(row: list[float], name: str, recipe: str, eps: float | None = None) -> None:
    """Group by group against exact arithmetic."""
    given = torch.tensor(row).tolist()
    values, scales = quantize_row(row, name, recipe, eps=eps)
    for number, start in enumerate(range(0, len(row), 128)):
        expected, scale = expected_group(given[start : start + 128], name, recipe, eps)
        assert (values[start : start + 128], scales[number]) == (expected, scale)


E4M3 = {448.0: 0x7E, 17.0: 0x58, 19.0: 0x5A, -17.0: 0xD8, 2**-10: 0x00, 3 * 2**-10: 0x02, 2**-6: 0x08, 1.0: 0x38, 0.0: 0x00}
E4M3FNUZ = {
    240.0: 0x7F,
    17.0: 0x60,
    19.0: 0x62,
    -17.0: 0xE0,
    2**-11: 0x00,
    3 * 2**-11: 0x02,
    2**-7: 0x08,
    1.0: 0x40,
    -(2**-11): 0x00,
}
E5M2 = {57344.0: 0x7B, 9.0: 0x48, 11.0: 0x4A, -9.0: 0xC8, 2**-17: 0x00, 3 * 2**-17: 0x02, 2**-14: 0x04, 1.0: 0x3C, 0.0: 0x00}
INT8 = {127.0: 127, 0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: 254, -2.5: 254, 126.5: 126, -127.0: 129, 0.75: 1, -0.75: 255}
HAND_ROUNDED = {"fp8_e4m3fn": E4M3, "fp8_e4m3fnuz": E4M3FNUZ, "fp8_e5m2": E5M2, "int8": INT8}


@pytest.mark.parametrize("name", FORMATS)
def test_a_unit_scale_rounds_values_to_nearest_even_as_worked_by_hand(name):
    """The largest magnitude of each table is the format's maximum, so that the scale is 1."""
    worked = HAND_ROUNDED[name]
    values, scales = quantize_row(list(worked), name)
    assert scales == [1.0]
    assert {x: hex(byte) for x, byte in zip(worked, values, strict=True)} == {x: hex(byte) for x, byte in worked.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_of_a_format_and_every_middle_is_rounded_as_integers_are(name):
    grid = torch.arange(0x7F, dtype=torch.uint8).view(DTYPES[name]).float()
    grid = grid[grid <= LARGEST[name]]
    middles = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middles, torch.nextafter(middles, grid[1:]), torch.nextafter(middles, grid[:-1])])
    x = torch.cat([x, -x])
    assert as_bytes(reference.round_to(x, DTYPES[name])) == [narrow_bits(number, name) for number in x.tolist()]


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_past_the_format_are_clamped_and_nan_becomes_zero(name):
    x = torch.tensor([1.001 * LARGEST[name], 1e30, math.inf, -1e30, -math.inf, math.nan])
    largest = float(LARGEST[name])
    assert reference.round_to(x, DTYPES[name]).float().tolist() == [largest] * 3 + [-largest] * 2 + [0.0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("columns", [1, 128, 130, 300])
def test_rows_with_tails_equal_exact_arithmetic(columns, recipe, name):
    row = torch.randn(columns) * torch.rand(columns).mul(8).exp()
    assert_row(row.tolist(), name, recipe)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_extreme_magnitudes_equal_exact_arithmetic(recipe, name):
    """Zeros, subnormals, numbers around the floor, and the largest finite, each a group of its own."""
    largest = torch.finfo(torch.float32).max
    groups = [[0.0, -0.0], [1e-40, -1e-42], [1e-10, 3e-11], [1e-4, -3e-5], [largest, -largest / 3], [-largest, 1.0]]
    assert_row([x for group in groups for x in group * 64], name, recipe)


@pytest.mark.parametrize(
    "recipe, amax, scale, byte",
    [
        ("default", 896.0, 2.0, 0x7E),
        ("default", 3.0, 3 / 448, 0x7E),
        ("deepgemm", 896.0, 2.0, 0x7E),
        # 3 / 448 lies between 2**-8 and 2**-7; 3 * 2**7 = 384
        ("ue8m0", 3.0, 2**-7, 0x7C),
        ("ue8m0", 448.0, 1.0, 0x7E),
        # 449 / 2 = 224.5, and 224 is the nearest
        ("ue8m0", 449.0, 2.0, 0x76),
        ("ue8m0", 224.0, 0.5, 0x7E),
    ],
)
def test_scales_worked_by_hand(recipe, amax, scale, byte):
    values, scales = quantize_row([amax, -amax, 0.0], "fp8_e4m3fn", recipe)
    assert scales == [float32(scale)] and values == [byte, byte + 0x80, 0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-40, -1, 0, 1, 60])
def test_ue8m0_keeps_exact_powers_of_two_and_goes_up_an_ulp_above(exponent, name):
    power = 2.0**exponent
    exact = np.float32(LARGEST[name] * power)
    above, below = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))
    scales = [quantize_row([float(x)], name, "ue8m0", eps=1e-20)[1][0] for x in (below, exact, above)]
    assert scales == [power, power, 2 * power]


@pytest.mark.parametrize("recipe, scale", [("default", 1e-10 / 448), ("deepgemm", 1e-4 / 448), ("ue8m0", 2**-42)])
def test_a_group_of_zeros_has_values_zero_and_the_floors_scale(recipe, scale):
    values, scales = quantize_row([0.0] * 128, "fp8_e4m3fn", recipe)
    assert scales[0] == pytest.approx(scale, rel=1e-7) and values == [0] * 128


def test_a_group_below_the_floor_is_not_stretched_to_the_formats_maximum():
    # 1e-11 / (1e-10 / 448) = 44.8, whose neighbours are 44 and 48: 0x63
    assert quantize_row([1e-11, 0.0], "fp8_e4m3fn")[0] == [0x63, 0]
    # 1 / (4 / 127) = 31.75
    assert quantize_row([1.0], "int8", eps=4.0) == ([32], [float32(4 / 127)])


def test_a_floor_that_is_given_replaces_the_recipes_own_upwards_and_downwards():
    for eps in (0.5, 1e-12):
        assert quantize_row([0.0], "fp8_e4m3fn", "deepgemm", eps=eps)[1] == [float32(float32(eps) / 448)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_group_with_nan_or_inf_has_a_nan_scale_and_values_zero(name, bad, recipe):
    row = [1.0] * 384
    row[200] = bad
    values, scales = quantize_row(row, name, recipe)
    good, scale = expected_group([1.0] * 128, name, recipe)
    assert values == good + [0] * 128 + good
    assert [scales[0], scales[2]] == [scale, scale] and math.isnan(scales[1])


def test_division_and_product_with_the_reciprocal_round_apart_where_they_should():
    """393 / (524 / 448) is 336 exactly, a tie that goes to 320; by the rounded reciprocal it is an ulp more and goes to 352."""
    assert 393 * 448 == 336 * 524
    assert quantize_row([524.0, 393.0], "fp8_e4m3fn", "default")[0] == [0x7E, 0x7A]
    assert quantize_row([524.0, 393.0], "fp8_e4m3fn", "deepgemm")[0] == [0x7E, 0x7B]
    for recipe, byte in (("default", 0x7A), ("deepgemm", 0x7B)):
        assert as_bytes(reference.quantize_weight(torch.tensor([[524.0], [393.0]]), recipe=recipe).values) == [0x7E, byte]
    # 19 / (38 / 127) = 63.5 goes to 64; by the reciprocal it is an ulp less and goes to 63
    assert quantize_row([38.0, 19.0], "int8", "default")[0] == [127, 64]
    assert quantize_row([38.0, 19.0], "int8", "deepgemm")[0] == [127, 63]


@pytest.mark.parametrize("recipe", RECIPES)
def test_quotients_beside_rounding_ties_equal_exact_arithmetic(recipe):
    """Groups whose quotients lie at the middles of e4m3 neighbours, for scales with an inexact reciprocal."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (grid[1:] + grid[:-1]) / 2
    for amax in (1.3, 524.0, 3e-3):
        assert_row([amax, *(middles * (amax / 448)).tolist()], "fp8_e4m3fn", recipe)


def test_a_trailing_partial_group_has_its_own_scale():
    row = [448.0] + [1.0] * 127 + [224.0, 1.0]
    values, scales = quantize_row(row, "fp8_e4m3fn")
    assert scales == [1.0, 0.5]
    assert values[128:] == [0x7E, 0x40] and values[1] == 0x38


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_other_group_sizes_cut_the_row_elsewhere(group_size):
    row = [float(i) for i in range(1, 301)]
    _, scales = quantize_row(row, "fp8_e4m3fn", group_size=group_size)
    ends = [min(end, 300) for end in range(group_size, 300 + group_size, group_size)]
    assert scales == [float32(Fraction(end, 448)) for end in ends]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_widened_before_anything_is_computed(dtype):
    x = torch.randn(1, 3, 140).to(dtype)
    narrow, wide = reference.quantize_expert_batch(x), reference.quantize_expert_batch(x.float())
    assert_bit_equal(narrow.values, wide.values)
    assert_bit_equal(narrow.scales, wide.scales)


def test_counts_say_which_rows_are_written_and_the_rest_stays():
    values = torch.full((3, 4, 2), 0x55, dtype=torch.uint8)
    scales = torch.full((3, 4, 1), 7.0)
    counts = torch.tensor([2, 0, 9], dtype=torch.int32)
    reference.quantize_rows(torch.ones(3, 4, 2), counts, None, values.view(torch.float8_e4m3fn), scales)
    written = torch.tensor([[1, 1, 0, 0], [0] * 4, [1] * 4]).bool()
    assert values.tolist() == torch.where(written, 0x7E, 0x55).unsqueeze(2).expand(3, 4, 2).tolist()
    assert scales.squeeze(2).tolist() == torch.where(written, torch.tensor(1.0) / 448, 7.0).tolist()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_blocks_with_tails_and_segments_equal_exact_arithmetic(recipe, name):
    rows, columns, group, segments = 14, 11, 4, 2
    w = torch.randn(segments * rows // 2, columns) * torch.rand(segments * rows // 2, 1).mul(6).exp()
    q = reference.quantize_weight(w, dtype=DTYPES[name], recipe=recipe, segments=segments, group_size=group)
    assert q.layout == "block" and q.scales.shape == (4, 3) and q.segments == 2
    values, half = q.values.view(torch.uint8), rows // 2
    for i in range(4):
        first = i // 2 * half + i % 2 * group
        last = min(first + group, (i // 2 + 1) * half)
        for j in range(3):
            block = slice(first, last), slice(j * group, (j + 1) * group)
            expected, scale = expected_group(w[block].flatten().tolist(), name, recipe)
            assert (values[block].flatten().tolist(), q.scales[i, j].item()) == (expected, scale)


def test_gate_and_up_share_no_block():
    w = torch.ones(260, 128)
    w[130:] = 100.0
    together, apart = reference.quantize_weight(w), reference.quantize_weight(w, segments=2)
    assert together.scales.flatten().tolist() == [float32(1 / 448), float32(100 / 448), float32(100 / 448)]
    assert apart.scales.flatten().tolist() == [float32(1 / 448)] * 2 + [float32(100 / 448)] * 2


def test_a_bad_number_spoils_its_block_alone():
    w = torch.ones(1, 256, 256)
    w[0, 200, 3] = math.inf
    q = reference.quantize_weight(w)
    assert q.scales.isnan().tolist() == [[[False, False], [True, False]]]
    assert reference.dequantize(q).isnan().sum() == 128 * 128


def test_dequantize_multiplies_each_group_and_block_by_its_scale():
    values = torch.tensor([[[1, 2, 3], [-4, 5, 6]]], dtype=torch.int8)
    rows = QuantizedTensor(values, torch.tensor([[[0.5, 10.0], [2.0, 100.0]]]), "row", group_size=2)
    assert reference.dequantize(rows).tolist() == [[[0.5, 1.0, 30.0], [-8.0, 10.0, 600.0]]]
    blocks = QuantizedTensor(values[0], torch.tensor([[0.5, 10.0], [2.0, 100.0]]), "block", group_size=2, segments=2)
    assert reference.dequantize(blocks).tolist() == [[0.5, 1.0, 30.0], [-8.0, 10.0, 600.0]]


def test_dequantize_rounds_once_to_the_type_asked_for():
    q = QuantizedTensor(torch.tensor([[[3]]], dtype=torch.int8), torch.full((1, 1, 1), 0.33), "row")
    assert reference.dequantize(q).item() == float32(3 * Fraction(float32(0.33)))
    assert reference.dequantize(q, torch.bfloat16).item() == torch.tensor(3 * float32(0.33)).bfloat16().item()


def swiglu64(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second, in float64."""
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def steps(values: torch.Tensor) -> torch.Tensor:
    """The position of 8-bit numbers on their format's grid, so that neighbours differ by 1."""
    bits = values.contiguous().view(torch.uint8).int()
    if values.dtype == torch.int8:
        return values.int()
    return torch.where(bits >= 0x80, 0x80 - bits, bits)


@pytest.mark.parametrize("name", FORMATS)
def test_swiglu_then_quantization_is_within_an_ulp_or_step_of_float64(name):
    x = torch.randn(2, 5, 2 * 200).bfloat16() * 3
    q = reference.silu_mul_quantize(x, dtype=DTYPES[name])
    product = torch.nn.functional.pad(swiglu64(x), (0, 56)).unflatten(-1, (2, 128))
    scales = product.abs().amax(-1) / LARGEST[name]
    assert ((q.scales - scales).abs() <= 4 * 2**-23 * scales).all()
    quotient = (product / q.scales.double().unsqueeze(-1)).flatten(-2)[..., :200]
    expected = torch.tensor([narrow_bits(max(min(y, LARGEST[name]), -LARGEST[name]), name) for y in quotient.flatten().tolist()])
    difference = (steps(q.values).flatten() - steps(expected.to(torch.uint8).view(DTYPES[name]))).abs()
    assert difference.max() <= 1 and (difference == 0).float().mean() > 0.99


def test_the_first_half_is_the_gate():
    out = reference.silu_mul(torch.tensor([[[0.0, 1.0, 5.0, 2.0]]]), out=torch.empty(1, 1, 2))
    assert out.flatten().tolist() == pytest.approx([0.0, 2 / (1 + math.exp(-1))], rel=1e-6)


def test_gates_far_from_zero_give_the_limits_of_silu_and_float32_inputs_keep_their_digits():
    up = 3 + 2.0**-12
    out = reference.silu_mul(torch.tensor([[[-1000.0, 1024.0, up, up]]]), out=torch.empty(1, 1, 2))
    assert out.flatten().tolist() == [0.0, 1024 * up]


@pytest.mark.parametrize("name", [*FORMATS, "none"])
def test_the_grouped_product_is_within_1e_5_of_float64_on_the_dequantized_operands(name):
    counts = torch.tensor([5, 0, 3], dtype=torch.int32)
    a, b = torch.randn(3, 5, 200).bfloat16(), torch.randn(3, 140, 200).bfloat16()
    left, right = a.double(), b.double()
    operands = a, b
    if name != "none":
        qa = reference.quantize_expert_batch(a, dtype=DTYPES[name])
        qb = reference.quantize_weight(b, dtype=DTYPES[name], segments=2)
        operands = qa, qb
        left = qa.values.double() * qa.scales.double().repeat_interleave(128, 2)[..., :200]
        columns = qb.scales.double().repeat_interleave(128, 2)[..., :200]
        # one block of rows for each half of 70
        right = qb.values.double() * columns.repeat_interleave(70, 1)
    out = poison(torch.empty(3, 5, 140))
    assert reference.grouped_gemm_blockscale(*operands, counts, out=out) is out
    expected = left @ right.transpose(1, 2)
    for expert, count in enumerate(counts.tolist()):
        got = out[expert, :count].double()
        assert torch.linalg.vector_norm(got - expected[expert, :count]) <= 1e-5 * torch.linalg.vector_norm(expected[expert, :count])
        assert out[expert, count:].isnan().all()


@pytest.mark.parametrize("count, written", [(99, 3), (3, 3), (0, 0), (-1, 0)], ids=str)
def test_counts_outside_the_buffer_are_cut_to_it(count, written):
    a, b = torch.ones(1, 3, 4).bfloat16(), torch.ones(1, 2, 4).bfloat16()
    out = poison(torch.empty(1, 3, 2))
    reference.grouped_gemm_blockscale(a, b, torch.tensor([count], dtype=torch.int32), out=out)
    assert (out[0, :written] == 4).all() and out[0, written:].isnan().all()
