"""The two modes of timing a step that several ranks make together, and turn-about timing of several ways to do one.

Chained: many calls, one after the other, by replay of a CUDA graph where the step can be captured: what a call costs in steady state.
Fresh entry: before each call all ranks meet and then stay idle for a while: what a single call costs that finds nothing under way. Ranks
leave the meeting at slightly different times, and the slowest one's call includes its wait for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Timing, captured, gpu_samples, slowest_rank, time_collectively

# long enough for a GPU to finish what it does and for its clocks to stay up
IDLE_SECONDS = 1e-3


@dataclass(frozen=True)
class Modes:
    """One step's times in both modes."""

    chained: Timing
    fresh: Timing


@dataclass(frozen=True)
class Way:
    """A way to do a step. in_graph: it can be captured in a CUDA graph."""

    call: Callable[[], Any]
    in_graph: bool


def meet_and_idle(device: str) -> None:
    if dist.is_initialized():
        dist.barrier()
    if device == "cuda":
        torch.cuda.synchronize()
    end = time.perf_counter() + IDLE_SECONDS
    # sleeping ends up to 0.1 ms late, at another time on each rank; on CPUs spinning would take the others' cores
    while device == "cuda" and time.perf_counter() < end:
        pass
    time.sleep(max(0.0, end - time.perf_counter()))


def fresh_samples(way: Way, *, device: str, reps: int) -> list[float]:
    """us of each call after `meet_and_idle`, as this rank sees it. Collective. The call was made before."""
    graph = captured(way.call) if way.in_graph else None
    call = way.call if graph is None else graph.replay
    samples = []
    for _ in range(reps):
        meet_and_idle(device)
        if device == "cuda":
            samples += gpu_samples(call, 1, flush_l2=False)
            continue
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    if graph is not None:
        graph.reset()
    return samples


def time_modes(way: Way, *, device: str, reps: int) -> Modes:
    """Both modes, of the slowest rank: the maximum over ranks of each repetition. Collective."""
    chained = time_collectively(way.call, device=device, in_graph=way.in_graph, reps=reps)
    fresh = fresh_samples(way, device=device, reps=reps)
    return Modes(Timing.of(slowest_rank(chained)), Timing.of(slowest_rank(fresh)))


def time_turn_about(ways: Mapping[str, Way], *, device: str, reps: int, rounds: int = 4) -> dict[str, Modes]:
    """Both modes of each way, a quarter of the repetitions at a time in turn, so that all meet the same clocks, temperatures and
    neighbours. Collective."""
    chained: dict[str, list[float]] = {name: [] for name in ways}
    fresh: dict[str, list[float]] = {name: [] for name in ways}
    share = max(1, reps // rounds)
    for _ in range(rounds):
        for name, way in ways.items():
            chained[name] += time_collectively(way.call, device=device, in_graph=way.in_graph, reps=share)
            fresh[name] += fresh_samples(way, device=device, reps=share)
    return {name: Modes(Timing.of(slowest_rank(chained[name])), Timing.of(slowest_rank(fresh[name]))) for name in ways}
