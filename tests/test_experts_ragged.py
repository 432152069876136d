"""GroupedExperts on ragged batches: the bits of padded ones in every step, and their workspaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moequant import ExpertBatch, GroupedExperts, MoEQuantDispatcher, QuantizedTensor, quantize_expert_batch
from moequant.config import QUANT_DTYPES
from moequant.testing import assert_bit_equal, routing
from moequant.weights import parts_of
from ragged_rows import Ragged, ragged

HIDDEN, INNER, M = 144, 136, 48
COUNTS = [5, 0, 33, 16]


def make(quant: str, counts: list[int] = COUNTS, **where: int) -> tuple[GroupedExperts, ExpertBatch, ExpertBatch, Ragged]:
    """Experts, a padded batch and the ragged one of the same rows."""
    device = str(torch.get_default_device())
    w13, w2 = (torch.randn(len(counts), *shape).bfloat16() / 12 for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER)))
    x = torch.randn(len(counts), M, HIDDEN).bfloat16()
    a = x if quant == "none" else quantize_expert_batch(x, dtype=QUANT_DTYPES[quant])
    rows, sources = ragged(counts, device, **where), torch.arange(len(counts) * M).view(-1, M)
    padded = ExpertBatch(*parts_of(a), rows.num_tokens, sources, "default", 16)
    packed = parts_of(rows.operand(a))
    batch = ExpertBatch(*packed, rows.num_tokens, rows.pack(sources), "default", 16, expert_start=rows.expert_start)
    return GroupedExperts.from_weights(w13, w2, quant=quant), padded, batch, rows


def same(rows: Ragged, found: QuantizedTensor | torch.Tensor, expected: QuantizedTensor | torch.Tensor, name: str) -> None:
    for mine, theirs in zip(parts_of(found), parts_of(expected), strict=True):
        if mine is not None and theirs is not None:
            for expert, (start, count) in enumerate(rows.spans()):
                assert_bit_equal(mine[start : start + count], theirs[expert, :count], f"{name} of expert {expert}")


@pytest.mark.parametrize("quant", ["none", "int8", "fp8_e4m3fn"])
@pytest.mark.usefixtures("both_paths")
def test_every_step_has_the_bits_of_a_padded_batch(quant):
    experts, padded, batch, rows = make(quant, spare=16)
    gate_up = experts.gemm1(padded), experts.gemm1(batch)
    assert gate_up[1].shape == (rows.rows, 2 * INNER)
    same(rows, gate_up[1], gate_up[0], "gate and up")
    inner = experts.activation(gate_up[0], padded), experts.activation(gate_up[1], batch)
    assert parts_of(inner[1])[0].shape == (rows.rows, INNER)
    same(rows, inner[1], inner[0], "inner")
    out = experts.gemm2(inner[0], padded), experts.gemm2(inner[1], batch)
    assert out[1].shape == batch.values.shape
    same(rows, out[1], out[0], "output")


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.usefixtures("both_paths")
def test_a_call_writes_the_rows_of_experts_alone(quant):
    """What no expert's row is stays in an output of the caller's, with counts that reach past R."""
    experts, padded, batch, rows = make(quant, [20, 40, 16], cut=64)
    out = torch.full(batch.values.shape, -7.0, dtype=torch.bfloat16)
    assert experts(batch, out=out) is out
    same(rows, out, experts(padded), "output")
    assert (out[~rows.mask()] == -7).all()


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_part_takes_the_same_part_of_a_batch(layout):
    weights = torch.randn(4, 64, 40).bfloat16(), torch.randn(4, 40, 32).bfloat16()
    experts = GroupedExperts.from_weights(*weights, quant="none")
    settings: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 40, "max_tokens_per_rank": 9, "quant": "none"}
    with MoEQuantDispatcher(**settings, layout=layout, device="cpu") as dispatcher:
        batch, _ = dispatcher.dispatch(torch.randn(9, 40).bfloat16(), *routing(9, 2, 4))
        with pytest.raises(
            ValueError, match="experts are a part that begins at 0 of 4, the batch a part that begins at 2; take the same"
        ):
            experts.part(0, 2)(batch.part(2, 4))
        with pytest.raises(ValueError, match="begins at 2 of 4, the batch a part that begins at 1"):
            experts.part(1, 4).part(1, 2)(batch.part(1, 4).part(0, 1))
        # by another way to the same experts, and experts that are a part of nothing, or of other numbers
        last = [batch.part(2, 4).rows_of(experts.part(2, 4)(batch.part(2, 4)), expert).clone() for expert in range(2)]
        apart = GroupedExperts.from_weights(*(w[2:] for w in weights), quant="none")
        more = GroupedExperts.from_weights(*(torch.cat((w, w)) for w in weights), quant="none")
        for other in (experts.part(1, 4).part(1, 3), apart, more.part(6, 8), more.part(4, 8).part(2, 4)):
            for part in (batch.part(2, 4), batch.part(1, 4).part(1, 3)):
                for expert in range(2):
                    assert_bit_equal(part.rows_of(other(part), expert), last[expert])
        assert more.part(4, 8)(batch).shape == experts(batch).shape


def test_parts_are_the_experts_of_the_whole_in_the_same_rows():
    experts, _, batch, rows = make("int8")
    whole = experts(batch).clone()
    for begin, end in ((0, 1), (1, 4)):
        out = experts.part(begin, end)(batch.part(begin, end))
        assert out.shape == whole.shape
        for start, count in rows.spans()[begin:end]:
            assert_bit_equal(out[start : start + count], whole[start : start + count])
    # other parts' rows stay, so that one workspace serves all
    assert_bit_equal(out[rows.mask()], whole[rows.mask()])
    assert len(experts._owner.workspaces) == 1


def test_workspaces_follow_the_rows_of_a_rank_and_of_an_expert():
    experts, padded, batch, _ = make("int8")
    _, _, longer, _ = make("int8", spare=32)
    results = [experts(x) for x in (padded, batch, longer)]
    assert [tuple(x.shape) for x in results] == [tuple(x.values.shape) for x in (padded, batch, longer)]
    assert experts(batch).data_ptr() == results[1].data_ptr() and len(experts._owner.workspaces) == 3


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_pushed_rows_go_to_their_addresses_with_the_bits_of_a_call(quant, device, monkeypatch):
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1" if device == "cpu" else "0")
    with torch.device(device):
        experts, _, batch, rows = make(quant)
        expected = experts(batch)
        elsewhere = torch.full(batch.values.shape, -7.0, dtype=torch.bfloat16)
        places = torch.randperm(rows.rows)
        mask = rows.mask()
        # nothing that is no expert's row is an address
        destinations = torch.where(mask, elsewhere.data_ptr() + places * (2 * HIDDEN), 8)
        experts.push(batch, destinations)
        assert_bit_equal(elsewhere[places[mask]], expected[mask])
        assert (elsewhere[places[~mask]] == -7).all()
        with pytest.raises(ValueError, match=r"destinations must have shape \(80,\), got \(1, 80\)"):
            experts.push(batch, destinations[None])


def test_a_batch_of_other_experts_and_steps_of_padded_rows_are_refused():
    experts, padded, batch, _ = make("int8")
    fewer = batch.part(0, 2)
    with pytest.raises(ValueError, match=r"the experts are 4 of hidden size 144 .* the batch has values of shape \(80, 144\)"):
        experts(fewer)
    with pytest.raises(ValueError, match=r"gate_up must have shape \(80, 272\), got \(4, 48, 272\)"):
        experts.activation(experts.gemm1(padded), batch)
    with pytest.raises(ValueError, match=r"out must have shape \(80, 144\), got \(4, 48, 144\)"):
        experts(batch, out=torch.empty(padded.values.shape, dtype=torch.bfloat16))
    assert batch.scales is not None
    wider = replace(batch, values=batch.values[:, :128].contiguous(), scales=batch.scales[:, :1])
    with pytest.raises(ValueError, match=r"the batch has values of shape \(80, 128\)"):
        experts(wider)
