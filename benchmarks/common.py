"""What the benchmark scripts share: timing, the machine's ceilings, and records (one JSON line each, see benchmarks/README.md).

Units: us microseconds, GB/s 1e9 bytes a second, TFLOP/s 1e12 floating point operations a second, 2 for a multiply and add.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.cuda.nccl as nccl
import torch.distributed as dist
import triton
from torch import Tensor

from benchmarks.records import case_text
from moequant.testing import cosine_difference, relative_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WARMUP = 3
# Of torch.cuda._sleep on an H200, about.
CYCLES_PER_SECOND = 1.8e9

# Relative error of the layer against dense bfloat16, by format. With normal data each of the four quantizations (tokens, w13, SwiGLU's
# result, w2) adds independent rounding noise, so that the ratio depends on the format and hardly on the shape: for I from 256 to 2880
# and H from 512 to 4096 it was 0.063-0.065 for e4m3, 0.126 for e5m2, 0.0237 for int8, and below 4e-3 for bfloat16 with different
# roundings of the product in between, and for float16, as what bfloat16 rounds there is left. A fifth above that is allowed, and for
# those two a half. 1 - 2*sum(xy)/sum(x^2+y^2) is half the square of it.
TOLERANCES = {"fp8_e4m3fn": 0.076, "fp8_e4m3fnuz": 0.076, "fp8_e5m2": 0.15, "int8": 0.029, "none": 0.006, "float16": 0.006}
# A single wrong token vanishes in the norm of many, so each token has a limit of its own.
WORST_TOKEN = 2.0


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of repeated timings, in us."""

    us: float
    us_p20: float
    us_p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """samples: us, at least one."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@functools.cache
def flush_buffer() -> torch.Tensor:
    """A GPU buffer much larger than L2. Reading it takes long enough (0.2 ms and more) for the host to queue the next call, so that
    what is timed never waits for Python."""
    memory = torch.cuda.get_device_properties().total_memory
    return torch.zeros(min(2**30, memory // 16) // 4, dtype=torch.int32, device="cuda")


def flush_l2_cache() -> None:
    """Leaves L2 with nothing of use, and nothing to write back: a buffer that was written would be evicted, and so written to memory,
    on the time of the call that comes next."""
    flush_buffer().amax()


def gpu_samples(fn: Callable[[], Any], reps: int, flush_l2: bool) -> list[float]:
    """us of each call by CUDA events. flush_l2: of single calls with a cold L2; before each the GPU is kept busy several times as long as
    the host needs for one, so that all of it is queued when it begins."""
    # the least of three, as the first may compile
    busy = int(min(host_samples(fn, 3)) * 4e-6 * CYCLES_PER_SECOND) if flush_l2 else 0
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    for start, end in events:
        if flush_l2:
            torch.cuda._sleep(busy)
            flush_l2_cache()
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def host_samples(fn: Callable[[], Any], reps: int) -> list[float]:
    """us of each call by the host's clock."""
    samples = []
    for _ in range(reps):
        start = time.perf_counter()
        fn()
        samples.append(1e6 * (time.perf_counter() - start))
    return samples


def captured(fn: Callable[[], Any], inner: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `inner` calls, replayed once. fn must be capturable and was called before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # thread_local: NCCL's watchdog thread queries events meanwhile, which is no error
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(inner):
            fn()
    graph.replay()
    return graph


def graph_samples(fn: Callable[[], Any], inner: int, reps: int) -> list[float]:
    """us a call, one sample for each replay of a CUDA graph of `inner` calls. fn must be capturable and was called before."""
    graph = captured(fn, inner)
    samples = [us / inner for us in gpu_samples(graph.replay, reps, flush_l2=False)]
    graph.reset()
    return samples


def measure(fn: Callable[[], Any], *, flush_l2: bool = True, min_reps: int = 20, device: str = "auto") -> Timing:
    """Times fn, one call at a time, with a cold L2.

    device: "cuda", "cpu" (the host's clock, no flush) or "auto", "cuda" if there is one.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    for _ in range(WARMUP):
        fn()
    if not cuda:
        return Timing.of(host_samples(fn, min_reps))
    estimate = max(1.0, statistics.median(gpu_samples(fn, WARMUP, flush_l2)))
    return Timing.of(gpu_samples(fn, min(200, max(min_reps, round(1e5 / estimate))), flush_l2))


def measure_graph(fn: Callable[[], Any], inner: int = 20, reps: int = 10, *, device: str = "auto") -> Timing:
    """Times fn by replaying a CUDA graph of `inner` calls: no host time, steady state, L2 as the calls leave it.

    device: as for `measure`; "cpu" times single calls.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    for _ in range(WARMUP):
        fn()
    return Timing.of(graph_samples(fn, inner, reps) if cuda else host_samples(fn, reps))


def time_collectively(fn: Callable[[], Any], *, device: str, in_graph: bool, reps: int, inner: int = 20) -> list[float]:
    """us a call, as this rank sees it, the same number of calls on every rank: fn may wait for the others.

    in_graph: `reps` replays of a CUDA graph of `inner` calls; otherwise `reps` single calls.
    """
    for _ in range(WARMUP):
        fn()
    if in_graph:
        return graph_samples(fn, inner, reps)
    if device == "cuda":
        return gpu_samples(fn, reps, flush_l2=False)
    return host_samples(fn, reps)


def slowest_rank(samples: list[float]) -> list[float]:
    """Of each repetition, the longest time of any rank. Collective."""
    if not dist.is_initialized():
        return samples
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, samples)
    return [max(repetition) for repetition in zip(*everyone, strict=True)]


