"""Which version of a library is installed, and which ones adapters take."""

from __future__ import annotations

import logging
from importlib import metadata

import engines
import pytest

from moequant.integrations import sglang
from moequant.integrations.versions import UNTESTED, installed, numbers, takes
from moequant.integrations.vllm import requirement


def test_a_library_has_its_version_and_one_that_is_not_there_none():
    # which may have a local part that the module has, or not
    assert installed("torch") == metadata.version("torch")
    assert installed("moequant-of-nobody") is None


def test_the_first_numbers_of_a_version():
    assert numbers("0.33.1+cu130", 2) == (0, 33) and numbers("0.5.23.post1", 3) == (0, 5, 23) and numbers("5.24.0", 2) > (5, 23)


def test_another_version_is_taken_where_the_user_says_so_and_the_log_does(monkeypatch, caplog):
    for value, taken in (("0", False), ("1", True)):
        monkeypatch.setenv(UNTESTED, value)
        assert takes("vLLM", "0.33.1", (0, 33)) and not caplog.records
        with caplog.at_level(logging.WARNING, "moequant"):
            assert takes("vLLM", "0.34.0", (0, 33)) is taken
        assert [record.getMessage() for record in caplog.records] == (
            ["vLLM 0.34.0 is tried because MOEQUANT_UNTESTED_ENGINES=1: the adapter was written for 0.33"] if taken else []
        )
    requirement.require("0.34.0")
    sglang.require("0.6.0")
    monkeypatch.delenv(UNTESTED)
    for require, version in ((requirement.require, "0.34.0"), (sglang.require, "0.6.0")):
        with pytest.raises(ImportError, match="MOEQUANT_UNTESTED_ENGINES=1 tries it all the same"):
            require(version)


@pytest.mark.parametrize("there", [("0.33.9", "0.5.23.post1", "0.3.1"), ("0.34.0", "0.5.24", "0.3.0")], ids=["none is", "two are"])
def test_newer_interfaces_are_told_of_and_printed_as_what_is_tested_next(there, monkeypatch, capsys):
    found = dict(zip(engines.TESTED, there, strict=True))
    monkeypatch.setattr(engines, "newest", found.__getitem__)
    newer = there[0] == "0.34.0"
    assert engines.main(["--newest"]) == newer
    said = capsys.readouterr()
    assert said.out == f"vllm=={there[0]} sglang=={there[1]} torchtitan=={there[2]}\n"
    assert [line.split(" is")[0] for line in said.err.splitlines()] == ["engines: vllm 0.34.0", "engines: sglang 0.5.24"] * newer
