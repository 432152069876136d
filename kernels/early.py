"""Launches that begin early (programmatic dependent launch, from Hopper on): while the launch before them on their stream runs, they are
put on multiprocessors, do what does not depend on it, and wait for its end, in hardware.

A launch can begin once each program of the one before has let it (`let_next_begin`) or has ended. Behind a kernel that ends by itself that
is never wrong. Behind one that waits for other ranks, what has begun keeps its place until they come, and whatever they wait for in turn
has to fit beside it. So behind one wait stands one launch, and it is small. What may begin early, and lets the next begin:

    launch             waits for                                           lets the next begin
    route              nothing; does not begin early                       at once
    exchange_counts    `route`; then all ranks' counts                     at once
    push_tokens        `exchange_counts`; its last program then for rows   after the first, so that nothing stands behind both
    signal_and_wait    all ranks' flags; does not begin early              at once
    land_rows          either of these two                                 no
    combine            `signal_and_wait`                                   no

Behind the counts stands at most `push_tokens`, behind the rows `land_rows`, behind the outputs `combine`: one launch, within the bounds
of `may_begin_early`, and the one program that spins.

Why two dispatches on two streams of a device, of one dispatcher or of two, can't deadlock, whatever the ranks' order. What a wait waits
for, every rank stores before its own wait of the same step. So it is enough that on every rank each stream comes to its next wait while the
other stands at one. The one that stands has at most multiprocessors - SPARE programs and the one that spins. That leaves SPARE - 1
multiprocessors empty wherever the hardware put them, since a program lies on one; what lies on those ends by itself. Any launch whose
programs fit on an empty multiprocessor one by one ends there sooner or later, products that take a whole one included. (Not a launch that
needs several empty ones at the same time: a cluster, or programs that wait for each other. Such ones need an event between the streams.)

With three dispatches in flight, two wait while the third has to go on. Each holds at most 5/16 of all registers, which leaves 6/16 free
on average, so at least as many on some multiprocessor: ROOM, which a program of any kernel of a dispatch fits in. The compiler is told the
registers that the launch counts on (`launch_option`). A product in front of the third may still find no multiprocessor of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moequant.kernels.common import multiprocessors

# Registers of a multiprocessor of every GPU that knows early launches. A warp takes a multiple of 256 of them, 8 for each thread.
REGISTERS = 65536
# What is left free on some multiprocessor beside two waits.
ROOM = REGISTERS * 6 // 16
# Multiprocessors that one launch behind a wait leaves alone.
SPARE = 4


@functools.lru_cache
def begins_early(device: torch.device) -> bool:
    """Whether launches on a device can begin before the one before them has ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def most_programs(device: torch.device) -> int:
    """Of a launch that begins early behind a wait."""
    return multiprocessors(device) - SPARE


def may_begin_early(device: torch.device, programs: int, warps: int, registers: int) -> bool:
    """Whether a launch may begin early behind a kernel that waits for other ranks. warps: of a program. registers: of a thread."""
    # no fewer than 32, so that warps are bounded too: two waits leave a multiprocessor 24 of its 64
    held = programs * warps * 32 * max(32, triton.cdiv(registers, 8) * 8)
    # beside what spins, which fits in ROOM as well
    fits = held + ROOM <= multiprocessors(device) * (REGISTERS - ROOM) // 2
    return fits and programs <= most_programs(device) and begins_early(device)


def launch_option(early: bool, registers: int | None = None) -> dict[str, Any]:
    """What a launch that may begin early needs besides. Not every kind of GPU knows the options.

    registers: of a thread, as `may_begin_early` was told. None: behind a kernel that ends by itself, whatever the compiler takes.
    """
    if not early:
        return {}
    return {"launch_pdl": True} if registers is None else {"launch_pdl": True, "maxnreg": registers}


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
