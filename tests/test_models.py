"""Shapes of published models."""

from __future__ import annotations

import pytest

from moequant.models import MODELS, model_shape


def test_model_shapes_are_found_by_name():
    assert model_shape("deepseek-v3") == MODELS["deepseek-v3"]
    with pytest.raises(ValueError, match="model must be one of deepseek-v3"):
        model_shape("deepseek")
