"""Launches of an earlier call, made again: what a call of the experts costs the host when the same batch, weights and stream come back.

A dispatcher's batch is the same object from dispatch to dispatch while the guess of its rows is, its tensors lie where they lay, and so
do weights and workspaces. Then everything that leads to the launches, the checks, the choice of kernels and tiles, TMA descriptors,
has one result, and what is left of the call are its launches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch

if TYPE_CHECKING:
    from moequant.kernels.library.launch import Launch

# Kinds of calls that are kept for a batch: streams, weights, settings. More come from nothing that repeats.
MOST_CALLS = 32


class Repeats:
    """The launches of calls on dispatchers' batches, which go when the batch does."""

    def __init__(self) -> None:
        self._of_batch: weakref.WeakKeyDictionary[ExpertBatch, dict[tuple[Any, ...], list[Launch]]] = weakref.WeakKeyDictionary()

    def run(
        self, batch: ExpertBatch, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...], call: Callable[[], Any]
    ) -> None:
        """Makes the launches of a call, by the call itself, or, if it has come before, by repeating them.

        tensors: what it reads and writes besides the batch. settings: all else that it depends on. Both may change from call to call, and
        the tensors' addresses too. call: does nothing but launch kernels.
        """
        x = batch.values
        # a graph that is captured draws tile counters of its own
        if batch.owner is None or not x.is_cuda or ops.is_traced(x) or torch.cuda.is_current_stream_capturing():
            call()
            return
        device = x.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.run(batch, tensors, settings, call)
            return
        from moequant.kernels.library import launch

        # the launches hold the tensors, so that no address in it is another tensor's by now
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in (x, *tensors)]
        key = (*addresses, *settings, torch._C._cuda_getCurrentRawStream(device))
        calls = self._of_batch.get(batch)
        launches = None if calls is None else calls.get(key)
        if launches is not None:
            launch.repeat(launches, device)
            return
        with launch.record() as launches:
            call()
        if calls is None:
            calls = self._of_batch[batch] = {}
        if None not in launches:
            if len(calls) >= MOST_CALLS:
                calls.clear()
            calls[key] = launches
