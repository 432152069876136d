"""A layer's weights as its products take them. L local experts, H hidden size, I intermediate size."""

from __future__ import annotations

import weakref

from torch import Tensor

from moequant.training.precision import Operand, Precision


class Operands:
    """Operands of w13 and w2 in both directions, a weight's made when they are first asked for, and kept.

    Args:
        precision: of the products.
        weights: w13 (L, 2I, H), not gated (L, I, H), and w2 (L, H, I), which have to stay as they are.
    """

    def __init__(self, precision: Precision, *weights: Tensor) -> None:
        self.precision = precision
        self._seen = [(weakref.ref(w), state(w)) for w in weights]
        self._made: dict[str, tuple[Operand, Operand]] = {}

    def check(self, *weights: Tensor) -> None:
        """That the weights are those of which the operands are made, as far as torch tells.

        Args:
            *weights: as for the constructor.

        Raises:
            RuntimeError: they have changed.
        """
        if any(known() is not w or before != state(w) for (known, before), w in zip(self._seen, weights, strict=True)):
            raise RuntimeError(
                "is_first_microbatch=False, but the weights have changed since the forward with True: give True in the first forward "
                "after each step of the optimizer, or leave it out"
            )

    def both(self, name: str, w: Tensor, segments: int = 1) -> tuple[Operand, Operand]:
        """What products with a weight take.

        Args:
            name: "w13" or "w2".
            w: that weight, (L, N, K_dim).
            segments: as for `Precision.weight`.

        Returns:
            (L, N, K_dim), by which forwards multiply transposed, and what backwards multiply by, quantized (L, K_dim, N), or plain
            (L, N, K_dim).
        """
        if name not in self._made:
            self._made[name] = self.precision.both_ways(w, segments)
        return self._made[name]


def state(w: Tensor) -> tuple[object, ...]:
    """What changes with a weight, as far as torch tells: fused optimizers write without a trace, and FSDP2 moves its parameters without
    changing them.

    Args:
        w: any.

    Returns:
        Something to compare.
    """
    return w._version, w.dtype, w.device, w.shape
