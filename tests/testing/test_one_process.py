"""The result of several ranks, by one process; that it is right, the tests of the transports show."""

from __future__ import annotations

import pytest
import torch

from moequant.errors import InvalidExpertIdError
from moequant.testing import in_one_process


def test_in_one_process_refuses_ids_that_no_expert_has():
    settings = {"num_experts": 4, "top_k": 2, "hidden_size": 8, "max_tokens_per_rank": 4}
    for wrong in (4, -2):
        ids = torch.tensor([[0, 1], [wrong, -1]])
        with pytest.raises(InvalidExpertIdError, match=r"topk_ids must be in -1..3"):
            in_one_process(settings, [(torch.ones(2, 8), ids, torch.ones(2, 2))], lambda batch: batch.values.bfloat16())
