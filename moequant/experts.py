"""`GroupedExperts`: the experts' feed-forward networks on an expert batch: grouped GEMM 1, activation + quantize, grouped GEMM 2.

L local experts, M rows of an expert's buffer, H hidden size, I intermediate size. What is (L, M, ...) is (R, ...) for a ragged batch.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch, Owner, Place, QuantizedTensor
from moequant.checks import check_contiguous, check_is, check_no_grad, check_num_sms, check_part, check_tensor
from moequant.formats import FLOAT_DTYPES
from moequant.gemm import grouped_gemm_blockscale
from moequant.quantization import silu_mul, silu_mul_quantize
from moequant.repeats import Repeats
from moequant.traced import numbered
from moequant.weights import ExpertWeights, Weight, check_batch, dtype_of, parts_of, some_of
from moequant.workspaces import Sizes, Workspace, workspace_of

Result = TypeVar("Result")
# What a subclass may override to compute something else.
STEPS = frozenset(("__call__", "push", "gemm1_swiglu", "gemm1", "activation", "gemm2", "gemm2_push", "_product"))
# What a copy has of its own.
OWN = frozenset(("_number", "_owner", "_repeats", "_checked", "_parts", "_known"))


class GroupedExperts(ExpertWeights):
    """w2[l] @ (silu(gate) * up) with gate, up = the halves of w13[l] @ x, for each valid row x of expert l; or with another activation,
    and with biases added to both products.

    Made by `from_weights` or `from_quantized`. They hold weights: what passes between the steps, and the result unless `out` is given,
    lies in workspaces of the batch's dispatcher, made for the first batch of a slot, shared by all experts of the same sizes, and kept
    until the dispatcher is gone. So it is valid until the next call of any experts on a batch of that slot.

    Every step raises ValueError for a batch of other experts and RuntimeError for tensors that require grad under grad mode.

    A subclass can override the steps of a call. Then a dispatcher calls it with the whole batch and combines what it returns, on
    every transport (`can_push`).

    Args:
        w13: (L, 2I, H), gate first, then up, not gated (L, I, H): bfloat16, float16, or quantized in layout "block", gate and up in
            segments=2, interleaved or not gated in one.
        w2: (L, H, I) of the same type.
        activation: an `Activation`, or the name of its function.
        bias13: (L, 2I), not gated (L, I), bfloat16, float16 or float32, as w13's rows lie; or None.
        bias2: (L, H), or None. Experts that have it don't push: a layer calls and combines.

    Raises:
        LayoutError: blocks of another size than 128x128.
        ValueError: other wrong weights, or a wrong activation.
    """

    def _begin(self) -> None:
        self._number = numbered.add(self)
        # of batches that are no dispatcher's
        self._owner = Owner()
        self._repeats: weakref.WeakKeyDictionary[ExpertBatch, Repeats] = weakref.WeakKeyDictionary()
        # the last batch that was found to be one for these experts
        self._checked: weakref.ref[ExpertBatch] | None = None
        self._parts: dict[tuple[int, int], GroupedExperts] = {}
        # where the weights lie that both are of
        self._known: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __call__(self, batch: ExpertBatch, *, out: Tensor | None = None, num_sms: int | None = None) -> Tensor:
        """What the experts make of a batch.

        Args:
            batch: of `MoEQuantDispatcher.dispatch`.
            out: (L, M, H) of `output_dtype`, contiguous, or None for a workspace.
            num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

        Returns:
            out; its valid rows are written.

        Raises:
            ValueError: a batch of other experts, or another wrong argument.
            RuntimeError: a tensor requires grad under grad mode.
        """

        def run() -> Tensor:
            check_num_sms(num_sms)
            self._check_batch(batch)
            checked = self._output(batch, out)
            return self.gemm2(self.gemm1_swiglu(batch, num_sms=num_sms), batch, out=checked, num_sms=num_sms)

        # an output of the caller's is not kept
        return run() if out is not None else self._repeated("call", batch, (), num_sms, run)

    def push(self, batch: ExpertBatch, destinations: Tensor, *, num_sms: int | None = None) -> None:
        """As a call, but GEMM 2 stores each valid row at its address: `MoEQuantDispatcher.combine_pushed` then sums them.

        Args:
            batch: of `MoEQuantDispatcher.dispatch`.
            destinations: (L, M) int64, as `MoEQuantDispatcher.begin_push` gives it.
            num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

        Raises:
            ValueError: a batch of other experts, or another wrong argument.
            RuntimeError: the batch is on a CPU, or a tensor requires grad under grad mode.
        """

        def run() -> None:
            self._check_batch(batch)
            self.gemm2_push(self.gemm1_swiglu(batch, num_sms=num_sms), batch, destinations, num_sms=num_sms)

        inputs = (destinations,) if isinstance(destinations, Tensor) else ()
        self._repeated("push", batch, inputs, num_sms, run)

    def _repeated(
        self, name: str, batch: ExpertBatch, inputs: tuple[Tensor, ...], num_sms: int | None, call: Callable[[], Result]
    ) -> Result:
        """The result of a call's steps. Those of a dispatcher's batch are repeated when the batch is, with the same weights."""
        check_num_sms(num_sms)
        if not isinstance(batch, ExpertBatch) or batch.owner is None or _overridden(self):
            return call()
        weights = self._notice_new_weights()
        repeats = self._repeats.get(batch)
        if repeats is None:
            repeats = self._repeats[batch] = Repeats()
        return repeats.run(batch.values, inputs, (name, num_sms, batch.values.data_ptr(), *weights, torch.is_grad_enabled()), call)

    def gemm1_swiglu(self, batch: ExpertBatch, *, num_sms: int | None = None) -> QuantizedTensor | Tensor:
        """GEMM 1, activation and quantization: in one kernel where there is a faster one, otherwise one after the other, with the same
        bits.

        Args:
            batch: of `MoEQuantDispatcher.dispatch`.
            num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

        Returns:
            Values (L, M, I), quantized unless the batch is not.
        """
        if not self.fuses(batch):
            return self.activation(self.gemm1(batch, num_sms=num_sms), batch)
        inner = self._workspace(batch).inner
        assert isinstance(self.w13, QuantizedTensor) and isinstance(inner, QuantizedTensor) and batch.scales is not None
        w13, out = (self.w13.values, self.w13.scales), (inner.values, inner.scales)
        counts = batch.num_tokens, batch.expert_start
        ops.gemm1_swiglu(batch.values, batch.scales, *w13, *counts, *out, batch.recipe, batch.chosen_by, num_sms)
        return inner

    def _notice_new_weights(self) -> tuple[int, ...]:
        """Where the weights lie, with what may be refused, that they require grad. What was made of others is forgotten."""
        weights = _addresses_of(self.w13, self.w2, self.bias13, self.bias2)
        if weights != self._known:
            self._known = weights
            self._repeats.clear()
            self._parts.clear()
        return weights

    def part(self, begin: int, end: int) -> GroupedExperts:
        """Some of the experts, with views of the weights, for `ExpertBatch.part`. It is kept, and so is its workspace; ragged: all's.

        Args:
            begin: the first expert.
            end: the one after the last.

        Returns:
            Experts begin..end - 1.

        Raises:
            ValueError: unless 0 <= begin < end <= L.
            RuntimeError: for a subclass that overrides steps: the part would not have them.
        """
        check_part(begin, end, self.w13.shape[0])
        self._notice_new_weights()
        if (begin, end) not in self._parts:
            if _overridden(self):
                raise RuntimeError(
                    f"{type(self).__name__} overrides steps of GroupedExperts, which a part would not have; override part"
                )
            w13, w2 = (some_of(w, begin, end) for w in (self.w13, self.w2))
            biases = (None if bias is None else bias[begin:end] for bias in (self.bias13, self.bias2))
            part = GroupedExperts(w13, w2, activation=self.kind, **dict(zip(("bias13", "bias2"), biases, strict=True)))
            self._parts[begin, end] = part
            first, whole = self._place or (0, self.w13.shape[0])
            part._place, part._owner = Place(first + begin, whole), self._owner
        return self._parts[begin, end]

    def fuses(self, batch: ExpertBatch) -> bool:
        """Whether `gemm1_swiglu` is one kernel for a batch.

        Args:
            batch: of `MoEQuantDispatcher.dispatch`.

        Returns:
            The answer.
        """
        inner, w13 = self._workspace(batch).inner, self.w13
        if not self.kind.plain or self.bias13 is not None or _overridden(self) & {"gemm1", "activation", "_product"}:
            return False
        if not (isinstance(w13, QuantizedTensor) and isinstance(inner, QuantizedTensor)) or batch.scales is None:
            return False
        return ops.fuses_gemm1(batch.values, batch.scales, w13.values, w13.scales, inner.values, inner.scales, batch.chosen_by)

    def gemm1(self, batch: ExpertBatch, *, num_sms: int | None = None) -> Tensor:
        """The batch's values times w13.

        Args:
            batch: of `MoEQuantDispatcher.dispatch`.
            num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

        Returns:
            (L, M, 2I) of `output_dtype`, not gated (L, M, I), without bias.
        """

        def run() -> Tensor:
            self._check_batch(batch)
            return self._product(batch.activations, self.w13, batch, self._workspace(batch).gate_up, num_sms)

        return self._repeated("gemm1", batch, (), num_sms, run)

    def activation(self, gate_up: Tensor, batch: ExpertBatch) -> QuantizedTensor | Tensor:
        """SwiGLU or another activation, after w13's bias, quantized by the batch's recipe.

        Args:
            gate_up: (L, M, 2I) of `gemm1`, not gated (L, M, I).
            batch: of `MoEQuantDispatcher.dispatch`.

        Returns:
            Values (L, M, I), quantized unless the batch is not.

        Raises:
            ValueError: a batch of other experts, or another wrong argument.
            RuntimeError: a tensor requires grad under grad mode.
        """
        self._check_batch(batch)
        rows = (*batch.values.shape[:-1], self.w13.shape[1])
        check_tensor("gate_up", gate_up, shape=rows, dtypes=FLOAT_DTYPES, device=batch.values.device)
        check_no_grad(gate_up=gate_up)
        inner, given = self._workspace(batch).inner, (gate_up, batch.num_tokens, batch.expert_start)
        if isinstance(inner, Tensor):
            return silu_mul(*given, activation=self.kind, bias=self.bias13, out=inner)
        outputs = {"recipe": batch.recipe, "values": inner.values, "scales": inner.scales}
        return silu_mul_quantize(*given, activation=self.kind, bias=self.bias13, dtype=inner.values.dtype, **outputs)

    def gemm2(
        self, inner: QuantizedTensor | Tensor, batch: ExpertBatch, *, out: Tensor | None = None, num_sms: int | None = None
    ) -> Tensor:
        """inner times w2, plus w2's bias.

        Args:
            inner: (L, M, I) of `activation`.
            batch: of `MoEQuantDispatcher.dispatch`.
            out: (L, M, H) of `output_dtype`, contiguous, or None for a workspace.
            num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

        Returns:
            out; its valid rows are written.

        Raises:
            ValueError: a batch of other experts, or another wrong argument.
            RuntimeError: a tensor requires grad under grad mode.
        """
        self._check_inner(inner, batch)
        check_no_grad(bias2=self.bias2)
        product = self._product(inner, self.w2, batch, self._output(batch, out), num_sms)
        if self.bias2 is not None:
            ops.add_bias(product, batch.num_tokens, batch.expert_start, self.bias2)
        return product

    def gemm2_push(
        self, inner: QuantizedTensor | Tensor, batch: ExpertBatch, destinations: Tensor, *, num_sms: int | None = None
    ) -> None:
        """`gemm2`, with the same bits, whose row (l, m) goes to the address destinations[l, m].

        Args:
            inner: (L, M, I) of `activation`.
            batch: of `MoEQuantDispatcher.dispatch`.
            destinations: (L, M) int64, as `MoEQuantDispatcher.begin_push` gives it.
            num_sms: SMs (multiprocessors) of the GPU to use, so that kernels of other streams have the rest; None for all.

        Raises:
            ValueError: a batch of other experts, or another wrong argument.
            RuntimeError: the batch is on a CPU, w2 has a bias, or a tensor requires grad under grad mode.
        """
        self._check_inner(inner, batch)
        if self.bias2 is not None:
            raise RuntimeError("bias2 is not added to rows that are pushed; call the experts, and use combine")
        check_num_sms(num_sms)
        rows = tuple(batch.values.shape[:-1])
        check_tensor("destinations", destinations, shape=rows, dtypes=(torch.int64,), device=batch.values.device)
        check_no_grad(w2=parts_of(self.w2)[0])
        if not ops.uses_kernels(batch.values):
            raise RuntimeError("rows are pushed by kernels alone, and this batch is on a CPU; call the experts, and use combine")
        # asked first: what torch may copy is not repeated
        side_by_side = destinations if destinations.is_contiguous() else destinations.contiguous()
        counts = batch.num_tokens, batch.expert_start
        ops.grouped_gemm_push(*parts_of(inner), *parts_of(self.w2), *counts, side_by_side, batch.chosen_by, num_sms)

    def _product(self, a: QuantizedTensor | Tensor, w: Weight, batch: ExpertBatch, out: Tensor, num_sms: int | None) -> Tensor:
        counts = batch.num_tokens, batch.expert_start
        hints = {"expected_rows": batch.expected_rows, "batch_invariant": batch.batch_invariant}
        return grouped_gemm_blockscale(a, w, *counts, out=out, num_sms=num_sms, **hints)

    def _check_inner(self, inner: QuantizedTensor | Tensor, batch: ExpertBatch) -> None:
        """Raises unless inner is what `activation` makes of the batch."""
        self._check_batch(batch)
        check_is("inner", inner, (QuantizedTensor, Tensor))
        values, shape = parts_of(inner)[0], (*batch.values.shape[:-1], self.intermediate_size)
        check_tensor("inner", values, shape=shape, dtypes=(dtype_of(self.w2),), device=batch.values.device)
        check_no_grad(inner=values)

    def _output(self, batch: ExpertBatch, out: Tensor | None) -> Tensor:
        """The output that was given, checked, or the workspace's."""
        if out is None:
            return self._workspace(batch).output
        check_tensor("out", out, shape=tuple(batch.values.shape), dtypes=(self.output_dtype,), device=batch.values.device)
        check_contiguous("out", out)
        check_no_grad(out=out)
        return out

    def _check_batch(self, batch: ExpertBatch) -> None:
        """Raises ValueError unless batch is one for these experts."""
        if self._checked is not None and self._checked() is batch:
            return
        check_batch(batch, self.w13, self._place)
        self._checked = weakref.ref(batch)

    def _workspace(self, batch: ExpertBatch) -> Workspace:
        """What all experts of these sizes share that take batches of the owner and slot."""
        self._check_batch(batch)
        inner = dtype_of(self.w2), isinstance(self.w2, QuantizedTensor), self.output_dtype
        first = self._place.first if self._place else 0
        span = None if batch.ragged else (first, first + self.w13.shape[0])
        rows = tuple(batch.values.shape[:-1])
        columns = self.hidden_size, self.intermediate_size, self.w13.shape[1]
        sizes = Sizes(batch.slot, span, rows, *columns, *inner, batch.values.device)
        return workspace_of(batch.owner or self._owner, sizes)


