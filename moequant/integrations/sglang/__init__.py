"""SGLang's experts on moequant: `MOEQUANT_SGLANG=1` beside `--moe-a2a-backend deepep --moe-runner-backend deep_gemm`.

SGLang finds `register` by the entry point group "sglang.srt.plugins" and calls it in each of its processes. Without the variable it does
nothing, and imports nothing of SGLang.
"""

from __future__ import annotations

import os

from moequant.integrations.versions import UNTESTED, installed, numbers, takes

VARIABLE = "MOEQUANT_SGLANG"
# hooks name SGLang's internals, which change with each of its releases; 0.5.23.post1 is one of these
WANTED = "0.5.23"


def register() -> None:
    """Registers the hooks of this integration in SGLang, if the user asks for them.

    Raises:
        SystemExit: they were asked for, and this is another SGLang, or the variable is neither 0 nor 1. SGLang logs any other error of
            a plugin and goes on without it: DeepEP would serve, and nobody would know.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked in ("", "0"):
        return
    try:
        if asked != "1":
            raise ValueError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
        require(installed("sglang"))
        from moequant.integrations.sglang import hooks

        hooks.install()
    except Exception as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def require(found: str | None) -> None:
    """Refuses an SGLang that the hooks were not written for.

    Args:
        found: its version, or None where there is none.

    Raises:
        ImportError: there is none, or it is another one.
    """
    if found is None or not takes("SGLang", found, numbers(WANTED, 3)):
        raise ImportError(
            f"moequant.integrations.sglang was written for sglang=={WANTED}, got {found or 'none'}: install that one, another "
            f"moequant, or unset {VARIABLE}; {UNTESTED}=1 tries it all the same"
        )
