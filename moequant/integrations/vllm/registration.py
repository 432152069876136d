"""What vLLM calls at its start."""

from __future__ import annotations

import logging

from moequant.integrations.versions import installed
from moequant.integrations.vllm.requirement import require

LOG = logging.getLogger("moequant")
NAME = "moequant"


def register() -> None:
    """Makes "moequant" one of vLLM's quantization methods. May be called again. Uses no GPU.

    With another vLLM than it is made for, it says so in the log and does nothing else: those who don't ask for moequant lose nothing, and
    the others read why vLLM doesn't know it.
    """
    try:
        require(installed("vllm"))
    except ImportError as error:
        LOG.warning("--quantization moequant is not there: %s", error)
        return
    from moequant.integrations.vllm import method

    method.register(NAME)
