"""Combine of rows that whoever makes them stores where their tokens came from.

T tokens of this rank, L local experts, M rows of an expert's buffer, R rows of a rank's (ragged), H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.batch import DispatchHandle
from moequant.checks import check_expert_output, check_out
from moequant.send_recv import SendRecv
from moequant.transport.lifecycle import step


class PushedRows(SendRecv):
    """The steps of a `MoEQuantDispatcher` for rows that are pushed."""

    @step
    def begin_push(self, handle: DispatchHandle, *, dtype: torch.dtype | None = None) -> Tensor:
        """Where a producer stores the rows that it makes: then call `combine_pushed`. Transport "symmetric" with reduce="exact" alone.

        Args:
            handle: of the dispatch.
            dtype: of the rows, bfloat16 or float16, the same on all ranks; None: what `GroupedExperts` make here, float16 with
                quant="float16", otherwise bfloat16.

        Returns:
            (L, M), ragged (R,), int64: for each valid row of the batch the address, in this process, of H numbers of that type. A
            multiple of 16 if H is one of 8. They stay as they are until the slot's next dispatch.

        Raises:
            RuntimeError: another transport or reduce.
            ValueError: another dtype.
        """
        transport = self._symmetric()
        if self.config.per_rank:
            raise RuntimeError(f'rows can be pushed with reduce="exact" alone, not with "{self.config.reduce}"; use combine')
        dtype = self.config.output_dtype if dtype is None else dtype
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
        buffers = self._slot_of(handle, "begin_push")
        self._come_again(buffers)
        buffers.pushing = dtype
        return transport.destinations(buffers)

    @step
    def push(self, expert_output: Tensor, handle: DispatchHandle) -> None:
        """Stores each valid row where its token came from, as a producer does that asks `begin_push`. Then call `combine_pushed`.

        Transport "symmetric" with reduce="exact" alone.

        Args:
            expert_output: (L, M, H), ragged (R, H), bfloat16 or float16.
            handle: of the dispatch.

        Raises:
            RuntimeError: another transport or reduce.
            ValueError: wrong tensors.
        """
        transport = self._symmetric()
        self._slot_of(handle)
        expert_output = check_expert_output(self.config, self.device, expert_output)
        self.begin_push(handle, dtype=expert_output.dtype)
        transport.push(expert_output, self._slots[handle.slot])

    @step
    def combine_pushed(self, handle: DispatchHandle, *, out: Tensor | None = None) -> Tensor:
        """`combine` of rows that have been pushed: waits until all ranks' are there, and sums them. Collective, the same bits.

        Args:
            handle: of the dispatch.
            out: (T, H) of the hidden states' type with contiguous rows, or None to allocate it.

        Returns:
            out, the sums.

        Raises:
            CallOrderError: nothing was pushed.
            ValueError: a wrong out.
        """
        transport = self._symmetric()
        buffers, out = self._slot_of(handle, "combine_pushed"), check_out(self.config, self.device, handle, out)
        pushing = buffers.pushing
        assert pushing is not None
        inputs = out, handle.topk_weights
        self._repeated(
            buffers,
            inputs,
            ("combine_pushed", pushing),
            lambda: transport.combine_pushed(pushing, handle.topk_weights, out, buffers, handle.state),
        )
        buffers.done("combine_pushed")
        return out
