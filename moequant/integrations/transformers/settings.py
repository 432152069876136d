"""What a user can set. Defaults need no setting."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any

from moequant.checks import check_choice, check_int, check_seconds
from moequant.config import CHOICES

LOG = logging.getLogger("moequant")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are served, all of them in this process, and the same on all ranks.

    Attributes:
        max_tokens: the most tokens of a rank that go through the experts at once; more are cut into pieces. Memory follows it.
        agree: where the ranks of an expert-parallel group hold batches of their own: whether they ask each other in each layer for the
            largest, which the host waits for. False: none has more than max_tokens, and more raises ValueError.
        transport: of the dispatchers between ranks, as `moequant.MoEQuantDispatcher` takes it.
        reduce: of the dispatchers, too.
        timeout: of the dispatchers, too, in seconds.

    Raises:
        ValueError: a wrong setting.
    """

    max_tokens: int = 4096
    agree: bool = True
    transport: str = "auto"
    reduce: str = "exact"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1)
        check_choice("agree", self.agree, (True, False))
        check_choice("transport", self.transport, CHOICES["transport"])
        check_choice("reduce", self.reduce, CHOICES["reduce"])
        check_seconds("timeout", self.timeout)


_KEPT = {"settings": Settings()}


def current() -> Settings:
    """The settings of calls from now on.

    Returns:
        Them.
    """
    return _KEPT["settings"]


def configure(**changes: Any) -> Settings:
    """Changes settings, for the calls that follow.

    Args:
        **changes: attributes of `Settings`.

    Returns:
        All of them, as they are now.

    Raises:
        ValueError: there is no such setting, or its value is wrong.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise ValueError(f"the settings are {', '.join(names)}, got {', '.join(unknown)}")
    _KEPT["settings"] = dataclasses.replace(current(), **changes)
    return current()


@functools.cache
def say_once(message: str) -> None:
    """Logs what a user should know, and not in every layer and step.

    Args:
        message: one line.
    """
    LOG.warning(message)
