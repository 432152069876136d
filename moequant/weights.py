"""The weights of experts. L local experts, H hidden size, I intermediate size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moequant.batch import ExpertBatch, QuantizedTensor
from moequant.checks import check_contiguous, check_is, check_no_grad, check_tensor
from moequant.errors import LayoutError

Weight = QuantizedTensor | Tensor


def check_weights(w13: Weight, w2: Weight, activation: str) -> None:
    """What `GroupedExperts` asks of its weights.

    Args:
        w13: (L, 2I, H), gate first, then up.
        w2: (L, H, I).
        activation: its name.

    Raises:
        LayoutError: blocks of another size than 128x128.
        ValueError: anything else that is wrong with them.
    """
    if not isinstance(activation, str) or activation != "silu":
        raise ValueError(f'activation must be "silu" (SwiGLU), got {activation!r}')
    for name, w in (("w13", w13), ("w2", w2)):
        check_is(name, w, (QuantizedTensor, Tensor))
        if isinstance(w, Tensor):
            check_tensor(name, w, dims=3, dtypes=(torch.bfloat16,))
            check_contiguous(name, w)
    if len(w13.shape) != 3:
        raise ValueError(f"w13 must be (L, 2 * I, H), gate first, got shape {tuple(w13.shape)}")
    experts, doubled, hidden = w13.shape
    if doubled % 2 or tuple(w2.shape) != (experts, hidden, doubled // 2):
        raise ValueError(f"w13 must be (L, 2 * I, H), gate first, and w2 (L, H, I); got {tuple(w13.shape)} and {tuple(w2.shape)}")
    if w13.device != w2.device:
        raise ValueError(f"w13 and w2 must be on one device, got {w13.device} and {w2.device}")
    if isinstance(w13, QuantizedTensor) and (w13.layout != "block" or w13.segments != 2):
        raise ValueError(
            f'w13 must have layout "block" with segments=2 (gate and up blocked apart), got "{w13.layout}" with '
            f"segments={w13.segments}; quantize_weight(w13, segments=2) makes it"
        )
    for name, w in (("w13", w13), ("w2", w2)):
        if isinstance(w, QuantizedTensor) and (w.layout != "block" or w.group_size != 128):
            raise LayoutError(f'{name} must have layout "block" of 128x128, got "{w.layout}" with group size {w.group_size}')
    if dtype_of(w13) != dtype_of(w2):
        raise ValueError(f"w13 and w2 must have one dtype, got {dtype_of(w13)} and {dtype_of(w2)}")


def addresses_of(w: Weight) -> tuple[int, ...]:
    """Where a weight lies, and whether it requires grad, for which its use may be refused.

    Args:
        w: the weight.

    Returns:
        The addresses of values and scales, or of a plain weight and 1 if it requires grad.
    """
    if isinstance(w, QuantizedTensor):
        return w.values.data_ptr(), w.scales.data_ptr()
    return w.data_ptr(), w.requires_grad


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


def check_batch(batch: ExpertBatch, w13: Weight) -> None:
    """Refuses a batch of other experts.

    Args:
        batch: what was given as one.
        w13: the experts' first weight, (L, 2I, H).

    Raises:
        ValueError: it is no batch, or of other sizes, another type or device.
        RuntimeError: it requires grad under grad mode.
    """
    hint = "dispatch returns the batch and a handle: give the batch alone" if isinstance(batch, tuple) else ""
    check_is("batch", batch, ExpertBatch, hint)
    experts, hidden = batch.num_tokens.shape[0], batch.values.shape[-1]
    if (experts, hidden) != (w13.shape[0], w13.shape[2]) or batch.values.dtype != dtype_of(w13):
        raise ValueError(
            f"the experts are {w13.shape[0]} of hidden size {w13.shape[2]} in {dtype_of(w13)}, the batch has values of "
            f"shape {tuple(batch.values.shape)} in {batch.values.dtype}; give dispatcher and experts the same quant and sizes"
        )
    check_no_grad(batch=batch.values)
    if batch.values.device != w13.device:
        raise ValueError(f"the experts are on {w13.device}, the batch on {batch.values.device}; they must be on one device")
