"""Which version of a library is installed."""

from __future__ import annotations

import torch

from moequant.integrations.versions import installed, numbers


def test_a_library_has_its_version_and_one_that_is_not_there_none():
    assert installed("torch") == torch.__version__
    assert installed("moequant-of-nobody") is None


def test_the_first_numbers_of_a_version():
    assert numbers("0.33.1+cu130", 2) == (0, 33) and numbers("0.5.23.post1", 3) == (0, 5, 23) and numbers("5.24.0", 2) > (5, 23)
