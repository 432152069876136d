"""Which version of a library is installed, and whether an adapter takes it. Imports none of them."""

from __future__ import annotations

import logging
import os
import re
from importlib import metadata

LOG = logging.getLogger("moequant")
# 1: an engine of another version than an adapter was written for is tried all the same
UNTESTED = "MOEQUANT_UNTESTED_ENGINES"


def installed(library: str) -> str | None:
    """The version of a library that is installed.

    Args:
        library: its name on PyPI.

    Returns:
        It, or None where there is none.
    """
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str, count: int) -> tuple[int, ...]:
    """The first numbers of a version.

    Args:
        version: such as "0.33.1+cu130".
        count: how many.

    Returns:
        Them, such as (0, 33).
    """
    return tuple(map(int, re.findall(r"\d+", version)[:count]))


def takes(library: str, found: str, wanted: tuple[int, ...]) -> bool:
    """Whether an adapter runs with a version of a library.

    Args:
        library: its name.
        found: its version.
        wanted: the first numbers of the versions that the adapter was written for.

    Returns:
        That it is one of those, or that the variable UNTESTED says so, and then the log does too.
    """
    if numbers(found, len(wanted)) == wanted:
        return True
    asked = os.environ.get(UNTESTED) == "1"
    if asked:
        LOG.warning(f"{library} {found} is tried because {UNTESTED}=1: the adapter was written for {'.'.join(map(str, wanted))}")
    return asked
