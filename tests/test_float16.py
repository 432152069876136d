"""quant="float16": rows, weights and everything between them in float16, with float16's accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant import Activation, CheckpointWeight, ExpertBatch, GroupedExperts, MoEQuantDispatcher
from moequant.testing import assert_bit_equal, in_one_process, relative_error

SIZES: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 72, "max_tokens_per_rank": 10}
INNER = 40
# of float64's result: four roundings of float16, where bfloat16's would be eight times as large
TOLERANCE = 8e-4


def drawn() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases, and tokens, ids and weights."""
    w13, w2 = torch.randn(4, 2 * INNER, 72) / 12, torch.randn(4, 72, INNER) / 9
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    biases = [torch.randn(4, 2 * INNER).half(), torch.randn(4, 72).half()]
    return [w13.half(), w2.half(), *biases], [torch.randn(10, 72).half(), ids, torch.rand(10, 2)]


def dense(parts: list[torch.Tensor], tokens: list[torch.Tensor]) -> torch.Tensor:
    """DeepSeek-V4's network with biases, in float64."""
    w13, w2, bias13, bias2 = (part.double() for part in parts)
    x, ids, weights = tokens[0].double(), tokens[1], tokens[2].double()
    out = torch.zeros_like(x)
    for token, k in torch.cartesian_prod(torch.arange(10), torch.arange(2)).tolist():
        expert = ids[token, k]
        gate, up = (w13[expert] @ x[token] + bias13[expert]).chunk(2)
        gate = gate.clamp(max=2.5)
        out[token] += weights[token, k] * (w2[expert] @ (gate * gate.sigmoid() * up.clamp(-2.5, 2.5)) + bias2[expert])
    return out


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "interpreted"])
def test_a_layer_has_the_accuracy_of_float16(kernels, layout, device, monkeypatch):
    if kernels and device == "cpu":
        monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")
    parts, tokens = drawn()
    mine, inputs = ([tensor.to(device) for tensor in tensors] for tensors in (parts, tokens))
    biases = dict(zip(("bias13", "bias2"), mine[2:], strict=True))
    experts = GroupedExperts.from_weights(*mine[:2], quant="float16", activation=Activation(limit=2.5), **biases)
    with MoEQuantDispatcher(**SIZES, quant="float16", layout=layout, device=device) as dispatcher:
        batch, handle = dispatcher.dispatch(*inputs)
        output = experts(batch)
        assert batch.values.dtype == experts.gemm1(batch).dtype == output.dtype == experts.output_dtype == torch.float16
        assert dispatcher.output_buffer().dtype == torch.float16
        out = dispatcher.combine(output, handle)
        assert_bit_equal(dispatcher(*inputs, experts=experts), out)
    assert out.dtype == torch.float16
    assert relative_error(out.cpu(), dense(parts, tokens)) < TOLERANCE


def test_rows_are_the_tokens_bits_where_bfloat16_would_round_them():
    def doubled(batch: ExpertBatch) -> torch.Tensor:
        return 2 * batch.values

    _, tokens = drawn()
    with MoEQuantDispatcher(**SIZES, quant="float16", device="cpu") as dispatcher:
        out = dispatcher(*tokens, experts=doubled)
        batch, _ = dispatcher.dispatch(*tokens)
    expected, outputs, _ = in_one_process(SIZES | {"quant": "float16"}, [tokens], doubled)
    assert_bit_equal(out, outputs[0])
    entry = int(batch.sources[1, 0])
    assert_bit_equal(batch.values[1, 0], tokens[0][entry // 2])
    assert_bit_equal(batch.values[1, 0], expected.values[1, 0])
    assert not torch.equal(tokens[0], tokens[0].bfloat16().half())


def test_batches_and_weights_of_the_two_plain_types_do_not_mix():
    parts, tokens = drawn()
    experts = GroupedExperts.from_weights(*(part.bfloat16() for part in parts[:2]), quant="none")
    with MoEQuantDispatcher(**SIZES, quant="float16", device="cpu") as dispatcher:
        batch, _ = dispatcher.dispatch(*tokens)
        with pytest.raises(
            ValueError, match=r"in torch.bfloat16, the batch has values of .* in torch.float16; give .* the same quant"
        ):
            experts(batch)
        halves = GroupedExperts.from_weights(*parts[:2], quant="float16")
        with pytest.raises(ValueError, match="out must be torch.float16, got torch.bfloat16"):
            halves(batch, out=torch.zeros(batch.values.shape).bfloat16())
    with pytest.raises(ValueError, match="w13 and w2 must have one dtype, got torch.float16 and torch.bfloat16"):
        GroupedExperts(parts[0], parts[1].bfloat16())


def test_a_checkpoint_is_widened_into_float16():
    values = torch.randn(4, 72, INNER).to(torch.float8_e4m3fn)
    w13 = CheckpointWeight(torch.randn(4, 2 * INNER, 72).to(torch.float8_e4m3fn), torch.ones(()), (None, None))
    w2 = GroupedExperts.from_checkpoint(w13, CheckpointWeight(values, torch.tensor(0.3), (None, None)), quant="float16").w2
    assert isinstance(w2, torch.Tensor)
    assert_bit_equal(w2, (values.float() * torch.tensor(0.3)).half())
