"""The weights of experts. L local experts, H hidden size, I intermediate size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from moequant.activations import Activation, activation_of
from moequant.batch import NARROW_DTYPES, ExpertBatch, Place, QuantizedTensor
from moequant.checkpoints import PACKED_DTYPES, Both, CheckpointWeight, halves_apart, made_of_checkpoint
from moequant.checks import check_contiguous, check_format, check_is, check_no_grad, check_tensor, check_weight_shapes
from moequant.config import PLAIN_DTYPES, QUANT_DTYPES
from moequant.errors import LayoutError
from moequant.formats import FLOAT_DTYPES
from moequant.quantization import quantize_weight

Weight = QuantizedTensor | Tensor
Made = TypeVar("Made", bound="ExpertWeights")


def made_of(w13: Tensor, w2: Tensor, quant: str, recipe: str, activation: Activation) -> tuple[Weight, Weight]:
    """The weights of `GroupedExperts.from_weights`, quantized.

    Args:
        w13: (L, 2I, H) float, not gated (L, I, H).
        w2: (L, H, I) float.
        quant: the dispatcher's.
        recipe: see `moequant.formats.RECIPES`.
        activation: what w13's rows are for.

    Returns:
        w13, gate and up apart, and w2.

    Raises:
        ValueError: wrong weights or settings.
        RuntimeError: weights to be quantized require grad under grad mode.
    """
    if not isinstance(quant, str) or quant not in QUANT_DTYPES:
        raise ValueError(f"quant must be one of {', '.join(map(repr, QUANT_DTYPES))}, got {quant!r}")
    for name, w in (("w13", w13), ("w2", w2)):
        if isinstance(w, Tensor) and w.dtype in (*NARROW_DTYPES, *PACKED_DTYPES):
            raise ValueError(
                f"{name} must be in plain numbers, got {w.dtype}, which is nothing without its scales: give both to "
                "GroupedExperts.from_checkpoint, as CheckpointWeight(values, scales)"
            )
        check_tensor(name, w, dims=3, dtypes=(PLAIN_DTYPES[quant],) if quant in PLAIN_DTYPES else FLOAT_DTYPES)
        if quant not in PLAIN_DTYPES:
            # which `quantize_weight` would say of an argument of its own
            check_no_grad(**{name: w})
    check_format(quant, w13.device)
    if w13.shape[1] % activation.width:
        raise ValueError(f"w13 must be (L, 2 * I, H), gate first, got shape {tuple(w13.shape)}")
    apart = halves_apart(w13) if activation.interleaved else w13
    if quant in PLAIN_DTYPES:
        return apart.contiguous(), w2.contiguous()
    segments, dtype = activation.width, QUANT_DTYPES[quant]
    return quantize_weight(apart, dtype=dtype, recipe=recipe, segments=segments), quantize_weight(w2, dtype=dtype, recipe=recipe)


def check_weights(w13: Weight, w2: Weight, activation: Activation) -> None:
    """What `GroupedExperts` asks of its weights.

    Args:
        w13: (L, 2I, H), not gated (L, I, H).
        w2: (L, H, I).
        activation: what w13's rows are for.

    Raises:
        LayoutError: blocks of another size than 128x128.
        ValueError: anything else that is wrong with them.
    """
    for name, w in (("w13", w13), ("w2", w2)):
        check_is(name, w, (QuantizedTensor, Tensor))
        if isinstance(w, Tensor):
            check_tensor(name, w, dims=3, dtypes=tuple(PLAIN_DTYPES.values()))
            check_contiguous(name, w)
    check_weight_shapes(w13.shape, w2.shape, activation.gated)
    if w13.device != w2.device:
        raise ValueError(f"w13 and w2 must be on one device, got {w13.device} and {w2.device}")
    segments = activation.halves
    if isinstance(w13, QuantizedTensor) and (w13.layout != "block" or w13.segments != segments):
        why = "gate and up blocked apart" if segments == 2 else "gate and up alternate, or there is no gate"
        raise ValueError(
            f'w13 must have layout "block" with segments={segments} ({why}), got "{w13.layout}" with '
            f"segments={w13.segments}; quantize_weight(w13, segments={segments}) makes it"
        )
    for name, w in (("w13", w13), ("w2", w2)):
        if isinstance(w, QuantizedTensor) and (w.layout != "block" or w.group_size != 128):
            raise LayoutError(f'{name} must have layout "block" of 128x128, got "{w.layout}" with group size {w.group_size}')
    if dtype_of(w13) != dtype_of(w2):
        raise ValueError(f"w13 and w2 must have one dtype, got {dtype_of(w13)} and {dtype_of(w2)}")


def checked_bias(name: str, bias: Tensor | None, w: Weight) -> Tensor | None:
    """A bias of a weight's products.

    Args:
        name: the argument's.
        bias: (L, N) float, or None.
        w: (L, N, K_dim).

    Returns:
        It, contiguous.

    Raises:
        ValueError: another shape or type, or on another device.
    """
    if bias is None:
        return None
    check_tensor(name, bias, shape=tuple(w.shape[:2]), dtypes=FLOAT_DTYPES, device=w.device)
    return bias.contiguous()


def bias_apart(bias: Tensor | None, w: Weight, activation: Activation) -> Tensor | None:
    """A bias of w13 whose gate and up are laid apart.

    Args:
        bias: (L, 2I), not gated (L, I), or None.
        w: w13.
        activation: what w13's rows were for.

    Returns:
        It, of interleaved rows a copy.

    Raises:
        ValueError: another shape or type, or on another device.
    """
    bias = checked_bias("bias13", bias, w)
    return halves_apart(bias) if bias is not None and activation.interleaved else bias


def parts_of(x: QuantizedTensor | Tensor) -> tuple[Tensor, Tensor | None]:
    """A weight's or an activation's values, and its scales if it has any.

    Args:
        x: quantized or not.

    Returns:
        The two, with None for no scales.
    """
    return (x.values, x.scales) if isinstance(x, QuantizedTensor) else (x, None)


def dtype_of(w: Weight) -> torch.dtype:
    """The type in which a weight is multiplied.

    Args:
        w: quantized or not.

    Returns:
        Its values' dtype.
    """
    return w.values.dtype if isinstance(w, QuantizedTensor) else w.dtype


def some_of(w: Weight, begin: int, end: int) -> Weight:
    """The weights of some experts.

    Args:
        w: of L experts.
        begin: the first.
        end: the one after the last.

    Returns:
        Views of them.
    """
    if isinstance(w, QuantizedTensor):
        return replace(w, values=w.values[begin:end], scales=w.scales[begin:end])
    return w[begin:end]


def check_batch(batch: ExpertBatch, w13: Weight, place: Place | None) -> None:
    """Refuses a batch of other experts.

    Args:
        batch: what was given as one.
        w13: the experts' first weight, (L, 2I, H).
        place: where they are, if they are a part of others.

    Raises:
        ValueError: it is no batch, or of other sizes, another type or device, or the part of other experts.
        RuntimeError: it requires grad under grad mode.
    """
    hint = "dispatch returns the batch and a handle: give the batch alone" if isinstance(batch, tuple) else ""
    check_is("batch", batch, ExpertBatch, hint)
    check_fits(w13, batch.num_tokens.shape[0], batch.values.shape, batch.values.dtype, batch.values.device)
    # experts of other numbers, as a rank's among all ranks', aren't told apart
    if place is not None and place.whole == batch._place.whole and place.first != batch._place.first:
        raise ValueError(
            f"the experts are a part that begins at {place.first} of {place.whole}, the batch a part that begins at "
            f"{batch._place.first}; take the same part of both"
        )
    check_no_grad(batch=batch.values)


def check_fits(
    w13: Weight,
    experts: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (),
) -> None:
    """Refuses experts that are not those of a batch, from what is known of it before it is there.

    Args:
        w13: the experts' first weight, (L, 2I, H).
        experts: that the batch has rows of.
        shape: of its values, (L, M, H), ragged (R, H).
        dtype: of its values.
        device: where it is.
        dtypes: in which the weight may be; none: in that of the values alone.

    Raises:
        ValueError: other sizes, another type or device.
    """
    if (experts, shape[-1]) != (w13.shape[0], w13.shape[2]) or dtype_of(w13) not in (dtypes or (dtype,)):
        raise ValueError(
            f"the experts are {w13.shape[0]} of hidden size {w13.shape[2]} in {dtype_of(w13)}, the batch has values of "
            f"shape {tuple(shape)} in {dtype}; give dispatcher and experts the same quant and sizes, and each rank its own experts"
        )
    if device != w13.device:
        raise ValueError(f"the experts are on {w13.device}, the batch on {device}; they must be on one device")


class ExpertWeights:
    """The weights, biases and activation of experts, and how they are made: what `GroupedExperts` says of them.

    Args:
        w13: (L, 2I, H), not gated (L, I, H).
        w2: (L, H, I).
        activation: an `Activation`, or the name of its function.
        bias13: (L, 2I), not gated (L, I), or None.
        bias2: (L, H), or None.
    """

    def __init__(
        self,
        w13: Weight,
        w2: Weight,
        *,
        activation: str | Activation = "silu",
        bias13: Tensor | None = None,
        bias2: Tensor | None = None,
    ) -> None:
        self.kind = activation_of(activation)
        check_weights(w13, w2, self.kind)
        self.w13, self.w2 = w13, w2
        self.bias13, self.bias2 = checked_bias("bias13", bias13, w13), checked_bias("bias2", bias2, w2)
        self.hidden_size, self.intermediate_size = tuple(w2.shape[1:])
        # where they are, if they are a part
        self._place: Place | None = None
        self._begin()

    @property
    def output_dtype(self) -> torch.dtype:
        """The type of the rows that they make: float16 if the weights are, otherwise bfloat16."""
        return torch.float16 if dtype_of(self.w2) == torch.float16 else torch.bfloat16

    def _begin(self) -> None:
        """What is each object's own, and no copy's."""

    @classmethod
    def from_weights(
        cls: type[Made],
        w13: Tensor,
        w2: Tensor,
        *,
        quant: str = "fp8_e4m3fn",
        activation: str | Activation = "silu",
        bias13: Tensor | None = None,
        bias2: Tensor | None = None,
        recipe: str = "default",
    ) -> Made:
        """Quantizes weights in 128x128 blocks, gate and up apart.

        Args:
            w13: (L, 2I, H), gate first, then up, or interleaved, which are laid apart; not gated (L, I, H). bfloat16, float16 or
                float32, any strides, "none" bfloat16 and "float16" float16: `w.transpose(1, 2)` of weights that lie the other way round.
            w2: (L, H, I), as w13.
            quant: the dispatcher's; "none" and "float16" keep the weights as they are, contiguous ones that need not be laid apart in
                the memory that was given.
            activation: an `Activation`, or the name of its function.
            bias13: (L, 2I), not gated (L, I), bfloat16, float16 or float32, as w13's rows lie; or None. Kept as such weights are.
            bias2: (L, H), or None.
            recipe: see `moequant.formats.RECIPES`.

        Returns:
            The experts.

        Raises:
            ValueError: wrong weights or settings, or a format that the GPU doesn't have.
            RuntimeError: weights to be quantized require grad under grad mode.
        """
        kind = activation_of(activation)
        first, second = made_of(w13, w2, quant, recipe, kind)
        bias13 = bias_apart(bias13, w13, kind)
        return cls(first, second, activation=replace(kind, interleaved=False), bias13=bias13, bias2=bias2)

    @classmethod
    def from_quantized(
        cls: type[Made],
        w13: QuantizedTensor,
        w2: QuantizedTensor,
        *,
        activation: str | Activation = "silu",
        bias13: Tensor | None = None,
        bias2: Tensor | None = None,
    ) -> Made:
        """Takes weights that are quantized already.

        Args:
            w13: (L, 2I, H), gate first, layout "block" with segments=2; interleaved, or not gated (L, I, H), with segments=1.
            w2: (L, H, I), layout "block".
            activation: an `Activation`, or the name of its function.
            bias13: as for `from_weights`.
            bias2: (L, H), or None.

        Returns:
            The experts.

        Raises:
            LayoutError: blocks of another size than 128x128.
            ValueError: other wrong weights.
        """
        for name, w in (("w13", w13), ("w2", w2)):
            check_is(name, w, QuantizedTensor, "quantize_weight makes one, and from_weights takes bfloat16 weights")
        return cls(w13, w2, activation=activation, bias13=bias13, bias2=bias2)

    @classmethod
    def from_checkpoint(
        cls: type[Made],
        w13: CheckpointWeight | Both,
        w2: CheckpointWeight,
        *,
        quant: str = "fp8_e4m3fn",
        activation: str | Activation = "silu",
        bias13: Tensor | None = None,
        bias2: Tensor | None = None,
        recipe: str | None = None,
    ) -> Made:
        """Takes the narrow weights of a checkpoint.

        Values of quant's type with one scale for each 128x128, or for more, are kept: the same bits, and views where they are
        contiguous. Others are quantized anew in blocks of 128x128, which rounds a second time, one expert after the other, so that no
        wide copy of all is ever there. Powers of two as scales spare most of the rounding, since e2m1 with e8m0 becomes float8_e4m3fn
        without any error where the scales of a 128x128 block are within 2**14 of each other.

        Args:
            w13: of (L, 2I, H), gate first, then up, or interleaved; not gated (L, I, H). Or gate and up, two of (L, I, H).
            w2: of (L, H, I).
            quant: the dispatcher's; "none" makes bfloat16 weights, "float16" float16.
            activation: an `Activation`, or the name of its function.
            bias13: as for `from_weights`, as w13's rows lie.
            bias2: (L, H), or None.
            recipe: of what is quantized anew, see `moequant.formats.RECIPES`; None: "ue8m0" where the scales are e8m0, otherwise
                "default".

        Returns:
            The experts. Interleaved rows are laid apart, but for those that are kept.

        Raises:
            LayoutError: scales of gate and up apart where there are none.
            ValueError: other wrong weights or settings, or a format that the GPU doesn't have.
            RuntimeError: scales require grad under grad mode.
        """
        kind = activation_of(activation)
        first, second, now = made_of_checkpoint(w13, w2, quant, recipe, kind)
        bias13 = bias13 if now.interleaved else bias_apart(bias13, first, kind)
        return cls(first, second, activation=now, bias13=bias13, bias2=bias2)
