"""Notices a lost rank while a CUDA graph is replayed, which calls nothing of a dispatcher."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence

from moequant.dispatcher import MoEQuantDispatcher
from moequant.errors import ClosedError

LOG = logging.getLogger("moequant")
# seconds between looks at words in the host's memory
INTERVAL = 1.0


def terminate() -> None:
    """Ends this worker as vLLM's executor ends it: the engine then fails its requests instead of answering them with wrong tokens."""
    os.kill(os.getpid(), signal.SIGTERM)


def watch(
    dispatchers: Sequence[MoEQuantDispatcher], end: Callable[[], None] = terminate, interval: float = INTERVAL
) -> threading.Thread:
    """Looks after dispatchers from a thread of its own, as vLLM has no hook that runs in each step. Waits for no device.

    Args:
        dispatchers: which.
        end: what is done when one has lost a rank, or has been called with wrong ids.
        interval: seconds between looks.

    Returns:
        The thread, which ends with the process, with the dispatchers, or after `end`.
    """

    def look() -> None:
        pause = threading.Event()
        while not pause.wait(interval):
            try:
                for dispatcher in dispatchers:
                    dispatcher.check(wait=False)
            except ClosedError:
                return
            except (RuntimeError, ValueError) as error:
                LOG.critical("this worker's experts give wrong results from now on, and it ends: %s", error)
                end()
                return

    thread = threading.Thread(target=look, name="moequant-watch", daemon=True)
    thread.start()
    return thread
