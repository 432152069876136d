"""Integers for sizes. Launches ask for them here too: Triton's own functions of these kinds, which are kernels' as well, take the host
microseconds."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is not less than a / b.

    Args:
        a: an integer.
        b: a positive one.

    Returns:
        That integer.
    """
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n.

    Args:
        n: an integer, not negative.

    Returns:
        That power, 1 for 0.
    """
    return 1 << max(n - 1, 0).bit_length()
