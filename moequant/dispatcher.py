"""`MoEQuantDispatcher`: sends tokens to their experts' ranks, quantized, and brings the weighted sums back.

T tokens of this rank, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, R rows of a rank's (ragged),
H hidden size, G = ceil(H / 128) groups.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.batch import DispatchHandle, ExpertBatch
from moequant.checks import check_expert_output, check_format, check_out
from moequant.config import DispatcherConfig
from moequant.experts import GroupedExperts
from moequant.layer import Options, check_layer, run_layer, traced_layer
from moequant.overlap import run_in_halves, run_in_waves, side_stream
from moequant.pushed_rows import PushedRows
from moequant.traced import numbered
from moequant.training.layer import WEIGHTS, TrackedHandle, combine_tracked, dispatch_tracked, train_layer
from moequant.transport.agreement import agree, attempt, choose_device, membership
from moequant.transport.base import Slot, Stage
from moequant.transport.lifecycle import step
from moequant.transport.select import buffer_bytes, resolve


class MoEQuantDispatcher(PushedRows):
    """Routes, quantizes and exchanges tokens for expert parallelism. One dispatcher serves all layers of a model.

    The constructor is collective: all ranks of the group call it, with the same settings. It allocates `buffer_bytes(...)` bytes,
    and compiles the kernels for bfloat16 hidden states and float32 weights; other types and waves compile when they first come.

    `dispatch` and `combine` are collective and run in stream order; nothing in them syncs with the host, except in the packed
    exchange. All ranks have to make the same calls, of all dispatchers of a group in one order. A call that raises on one rank
    counts, and OutOfStepError tells the ranks that went on without it: at once on a CPU; on a GPU, where nothing waits for the
    device, from the first call that can know, and from `check()`. The next dispatch raises what a device has noticed, dropped rows
    and wrong ids too, if it is known by then.

    Threads take turns, a call each. A dispatcher can't be copied. It is a context manager; leaving it calls `check()` and
    `close()`.

    Args:
        group: the process group of the W ranks that share the experts; None: the default group, or a single rank where
            torch.distributed is not initialised. Rank r of the group holds experts r * L .. r * L + L - 1.
        num_experts: E, a multiple of W.
        top_k: K.
        hidden_size: H.
        max_tokens_per_rank: the largest T of any rank and call.
        quant: "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "int8", or rows without scales: "none" in bfloat16, "float16".
        transport: "local" (one rank; without group this one, whatever others there are), "collective" (torch.distributed), "symmetric"
            (kernels that write to the other GPUs' memory: NVIDIA GPUs of one NVLink domain), or "auto": local for one rank, symmetric
            where it can be, otherwise collective.
        exchange: of "collective". "padded": fixed sizes, no host sync, can be captured in a CUDA graph; "packed": each token once
            to each rank that needs it, least on the wire, one host sync; "auto": packed on a CPU, elsewhere padded while its buffers
            are small.
        layout: of a batch. "padded": each expert has M rows; "ragged": the rows of all experts of a rank lie in one buffer, expert by
            expert: memory follows the rows that can come. The same values, scales and sums, to the bit. "auto": "ragged" with
            rank_capacity, and for more than 256 tokens without capacity; `config.layout` says which it is. Experts of one's own that
            take a batch's rows by its shape want one of the other two.
        capacity: with layout="padded": M, rounded up to a multiple of 16; None: W * max_tokens_per_rank, where nothing can overflow
            unless tokens name an expert twice. The padded exchange has room for max_tokens_per_rank (rounded up too) of these for
            each source rank.
        rank_capacity: with layout="ragged": R, rows of a rank, as each expert's begin at a multiple of 16. An int: so many, rounded up to
            a multiple of 16; a float: so many times the T * K that come to a rank on average, with room for alignment; None: all
            W * T * min(K, L) that can come, where nothing can overflow unless tokens name an expert twice.
        on_overflow: rows without room are not sent, contribute nothing, and weights are not renormalised. "error": `check()`
            raises; "drop": `check()` returns their number.
        on_invalid_id: "error": ids outside -1..E-1 raise, as `dispatch` says; "absent": they count as -1, and nothing is said.
        reduce: "exact": `combine` adds over k in order in float32, each product rounded first; the same bits on every transport.
            "per_rank": the rows that one rank has for a token are summed there in the same way, rounded to bfloat16 and sent once,
            and the ranks' sums are added in rank order in float32: fewer bytes come back, for one more rounding a rank. The bits
            are those of W ranks, the same on every transport.
        recipe: of quantization: "default", "deepgemm", "ue8m0", "fnuz_224" (`moequant.formats.RECIPES`).
        slots: 1 or 2 sets of buffers: two micro-batches in flight use one each.
        shared_batch: all ranks give the same tokens, ids and weights, and each gets all the sums, with the bits that one rank has. Over
            "collective", in layout "ragged"; nothing travels to the experts, and nothing is dropped. On a CPU ranks with other ids
            raise OutOfStepError, on a GPU nothing notices them.
        overlap: calls of the dispatcher itself hide communication under the experts' GEMMs where they can; see `__call__`.
        num_sms: SMs (multiprocessors) that are left to communication meanwhile.
        timeout: seconds that a wait for other ranks may last, the constructor's too. On GPUs dispatch and combine of "collective"
            have the process group's own limit instead.
        first_timeout: the same in the constructor, and in calls until `check()` has waited for the first ones: ranks that load weights
            and compile their experts' kernels may be minutes apart. Captured graphs keep the limit under which they were captured.
            None: timeout, and 600 s while the constructor compiles.
        batch_invariant: with `GroupedExperts` and `moequant.nn.MoEExperts`, a token's output has the same bits whatever other tokens
            there are, and on any number of ranks, any transport and in both layouts, under grad too; slower where there are few rows.
            With reduce="exact" and on_overflow="error" alone.
        device: where tensors live; None: the current GPU, or the CPU without one or with a gloo group.

    Raises:
        ConfigMismatchError: ranks disagree on a setting.
        PeerTimeoutError: a rank does not come.
        ValueError: wrong settings.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        max_tokens_per_rank: int,
        quant: str = "fp8_e4m3fn",
        transport: str = "auto",
        exchange: str = "auto",
        layout: str = "padded",
        capacity: int | None = None,
        rank_capacity: int | float | None = None,
        on_overflow: str = "error",
        on_invalid_id: str = "error",
        reduce: str = "exact",
        recipe: str = "default",
        slots: int = 1,
        shared_batch: bool = False,
        overlap: bool = True,
        num_sms: int = 8,
        timeout: float = 60.0,
        first_timeout: float | None = None,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self._number = numbered.add(self)
        # of the modules that were called as experts, in the order of their first calls
        self._layers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next_layer = itertools.count(1)
        # what is no text is refused with the other settings
        alone = group is None and isinstance(transport, str) and transport == "local"
        group, self._rank, world_size = (None, 0, 1) if alone else membership(group)
        self._group = group
        self.device = choose_device(group, None)

        def settings() -> DispatcherConfig:
            self.device = choose_device(group, device)
            check_format(quant, self.device)
            return DispatcherConfig(
                num_experts=num_experts,
                top_k=top_k,
                hidden_size=hidden_size,
                max_tokens_per_rank=max_tokens_per_rank,
                world_size=world_size,
                quant=quant,
                transport=transport,
                exchange=exchange,
                layout=layout,
                capacity=capacity,
                rank_capacity=rank_capacity,
                on_overflow=on_overflow,
                on_invalid_id=on_invalid_id,
                reduce=reduce,
                recipe=recipe,
                slots=slots,
                shared_batch=shared_batch,
                overlap=overlap,
                num_sms=num_sms,
                timeout=timeout,
                first_timeout=first_timeout,
                batch_invariant=batch_invariant,
            )

        mine = attempt(settings, alone=world_size == 1)
        agreed, self._ordinal = agree(mine, self.device, group, self._rank, world_size)
        # tensors that are kept are no inference tensors: they are written in any mode
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1), torch.inference_mode(False), torch.no_grad():
            super().__init__(self.device)
            self._build(resolve(agreed, group, self.device))
            self._side = side_stream(self.config, self.device)

    buffer_bytes = staticmethod(buffer_bytes)

    @step
    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        slot: int = 0,
        layer: int | None = None,
        expected_tokens: int | None = None,
    ) -> tuple[ExpertBatch, DispatchHandle]:
        """Sends each token to the ranks of its experts, quantized. Collective.

        Args:
            hidden_states: (T, H) bfloat16, float16 or float32, T from 0 to max_tokens_per_rank; T may differ between ranks.
            topk_ids: (T, K) int32 or int64, ids of experts, -1 for "no expert". On a CPU an id outside -1..E-1 raises; on a GPU it
                counts as -1, and `check()` raises.
            topk_weights: (T, K) float32, bfloat16 or float16; used by `combine` too, so it must not change before.
            slot: whose buffers to use.
            layer: the number of the model's layer, from 0 on, by which a rank that skipped one is noticed; None where that isn't
                said.
            expected_tokens: the tokens of all ranks together, with shared_batch those that they share, where the host knows them:
                by the rows that an expert then gets on average (`ExpertBatch.expected_rows`) GEMMs choose their tiles. None: as
                if all ranks had as many as this one. Only a hint, which may be wrong and may differ between ranks; not used under
                grad.

        Returns:
            The batch of this rank's experts, views of the slot's buffers that are valid until its next dispatch, and the handle
            that `combine` takes.

        Raises:
            CapacityOverflowError: on a CPU, on all ranks, if rows of this call had no room and on_overflow is "error".
            InvalidExpertIdError: on a CPU, for an id out of range.
            ValueError: other wrong tensors.
            RuntimeError: tensors that require grad under grad mode, with another quant than "none".
        """
        # asked without a call: most layers are not trained
        if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (hidden_states, topk_weights)):
            return dispatch_tracked(self, (hidden_states, topk_ids, topk_weights), slot, layer)
        arguments, buffers = self._begin(hidden_states, topk_ids, topk_weights, slot, layer, 0, expected_tokens)
        return self._dispatch(arguments, buffers)

    def _dispatch(self, arguments: tuple[Tensor, Tensor, Tensor], buffers: Slot) -> tuple[ExpertBatch, DispatchHandle]:
        """A dispatch that has begun."""
        settings = "dispatch", buffers.call.word, buffers.expected_rows
        batch, state = self._repeated(buffers, arguments, settings, lambda: self._transport.dispatch(*arguments, buffers))
        return batch, self._handle(*arguments, buffers, state, Stage.LANDED)

    @step
    def combine(self, expert_output: Tensor, handle: DispatchHandle, *, out: Tensor | None = None) -> Tensor:
        """Brings each token's rows back from its experts and sums them by their weights. Collective.

        It may be called again for the same dispatch.

        Args:
            expert_output: (L, M, H), ragged (R, H), bfloat16 or float16: for each valid row of the batch what its expert made of it.
                Transport "symmetric" pushes it as `push` does, or with overlap=False copies it first, unless it is `output_buffer`.
            handle: of the dispatch that this answers.
            out: (T, H) of the hidden states' type with contiguous rows, or None to allocate it: the one allocation in this call.

        Returns:
            out. A token whose entries are all absent (-1, or dropped) gets zeros.

        Raises:
            StaleHandleError: the handle's slot has dispatched again since.
            CallOrderError: the batch is not there yet.
            ValueError: wrong tensors.
            RuntimeError: tensors that require grad under grad mode, where the dispatch had none.
        """
        if isinstance(handle, TrackedHandle) and torch.is_grad_enabled():
            return combine_tracked(self, expert_output, handle, out)
        buffers = self._slot_of(handle, "combine")
        expert_output = check_expert_output(self.config, self.device, expert_output)
        out = check_out(self.config, self.device, handle, out)
        self._come_again(buffers)
        inputs = expert_output, handle.topk_weights, out
        # which needs no copy
        settings = "combine", buffers.output is not None and expert_output.data_ptr() == buffers.output.data_ptr()
        self._repeated(buffers, inputs, settings, lambda: self._transport.combine(*inputs, buffers, handle.state))
        buffers.done("combine")
        return out

    def output_buffer(self, slot: int = 0) -> Tensor:
        """A slot's buffer for expert output, which all layers can share. Transport "symmetric" with overlap=False has it from the start,
        and combines from it without a copy; otherwise it is made when it is first asked for, and `buffer_bytes` does not count it.

        It may be written from the slot's dispatch to its combine, not outside.

        Args:
            slot: which.

        Returns:
            (L, M, H), ragged (R, H), bfloat16, with quant="float16" float16.

        Raises:
            ValueError: there is no such slot.
        """
        self._check_open()
        return self._transport.output_buffer(self._slot(slot))

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Callable[[ExpertBatch], Tensor],
        *,
        slot: int = 0,
        layer: int | None = None,
        chunks: int = 1,
        first_experts: int = 0,
        out: Tensor | None = None,
        expected_tokens: int | None = None,
    ) -> Tensor:
        """dispatch, experts, combine. Collective.

        With `GroupedExperts`, transport "symmetric" and reduce="exact", GEMM 2 stores its rows at their tokens' ranks, and
        communication can go on under the GEMMs; overlap=False keeps the steps apart. The same bits, but for the experts' choice of
        tiles.

        Args:
            hidden_states: as for `dispatch`.
            topk_ids: as for `dispatch`.
            topk_weights: as for `dispatch`.
            experts: from a batch to its expert output, (L, M, H), ragged (R, H), bfloat16 or float16.
            slot: whose buffers to use.
            layer: as for `dispatch`; None: for `GroupedExperts` and torch modules, a number for each in the order of their first
                calls here.
            chunks: 1, or, with slots=2, 2: half of the tokens in each slot (`slot` is not used then), each with room for M rows of
                an expert or R of a rank, and one half's dispatch under the other's GEMMs. The same on all ranks, and not together with
                first_experts.
            first_experts: from 0 to L - 1; the rows of each rank's first so many experts are sent first, and those of the others
                under their GEMMs. The same on all ranks.
            out: (T, H) of the hidden states' type with contiguous rows, which may be the hidden states themselves, or None to
                allocate it. Not under grad.
            expected_tokens: as for `dispatch`.

        Returns:
            out, (T, H). Errors are those of `dispatch` and `combine`. Under grad, with bfloat16 weights or experts of one's own, it
            has a backward, which is collective too; then the layer goes in one piece.
        """
        options = Options(slot, layer, chunks, first_experts, expected_tokens, out)
        trained = False
        if torch.is_grad_enabled():
            # asked without a call: most layers are not trained
            module = isinstance(experts, torch.nn.Module)
            weights = experts.parameters() if module else (getattr(experts, name, None) for name in WEIGHTS)
            trained = any(getattr(x, "requires_grad", False) for x in (hidden_states, topk_weights, *weights))
        if torch.compiler.is_compiling() and not trained:
            return traced_layer(self, experts, (hidden_states, topk_ids, topk_weights), options)
        return self._run((hidden_states, topk_ids, topk_weights), experts, options, trained)

    @step
    def _run(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        experts: Callable[[ExpertBatch], Tensor],
        options: Options,
        trained: bool,
    ) -> Tensor:
        """What a call does."""
        try:
            pushing = check_layer(self, tokens[0], experts, options, trained)
        except Exception:
            self._count_refusal()
            raise
        if options.layer is None:
            options = options._replace(layer=self._layer_of(experts))
        if trained:
            return train_layer(self, tokens, experts, options.slot, options.layer)
        if pushing is not None and options.chunks == 2:
            return run_in_halves(self, tokens, pushing, options, self._side)
        if pushing is not None and options.first_experts:
            return run_in_waves(self, tokens, pushing, options, self._side)
        return run_layer(self, tokens, experts, pushing, options)

    def _layer_of(self, experts: object) -> int | None:
        """A number for experts that last from call to call."""
        if not isinstance(experts, GroupedExperts | torch.nn.Module):
            return None
        if experts not in self._layers:
            self._layers[experts] = next(self._next_layer)
        return self._layers[experts]
