"""Launches that begin early (programmatic dependent launch, from Hopper on): while the launch before them on their stream runs, they are
put on multiprocessors, do what does not depend on it, and wait for its end, in hardware.

A launch can begin once every program of the one before has let it (`launch_dependents`) or has ended. Behind a kernel that ends by itself
any launch may. Behind one that waits for other ranks, what has begun keeps its place until they come, and whatever they wait for in turn
has to fit beside it. So behind one wait stands one launch, and it is small:

    launch             begins early behind     waits for                              lets the next begin
    route              nothing                 nothing                                at once
    exchange_counts    route                   route; all ranks' counts               at once
    push_tokens        exchange_counts         exchange_counts; all ranks' rows       after the first, not behind both
    signal_and_wait    nothing                 all ranks' flags                       at once
    unpack_rows          either of these two     the launch before                      never
    combine            signal_and_wait         the launch before                      never

One program waits for ranks, in push_tokens the last one, when all others have nothing left to do but to end. Behind the counts stands
push_tokens, behind the rows unpack_rows, behind the outputs combine, each within the bounds of `may_use_pdl`.

Why two dispatches on two streams of a device, of one dispatcher or of two, can't deadlock, whatever order their launches begin in on
which rank. What a wait waits for, every rank stores before its own wait of the same step. So all waits end if on every rank each stream
comes to its next wait while the other stands at one. The one that stands holds programs on at most multiprocessors - SPARE + 1 of them,
wherever the hardware put them. On the others nothing waits, so they empty again and again, and any launch whose programs each fit on an
empty one ends some time, products that take a whole one included. (Not a launch of which several need an empty one at the same time, a
cluster or programs that meet: it needs an event between the streams.)

With three dispatches in flight, two stand while the third has to go on. Each holds at most 5/16 of all registers, which leaves 6/16 on
average and so on some multiprocessor: ROOM, in which a program of any kernel of a dispatch fits. The compiler is told the registers that
a launch counts on (`pdl_option`). A product before the third may find no multiprocessor for itself: three need events, too, there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moequant.kernels.library.common import multiprocessors
from moequant.sizes import ceil_div

# Registers of a multiprocessor of every GPU that knows early launches. A warp takes a multiple of 256 of them, 8 for each thread.
REGISTERS = 65536
# What is left free on some multiprocessor beside two waits.
ROOM = REGISTERS * 6 // 16
# Multiprocessors that one launch behind a wait leaves alone.
SPARE = 4


@functools.lru_cache
def uses_pdl(device: torch.device) -> bool:
    """Whether launches on a device can begin before the one before them has ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def most_programs(device: torch.device) -> int:
    """Of a launch that begins early behind a wait."""
    return multiprocessors(device) - SPARE


def may_use_pdl(device: torch.device, programs: int, warps: int, registers: int) -> bool:
    """Whether a launch may begin early behind a kernel that waits for other ranks. warps: of a program. registers: of a thread."""
    # no fewer than 32, so that warps are bounded too: two waits leave a multiprocessor 24 of its 64
    held = programs * warps * 32 * max(32, ceil_div(registers, 8) * 8)
    # beside what spins, which fits in ROOM as well
    fits = held + ROOM <= multiprocessors(device) * (REGISTERS - ROOM) // 2
    return fits and programs <= most_programs(device) and uses_pdl(device)


def pdl_option(pdl: bool, registers: int | None = None) -> dict[str, Any]:
    """Launch options for programmatic dependent launch (PDL), which not every kind of GPU knows.

    registers: of a thread at most, as `may_use_pdl` was told. None: whatever the compiler takes.
    """
    if not pdl:
        return {}
    return {"launch_pdl": True} if registers is None else {"launch_pdl": True, "maxnreg": registers}


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """The next launch may begin, if it is one that may begin early."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Waits for the end of the launch before, if this one may have begun early."""
    if PDL:
        gdc_wait()
