"""Which vLLM this works with. Imports nothing of it."""

from __future__ import annotations

from moequant.integrations.versions import UNTESTED, takes

# the minor version whose classes are derived from here; others have other classes
MINOR = 0, 33


def require(found: str | None) -> None:
    """Refuses a vLLM of another minor version.

    Args:
        found: its version, or None where there is none.

    Raises:
        ImportError: there is none, or another.
    """
    wanted = ".".join(map(str, MINOR))
    remedy = f"pip install 'vllm=={wanted}.*', or a moequant made for yours"
    if found is None:
        raise ImportError(f"moequant.integrations.vllm needs vLLM {wanted}, and there is none: {remedy}")
    if not takes("vLLM", found, MINOR):
        raise ImportError(
            f"moequant.integrations.vllm needs vLLM {wanted}, as each minor version moves what it derives from, got {found}: {remedy}; "
            f"{UNTESTED}=1 tries it all the same"
        )
