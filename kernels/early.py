"""Launches that begin early (programmatic dependent launch, from Hopper on): while the kernel before them runs, they are set up and do
what does not depend on it, and then wait for its end, in hardware.

The kernel before may be spinning, so what waits must leave room on the device for what that one waits for: at most EARLY_WARPS warps for
each multiprocessor, of which two slots take no more than half of its registers. Behind a kernel that ends by itself any launch may.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Warps for each multiprocessor of a launch that may begin early.
EARLY_WARPS = 16


@functools.lru_cache
def begins_early(device: torch.device) -> bool:
    """Whether launches on a device can begin before the one before them has ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def launch_option(early: bool) -> dict[str, Any]:
    """What a launch that may begin early needs besides. Not every kind of GPU knows the option."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """The next launch may begin, if it is one that may begin early."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """Waits for the end of the launch before, if this one may have begun early."""
    if EARLY:
        gdc_wait()
