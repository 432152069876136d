"""What a transport is to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moequant.batch import ExpertBatch, Owner
from moequant.config import DispatcherConfig
from moequant.errors import CallOrderError, PeerTimeoutError
from moequant.repeats import Repeats
from moequant.transport.buffers import Buffers, BufferSpec
from moequant.transport.calls import Call

Held = TypeVar("Held", bound=Buffers[Tensor])


class Stage(Enum):
    """How far a slot's last dispatch has come."""

    NONE = "nothing was dispatched"
    SENT = "after dispatch_send"
    FIRST = "after dispatch_first"
    LANDED = "its batch is there"
    RETURNING = "after combine_send"
    COMBINED = "it was combined"


class Follows(NamedTuple):
    """Of a step after a dispatch: the stages that it follows, the stage it leads to, if another, and whether rows are being pushed
    before it (None: that doesn't matter)."""

    stages: tuple[Stage, ...]
    leads_to: Stage | None
    pushing: bool | None


THERE = Stage.LANDED, Stage.COMBINED
STEPS = {
    "dispatch_recv": Follows((Stage.SENT,), Stage.LANDED, None),
    "dispatch_second": Follows((Stage.FIRST,), Stage.LANDED, None),
    "begin_push": Follows((Stage.FIRST, *THERE), None, False),
    "combine": Follows(THERE, Stage.COMBINED, False),
    "combine_send": Follows(THERE, Stage.RETURNING, False),
    "combine_recv": Follows((Stage.RETURNING,), Stage.COMBINED, False),
    "combine_pushed": Follows((Stage.LANDED,), Stage.COMBINED, True),
}
# what is missing before a step, where that does not follow from the stage
BEFORE = {
    "dispatch_recv": "dispatch_send",
    "dispatch_second": "dispatch_first",
    "combine_recv": "combine_send",
    "combine_pushed": "push or begin_push",
}
NEXT = {Stage.SENT: "dispatch_recv", Stage.FIRST: "dispatch_second", Stage.RETURNING: "combine_recv"}


class Taken(NamedTuple):
    """The part of a slot's buffers that so many tokens take: rows_in_expert and rows (T, K), partials (T, W) where there are any."""

    tokens: int
    rows_in_expert: Tensor
    rows: Tensor
    partials: Tensor


class Slot(Generic[Held]):
    """One slot's buffers, how many dispatches it has served, and how far the last one has come."""

    def __init__(self, number: int, buffers: Held, calls: Tensor | None = None) -> None:
        """calls: (1,) int32 on the device, how many dispatches the slot has seen; None where no other rank asks."""
        self.number = number
        self.buffers = buffers
        self.calls = calls
        # as the batch has them, (L, M, G) or (R, G)
        self.scales = None if buffers.scales is None else buffers.scales.mT
        # where expert output is best written; made when it is asked for
        self.output: Tensor | None = None
        self._taken = self._take(0)
        self.call = Call(0, number)
        # by the guess of their rows: the same views, so that what was found out about a batch holds for the next one
        self.batches: dict[int, ExpertBatch] = {}
        # that guess, where the caller knows better than this rank's own tokens tell
        self.expected_rows: int | None = None
        self.repeats = Repeats()
        self.generation = 0
        self.stage = Stage.NONE
        # the type of the rows that are being pushed
        self.pushing: torch.dtype | None = None
        # the expert output that `combine_send` was given, for `combine_recv`
        self.pending: Tensor | None = None
        # the arguments of `dispatch_first`, for `dispatch_second`
        self.second: tuple[Tensor, Tensor, Tensor, int] | None = None

    def check_step(self, step: str) -> None:
        """Raises CallOrderError unless the step may come now."""
        follows = STEPS[step]
        pushing = self.pushing is not None
        if self.stage in follows.stages and follows.pushing in (None, pushing):
            return
        if self.stage in NEXT and self.stage not in follows.stages:
            before = NEXT[self.stage]
        elif pushing and follows.pushing is False:
            before = "combine_pushed"
        else:
            before = BEFORE[step]
        pushed = ", and its rows are being pushed" if pushing else ""
        raise CallOrderError(
            f"{step} came without {before}; call {before} first, and each step once. Of slot {self.number}'s last dispatch: "
            f"{self.stage.value}{pushed}"
        )

    def done(self, step: str) -> None:
        """The step is done."""
        self.stage = STEPS[step].leads_to or self.stage
        if self.stage is Stage.COMBINED:
            self.pushing = self.pending = None

    def take(self, tokens: int) -> Taken:
        """Kept from call to call while tokens are as many."""
        if self._taken.tokens != tokens:
            # kept, so that they have to be no inference tensors
            with torch.inference_mode(False):
                self._taken = self._take(tokens)
        return self._taken

    def _take(self, tokens: int) -> Taken:
        buffers = self.buffers
        partials = buffers.rows_in_expert if buffers.partials is None else buffers.partials
        return Taken(tokens, buffers.rows_in_expert[:tokens], buffers.rows[:tokens], partials[:tokens])


AnySlot = TypeVar("AnySlot", bound=Slot[Any])


