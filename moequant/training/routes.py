"""The ways between tokens and their experts' rows, in both directions.

T tokens of this rank, K top-k, W ranks, R rows of a rank's experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moequant.batch import DispatchHandle, ExpertBatch
from moequant.errors import StaleHandleError
from moequant.training.rows import Rows
from moequant.transport.wire import Wire

if TYPE_CHECKING:
    from moequant.dispatcher import MoEQuantDispatcher

ENTRY = (1 << 32) - 1


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

    def send(self, x: Tensor, ids: Tensor, weights: Tensor | None = None) -> ExpertBatch:
        """Dispatches something of each token. Collective.

        Args:
            x: (T, H) float.
            ids: (T, K), as for `MoEQuantDispatcher.dispatch`.
            weights: (T, K), by which `sum` sums; None: ones.

        Returns:
            The batch, views of the slot's buffers.
        """
        self._unweighted = weights is None
        if weights is None:
            weights = torch.ones(ids.shape, dtype=torch.float32, device=x.device)
        self._batch, self._handle = self.dispatcher.dispatch(x, ids, weights, slot=self.slot, layer=self.layer)
        return self._batch

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor | None = None) -> Rows:
        """`send`, and the batch's rows.

        Args:
            x: as for `send`.
            ids: as for `send`.
            weights: as for `send`.

        Returns:
            The rows.
        """
        return Rows.of(self.send(x, ids, weights))

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
        """
        if not self._unweighted:
            self._send_nothing(ids, dtype)
        try:
            return self.sum(rows).to(dtype)
        except StaleHandleError:
            self._send_nothing(ids, dtype)
            return self.sum(rows)

    def _send_nothing(self, ids: Tensor, dtype: torch.dtype) -> None:
        """A dispatch for the sake of its way back."""
        self.send(torch.zeros(len(ids), self.dispatcher.config.hidden_size, dtype=dtype, device=ids.device), ids)

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
        group, timeout = self.dispatcher._group, self.dispatcher.config.timeout
        assert group is not None
        return Wire(group, timeout, self.dispatcher.device.type == "cpu")
