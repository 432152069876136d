"""Which transformers this works with. Imports nothing of it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

# the first whose models choose their experts and their expert parallelism by name
OLDEST = 5, 23


def installed() -> str | None:
    """The version of transformers that is installed.

    Returns:
        It, or None where there is none.
    """
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def require(found: str | None) -> None:
    """Refuses a transformers that models can't be served with.

    Args:
        found: its version, or None where there is none.

    Raises:
        ImportError: there is none, or it is too old.
    """
    needed = ".".join(map(str, OLDEST))
    remedy = "pip install 'moequant[transformers]'"
    if found is None:
        raise ImportError(f"moequant.integrations.transformers needs transformers {needed} or newer, and there is none: {remedy}")
    parts = re.findall(r"\d+", found)[:2]
    if tuple(map(int, parts)) < OLDEST:
        raise ImportError(f"moequant.integrations.transformers needs transformers {needed} or newer, got {found}: {remedy}")
