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
from moequant.checks import check_format, check_no_grad, check_tensor
from moequant.config import DispatcherConfig
from moequant.errors import (
    CapacityOverflowError,
    ClosedError,
    InvalidExpertIdError,
    OutOfStepError,
    PeerTimeoutError,
    StaleHandleError,
)
from moequant.transport.base import Slot, Transport
from moequant.transport.collective import PackedTransport, PaddedTransport, choose_exchange
from moequant.transport.local import LocalTransport

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
    transport: "local" (one rank), "collective" (torch.distributed), or "auto".
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
    recipe: of quantization: "default", "deepgemm", "ue8m0" (`moequant.formats.RECIPES`).
    slots: 1 or 2 sets of buffers: two micro-batches in flight use one each.
    timeout: seconds that a wait for other ranks may last, on CPUs; on GPUs the process group's own limit holds.
    device: where tensors live; None: the current GPU, or the CPU without one or with a gloo group.

    The constructor is collective: all ranks of the group call it, with the same settings. It allocates `buffer_bytes(...)` bytes, and
    compiles the kernels for bfloat16 hidden states and float32 weights; other types compile when they first come. `dispatch` and
    `combine` are collective and run in stream order; nothing in them syncs with the host, except in the packed exchange. All ranks have
    to make the same calls: a call that raises on one rank counts, and OutOfStepError tells the ranks that went on without it (on a GPU
    with the padded exchange, from `check()`). A dispatcher is a context manager; leaving it calls `check()` and `close()`.

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
                timeout=timeout,
            )

        mine = attempt(settings, alone=world_size == 1)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            self.config = agree(mine, group, rank, world_size)
            self._status = torch.zeros(3, dtype=torch.int64, device=self.device)
            self._transport = _make_transport(self.config, rank, self.device, self._status, group)
            self._slots = [self._transport.allocate(number) for number in range(slots)]
            if self.device.type == "cuda":
                self._warm_up()

    @staticmethod
    def buffer_bytes(
        *, num_experts: int, top_k: int, hidden_size: int, max_tokens_per_rank: int, world_size: int = 1, **settings: Any
    ) -> int:
        """Bytes of device memory that a dispatcher with these settings allocates on each rank. Needs no GPU and no group.

        settings: as the constructor's; world_size stands in for the group.
        """
        config = DispatcherConfig(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            max_tokens_per_rank=max_tokens_per_rank,
            world_size=world_size,
            **settings,
        )
        specs = _transport_class(config).buffer_specs(config)
        return config.slots * sum(spec.nbytes for spec in specs.values())

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
        self._check_open()
        # a call that is refused counts too: ranks that go on without this one must notice
        self._calls += 1
        buffers = self._slot(slot)
        buffers.call = (self._calls % 2**30) * 2 + slot
        self._check_inputs(hidden_states, topk_ids, topk_weights)
        if hidden_states.stride(-1) != 1:
            hidden_states = hidden_states.contiguous()
        topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
        buffers.generation += 1
        batch, state = self._run(self._transport.dispatch, hidden_states, topk_ids, topk_weights, buffers)
        return batch, DispatchHandle(topk_weights, hidden_states.dtype, self._number, slot, buffers.generation, state)

    @untraced
    def combine(self, expert_output: Tensor, handle: DispatchHandle, *, out: Tensor | None = None) -> Tensor:
        """Brings each token's rows back from its experts and sums them by their weights. Collective.

        expert_output: (L, M, H) bfloat16 or float16: for each valid row of the batch what its expert made of it.
        handle: of the dispatch that this answers.
        out: (T, H) of the hidden states' type with contiguous rows, or None to allocate it: the one allocation in this call.

        Returns out. A token whose entries are all absent (-1, or dropped) gets zeros. Raises StaleHandleError if the handle's slot has
        dispatched again since, ValueError for wrong tensors, RuntimeError for tensors that require grad under grad mode.
        """
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
        config, weights = self.config, handle.topk_weights
        shape = (config.num_local_experts, config.max_rows, config.hidden_size)
        check_tensor("expert_output", expert_output, shape=shape, dtypes=(torch.bfloat16, torch.float16), device=self.device)
        check_no_grad(expert_output=expert_output)
        if out is None:
            out = torch.empty(weights.shape[0], config.hidden_size, dtype=handle.dtype, device=self.device)
        check_tensor("out", out, shape=(weights.shape[0], config.hidden_size), dtypes=(handle.dtype,), device=self.device)
        check_no_grad(out=out)
        if out.stride(-1) != 1:
            raise ValueError(f"out must have contiguous rows, got strides {out.stride()}")
        self._run(self._transport.combine, expert_output.contiguous(), weights, out, buffers, handle.state)
        return out

    @untraced
    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Callable[[ExpertBatch], Tensor],
        *,
        slot: int = 0,
    ) -> Tensor:
        """dispatch, experts, combine. Returns (T, H) of the hidden states' type."""
        batch, handle = self.dispatch(hidden_states, topk_ids, topk_weights, slot=slot)
        return self.combine(experts(batch), handle)

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
        invalid, dropped, strangers = self._status.tolist()
        self._status.zero_()
        if strangers:
            self._fault = OutOfStepError(
                "ranks of the group made different calls of dispatch, and results since the last check are wrong: one rank raised an "
                "error, or skipped a call that the others made. Build a new dispatcher"
            )
            raise self._fault
        overflow = (
            f"{dropped} rows had no room in their expert's buffer of {self.config.max_rows} rows and were not sent; raise capacity "
            '(None holds every row of distinct experts; for experts that a token names twice use exchange="packed"), or accept it with '
            'on_overflow="drop"'
        )
        if invalid:
            raise InvalidExpertIdError(
                f"{invalid} entries of topk_ids were outside -1..{self.config.num_experts - 1} and were treated as -1; "
                f"check the router, and num_experts{'. Besides, ' + overflow if dropped else ''}"
            )
        if dropped and self.config.on_overflow == "error":
            raise CapacityOverflowError(overflow)
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
        if self._fault is not None:
            raise type(self._fault)(f"this dispatcher lost a rank earlier: {self._fault}")

    def _slot(self, slot: int) -> Slot:
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < len(self._slots):
            raise ValueError(
                f"slot must be in 0..{len(self._slots) - 1}, got {slot}; the constructor's slots says how many there are"
            )
        return self._slots[slot]

    def _check_inputs(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        config = self.config
        floats = (torch.bfloat16, torch.float16, torch.float32)
        check_tensor("hidden_states", hidden_states, dims=2, dtypes=floats, device=self.device)
        tokens = hidden_states.shape[0]
        if tokens > config.max_tokens_per_rank:
            raise ValueError(
                f"hidden_states has {tokens} tokens, max_tokens_per_rank is {config.max_tokens_per_rank}; split the tokens, or build "
                "the dispatcher with more"
            )
        check_tensor("hidden_states", hidden_states, shape=(tokens, config.hidden_size))
        routing = (tokens, config.top_k)
        check_tensor("topk_ids", topk_ids, shape=routing, dtypes=(torch.int32, torch.int64), device=self.device)
        check_tensor("topk_weights", topk_weights, shape=routing, dtypes=(torch.float32, torch.bfloat16), device=self.device)
        check_no_grad(hidden_states=hidden_states, topk_weights=topk_weights)
        if self.device.type == "cpu" and tokens:
            low, high = topk_ids.aminmax()
            if low < -1 or high >= config.num_experts:
                raise InvalidExpertIdError(
                    f"topk_ids must be in -1..{config.num_experts - 1}, got ids from {int(low)} to {int(high)}; -1 means no expert"
                )

    def _run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """A transport's step; after a fault every later call raises."""
        try:
            return step(*arguments)
        except (PeerTimeoutError, OutOfStepError) as error:
            self._fault = error
            raise

    def _warm_up(self) -> None:
        """Compiles and loads the kernels for few and for many tokens and both types of ids, with tokens that go nowhere."""
        config, slot = self.config, self._slots[0]
        hidden = torch.zeros(config.max_tokens_per_rank, config.hidden_size, dtype=torch.bfloat16, device=self.device)
        weights = torch.zeros(config.max_tokens_per_rank, config.top_k, device=self.device)
        # stands in for expert output, of which nothing is read: a whole one may be gigabytes
        nothing = torch.zeros(1, dtype=torch.bfloat16, device=self.device)
        output = nothing.expand(config.num_local_experts, config.max_rows, config.hidden_size)
        for dtype in (torch.int32, torch.int64):
            ids = torch.full(weights.shape, -1, dtype=dtype, device=self.device)
            for tokens in (1, config.max_tokens_per_rank):
                _, state = self._run(self._transport.dispatch, hidden[:tokens], ids[:tokens], weights[:tokens], slot)
                self._run(self._transport.combine, output, weights[:tokens], hidden[:tokens], slot, state)
        torch.cuda.synchronize(self.device)


def _transport_class(config: DispatcherConfig) -> type[Transport]:
    if config.transport == "local" or (config.transport == "auto" and config.world_size == 1):
        return LocalTransport
    return PaddedTransport if choose_exchange(config) == "padded" else PackedTransport


def _make_transport(
    config: DispatcherConfig, rank: int, device: torch.device, status: Tensor, group: dist.ProcessGroup | None
) -> Transport:
    kind = _transport_class(config)
    if kind is LocalTransport:
        return LocalTransport(config, rank, device, status)
    if group is None:
        raise ValueError('transport "collective" needs torch.distributed; call init_process_group first, or use "auto"')
    assert issubclass(kind, (PaddedTransport, PackedTransport))
    return kind(config, rank, device, status, group)