def time_wire(device: torch.device) -> tuple[int, Timing]:
    """The ceiling between ranks: bytes that leave each rank in a large `all_to_all_single`, and its time. Collective."""
    ranks = dist.get_world_size()
    size = (2**28 if device.type == "cuda" else 2**20) // ranks * ranks
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    samples = time_collectively(lambda: dist.all_to_all_single(target, source), device=device.type, in_graph=False, reps=10)
    return size // ranks * (ranks - 1), Timing.of(slowest_rank(samples))


@contextmanager
def process_group(device: str) -> Iterator[tuple[int, torch.device]]:
    """The group that torchrun's environment describes, if it does. Gives this process's rank and device."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    else:
        # on a busy machine a team of threads waits for the slowest one's time slice
        torch.set_num_threads(1)
    if "RANK" not in os.environ:
        yield rank, place
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=place if device == "cuda" else None)
    yield rank, place
    dist.destroy_process_group()


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, once for all ranks, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Check:
    """How far a result is from the dense one, and how far it may be."""

    relative: float
    cosine: float
    worst_token: float
    tolerance: float

    @property
    def passed(self) -> bool:
        # written so that a NaN fails
        within = self.relative <= self.tolerance and self.cosine <= self.tolerance**2 / 2
        return within and self.worst_token <= WORST_TOKEN * self.tolerance

    def __str__(self) -> str:
        return (
            f"{'right' if self.passed else 'WRONG'}: relative error {self.relative:.2e} (at most {self.tolerance}), worst token "
            f"{self.worst_token:.2e} (at most {WORST_TOKEN * self.tolerance}), 1 - 2xy/(xx+yy) {self.cosine:.2e} (at most "
            f"{self.tolerance**2 / 2:.1e})"
        )


def check_output(out: Tensor, expected: Tensor, quant: str) -> Check:
    """Compares a layer's output (T, H) with the dense one."""
    errors = torch.linalg.vector_norm(out.float() - expected, dim=1)
    norms = torch.linalg.vector_norm(expected, dim=1).clamp_min(1e-9)
    # a rank without tokens has nothing wrong
    worst = float((errors / norms).max()) if len(errors) else 0.0
    return Check(relative_error(out, expected), cosine_difference(out, expected), worst, TOLERANCES[quant])


def machine_name(gpus: int, device: str) -> str:
    """The name of a results file: the GPU and how many of them the run used, as `nvidia-h200-x2`; `cpu` without one."""
    if device == "cpu":
        return "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return name if gpus == 1 else f"{name}-x{gpus}"


def environment(device: str) -> dict[str, str | None]:
    """What a figure depends on besides the code."""
    cuda = device != "cpu"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "nccl": ".".join(map(str, nccl.version())) if cuda else None,
        "cuda": torch.version.cuda,
    }


