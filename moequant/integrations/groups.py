"""What layers of one process share, by the group of ranks that share the experts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch.distributed as dist

Key = TypeVar("Key")
Value = TypeVar("Value")


class ByGroup(Generic[Key, Value]):
    """What the ranks of a group have agreed on, which ends with the group."""

    def __init__(self) -> None:
        self._alone: dict[Key, Value] = {}
        self._known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Key, Value]] = weakref.WeakKeyDictionary()

    def of(self, group: dist.ProcessGroup | None) -> dict[Key, Value]:
        """A group's.

        Args:
            group: of ranks, or None for this rank alone.

        Returns:
            It, which may be added to.
        """
        return self._alone if group is None else self._known.setdefault(group, {})

    def values(self) -> Iterator[Value]:
        """That of all groups.

        Yields:
            Each value.
        """
        for known in (self._alone, *self._known.values()):
            yield from known.values()
