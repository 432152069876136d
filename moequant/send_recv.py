"""Dispatch and combine in two steps each, so that other work can be queued in between.

T tokens of this rank, K top-k, E experts, L local experts, M rows of an expert's buffer, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

from moequant.batch import DispatchHandle, ExpertBatch
from moequant.checks import check_expert_output, check_out
from moequant.transport.base import Stage
from moequant.transport.lifecycle import Lifecycle, step


class SendRecv(Lifecycle):
    """The steps of a `MoEQuantDispatcher` that send rows or wait for them, and those that send the rows of some experts first."""

    @step
    def dispatch_send(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        slot: int = 0,
        layer: int | None = None,
        expected_tokens: int | None = None,
    ) -> DispatchHandle:
        """The first half of `dispatch`: sends this rank's rows, and does not wait for the others' to arrive. Collective.

        Other work can be queued between it and `dispatch_recv`. With transport "symmetric" it does wait for the other ranks'
        counts, which say where the rows go, and so for the ranks to come to this call. The transports that can't part the two do
        all of it here.

        Args:
            hidden_states: as for `dispatch`.
            topk_ids: as for `dispatch`.
            topk_weights: as for `dispatch`.
            slot: as for `dispatch`.
            layer: as for `dispatch`.
            expected_tokens: as for `dispatch`.

        Returns:
            The handle that `dispatch_recv` and `combine` take. Errors are those of `dispatch`.
        """
        arguments, buffers = self._begin(hidden_states, topk_ids, topk_weights, slot, layer, expected_tokens=expected_tokens)
        state = self._transport.dispatch_send(*arguments, buffers)
        return self._handle(*arguments, buffers, state, Stage.SENT)

    @step
    def dispatch_recv(self, handle: DispatchHandle) -> ExpertBatch:
        """The second half of `dispatch`: waits until all ranks' rows are there. Collective.

        Args:
            handle: of `dispatch_send`.

        Returns:
            The batch.
        """
        buffers = self._slot_of(handle, "dispatch_recv")
        batch = self._transport.dispatch_recv(handle.topk_weights.shape[0], buffers)
        buffers.done("dispatch_recv")
        return batch

    @step
    def dispatch_first(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        slot: int,
        experts: int,
        layer: int | None = None,
        expected_tokens: int | None = None,
    ) -> tuple[ExpertBatch, DispatchHandle]:
        """`dispatch` of the rows of each rank's first experts. Collective, transport "symmetric" alone.

        `dispatch_second` sends the others, beside GEMMs of these if need be, before combine.

        Args:
            hidden_states: as for `dispatch`.
            topk_ids: as for `dispatch`.
            topk_weights: as for `dispatch`.
            slot: as for `dispatch`.
            experts: how many, from 1 to L - 1.
            layer: as for `dispatch`.
            expected_tokens: as for `dispatch`.

        Returns:
            Their batch, and the handle.
        """
        transport = self._symmetric()
        arguments, buffers = self._begin(hidden_states, topk_ids, topk_weights, slot, layer, experts, expected_tokens)
        batch, state = transport.dispatch_first(*arguments, buffers, experts)
        return batch, self._handle(*arguments, buffers, state, Stage.FIRST)

    @step
    def dispatch_second(self, handle: DispatchHandle) -> ExpertBatch:
        """The rest of `dispatch_first`. Collective.

        Args:
            handle: of `dispatch_first`, whose tensors must not have changed.

        Returns:
            The batch of the other experts.
        """
        transport = self._symmetric()
        buffers = self._slot_of(handle, "dispatch_second")
        batch = transport.dispatch_second(buffers)
        buffers.done("dispatch_second")
        return batch

    @step
    def combine_send(self, expert_output: Tensor, handle: DispatchHandle) -> None:
        """The first half of `combine`: makes this rank's rows available, and does not wait for the others'. Collective.

        Other work can be queued between it and `combine_recv`, but none that writes expert_output. Errors are those of `combine`.

        Args:
            expert_output: as for `combine`.
            handle: as for `combine`.

        Raises:
            ValueError: wrong tensors.
        """
        buffers = self._slot_of(handle, "combine_send")
        expert_output = check_expert_output(self.config, self.device, expert_output)
        self._come_again(buffers)
        self._transport.combine_send(expert_output, buffers)
        buffers.done("combine_send")

    @step
    def combine_recv(self, handle: DispatchHandle, *, out: Tensor | None = None) -> Tensor:
        """The second half of `combine`: waits until all ranks' rows are there. Collective.

        Args:
            handle: of `combine_send`.
            out: (T, H) of the hidden states' type with contiguous rows, or None to allocate it.

        Returns:
            out, the sums.

        Raises:
            ValueError: wrong tensors.
        """
        buffers, out = self._slot_of(handle, "combine_recv"), check_out(self.config, self.device, handle, out)
        self._transport.combine_recv(handle.topk_weights, out, buffers, handle.state)
        buffers.done("combine_recv")
        return out
