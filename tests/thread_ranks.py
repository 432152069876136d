"""Threads with one store that stand in for the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch._C._distributed_c10d import HashStore

from moequant.errors import PeerTimeoutError


class Member:
    """One rank's view of a group."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self.get_group_store, self.rank, self.size = lambda: store, lambda: rank, lambda: ranks


def members(ranks: int, store: Any = None) -> list[Any]:
    store = HashStore() if store is None else store
    return [Member(store, rank, ranks) for rank in range(ranks)]


def on_each(group: list[Any], call: Callable[[Any], Any]) -> list[Any]:
    """What a call gives, or raises, on each of these ranks at once."""

    def outcome(member: Any) -> Any:
        try:
            return call(member)
        except (ValueError, PeerTimeoutError) as error:
            return error

    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(outcome, group))
