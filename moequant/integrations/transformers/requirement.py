"""Which transformers this works with. Imports nothing of it."""

from __future__ import annotations

from moequant.integrations.versions import numbers

# the first whose models choose their experts and their expert parallelism by name
OLDEST = 5, 23


def require(found: str | None) -> None:
    """Refuses a transformers that models can't be served with.

    Args:
        found: its version, or None where there is none.

    Raises:
        ImportError: there is none, or it is too old.
    """
    needed = ".".join(map(str, OLDEST))
    remedy = "pip install '.[transformers]' in a checkout of moequant"
    if found is None:
        raise ImportError(f"moequant.integrations.transformers needs transformers {needed} or newer, and there is none: {remedy}")
    if numbers(found, 2) < OLDEST:
        raise ImportError(f"moequant.integrations.transformers needs transformers {needed} or newer, got {found}: {remedy}")
