"""How a layer that is trained multiplies: the one place that knows of number formats.

L local experts, M rows of an expert's buffer, R rows of a rank's, H hidden size, I intermediate size, N and K_dim columns and
contraction of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moequant import ops
from moequant.activations import Activation
from moequant.batch import ANY_ROWS, QuantizedTensor, empty_scales_of
from moequant.columnwise import BLOCK, Columnwise, empty_columnwise
from moequant.config import QUANT_DTYPES
from moequant.experts import GroupedExperts
from moequant.formats import FLOAT_DTYPES, recipe_of
from moequant.group_quant import empty_blocks
from moequant.ops.gemm import GROUPED_MM
from moequant.reference.quantization import expert_places
from moequant.repeats import Repeats
from moequant.training.rows import Rows
from moequant.weights import parts_of

if TYPE_CHECKING:
    from moequant.config import DispatcherConfig

# Of a group of gradients that are all smaller, nothing would be left: those of a loss that is a mean over many tokens are below 1e-6.
LARGEST_FLOOR = 1e-10
QUANTS = ("none", "fp8_e4m3fn")
# Rows of an expert from which on torch's `grouped_mm` is the faster product in bfloat16. benchmarks/notes_training.md
MANY_ROWS = 512
# what a product takes
Operand = QuantizedTensor | Tensor
# What a step of a training launches, the next one launches again.
REPEATS = Repeats()
again = REPEATS.call


@dataclass(frozen=True)
class Precision:
    """The number formats of a layer's products, in forward and backward.

    Attributes:
        quant: "none" for bfloat16, or "fp8_e4m3fn".
        recipe: of quantization.
    """

    quant: str = "none"
    recipe: str = "ue8m0"

    @classmethod
    def of(cls, config: DispatcherConfig) -> Precision:
        """A dispatcher's.

        Args:
            config: its settings.

        Returns:
            The formats.

        Raises:
            ValueError: settings by which gradients would be destroyed.
        """
        if config.quant not in QUANTS:
            raise ValueError(
                f'layers are trained with quant="none" or "fp8_e4m3fn", got "{config.quant}", too coarse or too narrow for gradients'
            )
        floor = recipe_of(config.recipe).eps
        if config.quant != "none" and floor > LARGEST_FLOOR:
            raise ValueError(
                f'recipe "{config.recipe}" takes every group of numbers for one of at least {floor:g}, and destroys gradients, which are '
                'smaller: build the dispatcher with recipe="ue8m0"'
            )
        return cls(config.quant, config.recipe)

    @property
    def columnwise(self) -> bool:
        """Whether weights' gradients are products of fp8 too: where fp8 rows keep their numbers when they are quantized along the tokens,
        but for those that become too small for a step."""
        return self.quant != "none" and recipe_of(self.recipe).power_of_two

    def weight(self, w: Tensor, segments: int = 1) -> Operand:
        """A weight as an operand, made anew: nothing can go stale.

        Args:
            w: (L, N, K_dim) float, any strides.
            segments: of its rows, which are blocked apart.

        Returns:
            The operand.
        """
        # the values that bfloat16 products have, whatever the parameters are kept in
        w = w.to(torch.bfloat16)
        if self.quant == "none":
            return w.contiguous()
        made = self._empty_blocks(w, segments)
        again(ops.quantize_weight, w, made.values, made.scales, self.recipe, segments, BLOCK)
        return made

    def _empty_blocks(self, w: Tensor, segments: int) -> QuantizedTensor:
        return empty_blocks(w.shape, QUANT_DTYPES[self.quant], self.recipe, segments, BLOCK, w.device)

    def both_ways(self, w: Tensor, segments: int = 1) -> tuple[Operand, Operand]:
        """A weight and its transpose as operands, made anew, of fp8 in one pass over the weight where that is possible.

        Args:
            w: (L, N, K_dim) float, any strides.
            segments: as for `weight`, of the weight's rows alone.

        Returns:
            (L, N, K_dim) and (L, K_dim, N), what `weight` makes of both; plain, the first of them twice.
        """
        if self.quant == "none":
            plain = self.weight(w)
            return plain, plain
        w = w.to(torch.bfloat16)
        made, across = self._empty_blocks(w, segments), self._empty_blocks(w.mT, 1)
        settings = self.recipe, segments, BLOCK
        again(ops.quantize_weight, w, made.values, made.scales, *settings, across.values, across.scales)
        return made, across

    def operand(self, x: Tensor, rows: Rows) -> Operand:
        """Rows as an operand.

        Args:
            x: (R, K_dim).
            rows: whose they are.

        Returns:
            (L, M, K_dim), ragged (R, K_dim).
        """
        shaped = rows.shaped(x.to(torch.bfloat16))
        if self.quant == "none":
            return shaped
        made = self.empty_rows(shaped.shape, shaped.device)
        again(
            ops.quantize_expert_batch, shaped, rows.num_tokens, rows.expert_start, made.values, made.scales, 128, self.recipe, None
        )
        return made

    def empty_rows(self, shape: torch.Size, device: torch.device) -> QuantizedTensor:
        """Uninitialised memory of rows as an operand, where they are quantized.

        Args:
            shape: (L, M, K_dim), ragged (R, K_dim).
            device: where.

        Returns:
            The operand, of layout "transposed".
        """
        values = torch.empty(shape, dtype=QUANT_DTYPES[self.quant], device=device)
        return QuantizedTensor.made_of(values, empty_scales_of(shape, 128, device), "transposed", self.recipe)

    def product(self, a: Operand, w: Operand, rows: Rows, segments: int = 1) -> Tensor:
        """Each row times its expert's weight, transposed.

        Args:
            a: (L, M, K_dim), ragged (R, K_dim), an operand.
            w: (L, N, K_dim) float, any strides, or what `weight` has made of it.
            rows: whose they are.
            segments: as for `weight`.

        Returns:
            (L, M, N), ragged (R, N), bfloat16. Rows that belong to no expert hold anything.
        """
        counts = rows.num_tokens, rows.expert_start
        many = (rows.expected_rows or 0) >= MANY_ROWS and not rows.batch_invariant
        if many and isinstance(a, Tensor) and isinstance(w, Tensor) and takes_grouped_mm(a, w, rows):
            return GROUPED_MM(a, w.to(torch.bfloat16).mT, offs=rows.ends)
        values, scales = parts_of(a)
        weight = w if isinstance(w, QuantizedTensor) else self.weight(w, segments)
        segments = weight.segments if isinstance(weight, QuantizedTensor) else 1
        out = torch.empty(*values.shape[:-1], w.shape[1], dtype=torch.bfloat16, device=values.device)
        hint = ANY_ROWS if rows.batch_invariant else rows.expected_rows
        # what `moequant.grouped_gemm_blockscale` would check is made here
        again(ops.grouped_gemm_blockscale, values, scales, *parts_of(weight), *counts, out, segments, hint)
        return out

    def back_product(self, a: Operand, w: Operand, rows: Rows) -> Tensor:
        """Each row times its expert's weight, as a backward multiplies by one that its forward has multiplied by transposed.

        Args:
            a: (L, M, N), ragged (R, N), an operand.
            w: (L, N, K_dim) float, any strides, or (L, K_dim, N), quantized: what `weight` has made of its transpose.
            rows: whose they are.

        Returns:
            (L, M, K_dim), ragged (R, K_dim), bfloat16. Rows that belong to no expert hold anything.
        """
        if isinstance(w, QuantizedTensor):
            return self.product(a, w, rows)
        # torch's takes weights in either order, so that none is copied for its transpose
        if isinstance(a, Tensor) and takes_grouped_mm(a, w, rows):
            return GROUPED_MM(a, w.to(torch.bfloat16), offs=rows.ends)
        return self.product(a, w.mT, rows)

    def activation(self, x: Tensor, rows: Rows, kind: Activation, bias: Tensor | None) -> Operand:
        """GEMM 1's result to GEMM 2's operand.

        Args:
            x: (L, M, 2I), ragged (R, 2I), not gated I for 2I.
            rows: whose they are.
            kind: the activation.
            bias: (L, 2I), added first, or None.

        Returns:
            (L, M, I), ragged (R, I).
        """
        shape, text = torch.Size((*x.shape[:-1], x.shape[-1] // kind.width)), kind.text
        bias = None if bias is None else bias.contiguous()
        if self.quant == "none":
            out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
            again(ops.silu_mul, x, rows.num_tokens, rows.expert_start, out, text, bias)
            return out
        made = self.empty_rows(shape, x.device)
        counts = rows.num_tokens, rows.expert_start
        again(ops.silu_mul_quantize, x, *counts, made.values, made.scales, self.recipe, text, bias)
        return made

    def experts(
        self, w13: Operand, w2: Operand, bias13: Tensor | None, bias2: Tensor | None, kind: Activation
    ) -> Callable[[Any], Tensor]:
        """The experts of an inference with the same bits.

        Args:
            w13: (L, 2I, H), not gated (L, I, H), float, or what `weight` has made of it.
            w2: (L, H, I), the same.
            bias13: (L, 2I), not gated (L, I), or None.
            bias2: (L, H), or None.
            kind: the activation.

        Returns:
            `GroupedExperts`.
        """
        biases = {"bias13": None if bias13 is None else bias13.detach(), "bias2": None if bias2 is None else bias2.detach()}
        if isinstance(w13, QuantizedTensor) and isinstance(w2, QuantizedTensor):
            return GroupedExperts(w13, w2, activation=kind, **biases)
        assert isinstance(w13, Tensor) and isinstance(w2, Tensor)
        pair = w13.detach().to(torch.bfloat16), w2.detach().to(torch.bfloat16)
        return GroupedExperts.from_weights(*pair, quant=self.quant, recipe=self.recipe, activation=kind, **biases)

    def add_bias(self, x: Tensor, rows: Rows, bias: Tensor) -> None:
        """Adds each expert's bias to its rows.

        Args:
            x: (L, M, H), ragged (R, H), written.
            rows: whose they are.
            bias: (L, H).
        """
        again(ops.add_bias, x, rows.num_tokens, rows.expert_start, bias.contiguous())

    def contracted(self, rows: Rows) -> Operand:
        """Rows as an operand of `weight_gradient`.

        Args:
            rows: of a dispatch.

        Returns:
            (L, M, H), ragged (R, H), quantized; or (R, H).
        """
        return rows.values if self.columnwise else rows.contracted()

    def columns(self, x: Operand, rows: Rows, *, blocks: bool) -> Columnwise:
        """An operand of `weight_gradient`, quantized along the tokens.

        Args:
            x: (L, M, N), ragged (R, N), quantized; or (R, N).
            rows: whose they are.
            blocks: one scale for 128 of its columns.

        Returns:
            The columns.
        """
        values, scales = (x.values, x.scales) if isinstance(x, QuantizedTensor) else (rows.shaped(x.to(torch.bfloat16)), None)
        sizes = values.shape[-1], rows.sources.numel(), len(rows.num_tokens)
        made = empty_columnwise(*sizes, blocks=blocks, device=values.device, dtype=QUANT_DTYPES[self.quant])
        again(ops.quantize_columnwise, values, scales, rows.num_tokens, rows.expert_start, *made, self.recipe, blocks)
        return made

    def weight_gradient(self, a: Operand, b: Operand, rows: Rows, dtype: torch.dtype) -> Tensor:
        """The sum over each expert's rows of a's row times b's row, added in float32.

        Args:
            a: (R, N), 0 in rows that belong to no expert, as `Rows.contracted` says; or of `contracted`. A gradient.
            b: (R, K_dim), the same.
            rows: whose they are.
            dtype: of the result.

        Returns:
            (L, N, K_dim): exact zeros for an expert without rows.
        """
        if self.columnwise:
            # numbers of a gradient have scales of their own: they differ the more
            left, right = self.columns(a, rows, blocks=False), self.columns(b, rows, blocks=True)
            shape = len(rows.num_tokens), left.values.shape[0], right.values.shape[0]
            made = torch.empty(shape, dtype=dtype if dtype in FLOAT_DTYPES else torch.float32, device=left.values.device)
            again(ops.weight_gradient, left.values, left.scales, right.values, right.scales, left.block_ends, made)
            return made.to(dtype)
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        if not a.is_cuda:
            return sums_of_products(a.float(), b.float(), rows, dtype)
        if rows.expert_start is None:
            experts = len(rows.num_tokens)
            pair = a.unflatten(0, (experts, -1)).mT, b.unflatten(0, (experts, -1))
            return torch.bmm(*pair, out_dtype=torch.float32) if dtype == torch.float32 else torch.bmm(*pair).to(dtype)
        if GROUPED_MM is None or a.shape[1] % 8 or b.shape[1] % 8:
            # rows that are no multiple of 16 bytes apart, which `grouped_mm` doesn't take: one expert after the other, with a host sync
            return sums_of_products(a, b, rows, dtype)
        made = GROUPED_MM(a.t(), b, offs=rows.ends)
        # of an expert without rows nothing need have been written
        ops.plain_rows(made, torch.where(rows.num_tokens > 0, a.shape[1], 0).to(torch.int32), None)
        return made.to(dtype)


def takes_grouped_mm(a: Tensor, w: Tensor, rows: Rows) -> bool:
    """Whether torch's `grouped_mm` runs a product as one kernel: on GPUs from Hopper on, ragged, of rows of whole 16 bytes.

    Args:
        a: (R, K_dim) or (R, N), the operand.
        w: (L, N, K_dim).
        rows: whose a is.

    Returns:
        The answer.
    """
    if GROUPED_MM is None or not a.is_cuda or torch.version.hip is not None or any(size % 8 for size in w.shape[1:]):
        return False
    hopper = torch.cuda.get_device_capability(a.device) >= (9, 0)
    return hopper and a.dtype == torch.bfloat16 and rows.expert_start is not None


def sums_of_products(a: Tensor, b: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """`Precision.weight_gradient`, one expert after the other. Syncs with the host.

    Args:
        a: (R, N).
        b: (R, K_dim).
        rows: whose they are.
        dtype: of the result.

    Returns:
        (L, N, K_dim).
    """
    out = torch.zeros(len(rows.num_tokens), a.shape[1], b.shape[1], dtype=dtype, device=a.device)
    a, b = rows.shaped(a), rows.shaped(b)
    for expert, place in enumerate(expert_places(a, rows.num_tokens, rows.expert_start)):
        out[expert] = a[place].mT @ b[place]
    return out
