"""The life of a dispatcher: its slots and handles, what it hears of faults, who may call it when, and its end."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.batch import DispatchHandle
from moequant.checks import check_counted, check_int, check_is, check_tokens, with_rows
from moequant.config import DispatcherConfig
from moequant.errors import ClosedError, OutOfStepError, PeerTimeoutError, StaleHandleError
from moequant.traced import untraced
from moequant.transport import guards
from moequant.transport.agreement import agree, attempt
from moequant.transport.base import Slot, Stage, Transport
from moequant.transport.calls import LAYERS, Call
from moequant.transport.peer_memory import host_words, view_of
from moequant.transport.select import make_transport
from moequant.transport.symmetric import SymmetricTransport
from moequant.transport.warm_up import warm_up

if TYPE_CHECKING:
    from typing_extensions import Self

Method = TypeVar("Method", bound=Callable[..., Any])


def step(method: Method) -> Method:
    """A method that launches kernels: one thread's at a time, on the dispatcher's device, whichever is current; a fault that it raises
    stays. A graph break for torch.compile."""

    @untraced
    @functools.wraps(method)
    def guarded(self: Lifecycle, *args: Any, **kwargs: Any) -> Any:
        try:
            # a context of torch.cuda costs more than the question
            if self._gpu is None or self._gpu == torch.cuda.current_device():
                with self._turn:
                    return method(self, *args, **kwargs)
            with self._turn, torch.cuda.device(self.device):
                return method(self, *args, **kwargs)
        except (PeerTimeoutError, OutOfStepError) as error:
            self._fault = self._fault or error
            raise

    return cast(Method, guarded)


class Lifecycle:
    """What a dispatcher is besides its steps. `device` is set first, the other attributes by the constructor that follows."""

    config: DispatcherConfig
    # among all dispatchers of the process, and among those of the group
    _number: int
    _ordinal: int
    _group: dist.ProcessGroup | None
    _rank: int
    _transport: Transport
    # of the transport's own kind
    _slots: list[Any]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpu = device.index if device.type == "cuda" else None
        self._closed = False
        self._fault: PeerTimeoutError | OutOfStepError | None = None
        self._turn = threading.RLock()
        # ids out of range, rows without room and ranks out of step, and what of them was reported
        self._status = host_words(3, torch.int64, device)
        self._reported = [0, 0, 0]
        self._counted = view_of(self._status)

    def _build(self, config: DispatcherConfig, generation: int = 0) -> None:
        """Makes the buffers. generation: dispatches that each slot has served, so that older handles stay stale."""
        self.config = config
        self._transport = make_transport(config, self._rank, self.device, self._status, self._group)
        self._slots = [self._transport.allocate(number) for number in range(config.slots)]
        if self.device.type == "cuda":
            warm_up(self._transport, config, self._slots[0], self.device)
        self._transport.start()
        for slot in self._slots:
            slot.generation = generation

    @step
    def ensure(self, max_tokens_per_rank: int) -> None:
        """Makes room for so many tokens of a rank, if there isn't already. Collective where there isn't.

        Growing waits for the device and takes new buffers: batches and handles of before are stale, and graphs that were captured with
        them must not be replayed any more. A backward whose forward came before raises RuntimeError, unless it keeps no rows
        (`MoEExperts(recompute=True)`).

        Args:
            max_tokens_per_rank: the largest T, the same on all ranks.

        Raises:
            RuntimeError: there is no room, or a graph is being captured, which would keep the addresses of the old buffers.
            ConfigMismatchError: another rank asks for another number.
            ValueError: no positive integer, or more rows than can be numbered.
        """
        self._check_open()
        check_int("max_tokens_per_rank", max_tokens_per_rank, 1)
        if max_tokens_per_rank <= self.config.max_tokens_per_rank:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("buffers can't grow while a graph is captured; call ensure before")
        alone = self.config.world_size == 1
        mine = attempt(lambda: replace(self.config, max_tokens_per_rank=max_tokens_per_rank), alone)
        agreed, self._ordinal = agree(mine, self.device, self._group, self._rank, self.config.world_size)
        generation = 1 + max(slot.generation for slot in self._slots)
        # what fails from here on leaves nothing behind
        self.close()
        with torch.inference_mode(False), torch.no_grad():
            self._build(agreed, generation)
        self._closed = False

    def check(self, *, wait: bool = True) -> int:
        """Reports what dispatches since the last check could not raise. Not collective. The first one that waits ends `first_timeout`.

        Args:
            wait: for the device. Otherwise what is known by now is reported, and the rest by a later check, or the next dispatch:
                words in the host's memory are read, no more, so that it can be asked between replays of a CUDA graph, which calls
                nothing of the dispatcher, from any thread, and while a graph is captured.

        Returns:
            The number of rows without room, of all ranks and experts.

        Raises:
            InvalidExpertIdError: topk_ids of this rank had ids outside -1..E-1.
            CapacityOverflowError: rows had no room and on_overflow is "error".
            OutOfStepError: ranks made different calls.
            PeerTimeoutError: a rank was lost.
            GuardError: with MOEQUANT_CHECK_GUARDS=1 in the environment, where a byte between buffers was overwritten.
        """
        check_is("wait", wait, bool)
        self._check_open()
        return self._report(wait)

    def _report(self, wait: bool) -> int:
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._raise_fault()
        if wait:
            self._transport.settle()
        if wait and guards.wanted():
            self._transport.check_guards()
        invalid, dropped, _ = self._news()
        self._reported = [self._reported[0] + invalid, self._reported[1] + dropped, 0]
        check_counted(self.config, invalid, dropped, self._transport.by_source)
        return dropped

    def _news(self) -> list[int]:
        """What the device counted since the last report, as far as it has come: ids out of range, rows without room, mismatched."""
        invalid, dropped, mismatched = (now - before for now, before in zip(self._counted, self._reported, strict=True))
        return [invalid if self.config.on_invalid_id == "error" else 0, dropped, mismatched]

    def close(self) -> None:
        """Waits for the device and lets go of the buffers, whose memory is free when the last batch is gone that lies in them.

        Graphs that were captured with them must not be replayed any more. Not collective, may be called twice; every other call
        raises ClosedError from then on.

        Raises:
            GuardError: as for `check`.
        """
        if self._closed:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._closed = True
        self._slots = []
        self._transport.owner.workspaces.clear()
        try:
            if guards.wanted():
                self._transport.check_guards()
        finally:
            self._transport.close()

    def __copy__(self) -> NoReturn:
        raise RuntimeError(
            "a dispatcher can't be copied: its buffers are shared with other ranks; let the copies of a model share one, or build another"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        self.__copy__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes, and, unless an error is under way, reports as `check` does, dropped rows too."""
        try:
            if kind is None and not self._closed and self._fault is None:
                self._report(wait=True)
        finally:
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this dispatcher is closed; build a new one")
        earlier = self._fault
        if earlier is not None:
            if isinstance(earlier, PeerTimeoutError):
                raise PeerTimeoutError(f"this dispatcher lost a rank earlier: {earlier}", earlier.rank)
            raise OutOfStepError(f"this dispatcher's ranks were out of step earlier: {earlier}")
        self._raise_fault()

    def _raise_fault(self) -> None:
        """Raises what the transport's kernels have noticed, as far as they have come."""
        # another thread may have noticed one meanwhile
        self._fault = self._fault or self._transport.fault()
        if self._fault is None and self._counted[2]:
            self._fault = OutOfStepError(
                "ranks of the group made different calls, and results since the last check are wrong: one rank raised an error, skipped "
                "a call that the others made, made another, or returned its experts' rows in another type or way. Build a new dispatcher"
            )
        if self._fault is not None:
            raise self._fault

    def _slot(self, slot: int) -> Any:
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < len(self._slots):
            raise ValueError(
                f"slot must be in 0..{len(self._slots) - 1}, got {slot}; the constructor's slots says how many there are"
            )
        return self._slots[slot]

    def _count_refusal(self) -> None:
        """A call that is refused counts too: ranks that go on without this one must notice."""
        for slot in self._slots:
            if slot.calls is not None:
                slot.calls.add_(1)

    def _begin(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        slot: int,
        layer: int | None,
        first_experts: int = 0,
        expected_tokens: int | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
        """The start of a dispatch: the inputs are checked and made contiguous, and the slot's last one is forgotten."""
        self._check_open()
        try:
            invalid, dropped, _ = self._news()
            if invalid or (dropped and self.config.on_overflow == "error"):
                self._report(wait=False)
            buffers = self._slot(slot)
            if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
                raise ValueError(f"layer must be the number of a layer, from 0 on, or None, got {layer!r}")
            check_tokens(self.config, self.device, hidden_states, topk_ids, topk_weights)
            if expected_tokens is not None:
                check_int("expected_tokens", expected_tokens)
        except Exception:
            self._count_refusal()
            raise
        if buffers.stage is Stage.SENT:
            self._transport.give_up(buffers)
        buffers.call = Call(self._ordinal, slot, first_experts, 0 if layer is None else 1 + layer % LAYERS)
        buffers.generation += 1
        buffers.expected_rows = None if expected_tokens is None else self.config.mean_rows(expected_tokens)
        buffers.stage = Stage.NONE
        buffers.pushing = buffers.pending = buffers.second = None
        return (with_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()), buffers

    def _handle(
        self, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor, slot: Slot, state: Any, stage: Stage
    ) -> DispatchHandle:
        """The handle of a dispatch that has come so far. On a CPU, where nothing has to be waited for, raises what it has counted."""
        if self.device.type == "cpu" and self.config.on_overflow == "error":
            self._report(wait=False)
        slot.stage = stage
        return DispatchHandle(topk_weights, hidden_states.dtype, self._number, slot.number, slot.generation, state)

    def _repeated(self, slot: Slot, inputs: tuple[Tensor, ...], settings: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        """What a step of the transport returns, where it may be by the launches of the same step before."""
        if not self._transport.repeats:
            return call()
        return slot.repeats.run(inputs[0], inputs, (*settings, self._transport.wait_limit), call)

    def _come_again(self, slot: Slot) -> None:
        """Before a combine: if it isn't the dispatch's first, waits until all ranks have got that one's sums."""
        if slot.stage is Stage.COMBINED:
            self._transport.again(slot)
            slot.stage = Stage.LANDED

    def _slot_of(self, handle: DispatchHandle, step: str | None = None) -> Any:
        """The slot of a handle that is still good, and ready for a step."""
        self._check_open()
        if not isinstance(handle, DispatchHandle):
            raise ValueError(f"handle must be the DispatchHandle that dispatch returned, got {type(handle).__name__}")
        if handle.dispatcher != self._number:
            raise StaleHandleError(
                "the handle was made by another dispatcher; give combine the handle that this one's dispatch returned"
            )
        buffers = self._slots[handle.slot]
        if handle.generation != buffers.generation:
            raise StaleHandleError(
                f"the handle is of dispatch {handle.generation} of slot {handle.slot}, whose buffers a later dispatch, or "
                "ensure, has taken; combine before the next dispatch, or use slots=2"
            )
        if step is not None:
            buffers.check_step(step)
        return buffers

    def _symmetric(self) -> SymmetricTransport:
        if not isinstance(self._transport, SymmetricTransport):
            raise RuntimeError(f'only transport "symmetric" can do this, not "{self.config.transport}"')
        return self._transport
