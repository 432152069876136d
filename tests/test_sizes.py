"""Sizes of launches are those that Triton's own functions give."""

from __future__ import annotations

import triton

from moequant.sizes import ceil_div, next_power_of_2


def test_sizes_are_tritons():
    for n in (1, 2, 3, 4, 5, 127, 128, 129, 1000, 2**20, 2**20 + 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [ceil_div(n, by) for by in (1, 7, 128)] == [triton.cdiv(n, by) for by in (1, 7, 128)]
    assert next_power_of_2(0) == 1 and ceil_div(0, 7) == 0
