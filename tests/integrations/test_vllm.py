"""The adapter of vLLM: what of it needs no vLLM here, and the tests of vllm_inside.py, which run inside vLLM's own layers."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from engines import ROOT, names_in, outcomes

from moequant.config import PADDED_TOKENS
from moequant.errors import ClosedError, PeerTimeoutError
from moequant.integrations.vllm import register, requirement
from moequant.integrations.vllm.exchange import Exchange, Sizes
from moequant.integrations.vllm.settings import Settings, settings_of
from moequant.integrations.vllm.watch import terminate, watch
from moequant.models import model_shape
from moequant.transport.select import buffer_bytes

INSIDE = "vllm_inside.py"


@pytest.fixture(scope="session")
def inside(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CACHE_ROOT": str(folder / "vllm"), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    return outcomes("vllm", INSIDE, folder, VLLM_TARGET_DEVICE="cpu", **quiet)


@pytest.mark.parametrize("name", names_in(INSIDE))
def test_inside(inside, name):
    assert not inside[name], inside[name]


@pytest.mark.parametrize("found", ["0.32.1", "0.34.0", "1.33.0"])
def test_another_minor_is_refused_in_words(found):
    with pytest.raises(ImportError, match=rf"needs vLLM 0\.33, .* got {re.escape(found)}: pip install 'vllm==0\.33\.\*'"):
        requirement.require(found)
    requirement.require("0.33.1+cu130")


def test_register_says_why_and_lets_the_engine_start(monkeypatch, caplog):
    """It runs in all processes of any engine that finds this package."""
    monkeypatch.setattr("moequant.integrations.vllm.registration.installed", lambda library: None)
    with caplog.at_level(logging.WARNING, "moequant"):
        register()
    assert "needs vLLM 0.33, and there is none" in caplog.text
    assert "vllm" not in sys.modules


def test_the_entry_point_is_register():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    assert section.partition("\n")[0] == 'moequant = "moequant.integrations.vllm:register"'


def test_settings_come_from_vllms_additional_config():
    assert settings_of({}) == settings_of({"others": 1}) == Settings()
    assert settings_of({"moequant": {"max_tokens": 2048, "reduce": "per_rank"}}) == Settings(max_tokens=2048, reduce="per_rank")
    for wrong, words in (
        ({"tokens": 1}, "may have max_tokens, transport"),
        ({"transport": "nvshmem"}, "transport must be one of"),
        (3, "got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            settings_of({"moequant": wrong})


@pytest.mark.parametrize(
    "error, ends", [(PeerTimeoutError("rank 1 is gone", 1), True), (ClosedError("closed"), False)], ids=["lost", "closed"]
)
def test_a_lost_rank_ends_the_worker_while_nothing_calls_the_dispatcher(error, ends, caplog):
    dispatcher, end = mock.Mock(), mock.Mock()
    dispatcher.check.side_effect = [0, 0, error]
    thread = watch((dispatcher,), end, interval=0.001)
    thread.join(60)
    assert not thread.is_alive() and thread.daemon
    assert dispatcher.check.call_args_list == [mock.call(wait=False)] * 3
    assert end.called == ends and ("rank 1 is gone" in caplog.text) == ends


def test_a_worker_ends_as_its_executor_ends_it():
    with mock.patch.object(os, "kill") as kill:
        terminate()
    kill.assert_called_once_with(os.getpid(), signal.SIGTERM)


def test_nothing_shadows_vllm():
    """The adapter's folder has vLLM's name, and is found by its own alone."""
    assert not any((Path(place) / "vllm" / "watch.py").exists() for place in sys.path)


def test_the_memory_of_the_page_is_what_the_dispatchers_take():
    page = (ROOT / "docs" / "serving.md").read_text()
    head, _, *rows = re.search(r"<!-- memory -->\n(.*)\n<!-- /memory -->", page, re.S)[1].splitlines()  # type: ignore[index]
    sizes = [int(cell) for cell in head.split("|")[2:-1]]
    assert sizes and Settings().max_tokens in sizes
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        shape = vars(model_shape(name)) | {"world_size": 8, "layout": "auto", "transport": "symmetric"}
        shape.pop("note")
        found = [sum(buffer_bytes(**shape, max_tokens_per_rank=few) for few in {PADDED_TOKENS, most}) for most in sizes]
        assert cells == [f"{total / 2**30:.2f}" for total in found], name


@pytest.fixture
def exchange(monkeypatch):
    """Of two ranks' sizes, without a group: dispatchers for 256 and 512 tokens, whose calls are looked at."""
    made = Exchange(
        None, Sizes(num_experts=4, top_k=2, hidden_size=16, quant="none", max_tokens=8192, padded=False), Settings(max_tokens=512)
    )
    assert [d.config.max_tokens_per_rank for d in (made.decode, made.chunks)] == [256, 512]
    made.decode, made.chunks = (mock.MagicMock(config=d.config) for d in (made.decode, made.chunks))
    return made


def calls(dispatcher: mock.MagicMock) -> list[tuple[int, int]]:
    """Of each call T and what was expected of all ranks."""
    return [(len(call.args[0]), call.kwargs["expected_tokens"]) for call in dispatcher.call_args_list]


def run(exchange: Exchange, tokens: int, across: list[int], layer: object = None) -> None:
    given = torch.zeros(tokens, 16), torch.zeros(tokens, 2, dtype=torch.int32), torch.zeros(tokens, 2)
    exchange.run(given, layer, across, torch.zeros(tokens, 16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "across, decode, chunks",
    [
        ((1, 256), [(1, 257)], []),
        ((1, 257), [], [(1, 258)]),
        # as often as the other rank's 1030 tokens take
        ((3, 1030), [], [(3, 515), (0, 512), (0, 6)]),
        ((0, 0), [], []),
    ],
    ids=str,
)
def test_the_largest_rank_says_which_dispatcher_is_called_and_how_often(exchange, across, decode, chunks):
    run(exchange, across[0], list(across))
    assert calls(exchange.decode) == decode and calls(exchange.chunks) == chunks


def test_the_first_limit_ends_when_the_first_layer_comes_again(exchange):
    first, second = object(), object()
    for layer, checks in ((first, 0), (second, 0), (first, 1), (second, 1), (first, 1)):
        run(exchange, 1, [1], layer)
        assert exchange.decode.check.call_count == exchange.chunks.check.call_count == checks


def test_experts_of_vllms_get_padded_rows_in_one_piece():
    made = Exchange(None, Sizes(num_experts=4, top_k=2, hidden_size=16, quant="none", max_tokens=512, padded=True), Settings())
    assert made.decode is made.chunks and made.chunks.config.layout == "padded" and made.chunks.config.max_tokens_per_rank == 512