class Transport(ABC, Generic[AnySlot]):
    """Moves rows to their experts and back. One instance serves one dispatcher; `slot` says whose buffers a call uses."""

    # whether the steps' launches are all that they do, from call to call the same
    repeats = False
    # whether each rank has only a part of an expert's rows
    by_source = False
    # of waits for other ranks, in the kernels' units
    wait_limit = 0

    def __init__(self, config: DispatcherConfig, rank: int, device: torch.device, status: Tensor) -> None:
        """status: (3,) int64, which the device can add to: ids out of range, rows without a place, ranks out of step."""
        self.config = config
        self.rank = rank
        self.device = device
        self.status = status
        # of this dispatcher's batches: experts keep workspaces for it
        self.owner = Owner()

    @staticmethod
    @abstractmethod
    def buffer_specs(config: DispatcherConfig) -> Buffers[BufferSpec]:
        """The buffers of one slot. `buffer_bytes` adds them up without a GPU."""

    @abstractmethod
    def allocate(self, number: int = 0) -> AnySlot:
        """A slot's buffers on the device, uninitialised."""

    @abstractmethod
    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: AnySlot) -> tuple[ExpertBatch, Any]:
        """hidden_states (T, H) with contiguous rows, topk_ids and topk_weights (T, K) contiguous. Returns the batch, and what `combine`
        needs. Weights travel with `reduce="per_rank"` alone."""

    @abstractmethod
    def combine(self, expert_output: Tensor, topk_weights: Tensor, out: Tensor, slot: AnySlot, state: Any) -> None:
        """expert_output (L, M, H) or (R, H) contiguous, topk_weights (T, K) contiguous. Writes out (T, H)."""

    def dispatch_send(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: AnySlot) -> Any:
        """`dispatch` without waiting for the other ranks' rows, where that can be. Returns what `dispatch_recv` and `combine` need."""
        _, state = self.dispatch(hidden_states, topk_ids, topk_weights, slot)
        return state

    def dispatch_recv(self, tokens: int, slot: AnySlot) -> ExpertBatch:
        """The batch of the slot's last `dispatch_send`, which had so many tokens."""
        return self.expert_batch(slot, tokens)

    def combine_send(self, expert_output: Tensor, slot: AnySlot) -> None:
        """`combine` without waiting for the other ranks' rows, where that can be."""
        slot.pending = expert_output

    def combine_recv(self, topk_weights: Tensor, out: Tensor, slot: AnySlot, state: Any) -> None:
        """The rest of `combine` after `combine_send`. Writes out (T, H)."""
        assert slot.pending is not None
        self.combine(slot.pending, topk_weights, out, slot, state)

    def output_buffer(self, slot: AnySlot) -> Tensor:
        """(L, M, H) or (R, H) of `config.output_dtype`, where expert output is best written."""
        if slot.output is None:
            shape = (*self.config.batch_shape, self.config.hidden_size)
            # kept, so that it has to be no inference tensor
            with torch.inference_mode(False):
                slot.output = torch.empty(shape, dtype=self.config.output_dtype, device=self.device)
        return slot.output

    def again(self, slot: AnySlot) -> None:
        """Before a second combine of one dispatch, which must not write what a slower rank still reads for the first."""

    def give_up(self, slot: AnySlot) -> None:
        """Before the dispatch that follows one whose rows were sent and never received."""

    def check_guards(self) -> None:
        """Waits for the device. Raises GuardError if something was stored between the buffers that other ranks store to."""

    def close(self) -> None:
        """Lets go of memory that other ranks map. Not collective."""

    def start(self) -> None:
        """Called once, on all ranks, when the kernels are compiled and before the first call."""

    def settle(self) -> None:
        """After the first calls, from the first check on: waits have the limit `timeout`."""

    def fault(self) -> PeerTimeoutError | None:
        """What went wrong on the device since the start, without waiting for it."""
        return None

    def make_buffers(self, specs: Mapping[str, BufferSpec]) -> dict[str, Tensor]:
        """On the device, uninitialised."""
        try:
            return {name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for name, spec in specs.items()}
        except RuntimeError as error:
            size = sum(spec.nbytes for spec in specs.values()) / 2**30
            raise RuntimeError(
                f"{self.device} has no room for {size:.1f} GiB of buffers: {str(error).splitlines()[0]}; lower capacity or "
                "max_tokens_per_rank (MoEQuantDispatcher.buffer_bytes says what settings need)"
            ) from error

    def expert_batch(self, slot: AnySlot, tokens: int) -> ExpertBatch:
        """The slot's batch buffers as the batch that dispatch returns. tokens: of this rank, for the guess of the mean."""
        config, buffers, rows = self.config, slot.buffers, slot.expected_rows
        if rows is None:
            rows = config.mean_rows(tokens * config.num_batches)
        batch = slot.batches.get(rows)
        if batch is None:
            batch = slot.batches[rows] = ExpertBatch(
                buffers.values,
                slot.scales,
                buffers.num_tokens,
                buffers.sources,
                config.recipe,
                rows,
                slot.number,
                self.owner,
                buffers.expert_start,
                config.batch_invariant,
            )
        return batch
