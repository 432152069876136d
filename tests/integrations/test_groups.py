"""What layers of one process share, by group."""

from __future__ import annotations

import gc
from typing import Any

from moequant.integrations.groups import ByGroup


class Group:
    """Stands for a group of ranks."""


def test_what_a_group_has_ends_with_it_and_what_a_rank_alone_has_does_not():
    known: ByGroup[str, int] = ByGroup()
    groups: list[Any] = [Group(), Group()]
    known.of(None)["a"] = 1
    known.of(groups[0])["a"], known.of(groups[1])["a"] = 2, 3
    assert known.of(groups[0]) == {"a": 2} and known.of(None) == {"a": 1} and sorted(known.values()) == [1, 2, 3]
    groups.clear()
    gc.collect()
    assert list(known.values()) == [1]
