"""The result of several ranks, by one process; that it is right, the tests of the transports show."""

from __future__ import annotations

import pytest
import torch

from moequant.batch import ExpertBatch
from moequant.errors import InvalidExpertIdError
from moequant.testing import in_one_process


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ragged_layout_has_the_bits_of_the_padded_one(ranks):
    generator = torch.Generator().manual_seed(ranks)
    inputs = []
    for tokens in (9, 0, 12, 1)[:ranks]:
        ids = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :3]
        ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
        inputs.append((torch.randn(tokens, 130, generator=generator), ids, torch.rand(tokens, 3, generator=generator)))
    for reduce in ("exact", "per_rank"):
        settings = {"num_experts": 8, "top_k": 3, "hidden_size": 130, "max_tokens_per_rank": 12, "quant": "none", "reduce": reduce}

        def experts(batch: ExpertBatch) -> torch.Tensor:
            return batch.values * (1 + batch.experts_of_rows())[..., None]

        padded, outputs, _ = in_one_process(settings, inputs, experts)
        ragged, others, dropped = in_one_process(settings | {"layout": "ragged"}, inputs, experts)
        assert dropped == 0
        for expert in range(8):
            for name in ("values", "sources"):
                mine, other = (batch.rows_of(getattr(batch, name), expert) for batch in (ragged, padded))
                assert torch.equal(mine, other)
        for out, other in zip(outputs, others, strict=True):
            assert torch.equal(out, other)


def test_each_rank_of_a_ragged_layout_has_room_of_its_own():
    """Two ranks of two experts and 16 rows: rank 0's 20 rows don't go on among rank 1's."""
    settings = {"num_experts": 4, "top_k": 1, "hidden_size": 8, "max_tokens_per_rank": 12, "layout": "ragged", "rank_capacity": 16}
    inputs = [(torch.ones(n, 8), torch.full((n, 1), expert), torch.ones(n, 1)) for n, expert in ((12, 1), (8, 1))]
    inputs[1][1][6:] = 2
    batch, outputs, dropped = in_one_process(settings | {"quant": "none"}, inputs, lambda batch: batch.values)
    assert batch.expert_start is not None and batch.expert_start.tolist() == [0, 0, 16, 32]
    assert batch.num_tokens.tolist() == [0, 16, 2, 0] and dropped == 2
    assert outputs[0].bool().all() and outputs[1][:, 0].tolist() == [1.0] * 4 + [0.0] * 2 + [1.0] * 2


def test_in_one_process_refuses_ids_that_no_expert_has():
    settings = {"num_experts": 4, "top_k": 2, "hidden_size": 8, "max_tokens_per_rank": 4}
    for wrong in (4, -2):
        ids = torch.tensor([[0, 1], [wrong, -1]])
        with pytest.raises(InvalidExpertIdError, match=r"topk_ids must be in -1..3"):
            in_one_process(settings, [(torch.ones(2, 8), ids, torch.ones(2, 2))], lambda batch: batch.values.bfloat16())
