"""torchtitan's MoE layer with moequant's dispatcher instead of its own (torchtitan_inside.py), on one rank and on two."""

from __future__ import annotations

import importlib.util
from typing import Any

import engines
import pytest

# how many, and which of them
RANKS = ["1-0", "2-0", "2-1"]


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[str, Any]:
    """What came of each rank."""
    return engines.results("torchtitan", "torchtitan_inside.py", tmp_path_factory.getbasetemp())


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is not None, reason="torchtitan is installed")
def test_without_torchtitan_the_import_says_what_is_wanted():
    with pytest.raises(ImportError, match=r"written for torchtitan 0\.3, got none: pip install 'torchtitan==0\.3\.\*'"):
        importlib.import_module("moequant.integrations.torchtitan")


@pytest.mark.parametrize("rank", RANKS)
def test_output_and_all_gradients_are_those_of_torchtitans_own_dispatcher(found, rank):
    what = found[rank]
    assert what["class"] == "MoEQuantTokenDispatcher"
    # more tokens than the dispatcher was made for, and fewer
    for length in ("5", "11", "3"):
        errors = what[length]
        weights = {name for name in errors if name not in ("output", "x")}
        assert len(weights) == 4
        # of rows that are summed in float32 here, and in bfloat16 there
        assert 0 < errors["output"] < 0.005 and 0 < errors["x"] < 0.005
        # half of bfloat16's step, where rows lie at other places of the same product
        assert max(errors[name] for name in weights) < 0.002
    assert what["no grad"]["output"] < 0.005


@pytest.mark.multigpu
def test_each_rank_was_on_a_gpu(found):
    assert [found[rank]["device"] for rank in RANKS] == ["cuda"] * 3


@pytest.mark.parametrize("rank", RANKS)
def test_recomputed_layers_have_the_same_bits(found, rank):
    assert all(found[rank][f"{length} {way}"] for length in (5, 11, 3) for way in ("full", "selective"))


@pytest.mark.parametrize("rank", RANKS)
def test_layers_share_a_dispatcher_that_grows(found, rank):
    assert found[rank]["dispatchers"] == 2 and found[rank]["room"] == 22


def test_experts_that_want_their_rows_at_multiples_of_32_and_unknown_settings_are_refused(found):
    (multiple, unknown), *others = (found[rank]["refused"] for rank in RANKS)
    assert multiple.startswith("ValueError: an expert's rows begin at a multiple of 16, and these experts want 32")
    assert "deltas for fields not on" in unknown and "capacity" in unknown
    assert others == [[multiple, unknown]] * 2


def test_another_torchtitan_is_refused(found):
    words = "ImportError: moequant.integrations.torchtitan was written for torchtitan 0.3, got 0.2.2"
    assert all(found[rank]["other version"].startswith(words) for rank in RANKS)
