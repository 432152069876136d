"""GroupedExperts with other activations than SwiGLU, with biases, and without a gate, against a dense computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from activation_cases import CASES, formula
from moequant import Activation, GroupedExperts, MoEQuantDispatcher, QuantizedTensor, quantize_weight
from moequant.config import QUANT_DTYPES
from moequant.experts import can_push
from moequant.testing import assert_bit_equal, relative_error
from test_experts import COUNTS, EXPERTS, HIDDEN, INNER, ROWS, TOLERANCES, make_batch, valid

# as gpt-oss, and limits that cut something
OSS = Activation(limit=1.5, alpha=1.702, offset=1.0, interleaved=True)


def drawn(activation: Activation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w13, w2 and biases of both."""
    columns = INNER * activation.width
    w13, w2 = torch.randn(EXPERTS, columns, HIDDEN) / HIDDEN**0.5, torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5
    return w13.bfloat16(), w2.bfloat16(), torch.randn(EXPERTS, columns).bfloat16(), torch.randn(EXPERTS, HIDDEN).bfloat16()


def dense(name: str, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    w13, w2, bias13, bias2 = (w.double() for w in weights)
    inner = formula(name, x.double() @ w13.transpose(1, 2) + bias13.unsqueeze(1))
    return inner @ w2.transpose(1, 2) + bias2.unsqueeze(1)


@pytest.mark.parametrize("quant", ["none", "int8", "fp8_e4m3fn"])
@pytest.mark.parametrize("name", CASES)
def test_the_network_is_near_a_dense_computation(name, quant):
    weights = drawn(CASES[name][0])
    x = torch.randn(EXPERTS, ROWS, HIDDEN).bfloat16()
    biases = dict(zip(("bias13", "bias2"), weights[2:], strict=True))
    experts = GroupedExperts.from_weights(*weights[:2], quant=quant, activation=CASES[name][0], **biases)
    out = experts(make_batch(quant, x))
    assert out.shape == x.shape and out.dtype == torch.bfloat16
    assert relative_error(valid(out), valid(dense(name, x, *weights))) < TOLERANCES[quant]


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_interleaved_weights_are_laid_apart_or_taken_as_they_lie(quant):
    w13, w2, bias13, bias2 = drawn(OSS)
    batch = make_batch(quant, torch.randn(EXPERTS, ROWS, HIDDEN))
    settings: dict[str, Any] = {"activation": OSS, "bias13": bias13, "bias2": bias2}
    apart = GroupedExperts.from_weights(w13, w2, quant=quant, **settings)
    assert not apart.kind.interleaved and apart.kind.limit == OSS.limit
    if quant == "none":
        assert_bit_equal(valid(GroupedExperts(w13, w2, **settings)(batch)), valid(apart(batch)))
        return
    # blocks that hold gates and ups
    mixed = [quantize_weight(w, dtype=torch.int8) for w in (w13, w2)]
    out = GroupedExperts.from_quantized(*mixed, **settings)(batch)
    assert relative_error(valid(out), valid(apart(batch))) < TOLERANCES[quant]
    with pytest.raises(ValueError, match=r"segments=1 \(gate and up alternate, or there is no gate\), got .* segments=2"):
        GroupedExperts.from_quantized(quantize_weight(w13, dtype=torch.int8, segments=2), mixed[1], **settings)


def test_without_a_gate_w13_has_half_the_rows_and_one_segment():
    activation = Activation("relu2", gated=False)
    w13, w2, bias13, _ = drawn(activation)
    experts = GroupedExperts.from_weights(w13, w2, activation=activation, bias13=bias13)
    assert experts.intermediate_size == INNER and isinstance(experts.w13, QuantizedTensor) and experts.w13.segments == 1
    batch = make_batch("fp8_e4m3fn", torch.randn(EXPERTS, ROWS, HIDDEN))
    assert experts.gemm1(batch).shape == (EXPERTS, ROWS, INNER)
    # gated experts of the same I on the same batches have other workspaces
    other = GroupedExperts.from_weights(torch.cat((w13, w13), 1), w2)
    other._owner = experts._owner
    assert other.gemm1(batch).shape == (EXPERTS, ROWS, 2 * INNER)
    with pytest.raises(ValueError, match=r"w13 must be \(L, I, H\), without a gate, and w2 \(L, H, I\)"):
        GroupedExperts.from_weights(torch.cat((w13, w13), 1), w2, activation=activation)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_layer_has_the_bits_of_its_steps_and_parts(layout):
    """Through a dispatcher, and in two parts, on the rows of either layout."""
    w13, w2, bias13, bias2 = drawn(OSS)
    experts = GroupedExperts.from_weights(w13, w2, quant="int8", activation=OSS, bias13=bias13, bias2=bias2)
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 2, "hidden_size": HIDDEN, "max_tokens_per_rank": 8}
    x, ids = torch.randn(8, HIDDEN).bfloat16(), torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(8)])
    weights = torch.rand(8, 2)
    with MoEQuantDispatcher(**sizes, quant="int8", layout=layout) as dispatcher:
        out = dispatcher(x, ids, weights, experts).clone()
        batch, handle = dispatcher.dispatch(x, ids, weights)
        whole = experts(batch).clone()
        assert_bit_equal(dispatcher.combine(whole, handle), out)
        for span in ((0, 1), (1, 3)):
            part = experts.part(*span)(batch.part(*span))
            for expert in range(*span):
                count = int(batch.num_tokens[expert])
                start = int(batch.expert_start[expert]) if batch.expert_start is not None else 0
                found, expected = (part, whole) if layout == "ragged" else (part[expert - span[0]], whole[expert])
                assert_bit_equal(found[start : start + count], expected[start : start + count])
    products = torch.stack([limited(x, expert, w13, w2, bias13, bias2) for expert in range(EXPERTS)], 1)
    expected = (products.gather(1, ids.unsqueeze(2).expand(-1, -1, HIDDEN)) * weights.double().unsqueeze(2)).sum(1)
    assert relative_error(out, expected) < TOLERANCES["int8"]


