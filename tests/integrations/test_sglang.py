"""SGLang's experts on moequant: registration, and inside SGLang's own layer (sglang_inside.py), on one rank and on two."""

from __future__ import annotations

import re
import sys
from typing import Any

import engines
import pytest

from moequant.integrations import sglang


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What came of each case, by rank."""
    cases: dict[str, list[dict[str, Any]]] = {}
    written = engines.results("sglang", "sglang_inside.py", tmp_path_factory.getbasetemp(), SGLANG_PLUGINS="moequant")
    for name, what in written.items():
        cases.setdefault(name.rpartition("-")[0], []).append(what)
    return cases


def test_without_the_variable_nothing_is_imported_and_nothing_raised(monkeypatch):
    for value in (None, "", "0"):
        monkeypatch.setattr(sglang, "installed", lambda library: pytest.fail("asked for SGLang's version"))
        monkeypatch.delenv(sglang.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(sglang.VARIABLE, value)
        sglang.register()
    assert "moequant.integrations.sglang.hooks" not in sys.modules


@pytest.mark.parametrize("version", [None, "0.5.22", "0.6.0"])
def test_another_sglang_ends_a_start_that_asked_for_moequant(monkeypatch, version):
    monkeypatch.setenv(sglang.VARIABLE, "1")
    monkeypatch.setattr(sglang, "installed", lambda library: version)
    words = f"ImportError: moequant.integrations.sglang was written for sglang=={sglang.WANTED}, got {version or 'none'}"
    with pytest.raises(SystemExit, match=re.escape(words)):
        sglang.register()


def test_a_post_release_of_it_is_none_of_another():
    for version in ("0.5.23", "0.5.23.post1", "0.5.23+cu130"):
        sglang.require(version)


def test_a_variable_that_is_neither_0_nor_1_ends_a_start(monkeypatch):
    monkeypatch.setenv(sglang.VARIABLE, "true")
    with pytest.raises(SystemExit, match="MOEQUANT_SGLANG must be 0 or 1, got 'true'"):
        sglang.register()


def test_the_tested_engine_is_the_one_that_the_hooks_were_written_for():
    assert engines.TESTED["sglang"][0] == sglang.WANTED


def test_an_installed_plugin_leaves_sglang_as_it_is_unless_it_is_asked_for(found):
    (what,) = found["not_asked"]
    assert what == {"loaded": True, "hooks": [], "imported": [], "class": "DeepEPMoE", "fused": False}


def test_docstrings_have_every_parameter_what_is_returned_and_what_is_raised(found):
    (what,) = found["docstrings"]
    assert what["looked at"] > 20 and what["wrong"] == []


def test_a_draft_model_with_another_backend_gets_sglangs_own_classes(found):
    for what in found["refused"]:
        assert (what["draft"], what["draft class"]) == ("StandardDispatcher", "FusedMoE")


def test_one_rank_has_the_layer_of_a_dense_reference_in_fp8_and_bfloat16_and_with_a_limit(found):
    (what,) = found["alone"]
    assert 0.03 < what["fp8"] < 0.05 and what["bfloat16"] < 0.005 and what["limit"] < 0.005
    # which does limit something
    assert what["no limit"] > 0.05
    assert what["rooms"] == [256, 2048]


def test_two_ranks_have_it_with_uneven_tokens_without_any_with_padding_and_in_chunks(found):
    for what in found["together"]:
        assert set(what["errors"]) == {"decode", "full", "one idle", "all idle", "in chunks", "other layer"}
        assert max(what["errors"].values()) < 0.05 and what["errors"]["other layer"] == 0
        assert what["shared"] and what["rooms"] == [4, 16]


@pytest.mark.multigpu
def test_each_rank_was_on_a_gpu(found):
    assert {what["device"] for case in ("alone", "together", "overlapped") for what in found[case]} == {"cuda"}


def test_ranks_make_as_many_calls_and_tell_the_gemms_how_many_tokens_all_have(found):
    mine, other = (what["calls"] for what in found["together"])
    assert (mine["decode"], other["decode"]) == ([[4, 4, 7]], [[4, 3, 7]])
    assert (mine["one idle"], other["one idle"]) == ([[16, 16, 16]], [[16, 0, 16]])
    assert (mine["all idle"], other["all idle"]) == ([[4, 0, 0]], [[4, 0, 0]])
    assert mine["in chunks"] == [[16, 16, 19], [16, 16, 16], [16, 8, 8]]
    assert other["in chunks"] == [[16, 3, 19], [16, 0, 16], [16, 0, 8]]


def test_numbers_of_another_step_are_refused_and_no_token_is_lost(found):
    for what in found["together"]:
        assert what["stale"].startswith("RuntimeError: SGLang says that the 2 ranks have [16, 16] tokens, and this one has 17")


def test_weights_that_sglang_loads_are_those_of_quantize_weight_and_are_not_copied(found):
    for what in found["together"]:
        assert what["equal"] == {"w13": True, "w2": True} and what["in place"]


def test_graphs_are_captured_with_the_short_limit_and_a_replay_asks_for_lost_ranks_without_waiting(found):
    for what in found["together"]:
        # of both dispatchers, before the capture and before the replay
        assert what["asked"] == [{}, {}, {"wait": False}, {"wait": False}]
        assert what["lost"] == "PeerTimeoutError: this dispatcher lost a rank earlier: rank 1 did not come"


@pytest.mark.parametrize(
    "case, ranks",
    [
        pytest.param("captured_alone", 1, marks=pytest.mark.gpu, id="one rank"),
        pytest.param("captured", 2, marks=pytest.mark.multigpu, id="two ranks"),
    ],
)
def test_a_captured_layer_has_the_bits_of_calls_with_uneven_tokens_and_without_any(found, case, ranks):
    assert len(found[case]) == ranks
    for what in found[case]:
        assert set(what["errors"]) == set(what["equal"]) == {"full", "uneven", "one idle", "all idle", "full again"}
        assert max(what["errors"].values()) < 0.05 and all(what["equal"].values()) and what["lost"] == 0


def test_two_batches_under_way_have_the_bits_of_one_after_the_other_in_deepeps_format(found):
    for what in found["overlapped"]:
        # on a GPU tiles follow the tokens that are expected, of which a half knows its own alone
        assert what["equal"] == [True, True] or (what["device"] == "cuda" and max(what["apart"]) < 0.005)
        assert what["passed on"]
        assert what["format"] == "deepep_ll"
        assert what["shapes"] == [[4, 128, 256], [4, 128, 2], [4]]
        assert what["types"] == ["torch.float8_e4m3fn", "torch.float32", "torch.int32"]
    # tokens of both ranks but the last of each, which are padding, to all experts
    rows = [what["rows"] for what in found["overlapped"]]
    assert [sum(both) for both in zip(*rows, strict=True)] == [11 * 3, 2 * 3]


@pytest.mark.parametrize(
    "case, words",
    [
        ("experts", "each of 2 ranks has as many experts, got 9: take another --tp"),
        ("activation", "SGLang's deep_gemm runner has gated silu alone, got 'situ'"),
        ("gate", "this model needs another backend"),
        ("runner", "takes the place of --moe-runner-backend deep_gemm, and this layer has 'triton': add it"),
        ("shared", "ranks have nothing but their share of routed experts, got 4 of 8: leave shared experts unfused"),
        ("elastic", "got 5 of 8"),
        ("on input", "routing weights are applied to what experts return"),
        ("blocks", "fp8 experts have blocks of 128x128, got weight_block_size=[32, 32]"),
        ("mxfp8", "take such a checkpoint"),
        ("method", "experts are in fp8 with blocks of 128x128, bfloat16 or float16, got object"),
        ("single batch", "leave out --enable-single-batch-overlap"),
        ("two batches", "add --deepep-mode low_latency"),
        ("enable_eplb", "leave out --enable-eplb"),
        ("enable_lora", "leave out --enable-lora"),
        ("hidden counts", "leave out --moe-dense-tp-size or --enable-dp-lm-head"),
        ("backend", "takes the place of --moe-a2a-backend deepep, and this server has 'none': add it"),
    ],
    ids=lambda value: value.replace(" ", "_") if len(value) < 15 else "",
)
def test_what_moequant_does_not_have_is_refused_before_weights_are_loaded(found, case, words):
    for what in found["refused"]:
        assert what[case].startswith("ValueError: MOEQUANT_SGLANG=1: ") and words in what[case]
        assert what[case].endswith(", or unset MOEQUANT_SGLANG")
