"""Which version of a library is installed. Imports none of them."""

from __future__ import annotations

import re
from importlib import metadata


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
