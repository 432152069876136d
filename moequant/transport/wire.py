"""The collectives of torch.distributed that a transport uses."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.errors import PeerTimeoutError
from moequant.transport.rendezvous import ADVICE, StoreError, named, roll_call

# what errors of gloo say: those of the connection, and of a wait that took too long
SIGNS = ("gloo/transport", "timed out")


class Wire:
    """The group's collectives on contiguous tensors of any type, sent as bytes: gloo knows neither float8 nor bfloat16.

    waits: on a CPU every call waits, within the dispatcher's time limit, and a lost or late rank raises PeerTimeoutError. On GPUs the
    waits are the stream's, under the limit of the process group's own watchdog.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float, waits: bool) -> None:
        from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions

        self.group = group
        self.waits = waits
        # the operations themselves have the limit, not the wait for them alone: what is under way can't be called off, and neither the
        # group nor the process would end before it
        self.gather_options, self.exchange_options = AllgatherOptions(), AllToAllOptions()
        for options in (self.gather_options, self.exchange_options):
            options.asyncOp = True
        self.limit(timeout)

    def limit(self, timeout: float) -> None:
        """Of the calls from now on, in seconds."""
        self.timeout = timeout
        for options in (self.gather_options, self.exchange_options):
            options.timeout = timedelta(seconds=timeout)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """out (W, ...) from each rank's x (...)."""
        if self.waits:
            self._wait("all_gather", self.group.allgather([list(out)], [x], self.gather_options))
        else:
            dist.all_gather_into_tensor(out, x, group=self.group)

    def all_to_all(self, out: Tensor, x: Tensor, out_splits: list[int] | None = None, in_splits: list[int] | None = None) -> None:
        """Splits along the first dimension, equal ones by default."""
        out, x = out.view(torch.uint8), x.view(torch.uint8)
        if self.waits:
            self._wait("all_to_all", self.group.alltoall_base(out, x, out_splits or [], in_splits or [], self.exchange_options))
        else:
            dist.all_to_all_single(out, x, out_splits, in_splits, group=self.group)

    def _wait(self, name: str, work: Any) -> None:
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            text = str(error)
            if not any(sign in text or sign in text.lower() for sign in SIGNS):
                raise
            took = time.monotonic() - start
            if "timed out" in text.lower():
                happened = f"{name} had no answer for {took:.3g} s"
            else:
                happened = f"{name}: the connection broke after {took:.3g} s"
            raise self._fault(happened) from error

    def _fault(self, happened: str) -> PeerTimeoutError:
        """What happened, and who is lost by it, as far as the ranks that are left can say together."""
        rank, ranks = self.group.rank(), self.group.size()
        try:
            # a rank that is well comes to its next call within the limit, and notices there within the limit
            lost = roll_call(self.group, 2 * self.timeout)
        except StoreError as error:
            # of two ranks it is the other one all the same
            if ranks > 2:
                return PeerTimeoutError(f"{happened}: a rank of the group is lost, and which can't be said: {error}; {ADVICE}")
            lost = [1 - rank]
        if not lost:
            return PeerTimeoutError(
                f"{happened}, and all ranks of the group are still there: one was late, or at another call; raise timeout if it was only "
                "slow, and build a dispatcher on a new group"
            )
        if rank in lost:
            return PeerTimeoutError(
                f"{happened}: this rank, {rank} of the group, was late, and the others went on without it; raise timeout if it was only "
                "slow, and build a dispatcher on a new group",
                rank,
            )
        verb = "is" if len(lost) == 1 else "are"
        return PeerTimeoutError(f"{happened}: {named(lost)} of the group {verb} lost or late; {ADVICE}", lost[0])