def limited(x: torch.Tensor, expert: int, *weights: torch.Tensor) -> torch.Tensor:
    """OSS written out, for one expert, in float64."""
    w13, w2, bias13, bias2 = (w[expert].double() for w in weights)
    gate, up = (x.double() @ w13.T + bias13).unflatten(1, (-1, 2)).unbind(2)
    gate = gate.clamp(max=1.5)
    return (gate * torch.sigmoid(1.702 * gate) * (up.clamp(-1.5, 1.5) + 1)) @ w2.T + bias2


def test_rows_past_the_counts_get_no_bias():
    w13, w2, bias13, bias2 = drawn(Activation())
    experts = GroupedExperts.from_weights(w13, w2, quant="none", bias13=bias13, bias2=bias2)
    batch = make_batch("none", torch.randn(EXPERTS, ROWS, HIDDEN))
    out = torch.full((EXPERTS, ROWS, HIDDEN), -7.0).bfloat16()
    experts(batch, out=out)
    assert valid(out).isfinite().all() and (out[1] == -7).all() and (out[2, int(COUNTS[2]) :] == -7).all()


def test_only_plain_swiglu_is_fused_and_a_bias_of_w2_is_not_pushed(monkeypatch):
    monkeypatch.setattr("moequant.ops.fuses_gemm1", lambda *arguments: True)
    batch = make_batch("int8", torch.randn(EXPERTS, ROWS, HIDDEN))
    w13, w2, bias13, bias2 = drawn(Activation())

    def fuses(**settings: Any) -> bool:
        return GroupedExperts.from_weights(w13, w2, quant="int8", **settings).fuses(batch)

    assert fuses() and fuses(bias2=bias2) and fuses(activation=Activation())
    assert not fuses(bias13=bias13) and not fuses(activation="gelu") and not fuses(activation=Activation(limit=7.0))
    biased = GroupedExperts.from_weights(w13, w2, quant="int8", bias2=bias2)
    assert not can_push(biased) and can_push(GroupedExperts.from_weights(w13, w2, quant="int8", bias13=bias13, activation="gelu"))
    destinations = torch.zeros(EXPERTS, ROWS, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="bias2 is not added to rows that are pushed; call the experts, and use combine"):
        biased.gemm2_push(biased.activation(biased.gemm1(batch), batch), batch, destinations)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "bias13 of one half": ({"bias13": torch.zeros(EXPERTS, INNER)}, r"bias13 must have shape \(3, 272\), got \(3, 136\)"),
    "bias2 of integers": ({"bias2": torch.zeros(EXPERTS, HIDDEN).int()}, "bias2 must be torch.bfloat16"),
    "bias2 elsewhere": ({"bias2": torch.zeros(EXPERTS, HIDDEN, device="meta")}, "bias2 must be on cpu"),
    "interleaved, too short": ({"activation": OSS, "bias13": torch.zeros(EXPERTS, INNER)}, r"bias13 must have shape \(3, 272\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_biases_raise_a_value_error(case):
    settings, message = BAD[case]
    w13, w2, *_ = drawn(Activation())
    for quant in QUANT_DTYPES:
        plain = torch.float16 if quant == "float16" else torch.bfloat16
        with pytest.raises(ValueError, match=message):
            GroupedExperts.from_weights(w13.to(plain), w2.to(plain), quant=quant, **settings)


def test_biases_that_require_grad_never_give_a_detached_result():
    w13, w2, bias13, bias2 = drawn(Activation())
    batch = make_batch("none", torch.randn(EXPERTS, ROWS, HIDDEN))
    for name, bias in (("bias13", bias13), ("bias2", bias2)):
        biases: dict[str, Any] = {name: torch.nn.Parameter(bias)}
        experts = GroupedExperts.from_weights(w13, w2, quant="none", **biases)
        with pytest.raises(RuntimeError, match="requires grad, and this call has no backward"):
            experts(batch)
        with torch.no_grad():
            assert valid(experts(batch)).isfinite().all()
