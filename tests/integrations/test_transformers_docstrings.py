"""The integration's docstrings say what the others of the package say."""

from __future__ import annotations

import pkgutil

import pytest

import test_docstrings

pytest.importorskip("transformers", "5.23")

import moequant.integrations.transformers as integration

MODULES = tuple(f"integrations.transformers.{module.name}" for module in pkgutil.iter_modules(integration.__path__))


def test_docstrings_have_every_parameter_what_is_returned_and_what_is_raised(monkeypatch):
    monkeypatch.setattr(test_docstrings, "MODULES", MODULES)
    public = dict(test_docstrings.public())
    assert len(public) > 20
    wrong = []
    for name, value in public.items():
        try:
            test_docstrings.check(name, value)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert wrong == []
