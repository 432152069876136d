"""Random routing."""

from __future__ import annotations

import pytest
import torch

from moequant.testing import routing


@pytest.mark.parametrize("kind", ["uniform", "zipf:1.2", "zipf:0", "one-hot", "half"])
def test_routing_gives_distinct_experts_and_normalised_weights(kind):
    ids, weights = routing(64, 6, 16, kind, torch.Generator().manual_seed(1))
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (64, 6)
    assert int(ids.min()) >= 0 and int(ids.max()) < 16
    assert all(len(set(row)) == 6 for row in ids.tolist())
    assert float(weights.min()) > 0
    torch.testing.assert_close(weights.sum(1), torch.ones(64))


def test_routing_repeats_with_the_same_seed():
    first, second = (routing(8, 2, 8, "uniform", torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_uniform_routing_loads_experts_evenly_and_zipf_does_not():
    def loads(kind):
        ids, _ = routing(4096, 2, 16, kind, torch.Generator().manual_seed(0))
        return ids.flatten().long().bincount(minlength=16).sort(descending=True).values

    assert loads("uniform")[0] < 1.25 * loads("uniform")[-1]
    zipf = loads("zipf:1.0")
    assert zipf[0] > 4 * zipf[-1]


def test_one_hot_routing_sends_every_first_choice_to_expert_0():
    ids, _ = routing(32, 3, 8, "one-hot")
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] != 0).all()


def test_half_routing_sends_half_of_the_tokens_to_expert_0():
    ids, _ = routing(33, 3, 8, "half")
    assert (ids[::2, 0] == 0).all() and (ids[1::2] != 0).all() and (ids[::2, 1:] != 0).all()


def test_routing_of_no_tokens():
    ids, weights = routing(0, 4, 8)
    assert ids.shape == weights.shape == (0, 4)


@pytest.mark.parametrize("kind", ["", "zipf", "zipf:x", "zipf:-1", "uniform:2", "nan"])
def test_routing_refuses_an_unknown_kind(kind):
    with pytest.raises(ValueError, match="kind must be"):
        routing(4, 2, 8, kind)


def test_routing_refuses_more_choices_than_experts():
    with pytest.raises(ValueError, match="top_k"):
        routing(4, 9, 8)


@pytest.mark.parametrize("sizes", [(-1, 2, 8), (1.0, 2, 8), (1, True, 8), (1, 2, 2**31)], ids=str)
def test_routing_of_other_numbers_is_refused(sizes):
    with pytest.raises(ValueError, match="must be"):
        routing(*sizes)
