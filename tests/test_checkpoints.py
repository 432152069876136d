"""Weights of checkpoints: kept bit by bit where they can be, otherwise quantized anew, and their formats decoded by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moequant import Activation, CheckpointWeight, GroupedExperts, LayoutError, QuantizedTensor, dequantize, quantize_weight
from moequant.testing import assert_bit_equal, relative_error
from test_experts import make_batch

E, H, INNER = 2, 200, 136
E4M3 = torch.float8_e4m3fn
# as gpt-oss
OSS = Activation(limit=7.0, alpha=1.702, offset=1.0, interleaved=True)


def stored(rows: int, columns: int, dtype: torch.dtype = E4M3, segments: int = 1, **settings: Any) -> QuantizedTensor:
    return quantize_weight(torch.randn(E, rows, columns), dtype=dtype, segments=segments, **settings)


def narrow(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (16 * torch.randn(shape)).clamp(-100, 100).to(dtype)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.5


def spread(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int, parts: int = 1) -> torch.Tensor:
    """The scale of each number, written out: one part's blocks after the other's."""
    length = rows // parts
    down = [part * -(-length // block[0]) + inside // block[0] for part in range(parts) for inside in range(length)]
    return scale[:, down][:, :, [column // block[1] for column in range(columns)]]


def as_w2(w: CheckpointWeight, **settings: Any) -> torch.Tensor | QuantizedTensor:
    """What becomes of a weight (E, H, INNER)."""
    return GroupedExperts.from_checkpoint(stored_w13(), w, **settings).w2


def stored_w13(**changes: Any) -> CheckpointWeight:
    q = stored(2 * INNER, H, segments=2)
    return CheckpointWeight(q.values, q.scales, **changes)


@pytest.mark.parametrize("scale_dtype", ["float32", "e8m0", "its bytes"])
def test_blocks_of_128x128_are_taken_without_a_change_of_bits_or_a_copy(scale_dtype):
    w13, w2 = stored(2 * INNER, H, segments=2, recipe="ue8m0"), stored(H, INNER, recipe="ue8m0")

    def given(w: QuantizedTensor) -> CheckpointWeight:
        if scale_dtype == "float32":
            return CheckpointWeight(w.values, w.scales)
        exponents = w.scales.to(torch.float8_e8m0fnu)
        return CheckpointWeight(w.values, exponents if scale_dtype == "e8m0" else exponents.view(torch.uint8))

    experts = GroupedExperts.from_checkpoint(given(w13), given(w2))
    for made, source in ((experts.w13, w13), (experts.w2, w2)):
        assert isinstance(made, QuantizedTensor) and made.values.data_ptr() == source.values.data_ptr()
        assert_bit_equal(made.scales, source.scales)
        assert made.recipe == ("default" if scale_dtype == "float32" else "ue8m0")
    batch = make_batch("fp8_e4m3fn", torch.randn(E, 4, H), torch.tensor([4, 1], dtype=torch.int32))
    same = GroupedExperts.from_quantized(w13, w2)(batch)
    assert_bit_equal(experts(batch)[0], same[0])


def test_gate_and_up_may_be_apart_and_weights_lie_the_other_way_round():
    gate, up, w2 = stored(INNER, H), stored(INNER, H), stored(H, INNER)

    def turned(w: QuantizedTensor) -> CheckpointWeight:
        return CheckpointWeight(w.values.mT.contiguous(), w.scales.mT.contiguous(), transposed=True)

    pair = CheckpointWeight(gate.values, gate.scales), CheckpointWeight(up.values, up.scales)
    for first, second in ((pair, CheckpointWeight(w2.values, w2.scales)), ((turned(gate), turned(up)), turned(w2))):
        experts = GroupedExperts.from_checkpoint(first, second)
        assert isinstance(experts.w13, QuantizedTensor) and isinstance(experts.w2, QuantizedTensor)
        assert experts.w13.segments == 2
        assert_bit_equal(experts.w13.values, torch.cat((gate.values.float(), up.values.float()), 1).to(E4M3))
        assert_bit_equal(experts.w13.scales, torch.cat((gate.scales, up.scales), 1))
        assert_bit_equal(experts.w2.values, w2.values)
        assert_bit_equal(experts.w2.scales, w2.scales)


COARSE: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, int]]] = {
    # a scale's shape, the settings, and the block that it is for
    "one for all": ((), {"block": (None, None)}, (H, INNER)),
    "one for all, as compressed-tensors has it": ((1,), {"block": (None, None)}, (H, INNER)),
    "one for each expert": ((E,), {"block": (None, None)}, (H, INNER)),
    "256 rows": ((E, 1, 2), {"block": (256, 128)}, (256, 128)),
    "all rows": ((E, 1, 2), {"block": (None, 128)}, (H, 128)),
}


@pytest.mark.parametrize("case", COARSE)
def test_coarser_scales_are_repeated_and_values_kept(case):
    shape, settings, block = COARSE[case]
    values, scale = narrow(E, H, INNER), scales(*shape)
    made = as_w2(CheckpointWeight(values, scale, **settings))
    assert isinstance(made, QuantizedTensor) and made.values.data_ptr() == values.data_ptr()
    wide = scale.reshape(1, 1, 1).expand(E, 1, 1) if scale.numel() == 1 else scale.reshape(E, 1, -1)
    assert_bit_equal(dequantize(made), values.float() * spread(wide, block, H, INNER))


def test_gate_and_up_may_have_a_scale_each():
    values, scale = narrow(E, 2 * INNER, H), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    experts = GroupedExperts.from_checkpoint(CheckpointWeight(values, scale, (None, None)), CheckpointWeight(*w2_parts()))
    assert isinstance(experts.w13, QuantizedTensor) and experts.w13.values.data_ptr() == values.data_ptr()
    expected = values.float() * torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(INNER, 1).unsqueeze(2)
    assert_bit_equal(dequantize(experts.w13), expected)


def w2_parts() -> tuple[torch.Tensor, torch.Tensor]:
    w2 = stored(H, INNER)
    return w2.values, w2.scales


FINE: dict[str, tuple[tuple[int, ...], tuple[int | None, int | None], tuple[int, int]]] = {
    "64x64": ((E, 4, 3), (64, 64), (64, 64)),
    "96x40, which divides nothing": ((E, 3, 4), (96, 40), (96, 40)),
    "a channel": ((E, H, 1), (1, None), (1, INNER)),
    "a channel, of two dimensions": ((E, H), (1, None), (1, INNER)),
    "a group of 32": ((E, H, 5), (1, 32), (1, 32)),
}


@pytest.mark.parametrize("quant, dtype", [("fp8_e4m3fn", E4M3), ("int8", torch.int8)], ids=str)
@pytest.mark.parametrize("case", FINE)
def test_finer_scales_give_what_quantizing_their_numbers_gives(case, quant, dtype):
    shape, block, sizes = FINE[case]
    values, scale = narrow(E, H, INNER), scales(*shape)
    made = as_w2_of(CheckpointWeight(values, scale.bfloat16(), block), quant)
    numbers = values.float() * spread(scale.bfloat16().float().reshape(E, shape[1], -1), sizes, H, INNER)
    expected = quantize_weight(numbers, dtype=dtype)
    assert isinstance(made, QuantizedTensor) and made.recipe == "default"
    assert_bit_equal(made.values, expected.values)
    assert_bit_equal(made.scales, expected.scales)
    wide = GroupedExperts.from_checkpoint(unit_w13(), CheckpointWeight(values, scale.bfloat16(), block), quant="none").w2
    assert isinstance(wide, torch.Tensor)
    assert_bit_equal(wide, numbers.bfloat16())


def as_w2_of(w: CheckpointWeight, quant: str) -> torch.Tensor | QuantizedTensor:
    return GroupedExperts.from_checkpoint(unit_w13(), w, quant=quant).w2


def unit_w13() -> CheckpointWeight:
    return CheckpointWeight(narrow(E, 2 * INNER, H), torch.ones(()), (None, None))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8], ids=str)
def test_another_narrow_type_becomes_the_one_that_is_asked_for(dtype):
    values = narrow(E, H, INNER, dtype=dtype)
    scale = scales(E, 2, 2)
    made = as_w2(CheckpointWeight(values, scale))
    expected = quantize_weight(values.float() * spread(scale, (128, 128), H, INNER))
    assert isinstance(made, QuantizedTensor)
    assert_bit_equal(made.values, expected.values)
    assert_bit_equal(made.scales, expected.scales)


def test_blocks_across_the_middle_of_gate_and_up_are_laid_anew():
    values, scale = narrow(E, 2 * INNER, H), scales(E, 3, 2)
    numbers = values.float() * spread(scale, (128, 128), 2 * INNER, H)
    # 4 rows of scales would be gate and up apart
    experts = GroupedExperts.from_checkpoint(CheckpointWeight(values, scale), CheckpointWeight(*w2_parts()))
    expected = quantize_weight(numbers, segments=2)
    assert isinstance(experts.w13, QuantizedTensor)
    assert_bit_equal(experts.w13.values, expected.values)
    assert_bit_equal(experts.w13.scales, expected.scales)
    # where the number of rows doesn't tell, they are apart unless it is said
    short, both = narrow(E, 200, H), scales(E, 2, 2)
    w2 = CheckpointWeight(narrow(E, H, 100), torch.ones(()), (None, None))
    kept = GroupedExperts.from_checkpoint(CheckpointWeight(short, both), w2).w13
    assert isinstance(kept, QuantizedTensor)
    assert_bit_equal(dequantize(kept), short.float() * spread(both, (128, 128), 200, H, 2))
    across = GroupedExperts.from_checkpoint(CheckpointWeight(short, both, segments=1), w2).w13
    assert isinstance(across, QuantizedTensor)
    assert_bit_equal(across.values, quantize_weight(short.float() * spread(both, (128, 128), 200, H), segments=2).values)


# The table of OCP MX, E2M1: sign, two bits of exponent with bias 1, one of mantissa; without an exponent 0 and 0.5.
def e2m1(code: int) -> float:
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    return (-1) ** sign * (0.5 * mantissa if exponent == 0 else 2.0 ** (exponent - 1) * (1 + 0.5 * mantissa))


def mx(pairs: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Number by number: the lower four bits first, 2**(b - 127) for 32 of a row."""
    flat = pairs.reshape(-1, pairs.shape[-1]).tolist()
    powers = exponents.reshape(-1, exponents.shape[-1]).tolist()
    rows = []
    for row, power in zip(flat, powers, strict=True):
        numbers = [e2m1(code) for byte in row for code in (byte & 15, byte >> 4)]
        rows.append([number * 2.0 ** (power[place // 32] - 127) for place, number in enumerate(numbers)])
    return torch.tensor(rows).view(*pairs.shape[:-1], -1)


def test_e2m1_and_e8m0_by_hand():
    # 0x21: 0.5 then 1; 0xF7: 6 then -6; 0x9A: -1 then -0.5; 0x08: -0 then 0; 0x43: 1.5 then 2; 0x65: 3 then 4; scaled by 8
    row = [0x21, 0xF7, 0x9A, 0x08, 0x43, 0x65] + [0] * 10
    pairs = torch.tensor(row, dtype=torch.uint8).expand(1, 4, 16).contiguous()
    exponents = torch.full((1, 4, 1), 130, dtype=torch.uint8)
    made = GroupedExperts.from_checkpoint(
        CheckpointWeight(torch.zeros(1, 64, 4).to(E4M3), torch.ones(1, 1, 1), (None, None)),
        CheckpointWeight(pairs, exponents, (1, 32)),
    ).w2
    assert isinstance(made, QuantizedTensor)
    by_hand = [4.0, 8.0, 48.0, -48.0, -8.0, -4.0, 0.0, 0.0, 12.0, 16.0, 24.0, 32.0]
    assert dequantize(made)[0, 3].tolist() == by_hand + [0.0] * 20
    assert mx(pairs, exponents)[0, 0].tolist() == by_hand + [0.0] * 20


def drawn_mx(rows: int, columns: int, near: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.randint(0, 256, (E, rows, columns // 2), dtype=torch.uint8)
    return pairs, torch.randint(120 - near, 121, (E, rows, columns // 32)).to(torch.uint8)


@pytest.mark.parametrize("form", ["pairs", "groups of 16 bytes", "float4_e2m1fn_x2", "gate and up apart"])
def test_mxfp4_becomes_fp8_without_any_error(form):
    (p13, s13), (p2, s2) = drawn_mx(2 * 96, 160, 14), drawn_mx(160, 96, 14)
    changed = {
        "groups of 16 bytes": lambda x: x.unflatten(2, (-1, 16)),
        "float4_e2m1fn_x2": lambda x: x.view(torch.float4_e2m1fn_x2),
    }
    given = [changed.get(form, lambda x: x)(pairs) for pairs in (p13, p2)]
    exponents = s13.view(torch.float8_e8m0fnu) if form == "float4_e2m1fn_x2" else s13
    w13: Any = CheckpointWeight(given[0], exponents, (1, 32))
    if form == "gate and up apart":
        w13 = tuple(CheckpointWeight(p13[:, at], s13[:, at], (1, 32)) for at in (slice(96), slice(96, None)))
    experts = GroupedExperts.from_checkpoint(w13, CheckpointWeight(given[1], s2, (1, 32)))
    for made, numbers in ((experts.w13, mx(p13, s13)), (experts.w2, mx(p2, s2))):
        assert isinstance(made, QuantizedTensor) and made.values.dtype == E4M3 and made.recipe == "ue8m0"
        # zeros of either sign
        assert torch.equal(dequantize(made), numbers)


def test_mxfp4_of_gpt_oss_is_laid_apart_with_its_biases_and_computes_its_network():
    (p13, s13), (p2, s2) = drawn_mx(2 * 96, 160, 2), drawn_mx(160, 96, 2)
    bias13, bias2 = torch.randn(E, 192), torch.randn(E, 160)
    weights = CheckpointWeight(p13, s13, (1, 32)), CheckpointWeight(p2, s2, (1, 32))
    n13, n2 = mx(p13, s13).double(), mx(p2, s2).double()
    x = torch.randn(E, 8, 160).bfloat16()
    gate, up = (x.double() @ n13.mT + bias13.unsqueeze(1)).unflatten(2, (-1, 2)).unbind(3)
    gate = gate.clamp(max=7)
    expected = (gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7, 7) + 1)) @ n2.mT + bias2.unsqueeze(1)
    for quant, tolerance in (("fp8_e4m3fn", 0.06), ("int8", 0.03), ("none", 0.006)):
        experts = GroupedExperts.from_checkpoint(*weights, quant=quant, activation=OSS, bias13=bias13, bias2=bias2)
        assert not experts.kind.interleaved
        out = experts(make_batch(quant, x, torch.tensor([8, 8], dtype=torch.int32)))
        assert relative_error(out, expected) < tolerance


def test_interleaved_blocks_that_are_kept_stay_interleaved():
    q, w2 = stored(2 * INNER, H), stored(H, INNER)
    bias = torch.randn(E, 2 * INNER)
    experts = GroupedExperts.from_checkpoint(
        CheckpointWeight(q.values, q.scales), CheckpointWeight(w2.values, w2.scales), activation=OSS, bias13=bias
    )
    assert experts.kind == OSS and experts.bias13 is bias
    assert isinstance(experts.w13, QuantizedTensor) and experts.w13.values.data_ptr() == q.values.data_ptr()


class Largest(TorchFunctionMode):
    """The most elements of a wide tensor that anything made."""

    elements = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.itemsize > 1:
                self.elements = max(self.elements, x.numel())
        return result


def test_no_wide_copy_of_more_than_one_expert_is_made():
    experts, rows, columns = 12, 64, 64
    pairs = torch.randint(0, 256, (experts, 2 * rows, columns // 2), dtype=torch.uint8)
    exponents = torch.full((experts, 2 * rows, columns // 32), 120, dtype=torch.uint8)
    w2 = CheckpointWeight(narrow(experts, columns, rows), scales(experts, columns), (1, None))
    with Largest() as largest:
        GroupedExperts.from_checkpoint(CheckpointWeight(pairs, exponents, (1, 32)), w2)
    assert largest.elements == 2 * rows * columns


def test_nan_scales_stay_nan():
    pairs, exponents = drawn_mx(160, 96, 2)
    exponents[0, 0, 0] = 255
    (p13, s13) = drawn_mx(192, 160, 2)
    w2 = GroupedExperts.from_checkpoint(CheckpointWeight(p13, s13, (1, 32)), CheckpointWeight(pairs, exponents, (1, 32))).w2
    assert isinstance(w2, QuantizedTensor)
    assert dequantize(w2)[0, :128].isnan().all() and dequantize(w2)[1].isfinite().all()


VALUES = torch.zeros(E, 8, 32).to(E4M3)
ONE_SIZE: Any = (128,)
BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "pairs in int8": (
        lambda: CheckpointWeight(torch.zeros(E, 8, 16, dtype=torch.int8), torch.ones(E, 8, 2), (1, 32)),
        r"pairs of e2m1 are given as values.view\(torch.uint8\)",
    ),
    "one expert": (lambda: CheckpointWeight(VALUES[0], torch.ones(1, 1)), r"\(L, N, K_dim\), got .*torch.stack puts experts"),
    "wide values": (
        lambda: CheckpointWeight(torch.zeros(E, 8, 32), torch.ones(E, 1, 1)),
        "values must be torch.float8_e4m3fn or .*, got torch.float32; weights in plain numbers are for GroupedExperts.from_weights",
    ),
    "pairs without scales": (
        lambda: GroupedExperts.from_weights(torch.zeros(E, 8, 16, dtype=torch.uint8), torch.zeros(E, 16, 4)),
        "w13 must be in plain numbers, got torch.uint8, .* give both to GroupedExperts.from_checkpoint",
    ),
    "scales of integers": (lambda: CheckpointWeight(VALUES, torch.ones(E, 1, 1).int()), "scales must be torch.bfloat16 or"),
    "a block of one size": (
        lambda: CheckpointWeight(VALUES, torch.ones(E), ONE_SIZE),
        r"block must be rows and columns, got \(128,\)",
    ),
    "pairs across": (
        lambda: CheckpointWeight(torch.zeros(E, 8, 16, dtype=torch.uint8), torch.ones(E), (None, None), transposed=True),
        "two numbers a byte lie along K_dim and can't be transposed",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_wrong_weights_raise_a_value_error(case):
    make, message = BAD_WEIGHTS[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_scales_of_gate_and_up_are_no_others():
    message = r"8 rows and 32 columns with block=\(128, 128\) and segments=1 need scales of shape \(2, 1, 1\), got \(2, 2, 1\)"
    with pytest.raises(LayoutError, match=message):
        CheckpointWeight(VALUES, torch.ones(E, 2, 1), segments=1)
    w13 = CheckpointWeight(torch.zeros(E, 64, 8).to(E4M3), torch.ones(()), (None, None))
    with pytest.raises(LayoutError, match=r"8 rows .* need scales of shape \(2, 1, 1\) or of gate and up each, got"):
        GroupedExperts.from_checkpoint(w13, CheckpointWeight(VALUES, torch.ones(E, 2, 1)))


def test_scales_of_transposed_values_are_asked_for_as_they_lie():
    values = torch.zeros(E, 256, 128).to(E4M3)
    with pytest.raises(
        LayoutError, match=r"need scales of shape \(2, 2, 1\) or of gate and up each, got \(2, 1, 2\), transposed; give"
    ):
        CheckpointWeight(values, torch.ones(E, 1, 2), transposed=True)
    assert CheckpointWeight(values, torch.ones(E, 2, 1), transposed=True).shape == (E, 128, 256)


def test_weights_that_do_not_fit_together_raise_a_value_error():
    w2, unit = CheckpointWeight(*w2_parts()), torch.ones(())
    half = CheckpointWeight(narrow(E, INNER, H), unit, (None, None))
    from_checkpoint: Any = GroupedExperts.from_checkpoint
    with pytest.raises(ValueError, match=r"w13 must be \(L, 2 \* I, H\), gate first, and w2 \(L, H, I\); got \(2, 136, 200\)"):
        from_checkpoint(half, w2)
    with pytest.raises(ValueError, match="gate and up of one shape, for an activation that is gated and not interleaved"):
        from_checkpoint((half, half), w2, activation=OSS)
    with pytest.raises(ValueError, match="w13 must be one weight, or gate and up, got 3 weights"):
        from_checkpoint((half,) * 3, w2)
    with pytest.raises(
        ValueError, match=r"w2 must be CheckpointWeight, got Tensor; CheckpointWeight\(values, scales\) is one weight"
    ):
        from_checkpoint((half, half), w2.values)
    with pytest.raises(ValueError, match=r"w13 must be CheckpointWeight or tuple or list, got Tensor; CheckpointWeight\(values"):
        from_checkpoint(half.values, w2)
    with pytest.raises(ValueError, match="quant must be one of none, .* got 'fp4'"):
        from_checkpoint((half, half), w2, quant="fp4")
    with pytest.raises(ValueError, match="recipe must be one of"):
        from_checkpoint((half, half), w2, recipe="mx")
    with pytest.raises(RuntimeError, match=r"w2.scales requires grad, .* or pass w2.scales.detach\(\)"):
        from_checkpoint((half, half), CheckpointWeight(w2.values, w2.scales.clone().requires_grad_()))
    assert GroupedExperts.from_checkpoint(half, w2, activation=Activation("relu2", gated=False)).intermediate_size == INNER