def can_push(experts: object) -> bool:
    """Whether `GroupedExperts.push` computes what a call of these experts does.

    Args:
        experts: anything.

    Returns:
        False where a step is overridden, by a subclass or an attribute, where w2 has a bias, and for what is no GroupedExperts.
    """
    return isinstance(experts, GroupedExperts) and experts.bias2 is None and not _overridden(experts)


def _overridden(experts: GroupedExperts) -> frozenset[str]:
    """The steps that are overridden, by a subclass or by an attribute."""
    return _overridden_by(type(experts)) | (vars(experts).keys() & STEPS)


@functools.cache
def _overridden_by(kind: type[GroupedExperts]) -> frozenset[str]:
    return frozenset(step for step in STEPS if getattr(kind, step) is not getattr(GroupedExperts, step))


def _addresses_of(*weights: Weight | None) -> tuple[int, ...]:
    """Where weights and biases lie, values and scales each, and of plain ones whether they require grad, for which their use may be
    refused. 0 for None, so that one bias is not taken for the other."""
    found: list[int] = []
    for w in weights:
        if w is None:
            found.append(0)
        elif isinstance(w, QuantizedTensor):
            found += w.values.data_ptr(), w.scales.data_ptr()
        else:
            found += w.data_ptr(), w.requires_grad
    return tuple(found)
