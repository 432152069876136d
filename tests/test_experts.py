"""GroupedExperts on a CPU against a dense computation, its workspaces, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant import ExpertBatch, GroupedExperts, LayoutError, QuantizedTensor, dequantize, quantize_expert_batch, quantize_weight
from moequant.config import QUANT_DTYPES
from moequant.testing import assert_bit_equal, poison, relative_error

EXPERTS, ROWS, HIDDEN, INNER = 3, 16, 200, 136
# of the whole feed-forward network, against dense bfloat16: three quantizations of rows and weights
TOLERANCES = {"none": 0.006, "float16": 0.006, "int8": 0.03, "fp8_e4m3fn": 0.08, "fp8_e4m3fnuz": 0.08, "fp8_e5m2": 0.15}
COUNTS = torch.tensor([16, 0, 5], dtype=torch.int32)


def weights(hidden: int = HIDDEN, inner: int = INNER) -> tuple[torch.Tensor, torch.Tensor]:
    w13 = torch.randn(EXPERTS, 2 * inner, hidden) / hidden**0.5
    return w13.bfloat16(), (torch.randn(EXPERTS, hidden, inner) / inner**0.5).bfloat16()


def make_batch(quant: str, x: torch.Tensor, counts: torch.Tensor = COUNTS, recipe: str = "default") -> ExpertBatch:
    """As a dispatcher leaves it, with rows past the counts poisoned."""
    values, scales = x.bfloat16(), None
    if quant == "float16":
        values = x.half()
    elif quant != "none":
        q = quantize_expert_batch(values, dtype=QUANT_DTYPES[quant], recipe=recipe)
        values, scales = q.values, q.scales
    for expert, count in enumerate(counts.tolist()):
        poison((values if scales is None else scales)[expert, count:])
    return ExpertBatch(values, scales, counts, torch.zeros(x.shape[:2], dtype=torch.int64), recipe, 8)


def dense(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The network of each expert on all its rows, in bfloat16 as plain torch computes it."""
    gate, up = (x.bfloat16() @ w13.transpose(1, 2)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w2.transpose(1, 2)


def valid(x: torch.Tensor, counts: torch.Tensor = COUNTS) -> torch.Tensor:
    return torch.cat([x[expert, :count] for expert, count in enumerate(counts.tolist())])


@pytest.mark.parametrize("hidden, inner", [(200, 136), (256, 128), (128, 300), (16, 8)], ids=str)
@pytest.mark.parametrize("quant", QUANT_DTYPES)
def test_the_network_is_near_a_dense_bfloat16_computation(quant, hidden, inner):
    w13, w2 = weights(hidden, inner)
    if quant == "float16":
        w13, w2 = w13.half(), w2.half()
    x = torch.randn(EXPERTS, ROWS, hidden)
    out = GroupedExperts.from_weights(w13, w2, quant=quant)(make_batch(quant, x))
    assert out.shape == x.shape and out.dtype == w13.dtype
    assert relative_error(valid(out), valid(dense(x, w13.bfloat16(), w2.bfloat16()))) < TOLERANCES[quant]


def powers_of_two(scales: torch.Tensor) -> bool:
    return bool((torch.frexp(scales)[0] == 0.5).all())


@pytest.mark.parametrize("recipe", ["deepgemm", "ue8m0"])
def test_a_recipe_is_used_for_both_weights_and_the_inner_quantization(recipe):
    w13, w2 = weights()
    x = torch.randn(EXPERTS, ROWS, HIDDEN)
    experts = GroupedExperts.from_weights(w13, w2, recipe=recipe)
    batch = make_batch("fp8_e4m3fn", x, recipe=recipe)
    assert relative_error(valid(experts(batch)), valid(dense(x, w13, w2))) < 0.1
    inner = experts.activation(experts.gemm1(batch), batch)
    assert isinstance(inner, QuantizedTensor)
    for weight in (experts.w13, experts.w2):
        assert isinstance(weight, QuantizedTensor) and weight.recipe == recipe
        assert powers_of_two(weight.scales) == (recipe == "ue8m0")
    assert powers_of_two(valid(inner.scales)) == (recipe == "ue8m0")


@pytest.mark.parametrize("quant", ["int8", "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"])
def test_weights_quantized_beforehand_give_the_same_bits(quant):
    w13, w2 = weights()
    dtype = QUANT_DTYPES[quant]
    quantized = quantize_weight(w13, dtype=dtype, segments=2), quantize_weight(w2, dtype=dtype)
    batch = make_batch(quant, torch.randn(EXPERTS, ROWS, HIDDEN))
    from_weights = GroupedExperts.from_weights(w13, w2, quant=quant)(batch)
    assert_bit_equal(valid(GroupedExperts.from_quantized(*quantized)(batch)), valid(from_weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_of_any_float_type_and_order_are_quantized_from_it(dtype):
    w13, w2 = (w.to(dtype) + 2.0**-9 for w in weights())
    experts = GroupedExperts.from_weights(w13.mT.contiguous().mT, w2.mT.contiguous().mT, quant="int8")
    for made, w, segments in ((experts.w13, w13, 2), (experts.w2, w2, 1)):
        expected = quantize_weight(w, dtype=torch.int8, segments=segments)
        assert isinstance(made, QuantizedTensor)
        assert_bit_equal(made.values, expected.values)
        assert_bit_equal(made.scales, expected.scales)


@pytest.mark.parametrize("quant", [quant for quant in QUANT_DTYPES if quant != "float16"])
def test_quantization_is_the_only_error_beside_bfloat16s(quant):
    """Against products of the dequantized operands, the inner rows quantized and dequantized too."""
    w13, w2 = weights()
    x = torch.randn(EXPERTS, ROWS, HIDDEN)
    experts = GroupedExperts.from_weights(w13, w2, quant=quant)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        return rows.bfloat16().float() if quant == "none" else dequantize(quantize_expert_batch(rows, dtype=QUANT_DTYPES[quant]))

    def plain(w: torch.Tensor | QuantizedTensor) -> torch.Tensor:
        return dequantize(w) if isinstance(w, QuantizedTensor) else w.float()

    gate, up = (rounded(x.bfloat16()) @ plain(experts.w13).transpose(1, 2)).bfloat16().float().chunk(2, -1)
    expected = rounded(torch.nn.functional.silu(gate) * up) @ plain(experts.w2).transpose(1, 2)
    assert relative_error(valid(experts(make_batch(quant, x))), valid(expected)) < 2e-3


@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
def test_the_gate_comes_first(quant):
    """With a gate of -8 and an up of 1 the product is silu(-8); the other way round it would be -8 * silu(1)."""
    w13 = torch.cat([torch.full((1, 128, 128), -8 / 128), torch.full((1, 128, 128), 1 / 128)], 1).bfloat16()
    w2 = torch.eye(128).unsqueeze(0).bfloat16()
    experts = GroupedExperts.from_weights(w13, w2, quant=quant)
    out = experts(make_batch(quant, torch.ones(1, 2, 128), torch.tensor([2], dtype=torch.int32)))
    silu, swapped = -8 / (1 + 2.718281828**8), -8 / (1 + 2.718281828**-1)
    assert out.flatten().tolist() == pytest.approx([silu] * 256, rel=0.01)
    assert abs(swapped - silu) > 5


def test_rows_past_the_counts_are_not_written():
    experts = GroupedExperts.from_weights(*weights())
    batch = make_batch("fp8_e4m3fn", torch.randn(EXPERTS, ROWS, HIDDEN))
    experts(batch)
    # the same workspace again, so that what it holds is known
    experts._workspace(batch).output.fill_(-7.0)
    out = experts(batch)
    assert valid(out).isfinite().all() and not (valid(out) == -7).all(1).any()
    assert (out[1] == -7).all() and (out[2, 5:] == -7).all()


def test_workspaces_are_reused_for_batches_of_the_same_rows():
    experts = GroupedExperts.from_weights(*weights())
    first, second = (make_batch("fp8_e4m3fn", torch.randn(EXPERTS, ROWS, HIDDEN)) for _ in range(2))
    out = experts(first)
    kept = out.clone()
    again = experts(second)
    assert again.data_ptr() == out.data_ptr()
    assert relative_error(valid(again), valid(kept)) > 0.5
    assert_bit_equal(valid(experts(first)), valid(kept))


@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
def test_batches_of_more_and_of_fewer_rows_get_workspaces_of_their_own_size(quant):
    w13, w2 = weights()
    experts = GroupedExperts.from_weights(w13, w2, quant=quant)
    for rows in (16, 48, 4):
        x = torch.randn(EXPERTS, rows, HIDDEN)
        counts = torch.tensor([rows, 0, 3], dtype=torch.int32)
        out = experts(make_batch(quant, x, counts))
        assert out.shape == x.shape
        assert relative_error(valid(out, counts), valid(dense(x, w13, w2), counts)) < TOLERANCES[quant]


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_parts_are_the_experts_of_the_whole(quant):
    experts, batch = GroupedExperts.from_weights(*weights(), quant=quant), make_batch(quant, torch.randn(EXPERTS, ROWS, HIDDEN))
    whole = valid(experts(batch).clone())
    parts = torch.cat([experts.part(*span)(batch.part(*span)) for span in ((0, 1), (1, 3))])
    assert_bit_equal(valid(parts), whole)
    assert experts.part(0, 1) is experts.part(0, 1)


def test_parts_have_the_weights_of_the_moment():
    experts, batch = GroupedExperts.from_weights(*weights(), quant="none"), make_batch("none", torch.randn(EXPERTS, ROWS, HIDDEN))
    of_the_whole = experts.w2
    assert isinstance(of_the_whole, torch.Tensor)
    for w2 in (of_the_whole, torch.zeros_like(of_the_whole), of_the_whole):
        experts.w2 = w2
        assert experts.part(0, 2)(batch.part(0, 2))[0, 0].any() == w2.any()


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_steps_alone_are_the_call(quant):
    experts = GroupedExperts.from_weights(*weights(), quant=quant)
    batch = make_batch(quant, torch.randn(EXPERTS, ROWS, HIDDEN))
    whole = experts(batch).clone()
    gate_up = experts.gemm1(batch)
    assert gate_up.shape == (EXPERTS, ROWS, 2 * INNER) and gate_up.dtype == torch.bfloat16
    assert_bit_equal(valid(experts.gemm2(experts.activation(gate_up, batch), batch)), valid(whole))


W13, W2 = torch.zeros(3, 8, 4).bfloat16(), torch.zeros(3, 4, 4).bfloat16()
BAD_WEIGHTS = {
    "another activation": (W13, W2, {"activation": "tanh"}, "activation must be an Activation or one of 'silu', .*, got 'tanh'"),
    "an unknown format": (W13, W2, {"quant": "fp4"}, "quant must be one of 'none', 'float16', 'fp8_e4m3fn'.*, got 'fp4'"),
    "float32 weights": (W13.float(), W2, {"quant": "none"}, "w13 must be torch.bfloat16, got torch.float32"),
    "bfloat16 weights": (W13, W2, {"quant": "float16"}, "w13 must be torch.float16, got torch.bfloat16"),
    "weights of integers": (W13.int(), W2, {}, "w13 must be torch.bfloat16 or .*, got torch.int32"),
    "narrow weights": (W13, W2.to(torch.float8_e4m3fn), {}, "w2 .*float8_e4m3fn, .* GroupedExperts.from_checkpoint"),
    "two dimensions": (W13, W2[0], {}, r"w2 must have 3 dimensions, got shape \(4, 4\)"),
    "w2 the other way round": (W13, torch.zeros(3, 8, 4).bfloat16(), {}, r"w2 \(L, H, I\); got \(3, 8, 4\) and \(3, 8, 4\)"),
    "other experts": (W13, W2[:2], {}, r"got \(3, 8, 4\) and \(2, 4, 4\)"),
    "an odd number of rows": (W13[:, 1:], W2, {}, r"w13 must be \(L, 2 \* I, H\), gate first, got shape \(3, 7, 4\)"),
    "an unknown recipe": (W13, W2, {"recipe": "mx"}, "recipe must be one of"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_raise_a_value_error(case):
    w13, w2, options, message = BAD_WEIGHTS[case]
    with pytest.raises(ValueError, match=message):
        GroupedExperts.from_weights(w13, w2, **options)


def test_an_odd_number_of_rows_is_refused_without_quantization_too():
    with pytest.raises(ValueError, match="w13 must be"):
        GroupedExperts.from_weights(W13[:, 1:], W2, quant="none")


def row_scaled(w: torch.Tensor) -> QuantizedTensor:
    return QuantizedTensor(w.to(torch.float8_e4m3fn), torch.ones(*w.shape[:2], 1), "row")


BAD_QUANTIZED = {
    "gate and up in one block": (quantize_weight(W13), quantize_weight(W2), 'segments=2 .*, got "block" with segments=1'),
    "w13 with scales of rows": (
        row_scaled(W13),
        quantize_weight(W2),
        'layout "block" with segments=2 .*, got "row" with segments=1',
    ),
    "two formats": (quantize_weight(W13, segments=2), quantize_weight(W2, dtype=torch.int8), "one dtype, got .* and torch.int8"),
    "other sizes": (quantize_weight(W13, segments=2), quantize_weight(W2[:, :3]), r"got \(3, 8, 4\) and \(3, 3, 4\)"),
    "two devices": (quantize_weight(W13, segments=2), quantize_weight(W2.to("meta")), "on one device, got cpu and meta"),
}


@pytest.mark.parametrize("case", BAD_QUANTIZED)
def test_quantized_weights_that_do_not_fit_raise_a_value_error(case):
    w13, w2, message = BAD_QUANTIZED[case]
    with pytest.raises(ValueError, match=message):
        GroupedExperts.from_quantized(w13, w2)
    with pytest.raises(ValueError, match="""activation must be .* got 'swish'"""):
        GroupedExperts.from_quantized(w13, w2, activation="swish")


def test_quantized_and_plain_weights_together_are_refused():
    with pytest.raises(ValueError, match="one dtype, got .* and torch.bfloat16"):
        GroupedExperts(quantize_weight(W13, segments=2), W2)
    plain: Any = W2
    with pytest.raises(ValueError, match="w2 must be QuantizedTensor, got Tensor; quantize_weight makes one"):
        GroupedExperts.from_quantized(quantize_weight(W13, segments=2), plain)


def test_w2_that_the_gemm_cannot_read_is_a_layout_error():
    with pytest.raises(LayoutError, match='w2 must have layout "block" of 128x128, got "row"'):
        GroupedExperts.from_quantized(quantize_weight(W13, segments=2), row_scaled(W2))


BATCHES = {
    "another quant": (
        "int8",
        (3, 2, 4),
        r"are 3 of hidden size 4 in torch.float8_e4m3fn, the batch has .* \(3, 2, 4\) in torch.int8",
    ),
    "no quant": ("none", (3, 2, 4), "in torch.bfloat16; give dispatcher and experts the same quant and sizes, and each rank"),
    "another hidden size": ("fp8_e4m3fn", (3, 2, 5), r"the batch has values of shape \(3, 2, 5\)"),
    "other experts": ("fp8_e4m3fn", (2, 2, 4), r"the batch has values of shape \(2, 2, 4\)"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_of_another_kind_raises_a_value_error(case):
    quant, shape, message = BATCHES[case]
    batch = make_batch(quant, torch.ones(shape), torch.ones(shape[0], dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        GroupedExperts.from_weights(W13, W2)(batch)


@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
def test_weights_that_require_grad_never_give_a_detached_result(quant):
    batch = make_batch(quant, torch.ones(3, 2, 4), torch.ones(3, dtype=torch.int32))
    trained = W13.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="requires grad, and this call has no backward"):
        GroupedExperts.from_weights(trained, W2, quant=quant)(batch)
    with torch.no_grad():
        assert not GroupedExperts.from_weights(trained, W2, quant=quant)(batch)[:, :1].any()
