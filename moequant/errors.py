"""Typed errors. Each is a ValueError (the call was wrong) or a RuntimeError (the call was right, the state was not)."""


class ConfigMismatchError(ValueError):
    """Ranks of one group built their dispatchers with different settings."""


class InvalidExpertIdError(ValueError):
    """A `topk_ids` entry lies outside -1..num_experts-1."""


class LayoutError(ValueError):
    """A quantized tensor's scales have a layout, shape or strides that the operation doesn't support."""


class NumericalOverflowError(ValueError):
    """Numbers leave a format's range with every scale that was tried."""


class CapacityOverflowError(RuntimeError):
    """More rows were routed to an expert than its buffer holds, under `on_overflow="error"`."""


class StaleHandleError(RuntimeError):
    """A handle was used after the same slot's next dispatch, or with a dispatcher that didn't make it."""


class ClosedError(RuntimeError):
    """A dispatcher was used after `close()`."""


class CallOrderError(RuntimeError):
    """A step of a dispatch came before the one that it follows, or once too often."""


class OutOfStepError(RuntimeError):
    """Ranks of one group made different calls: one of them raised an error or skipped a call, and the others went on; or they answer a
    dispatch in different ways."""


class PeerTimeoutError(RuntimeError):
    """A rank did not answer within the dispatcher's time limit, or was lost.

    Args:
        message: what happened, and what to do.
        rank: which one, as its rank in the group, the first if there are several; None where it is not known, or where none is
            missing.

    Attributes:
        rank: as given.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class GuardError(RuntimeError):
    """Something was stored where nothing may be: a kernel wrote outside its rows."""


class UnreachableError(ValueError):
    """`transport="symmetric"` was asked for where ranks can't address each other's memory."""
