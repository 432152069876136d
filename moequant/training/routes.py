"""The ways between tokens and their experts' rows, in both directions.

T tokens of this rank, K top-k, W ranks, R rows of a rank's experts, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moequant.batch import DispatchHandle, ExpertBatch
from moequant.errors import StaleHandleError
from moequant.training.rows import Rows
from moequant.transport.lifecycle import step
from moequant.transport.wire import Wire

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher

ENTRY = (1 << 32) - 1


class Kind(NamedTuple):
    """What a dispatch brings, as `moequant.transport.calls.Call` has it: the tokens, those once more for a backward, or gradients.

    Attributes:
        gradients: whether it brings those of the output.
        again: whether it brings the tokens, in a backward.
        makes: with gradients, what is made of them, in bits.
    """

    gradients: bool = False
    again: bool = False
    makes: int = 0


TOKENS, TOKENS_AGAIN = Kind(), Kind(again=True)


def gradients(*, hidden: bool = False, weights: bool = False, w13: bool = False, bias2: bool = False) -> Kind:
    """A dispatch of gradients, and which exchanges come behind it: ranks that would make unlike ones hear of it here.

    Args:
        hidden: the gradients of the hidden states are made.
        weights: those of the routing weights.
        w13: those of w13.
        bias2: those of bias2.

    Returns:
        The kind.
    """
    return Kind(gradients=True, makes=sum(wanted << bit for bit, wanted in enumerate((hidden, weights, w13, bias2))))


class Routes:
    """A dispatcher's, in one slot, of one layer.

    The rows of a dispatch of the same ids are the same ones in the same order, whatever travels. So what a backward needs is dispatched
    once more, and nothing of a slot is kept from forward to backward.

    Args:
        dispatcher: with no call under way in the slot.
        slot: whose buffers to use.
        layer: the number of the model's layer, or None.
    """

    def __init__(self, dispatcher: MoEQuantDispatcher, slot: int = 0, layer: int | None = None) -> None:
        self.dispatcher, self.slot, self.layer = dispatcher, slot, layer
        self._batch: ExpertBatch | None = None
        self._handle: DispatchHandle | None = None
        # whether the weights of the last dispatch were ones
        self._unweighted = False

    def send(self, x: Tensor, ids: Tensor, weights: Tensor | None = None, kind: Kind = TOKENS) -> ExpertBatch:
        """Dispatches something of each token. Collective.

        Args:
            x: (T, H) float.
            ids: (T, K), as for `MoEQuantDispatcher.dispatch`.
            weights: (T, K), by which `sum` sums; None: ones.
            kind: what it is, the same on all ranks.

        Returns:
            The batch, views of the slot's buffers.
        """
        self._unweighted = weights is None
        if weights is None:
            weights = torch.ones(ids.shape, dtype=torch.float32, device=x.device)
        self._batch, self._handle = _dispatch(self.dispatcher, (x, ids, weights), self.slot, self.layer, kind)
        return self._batch

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor | None = None, kind: Kind = TOKENS) -> Rows:
        """`send`, and the batch's rows.

        Args:
            x: as for `send`.
            ids: as for `send`.
            weights: as for `send`.
            kind: as for `send`.

        Returns:
            The rows.
        """
        return Rows.of(self.send(x, ids, weights, kind))

    def run(self, tokens: tuple[Tensor, Tensor, Tensor], experts: Callable[[Any], Tensor]) -> Tensor:
        """A whole layer, as an inference runs it. Collective.

        Args:
            tokens: hidden states (T, H), ids and weights (T, K).
            experts: of `Precision.experts`.

        Returns:
            (T, H) of the hidden states' type.
        """
        return self.dispatcher(*tokens, experts, slot=self.slot, layer=self.layer)

    def sum(self, rows: Tensor) -> Tensor:
        """Sums each token's rows by the weights of the last dispatch. Collective.

        Args:
            rows: (L, M, H), ragged (R, H), bfloat16.

        Returns:
            (T, H) of the type of what was dispatched.

        Raises:
            RuntimeError: nothing was dispatched.
        """
        return self.dispatcher.combine(rows, self.last()[1])

    def last(self) -> tuple[ExpertBatch, DispatchHandle]:
        """The last dispatch.

        Returns:
            Its batch, views of the slot's buffers, and its handle.

        Raises:
            RuntimeError: there was none.
        """
        if self._batch is None or self._handle is None:
            raise RuntimeError("nothing was dispatched; call dispatch first")
        return self._batch, self._handle

    def resume(self, handle: DispatchHandle) -> None:
        """Makes an earlier dispatch, with weights, the one whose rows `sum` sums.

        Args:
            handle: of it.
        """
        self._handle, self._unweighted = handle, False

    def return_sum(self, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """`sum` with ones for weights, whether or not the slot has dispatched something else since. Collective.

        Args:
            rows: as for `sum`.
            ids: (T, K), as they were dispatched.
            dtype: of the result.

        Returns:
            (T, H).

        Raises:
            RuntimeError: the rows are of a dispatch before the buffers grew.
        """
        check_kept(rows, math.prod(self.dispatcher.config.batch_shape))
        if not self._unweighted:
            self._send_nothing(ids, dtype)
        try:
            return self.sum(rows).to(dtype)
        except StaleHandleError:
            self._send_nothing(ids, dtype)
            return self.sum(rows)

    def _send_nothing(self, ids: Tensor, dtype: torch.dtype) -> None:
        """A dispatch for the sake of its way back."""
        nothing = torch.zeros(len(ids), self.dispatcher.config.hidden_size, dtype=dtype, device=ids.device)
        self.send(nothing, ids, kind=gradients(hidden=True))

    def at_rows(self, weights: Tensor, rows: Rows) -> Tensor:
        """The routing weight of each row. Collective where there are several ranks.

        Args:
            weights: (T, K) float32 or bfloat16.
            rows: of a dispatch with these weights' ids.

        Returns:
            (R,) float32; 0 for rows that belong to no expert.
        """
        everyone = self.everyones(weights)
        valid = rows.valid.squeeze(1)
        places = torch.where(valid, self._places(rows.sources.flatten(), everyone.shape[1]), 0)
        return torch.where(valid, everyone.flatten()[places], 0)

    def everyones(self, weights: Tensor) -> Tensor:
        """The routing weights of all ranks' entries. Collective where there are several ranks.

        Args:
            weights: (T, K) float32 or bfloat16.

        Returns:
            (W, at least T * K) float32, a row for each rank, or one for all where they share the tokens: entry k of token t at t * K + k.
        """
        room = self.dispatcher.config.max_tokens_per_rank * weights.shape[1]
        mine = torch.zeros(room, dtype=torch.float32, device=weights.device)
        mine[: weights.numel()] = weights.flatten()
        if self._batches == 1:
            return mine.unsqueeze(0)
        everyone = mine.new_empty(self._batches, room)
        self._wire.all_gather(everyone, mine)
        return everyone

    def to_entries(self, x: Tensor, rows: Rows, ids: Tensor) -> Tensor:
        """A number of each row, at the token and choice that it came from. Collective where there are several ranks.

        Args:
            x: (R,) float32.
            rows: whose they are.
            ids: (T, K), as they were dispatched.

        Returns:
            (T, K) float32; 0 for entries without a row.
        """
        room = self.dispatcher.config.max_tokens_per_rank * ids.shape[1]
        # rows that belong to no expert have a place behind all
        places = torch.where(rows.valid.squeeze(1), self._places(rows.sources.flatten(), room), self._batches * room)
        sent = x.new_zeros(self._batches * room + 1).index_copy_(0, places, x)[:-1].view(self._batches, room)
        return self.returned(sent.contiguous(), ids)

    def returned(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """What this rank has made for the entries of all ranks, back at their tokens. Collective where there are several ranks.

        Args:
            numbers: of all ranks' entries, as `everyones` has them, contiguous; 0 for those without a row here.
            ids: (T, K), as they were dispatched.

        Returns:
            (T, K) float32.
        """
        if self._ranks > 1:
            received = numbers.new_empty(self._ranks, numbers.shape[1])
            if self._batches == 1:
                self._wire.all_gather(received, numbers[0])
            else:
                self._wire.all_to_all(received, numbers)
            # one rank has the entry's row, and of the others come zeros
            numbers = received.sum(0, keepdim=True)
        return numbers[0, : ids.numel()].view(ids.shape)

    @staticmethod
    def _places(sources: Tensor, room: int) -> Tensor:
        return (sources >> 32) * room + (sources & ENTRY)

    @property
    def _ranks(self) -> int:
        return self.dispatcher.config.world_size

    @property
    def _batches(self) -> int:
        return self.dispatcher.config.num_batches

    @property
    def _wire(self) -> Wire:
        # ranks out of step must not exchange anything
        self.dispatcher._check_open()
        group, timeout = self.dispatcher._group, self.dispatcher.config.timeout
        assert group is not None
        return Wire(group, timeout, self.dispatcher.device.type == "cpu")


def check_kept(kept: Tensor, rows: int) -> None:
    """That what a forward has left for its backward is of the rows that the dispatcher has now.

    Args:
        kept: (L, M, N), ragged (R, N), or flat, (L * M, N).
        rows: R of now.

    Raises:
        RuntimeError: the buffers are larger now.
    """
    if kept.shape[:-1].numel() != rows:
        raise RuntimeError(
            "the dispatcher has grown since the forward (ensure), and what that has kept for this backward is of the rows of before: "
            "call ensure before a forward or behind its backward, or use MoEExperts(recompute=True), which keeps no rows"
        )


@step
def _dispatch(
    dispatcher: MoEQuantDispatcher, tokens: tuple[Tensor, Tensor, Tensor], slot: int, layer: int | None, kind: Kind
) -> tuple[ExpertBatch, DispatchHandle]:
    """`MoEQuantDispatcher.dispatch`, which says to the other ranks what it brings."""
    arguments, buffers = dispatcher._begin(*tokens, slot, layer)
    buffers.call = buffers.call._replace(**kind._asdict())
    return dispatcher._dispatch(arguments, buffers)
