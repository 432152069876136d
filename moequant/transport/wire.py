"""The collectives of torch.distributed that a transport uses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.errors import PeerTimeoutError


class Wire:
    """The group's collectives on contiguous tensors of any type, sent as bytes: gloo knows neither float8 nor bfloat16.

    waits: on a CPU every call waits, within the dispatcher's time limit, and a lost or late rank raises PeerTimeoutError. On GPUs the
    waits are the stream's, under the limit of the process group's own watchdog.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float, waits: bool) -> None:
        self.group = group
        self.timeout = timeout
        self.waits = waits

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """out (W, ...) from each rank's x (...)."""
        if self.waits:
            self._wait("all_gather", lambda: dist.all_gather(list(out), x, group=self.group, async_op=True))
        else:
            dist.all_gather_into_tensor(out, x, group=self.group)

    def all_to_all(self, out: Tensor, x: Tensor, out_splits: list[int] | None = None, in_splits: list[int] | None = None) -> None:
        """Splits along the first dimension, equal ones by default."""
        out, x = out.view(torch.uint8), x.view(torch.uint8)
        if self.waits:
            self._wait(
                "all_to_all",
                lambda: dist.all_to_all_single(out, x, out_splits, in_splits, group=self.group, async_op=True),
            )
        else:
            dist.all_to_all_single(out, x, out_splits, in_splits, group=self.group)

    def _wait(self, name: str, start: Callable[[], Any]) -> None:
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise PeerTimeoutError(
                f"{name} did not complete within {self.timeout:g} s: a rank of the group is lost or late ({error}); "
                "close this dispatcher and build one on a new group of the ranks that are left"
            ) from error
