"""`GroupedExperts`: the experts' feed-forward networks on an expert batch: grouped GEMM 1, SwiGLU + quantize, grouped GEMM 2.

L local experts, M rows of an expert's buffer, H hidden size, I intermediate size.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ExpertBatch, QuantizedTensor, ceil_div, empty_transposed_scales
from moequant.checks import check_format, check_tensor
from moequant.config import QUANT_DTYPES
from moequant.errors import LayoutError
from moequant.gemm import grouped_gemm_blockscale
from moequant.quantization import quantize_weight, silu_mul, silu_mul_quantize

Weight = QuantizedTensor | Tensor


class GroupedExperts:
    """w2[l] @ (silu(gate) * up) with gate, up = the halves of w13[l] @ x, for each valid row x of expert l.

    Made by `from_weights` or `from_quantized`. Calling it with an ExpertBatch returns (L, M, H) bfloat16, of which the valid rows are
    written. Workspaces are allocated for the first batch of each slot and M, and kept; the result is one of them, valid until the next
    batch of that slot, unless `out` is given.
    """

    def __init__(self, w13: Weight, w2: Weight, *, activation: str = "silu") -> None:
        if activation != "silu":
            raise ValueError(f'activation must be "silu" (SwiGLU), got {activation!r}')
        if len(w13.shape) != 3:
            raise ValueError(f"w13 must be (L, 2 * I, H), gate first, got shape {tuple(w13.shape)}")
        experts, doubled, hidden = w13.shape
        if doubled % 2 or tuple(w2.shape) != (experts, hidden, doubled // 2):
            raise ValueError(
                f"w13 must be (L, 2 * I, H), gate first, and w2 (L, H, I); got {tuple(w13.shape)} and {tuple(w2.shape)}"
            )
        if w13.device != w2.device:
            raise ValueError(f"w13 and w2 must be on one device, got {w13.device} and {w2.device}")
        if isinstance(w13, QuantizedTensor) and (w13.layout != "block" or w13.segments != 2):
            raise ValueError(
                f'w13 must have layout "block" with segments=2 (gate and up blocked apart), got "{w13.layout}" with '
                f"segments={w13.segments}; quantize_weight(w13, segments=2) makes it"
            )
        for name, w in (("w13", w13), ("w2", w2)):
            if not isinstance(w, QuantizedTensor):
                check_tensor(name, w, dims=3, dtypes=(torch.bfloat16,))
            elif w.layout != "block" or w.group_size != 128:
                raise LayoutError(f'{name} must have layout "block" of 128x128, got "{w.layout}" with group size {w.group_size}')
        if _dtype(w13) != _dtype(w2):
            raise ValueError(f"w13 and w2 must have one dtype, got {_dtype(w13)} and {_dtype(w2)}")
        self.w13, self.w2 = w13, w2
        self.hidden_size, self.intermediate_size = hidden, doubled // 2
        # of these experts among all of a layer, by slot and M
        self._span = 0, experts
        self._workspaces: dict[tuple[int, int, tuple[int, int]], Workspace] = {}
        self._parts: dict[tuple[int, int], GroupedExperts] = {}

    @classmethod
    def from_weights(
        cls, w13: Tensor, w2: Tensor, *, quant: str = "fp8_e4m3fn", activation: str = "silu", recipe: str = "default"
    ) -> GroupedExperts:
        """Quantizes bfloat16 weights in 128x128 blocks, gate and up apart.

        w13: (L, 2I, H), gate first, then up. w2: (L, H, I). quant: the dispatcher's; "none" keeps the weights as they are.
        activation: only "silu" is there.
        """
        if quant not in QUANT_DTYPES:
            raise ValueError(f"quant must be one of {', '.join(map(repr, QUANT_DTYPES))}, got {quant!r}")
        check_format(quant, w13.device)
        for name, w in (("w13", w13), ("w2", w2)):
            check_tensor(name, w, dims=3, dtypes=(torch.bfloat16,))
        if quant == "none":
            return cls(w13.contiguous(), w2.contiguous(), activation=activation)
        if w13.shape[1] % 2:
            raise ValueError(f"w13 must be (L, 2 * I, H), gate first, got shape {tuple(w13.shape)}")
        dtype = QUANT_DTYPES[quant]
        return cls(
            quantize_weight(w13, dtype=dtype, recipe=recipe, segments=2),
            quantize_weight(w2, dtype=dtype, recipe=recipe),
            activation=activation,
        )

    @classmethod
    def from_quantized(cls, w13: QuantizedTensor, w2: QuantizedTensor, *, activation: str = "silu") -> GroupedExperts:
        """Takes weights that are quantized already: layout "block", w13 with segments=2."""
        return cls(w13, w2, activation=activation)

    def __call__(self, batch: ExpertBatch, *, out: Tensor | None = None, num_sms: int | None = None) -> Tensor:
        """out: (L, M, H) bfloat16 contiguous, or None for a workspace. Returns it; the valid rows are written.

        num_sms: multiprocessors of the GPU that the products use, so that kernels of other streams have the rest; None for all.
        """
        return self.gemm2(self.gemm1_swiglu(batch, num_sms=num_sms), batch, out=out, num_sms=num_sms)

    def push(self, batch: ExpertBatch, destinations: Tensor, *, num_sms: int | None = None) -> None:
        """As a call, but GEMM 2 stores each valid row at its address: `MoEQuantDispatcher.combine_pushed` then sums them.

        destinations: (L, M) int64, as `MoEQuantDispatcher.begin_push` gives it.
        """
        self.gemm2_push(self.gemm1_swiglu(batch, num_sms=num_sms), batch, destinations, num_sms=num_sms)

    def gemm1_swiglu(self, batch: ExpertBatch, *, num_sms: int | None = None) -> QuantizedTensor | Tensor:
        """GEMM 1, SwiGLU and quantization: in one kernel where there is a faster one, otherwise one after the other, with the same
        bits. Returns values (L, M, I)."""
        if not self.fuses(batch):
            return self.activation(self.gemm1(batch, num_sms=num_sms), batch)
        inner = self._workspace(batch).inner
        assert isinstance(self.w13, QuantizedTensor) and isinstance(inner, QuantizedTensor)
        torch.ops.moequant.gemm1_swiglu(
            batch.values,
            batch.scales,
            self.w13.values,
            self.w13.scales,
            batch.num_tokens,
            inner.values,
            inner.scales,
            batch.recipe,
            batch.expected_rows,
            num_sms,
        )
        return inner

    def part(self, begin: int, end: int) -> GroupedExperts:
        """Experts begin..end - 1, with views of the weights and a workspace of their own, for `ExpertBatch.part`. It is kept."""
        if (begin, end) not in self._parts:
            w13, w2 = (
                replace(w, values=w.values[begin:end], scales=w.scales[begin:end])
                if isinstance(w, QuantizedTensor)
                else w[begin:end]
                for w in (self.w13, self.w2)
            )
            part = self._parts[begin, end] = GroupedExperts(w13, w2)
            part._span, part._workspaces = (begin, end), self._workspaces
        return self._parts[begin, end]

    def share_workspaces(self, other: GroupedExperts) -> None:
        """Uses the other's workspaces, as layers of a model can that run one after the other: they then need no more memory than one.

        Raises ValueError if the other's weights have other sizes, another type or device, and RuntimeError if there have been batches
        already: a captured graph may hold the workspaces that were made for them.
        """
        for name, mine, theirs in (("w13", self.w13, other.w13), ("w2", self.w2, other.w2)):
            if (mine.shape, _dtype(mine), mine.device) != (theirs.shape, _dtype(theirs), theirs.device):
                raise ValueError(
                    f"experts that share workspaces must be of the same size, type and device: {name} is {tuple(mine.shape)} in "
                    f"{_dtype(mine)} on {mine.device}, the other's {tuple(theirs.shape)} in {_dtype(theirs)} on {theirs.device}"
                )
        if self._workspaces and self._workspaces is not other._workspaces:
            raise RuntimeError("workspaces can't be shared any more, as there have been batches; share them before the first")
        self._workspaces = other._workspaces
        self._parts.clear()

    def fuses(self, batch: ExpertBatch) -> bool:
        """Whether `gemm1_swiglu` is one kernel for a batch."""
        inner, w13 = self._workspace(batch).inner, self.w13
        if not (isinstance(w13, QuantizedTensor) and isinstance(inner, QuantizedTensor)) or batch.scales is None:
            return False
        return ops.fuses_gemm1(batch.values, batch.scales, w13.values, w13.scales, inner.values, inner.scales, batch.expected_rows)

    def gemm1(self, batch: ExpertBatch, *, num_sms: int | None = None) -> Tensor:
        """batch's values times w13: (L, M, 2I) bfloat16."""
        return self._product(batch.activations, self.w13, batch, self._workspace(batch).gate_up, num_sms)

    def activation(self, gate_up: Tensor, batch: ExpertBatch) -> QuantizedTensor | Tensor:
        """SwiGLU of (L, M, 2I), quantized by the batch's recipe: values (L, M, I)."""
        inner = self._workspace(batch).inner
        if isinstance(inner, Tensor):
            return silu_mul(gate_up, batch.num_tokens, out=inner)
        return silu_mul_quantize(
            gate_up, batch.num_tokens, dtype=inner.values.dtype, recipe=batch.recipe, values=inner.values, scales=inner.scales
        )

    def gemm2(
        self,
        inner: QuantizedTensor | Tensor,
        batch: ExpertBatch,
        *,
        out: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor:
        """inner times w2: (L, M, H) bfloat16."""
        return self._product(inner, self.w2, batch, self._workspace(batch).output if out is None else out, num_sms)

    def gemm2_push(
        self, inner: QuantizedTensor | Tensor, batch: ExpertBatch, destinations: Tensor, *, num_sms: int | None = None
    ) -> None:
        """`gemm2`, with the same bits, whose row (l, m) goes to the address destinations[l, m]."""
        check_tensor("destinations", destinations, shape=batch.values.shape[:2], dtypes=(torch.int64,), device=batch.values.device)
        ops.grouped_gemm_push(
            *_parts(inner), *_parts(self.w2), batch.num_tokens, destinations.contiguous(), batch.expected_rows, num_sms
        )

    def _product(self, a: QuantizedTensor | Tensor, w: Weight, batch: ExpertBatch, out: Tensor, num_sms: int | None) -> Tensor:
        return grouped_gemm_blockscale(a, w, batch.num_tokens, out=out, expected_rows=batch.expected_rows, num_sms=num_sms)

    def _workspace(self, batch: ExpertBatch) -> Workspace:
        """The workspace of the batch's slot and M. It is kept: a captured graph may hold it."""
        experts, rows, hidden = batch.values.shape
        if (experts, hidden) != (self.w13.shape[0], self.hidden_size) or batch.values.dtype != _dtype(self.w13):
            raise ValueError(
                f"the experts are {self.w13.shape[0]} of hidden size {self.hidden_size} in {_dtype(self.w13)}, the batch has values of "
                f"shape {tuple(batch.values.shape)} in {batch.values.dtype}; give dispatcher and experts the same quant and sizes"
            )
        key = batch.slot, rows, self._span
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(self, rows)
        return self._workspaces[key]


class Workspace:
    """What passes between the steps for batches of M rows: SwiGLU's output (L, M, I), and, each made when it is first asked for, gate and
    up (L, M, 2I) and GEMM 2's output (L, M, H)."""

    def __init__(self, experts: GroupedExperts, rows: int) -> None:
        self.shape = experts.w13.shape[0], rows
        self.device = experts.w13.device
        self.gate_up_columns = 2 * experts.intermediate_size
        self.hidden_size = experts.hidden_size
        self.inner: QuantizedTensor | Tensor = torch.empty(
            *self.shape, experts.intermediate_size, dtype=_dtype(experts.w2), device=self.device
        )
        if isinstance(experts.w2, QuantizedTensor):
            scales = empty_transposed_scales(*self.shape, ceil_div(experts.intermediate_size, 128), self.device)
            self.inner = QuantizedTensor(self.inner, scales, "transposed")

    @functools.cached_property
    def output(self) -> Tensor:
        return torch.empty(*self.shape, self.hidden_size, dtype=torch.bfloat16, device=self.device)

    @functools.cached_property
    def gate_up(self) -> Tensor:
        return torch.empty(*self.shape, self.gate_up_columns, dtype=torch.bfloat16, device=self.device)


def _parts(x: QuantizedTensor | Tensor) -> tuple[Tensor, Tensor | None]:
    return (x.values, x.scales) if isinstance(x, QuantizedTensor) else (x, None)


def _dtype(w: Weight) -> torch.dtype:
    return w.values.dtype if isinstance(w, QuantizedTensor) else w.dtype