def commit() -> str:
    """The checkout's short commit id; MOEQUANT_COMMIT where that is set, for a copy of the files without their repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    if "MOEQUANT_COMMIT" in os.environ:
        return os.environ["MOEQUANT_COMMIT"]
    result = subprocess.run(command, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    return result.stdout.strip() if result is not None and result.returncode == 0 else "unknown"


def significant(x: float | None, digits: int) -> float | None:
    return None if x is None else float(f"{x:.{digits}g}")


def progress(text: str) -> None:
    """Says on stderr what is being done, once for all ranks; on a terminal each line replaces the one before."""
    if os.environ.get("RANK", "0") != "0":
        return
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


class Bench:
    """One run of a benchmark script: its machine, its ceilings, its records."""

    def __init__(self, path: Path | None, device: str, gpus: int) -> None:
        self.device = device
        self.machine = machine_name(gpus, device)
        # figures of a CPU are for trying scripts out: they go nowhere unless a place is named
        self.path = path if path is not None or device == "cpu" else RESULTS / f"{self.machine}.jsonl"
        self.env = environment(device)
        self.commit = commit()
        self.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.tflops: dict[torch.dtype, float] = {}
        self.copy_gbps = float("nan")

    @classmethod
    def start(cls, path: Path | None = None, *, device: str = "auto", gpus: int = 1) -> Bench:
        """Prints the environment and the table's header, and measures the copy ceiling.

        path: where records are appended; None for benchmarks/results/<machine>.jsonl, or nowhere on a CPU.
        device: "cuda", "cpu" or "auto". gpus: how many GPUs the run uses, for the machine's name.
        """
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        bench = cls(path, device, gpus)
        print(f"{bench.machine}: {', '.join(f'{key} {value}' for key, value in bench.env.items() if value)}, commit {bench.commit}")
        titles = ("us", 9), ("p20", 9), ("p80", 9), ("floor", 9), ("share", 6), ("GB/s", 7), ("TFLOP/s", 8), ("fresh us", 9)
        print(f"{'step':<66} {' '.join(title.rjust(width) for title, width in titles)}", flush=True)
        size = 2**30 if device == "cuda" else 2**24
        source = torch.zeros(size, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        timing = measure(lambda: target.copy_(source), device=device)
        bench.copy_gbps = 2 * size / timing.us / 1e3
        bench.record("copy", {"bytes": size}, timing, floor_us=None, gbps=bench.copy_gbps)
        return bench

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """The ceiling of products in dtype, of an 8192 cube; measured at the first call. Formats that `torch._scaled_mm` doesn't take
        stand under float8_e4m3fn; a CPU computes everything in float32."""
        if self.device == "cpu":
            dtype = torch.float32
        elif dtype not in (torch.bfloat16, torch.float16, torch.int8):
            dtype = torch.float8_e4m3fn
        if dtype not in self.tflops:
            size = 8192 if self.device == "cuda" else 512
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            one = torch.ones((), device=self.device)
            if dtype == torch.int8:
                run = functools.partial(torch.ops.aten._int_mm, a, b.t())
            elif dtype == torch.float8_e4m3fn:
                run = functools.partial(
                    torch.ops.aten._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            else:
                run = functools.partial(torch.matmul, a, b.t())
            timing = measure(run, device=self.device)
            self.tflops[dtype] = 2 * size**3 / timing.us / 1e6
            case = {"E": 1, "rows": size, "N": size, "K_dim": size, "dtype": str(dtype).removeprefix("torch.")}
            self.record("matmul", case, timing, floor_us=None, tflops=self.tflops[dtype])
        return self.tflops[dtype]

    def floor_us(self, nbytes: float = 0.0, flops: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> float:
        """us that nbytes of memory traffic and flops in dtype take at the ceilings, the longer of the two."""
        return max(nbytes / self.copy_gbps / 1e3, flops / self.matmul_tflops(dtype) / 1e6 if flops else 0.0)

    def record(
        self,
        op: str,
        case: dict[str, Any],
        timing: Timing,
        *,
        floor_us: float | None,
        gbps: float | None = None,
        tflops: float | None = None,
        label: str | None = None,
        **extra: Any,
    ) -> None:
        """Prints a row and appends a record.

        floor_us: time of the bytes or operations at the ceiling measured in this run; None where there is none.
        label: what the row is called instead of its op and case. extra: further fields of the record, as fresh_us, peer and peer_us.
        """
        numbers = {"us": timing.us, "us_p20": timing.us_p20, "us_p80": timing.us_p80, "floor_us": floor_us}
        rates = {key: significant(value, 4) for key, value in (("gbps", gbps), ("tflops", tflops)) if value is not None}
        row = {"op": op, "case": case, **{key: significant(value, 5) for key, value in numbers.items()}, **rates, **extra}
        row |= {"env": self.env, "commit": self.commit, "date": self.date}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        columns = [f"{value:9.1f}" if value is not None else " " * 9 for value in numbers.values()]
        columns.append(f"{floor_us / timing.us:6.0%}" if floor_us else " " * 6)
        columns += [f"{gbps:7.0f}" if gbps is not None else " " * 7, f"{tflops:8.1f}" if tflops is not None else " " * 8]
        columns.append(f"{extra['fresh_us']:9.1f}" if "fresh_us" in extra else "")
        peers = extra.get("peers", {extra["peer"]: extra["peer_us"]} if "peer" in extra else {})
        beside = "".join(f"  {name} {us:.1f} us" for name, us in peers.items())
        print(f"{label or f'{op} {case_text(case)}':<66} {' '.join(columns).rstrip()}{beside}", flush=True)
