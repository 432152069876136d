"""`MoEQuantDispatcher`: sends tokens to their experts' ranks, quantized, and brings the weighted sums back.

T tokens of this rank, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, H hidden size,
G = ceil(H / 128) groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.agreement import agree, attempt, choose_device, membership
from moequant.batch import DispatchHandle, ExpertBatch
from moequant.checks import check_counted, check_expert_output, check_format, check_out, check_tokens, with_rows
from moequant.config import DispatcherConfig
from moequant.errors import ClosedError, OutOfStepError, PeerTimeoutError, StaleHandleError
from moequant.layer import run_layer, side_stream
from moequant.transport.base import Slot
from moequant.transport.select import buffer_bytes, make_transport, resolve
from moequant.transport.symmetric import SymmetricTransport
from moequant.warm_up import warm_up

_NUMBERS = itertools.count()
Method = TypeVar("Method", bound=Callable[..., Any])


def untraced(method: Method) -> Method:
    """A graph break for torch.compile, with the method's signature kept."""
    return cast(Method, torch.compiler.disable(method))


class MoEQuantDispatcher:
    """Routes, quantizes and exchanges tokens for expert parallelism. One dispatcher serves all layers of a model.

    group: the process group of the W ranks that share the experts; None: the default group, or a single rank where torch.distributed
        is not initialised. Rank r of the group holds experts r * L .. r * L + L - 1.
    num_experts, top_k, hidden_size, max_tokens_per_rank: E, K, H and the largest T of any rank and call. E must be divisible by W.
    quant: "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "int8", or "none" for bfloat16 rows without scales.
    transport: "local" (one rank), "collective" (torch.distributed), "symmetric" (kernels that write to the other GPUs' memory: NVIDIA
        GPUs of one NVLink domain), or "auto": local for one rank, symmetric where it can be, otherwise collective.
    exchange: of "collective". "padded": fixed sizes, no host sync, can be captured in a CUDA graph; "packed": each token once to each
        rank that needs it, least on the wire, one host sync; "auto": padded while its buffers are small.
    capacity: M, rounded up to a multiple of 16; None: W * max_tokens_per_rank, where nothing can overflow unless tokens name an expert
        twice. The padded exchange has room for max_tokens_per_rank (rounded up too) of these for each source rank.
    on_overflow: rows without room are not sent, contribute nothing, and weights are not renormalised. "error": `check()` raises;
        "drop": `check()` returns their number.
    reduce: "exact": `combine` adds over k in order in float32, each product rounded first; the same bits on every transport.
        "per_rank": the rows that one rank has for a token are summed there in the same way, rounded to bfloat16 and sent once, and the
        ranks' sums are added in rank order in float32: fewer bytes come back, for one more rounding a rank. The bits are those of W
        ranks, the same on every transport.
    recipe: of quantization: "default", "deepgemm", "ue8m0", "fnuz_224" (`moequant.formats.RECIPES`).
    slots: 1 or 2 sets of buffers: two micro-batches in flight use one each.
    overlap: calls of the dispatcher itself hide communication under the experts' products where they can; see `__call__`.
    num_sms: multiprocessors that are left to communication meanwhile.
    timeout: seconds that a wait for other ranks may last. On GPUs "collective" has the process group's own limit instead.
    device: where tensors live; None: the current GPU, or the CPU without one or with a gloo group.

    The constructor is collective: all ranks of the group call it, with the same settings. It allocates `buffer_bytes(...)` bytes, and
    compiles the kernels for bfloat16 hidden states and float32 weights; other types and waves compile when they first come.
    `dispatch` and `combine` are collective and run in stream order; nothing in them syncs with the host, except in the packed
    exchange. All ranks have to make the same calls: a call that raises on one rank counts, and OutOfStepError tells the ranks that went
    on without it (on a GPU with the padded exchange, from `check()`). A dispatcher is a context manager; leaving it calls `check()` and
    `close()`.

    Raises ValueError for wrong settings, ConfigMismatchError where ranks disagree.
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
        capacity: int | None = None,
        on_overflow: str = "error",
        reduce: str = "exact",
        recipe: str = "default",
        slots: int = 1,
        overlap: bool = True,
        num_sms: int = 8,
        timeout: float = 60.0,
        device: torch.device | str | None = None,
    ) -> None:
        self._closed = False
        self._fault: PeerTimeoutError | OutOfStepError | None = None
        self._calls = 0
        self._number = next(_NUMBERS)
        group, rank, world_size = membership(group)
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
                capacity=capacity,
                on_overflow=on_overflow,
                reduce=reduce,
                recipe=recipe,
                slots=slots,
                overlap=overlap,
                num_sms=num_sms,
                timeout=timeout,
            )

        mine = attempt(settings, alone=world_size == 1)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            self.config = resolve(agree(mine, group, rank, world_size), group, self.device)
            self._status = torch.zeros(3, dtype=torch.int64, device=self.device)
            self._transport = make_transport(self.config, rank, self.device, self._status, group)
            self._slots = [self._transport.allocate(number) for number in range(slots)]
            if self.device.type == "cuda":
                warm_up(self._transport, self.config, self._slots[0], self.device)
            self._transport.start()
            self._side = side_stream(self.config, self.device)

    buffer_bytes = staticmethod(buffer_bytes)

    @untraced
    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, slot: int = 0
    ) -> tuple[ExpertBatch, DispatchHandle]:
        """Sends each token to the ranks of its experts, quantized. Collective.

        hidden_states: (T, H) bfloat16, float16 or float32, T from 0 to max_tokens_per_rank; T may differ between ranks.
        topk_ids: (T, K) int32 or int64, ids of experts, -1 for "no expert". On a CPU an id outside -1..E-1 raises
            InvalidExpertIdError; on a GPU it counts as -1, and `check()` raises.
        topk_weights: (T, K) float32 or bfloat16; used by `combine` too, so it must not change before.
        slot: whose buffers to use.

        Returns the batch of this rank's experts, views of the slot's buffers that are valid until its next dispatch, and the handle
        that `combine` takes. Raises ValueError for wrong tensors, RuntimeError for tensors that require grad under grad mode.
        """
        arguments, buffers = self._begin(hidden_states, topk_ids, topk_weights, slot)
        batch, state = self._run(self._transport.dispatch, *arguments, buffers)
        return batch, self._handle(*arguments, buffers, state)

    @untraced
    def dispatch_send(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, slot: int = 0) -> DispatchHandle:
        """The first half of `dispatch`: sends this rank's rows, and does not wait for the others' to arrive. Collective.

        Other work can be queued between it and `dispatch_recv`. With transport "symmetric" it does wait for the other ranks' counts,
        which say where the rows go, and so for the ranks to come to this call. The transports that can't part the two do all of it here.
        Arguments and errors as for `dispatch`.
        """
        arguments, buffers = self._begin(hidden_states, topk_ids, topk_weights, slot)
        state = self._run(self._transport.dispatch_send, *arguments, buffers)
        return self._handle(*arguments, buffers, state)

    @untraced
    def dispatch_recv(self, handle: DispatchHandle) -> ExpertBatch:
        """The second half of `dispatch`: the batch, when all ranks' rows are there. Collective. handle: of `dispatch_send`."""
        buffers = self._slot_of(handle)
        return self._run(self._transport.dispatch_recv, handle.topk_weights.shape[0], buffers)

    @untraced
    def dispatch_first(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: int, experts: int
    ) -> tuple[ExpertBatch, DispatchHandle]:
        """`dispatch` of the rows of each rank's first `experts` experts, 1 to L - 1, whose batch it returns. Collective.
        `dispatch_second` sends the others, beside products of these if need be, before combine. Transport "symmetric" alone."""
        transport = self._symmetric()
        arguments, buffers = self._begin(hidden_states, topk_ids, topk_weights, slot, experts)
        batch, state = self._run(transport.dispatch_first, *arguments, buffers, experts)
        return batch, self._handle(*arguments, buffers, state)

    @untraced
    def dispatch_second(self, handle: DispatchHandle) -> ExpertBatch:
        """The batch of the other experts. Collective. handle: of `dispatch_first`, whose tensors must not have changed."""
        return self._run(self._symmetric().dispatch_second, self._slot_of(handle))

    @untraced
    def combine(self, expert_output: Tensor, handle: DispatchHandle, *, out: Tensor | None = None) -> Tensor:
        """Brings each token's rows back from its experts and sums them by their weights. Collective.

        expert_output: (L, M, H) bfloat16 or float16: for each valid row of the batch what its expert made of it. Transport "symmetric"
            copies it first, unless it is `output_buffer`.
        handle: of the dispatch that this answers.
        out: (T, H) of the hidden states' type with contiguous rows, or None to allocate it: the one allocation in this call.

        Returns out. A token whose entries are all absent (-1, or dropped) gets zeros. Raises StaleHandleError if the handle's slot has
        dispatched again since, ValueError for wrong tensors, RuntimeError for tensors that require grad under grad mode.
        """
        buffers = self._slot_of(handle)
        expert_output = check_expert_output(self.config, self.device, expert_output)
        out = check_out(self.config, self.device, handle, out)
        self._run(self._transport.combine, expert_output, handle.topk_weights, out, buffers, handle.state)
        return out

    @untraced
    def combine_send(self, expert_output: Tensor, handle: DispatchHandle) -> None:
        """The first half of `combine`: makes this rank's rows available, and does not wait for the others'. Collective.

        Other work can be queued between it and `combine_recv`, but none that writes expert_output. Arguments and errors as for `combine`.
        """
        self._run(self._transport.combine_send, check_expert_output(self.config, self.device, expert_output), self._slot_of(handle))

    @untraced
    def combine_recv(self, handle: DispatchHandle, *, out: Tensor | None = None) -> Tensor:
        """The second half of `combine`: the sums, when all ranks' rows are there. Collective. After `combine_send` of the same handle."""
        buffers, out = self._slot_of(handle), check_out(self.config, self.device, handle, out)
        if buffers.pending is None:
            raise RuntimeError("combine_recv came without combine_send; call combine_send(expert_output, handle) first")
        self._run(self._transport.combine_recv, handle.topk_weights, out, buffers, handle.state)
        buffers.pending = None
        return out

    @untraced
    def push(self, expert_output: Tensor, handle: DispatchHandle) -> None:
        """Stores each valid row of expert_output (L, M, H) at `handle.destinations`, as a producer can do that has the addresses itself.
        Then call `combine_pushed`. Transport "symmetric" with reduce="exact" alone."""
        self._run(self._pushing(handle).push, check_expert_output(self.config, self.device, expert_output), self._slot_of(handle))

    @untraced
    def combine_pushed(self, handle: DispatchHandle, *, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """`combine` of rows that have been stored at `handle.destinations`: waits until all ranks' are, and sums them. Collective.

        dtype: of the rows, bfloat16 or float16. The same bits as `combine`. Transport "symmetric" with reduce="exact" alone.
        """
        transport = self._pushing(handle)
        buffers, out = self._slot_of(handle), check_out(self.config, self.device, handle, out)
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
        self._run(transport.combine_pushed, dtype, handle.topk_weights, out, buffers, handle.state)
        return out

    def output_buffer(self, slot: int = 0) -> Tensor:
        """(L, M, H) bfloat16: a slot's buffer for expert output. Transport "symmetric" combines from it without a copy.

        It may be written from the slot's dispatch to its combine, not outside.
        """
        self._check_open()
        return self._transport.output_buffer(self._slot(slot))

    @untraced
    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Callable[[ExpertBatch], Tensor],
        *,
        slot: int = 0,
        chunks: int | None = None,
        first_experts: int | None = None,
    ) -> Tensor:
        """dispatch, experts, combine. Returns (T, H) of the hidden states' type. Collective.

        With `GroupedExperts`, transport "symmetric" and reduce="exact", GEMM 2 stores its rows at their tokens' ranks, and communication
        can go on under the products; overlap=False keeps the steps apart. The same bits, but for the experts' choice of tiles.

        first_experts: from 0 to L - 1; the rows of each rank's first so many experts are sent first, and those of the others under
            their products.
        chunks: 1, or, with slots=2, 2: half of the tokens in each slot (`slot` is not used then), each with room for M rows of an
            expert, and one half's dispatch under the other's products.

        Both are the same on all ranks, and only one is used. None: what a model of the hardware finds fastest for max_tokens_per_rank
        tokens; give first_experts=0 and chunks=1 for calls with few tokens of a dispatcher that is made for many.
        """
        tokens = hidden_states, topk_ids, topk_weights
        return run_layer(self, tokens, experts, slot, chunks, first_experts, self._side)

    def check(self) -> int:
        """Waits for the device, and reports what dispatches since the last check could not raise. Not collective.

        Returns the number of rows without room, of all ranks and experts. Raises InvalidExpertIdError if topk_ids of this rank had ids
        outside -1..E-1, CapacityOverflowError if rows had no room and on_overflow is "error", OutOfStepError if ranks made different
        calls, PeerTimeoutError after a fault.
        """
        self._check_open()
        return self._report()

    def _report(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._raise_fault()
        invalid, dropped, strangers = self._status.tolist()
        self._status.zero_()
        if strangers:
            self._fault = OutOfStepError(
                "ranks of the group made different calls of dispatch, and results since the last check are wrong: one rank raised an "
                "error, or skipped a call that the others made. Build a new dispatcher"
            )
            raise self._fault
        check_counted(self.config, invalid, dropped)
        return dropped

    def close(self) -> None:
        """Waits for the device and frees the buffers; graphs that were captured with them must not be replayed any more. Not collective,
        may be called twice; every other call raises ClosedError from then on."""
        if self._slots and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._closed = True
        self._slots = []

    def __enter__(self) -> MoEQuantDispatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes, and, unless an error is under way, reports as `check` does: what was dropped must not go unsaid."""
        try:
            if kind is None and not self._closed and self._fault is None:
                self._report()
        finally:
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this dispatcher is closed; build a new one")
        earlier = self._fault
        if earlier is not None:
            message = f"this dispatcher lost a rank earlier: {earlier}"
            raise PeerTimeoutError(message, earlier.rank) if isinstance(earlier, PeerTimeoutError) else OutOfStepError(message)
        self._raise_fault()

    def _raise_fault(self) -> None:
        """Raises what the transport's kernels have noticed."""
        self._fault = self._transport.fault()
        if self._fault is not None:
            raise self._fault

    def _slot(self, slot: int) -> Slot:
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < len(self._slots):
            raise ValueError(
                f"slot must be in 0..{len(self._slots) - 1}, got {slot}; the constructor's slots says how many there are"
            )
        return self._slots[slot]

    def _begin(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, slot: int, first_experts: int = 0
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Slot]:
        """The start of a dispatch: the call is counted, the inputs are checked and made contiguous."""
        self._check_open()
        # a call that is refused counts too: ranks that go on without this one must notice
        self._calls += 1
        buffers = self._slot(slot)
        buffers.call = (self._calls % 2**21) << 9 | slot << 8 | first_experts % 2**8
        check_tokens(self.config, self.device, hidden_states, topk_ids, topk_weights)
        buffers.generation += 1
        buffers.pending = buffers.second = None
        return (with_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()), buffers

    def _handle(self, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor, slot: Slot, state: Any) -> DispatchHandle:
        destinations = slot.buffers.get("destinations")
        return DispatchHandle(topk_weights, hidden_states.dtype, self._number, slot.number, slot.generation, state, destinations)

    def _slot_of(self, handle: DispatchHandle) -> Slot:
        """The slot of a handle that is still good."""
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
                f"the handle is of dispatch {handle.generation} of slot {handle.slot}, which has dispatched {buffers.generation} times "
                "since and reused its buffers; combine before the next dispatch, or use slots=2"
            )
        return buffers

    def _symmetric(self) -> SymmetricTransport:
        if not isinstance(self._transport, SymmetricTransport):
            raise RuntimeError(f'only transport "symmetric" can do this, not "{self.config.transport}"')
        return self._transport

    def _pushing(self, handle: DispatchHandle) -> SymmetricTransport:
        self._slot_of(handle)
        transport = self._symmetric()
        if handle.destinations is None:
            raise RuntimeError(f'rows can be pushed with reduce="exact" alone, not with "{self.config.reduce}"; use combine')
        return transport

    def _run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """A transport's step; after a fault every later call raises."""
        try:
            return step(*arguments)
        except (PeerTimeoutError, OutOfStepError) as error:
            self._fault = error
            raise
