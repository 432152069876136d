"""Draws random settings and checks each, on one GPU or on several, until its time is over. Without a GPU it interprets tiny kernels.

    python tests/fuzz_gpu.py --seconds 300 --seed 0                one GPU: operations, layers of one rank, ranks that are its streams
    python tests/fuzz_gpu.py --seconds 300 --seed 0 --ranks 2      layers over two GPUs
    python tests/fuzz_gpu.py --families trained invariant          some families alone
    python tests/fuzz_gpu.py --families invariant --ranks 2        tokens' bits alone, on one GPU, and spread over two
    python tests/fuzz_gpu.py --only 4711 [--ranks 2]               one setting again, after those of its block that came before it

What is checked: bits against `moequant.reference` and `in_one_process` where they are promised, pushed against stored products, products
against float32, gradients step by step; outputs begin as NaN and lie between guards. BLOCK settings in a row share a family
(fuzz_families.py): the sizes that kernels are compiled for, and a dispatcher. Several workers take blocks in turn; one that dies or hangs
is replaced, and its setting has failed. One that dies between settings is counted as lost. Below the families stands how often they drew
what only some of their settings have.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
for folder in (TESTS.parent, TESTS, TESTS / "distributed"):
    sys.path.insert(0, str(folder))

# settings that share a family
BLOCK = 20
# over several ranks, on one of them, and only there where it is a GPU
ON_SEVERAL, ON_A_GPU = ("layers", "shared", "invariant"), ("peers", "gemm1_swiglu")
ON_ONE = (
    *("layers", "invariant", "trained", "product", "quantize", "activation", "silu_mul_backward", "plain_rows", "columnwise"),
    *("weight_gradient", "weight", "checkpoint"),
)
# of one setting, and of one whose kernels are compiled
SECONDS, FIRST_SECONDS = 60.0, 240.0
# after its time, how long a worker may take to end
GRACE = 90.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to draw settings")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first setting; settings are numbered from a million times this on"
    )
    parser.add_argument("--ranks", type=int, default=1, help="1: one GPU; more: layers over so many GPUs")
    parser.add_argument("--workers", type=int, help="processes that draw settings at the same time; 12, or 1 without a GPU")
    parser.add_argument("--families", nargs="+", choices=sorted({*ON_SEVERAL, *ON_ONE, *ON_A_GPU}), help="draw these alone")
    parser.add_argument("--only", type=int, help="the number of one setting to run again")
    parser.add_argument("--out", type=Path, help="a file of JSON lines to which the result is added")
    # of workers, which this program starts
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Log:
    """A worker's lines of JSON: of each setting its beginning and its end, written at once."""

    def __init__(self, path: Path | None) -> None:
        self.file = open(path, "a") if path else None  # noqa: SIM115 (open for the worker's life)
        self.seed = 0
        self.name = self.family = "?"
        self.watch = threading.Timer(0, int)

    def begin(self, seed: int, name: str, seconds: float) -> None:
        self.seed, self.name = seed, name
        self._write({})
        self.watch = threading.Timer(seconds, self._too_late, [seconds])
        self.watch.daemon = True
        self.watch.start()

    def end(self, error: str | None, guards: bool, drawn: list[str]) -> None:
        self.watch.cancel()
        self._write({"done": True, "error": error, "guards": guards, "drawn": drawn})

    def _write(self, entry: dict[str, Any]) -> None:
        if self.file:
            named = {"seed": self.seed, "name": self.name, "family": self.family}
            self.file.write(json.dumps(named | entry) + "\n")
            self.file.flush()

    def _too_late(self, seconds: float) -> None:
        frames = sys._current_frames()[threading.main_thread().ident or 0]
        self.end(f"not done after {seconds:g} s\n{''.join(traceback.format_stack(frames)[-6:])}", False, [])
        # the device may be stuck, and nothing waits for it
        os._exit(3)


def attempt(function: Any, *arguments: Any) -> tuple[Any, str | None, bool]:
    """What a function returns, or how it failed, and whether by a guard that was touched."""
    try:
        return function(*arguments), None, False
    except Exception as error:
        return None, traceback.format_exc(), "Guard" in type(error).__name__


class Control:
    """What the ranks of a worker agree on, over gloo."""

    def __init__(self, ranks: int, rank: int) -> None:
        import torch.distributed as dist

        self.rank = rank
        self.group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=FIRST_SECONDS)) if ranks > 1 else None

    def merge(self, error: str | None, guards: bool, stop: bool) -> tuple[str | None, bool, bool]:
        """Any rank's."""
        if self.group is None:
            return error, guards, stop
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, (error, guards, stop), group=self.group)
        errors = [f"rank {rank}: {entry[0]}" for rank, entry in enumerate(everyone) if entry[0]]
        return "\n".join(errors) or None, any(entry[1] for entry in everyone), any(entry[2] for entry in everyone)


def set_up(options: argparse.Namespace) -> Any:
    """Before Triton is imported. Returns the place."""
    # each rank that is a stream has a queue of its own
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("MOEQUANT_CHECK_GUARDS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = os.environ["MOEQUANT_CPU_KERNELS"] = "1"
        import interpreter

        interpreter.install()
    import torch.distributed as dist

    from fuzz_operations import Place

    device = f"cuda:{options.rank}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(options.rank)
    if options.ranks > 1:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        limit = datetime.timedelta(seconds=FIRST_SECONDS)
        dist.init_process_group(
            backend,
            init_method=f"file://{options.folder}/store-{options.worker}-{options.first}",
            rank=options.rank,
            world_size=options.ranks,
            timeout=limit,
            device_id=None if device == "cpu" else torch.device(device),
        )
    return Place(device, device == "cpu", options.rank, options.ranks)


def work(options: argparse.Namespace) -> int:
    """A worker: blocks from options.first on, every options.step-th."""
    end = float(os.environ.get("FUZZ_END", "inf"))
    place = set_up(options)
    import torch

    from fuzz_families import draw_family

    control = Control(options.ranks, options.rank)
    log = Log(options.folder / f"log-{options.worker}-{options.rank}" if options.folder else None)
    wrong, printed, block = 0, 0, options.first
    while True:
        family, stop = None, False
        for seed in range(block * BLOCK, (block + 1) * BLOCK):
            first = seed == block * BLOCK
            log.begin(seed, family.name if family else "?", FIRST_SECONDS if first else SECONDS)
            error, guards = None, False
            if family is None:
                family, error, guards = attempt(draw_family, block, place, options.families)
                log.name, log.family = (family.name, family.family) if family else ("a family", "?")
            # what a family says it drew besides
            drawn: set[str] = getattr(family, "drawn", set())
            drawn.clear()
            if error is None:
                rng = random.Random(f"setting {seed}")
                _, error, guards = attempt(family.check, rng)
            late = time.time() > end or seed == options.only
            error, guards, stop = control.merge(error, guards, late)
            log.end(error, guards, sorted(drawn))
            if error:
                wrong += 1
                printed += 1
                if options.rank == 0 and printed <= 5:
                    print(f"FAILED setting {seed} ({log.name}); again: {again(seed, options)}\n{error}", flush=True)
                # the device's context is lost, or another rank waits for what won't come
                if "CUDA error" in error or "PeerTimeoutError" in error or "AcceleratorError" in error:
                    os._exit(4)
            # ranks may be out of step now
            if stop or (error and (family is None or options.ranks > 1)):
                break
        if family is not None and hasattr(family, "close"):
            family.close()
        if place.device != "cpu":
            # the workers share a GPU
            torch.cuda.empty_cache()
        if stop or options.only is not None:
            # of ranks that are out of step, one might wait for the other
            if options.ranks > 1 and not wrong:
                torch.distributed.destroy_process_group()
            return 1 if wrong else 0
        block += options.step


def again(seed: int, options: argparse.Namespace) -> str:
    families = f" --families {' '.join(options.families)}" if options.families else ""
    return f"python tests/fuzz_gpu.py --only {seed}" + (f" --ranks {options.ranks}" if options.ranks > 1 else "") + families


class Worker:
    """A process for each rank that take blocks together, and are started anew where one died."""

    def __init__(self, number: int, options: argparse.Namespace, folder: Path, first: int, step: int) -> None:
        self.number, self.options, self.folder, self.step = number, options, folder, step
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start(first)

    def start(self, first: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(self.number), "--first", str(first)]
        command += ["--step", str(self.step), "--ranks", str(self.options.ranks), "--folder", str(self.folder)]
        command += ["--only", str(self.options.only)] if self.options.only is not None else []
        command += ["--families", *self.options.families] if self.options.families else []
        self.first = first
        self.processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(self.options.ranks)]

    def ended(self) -> bool:
        """Whether the processes are done. One that failed takes the others with it."""
        codes = [process.poll() for process in self.processes]
        if any(code not in (None, 0, 1) for code in codes):
            time.sleep(2.0)
            self.kill()
            return True
        return all(code is not None for code in codes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def failed(self) -> bool:
        return any(process.returncode not in (0, 1) for process in self.processes)

    def in_a_setting(self) -> bool:
        """Whether the last setting that a rank began has failed, or has not ended."""
        last = [mine[max(mine)] for mine in map(self._entries_of, range(self.options.ranks)) if mine]
        return any(entry.get("error") or not entry.get("done") for entry in last)

    def _entries_of(self, rank: int) -> dict[int, dict[str, Any]]:
        """Of each setting a rank's last line."""
        path = self.folder / f"log-{self.number}-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        return {entry["seed"]: entry for entry in map(json.loads, lines)}

    def entries(self) -> dict[int, dict[str, Any]]:
        """Of each setting the last line; of several ranks a failure, where one has one."""
        found: dict[int, dict[str, Any]] = {}
        for rank in range(self.options.ranks):
            for seed, entry in self._entries_of(rank).items():
                if seed not in found or entry.get("error") or not entry.get("done"):
                    found[seed] = entry
        return found


def run(options: argparse.Namespace) -> int:
    import torch

    began = time.time()
    options.workers = options.workers or (12 if torch.cuda.is_available() else 1)
    os.environ["FUZZ_END"] = str(began + options.seconds)
    first = options.only // BLOCK if options.only is not None else options.seed * 1_000_000 // BLOCK
    count = 1 if options.only is not None else max(1, options.workers // options.ranks)
    lost = 0
    with tempfile.TemporaryDirectory(prefix="moequant-fuzz-") as name:
        folder = Path(name)
        workers = [Worker(number, options, folder, first + number, count) for number in range(count)]
        running = list(workers)
        try:
            while running and time.time() < began + options.seconds + GRACE:
                time.sleep(0.2)
                for worker in list(running):
                    if not worker.ended():
                        continue
                    running.remove(worker)
                    lost += worker.failed() and not worker.in_a_setting()
                    if worker.failed() and options.only is None and time.time() < began + options.seconds:
                        last = max(worker.entries(), default=worker.first * BLOCK)
                        worker.start(max(last // BLOCK, worker.first) + count)
                        running.append(worker)
        finally:
            for worker in running:
                worker.kill()
        entries = [entry for worker in workers for entry in worker.entries().values()]
    return report(options, entries, lost, time.time() - began)


def report(options: argparse.Namespace, entries: list[dict[str, Any]], lost: int, seconds: float) -> int:
    for entry in entries:
        if not entry.get("done"):
            entry["error"] = "the worker ended or was stopped in it"
    wrong = [entry for entry in entries if entry.get("error")]
    guards = sum(bool(entry.get("guards")) for entry in entries)
    done, bad = (Counter(entry["name"] for entry in chosen) for chosen in (entries, wrong))
    # a family that was not drawn is said
    done.update(dict.fromkeys(undrawn(options, entries), 0))
    drawn = Counter(f"{entry['name']}: {draw}" for entry in entries for draw in entry.get("drawn", ()))
    for entry in sorted(wrong, key=lambda entry: entry["seed"]):
        lines = [line for line in entry["error"].splitlines() if line.strip()]
        print(f"seed {entry['seed']} ({entry['name']}): {lines[-1][:200]}\n    {again(entry['seed'], options)}")
    print(f"\n{'family':24} {'settings':>8} {'wrong':>6}")
    for name in sorted(done):
        print(f"{name:24} {done[name]:8} {bad[name]:6}")
    print(f"{'all':24} {len(entries):8} {len(wrong):6}   guards touched: {guards}, {seconds:.0f} s, seed {options.seed}")
    for name in sorted(drawn):
        print(f"    {name:50} {drawn[name]:8}")
    if lost:
        print(f"{lost} workers ended by an error of their own: see above")
    if options.out:
        with options.out.open("a") as file:
            file.write(
                json.dumps({**record(options, entries, wrong, guards, done, seconds), "by_draw": dict(drawn), "workers_lost": lost})
                + "\n"
            )
    return 1 if wrong or lost or not entries else 0


def undrawn(options: argparse.Namespace, entries: list[dict[str, Any]]) -> set[str]:
    """The families that could have been drawn, or were asked for, and were not."""
    import torch

    here = ON_SEVERAL if options.ranks > 1 else ON_ONE + (ON_A_GPU if torch.cuda.is_available() else ())
    return set(options.families or here) - {entry.get("family") for entry in entries}


def record(
    options: argparse.Namespace,
    entries: list[dict[str, Any]],
    wrong: list[dict[str, Any]],
    guards: int,
    done: Counter[str],
    seconds: float,
) -> dict[str, Any]:
    import torch
    import triton

    git = ["git", "-C", str(TESTS.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "settings": len(entries),
        "wrong": len(wrong),
        "guards_touched": guards,
        "by_family": dict(done),
        "failures": [{"seed": entry["seed"], "name": entry["name"], "error": entry["error"][-2000:]} for entry in wrong[:50]],
        "seed": options.seed,
        "ranks": options.ranks,
        "seconds": round(seconds),
        "machine": torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine(),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("COMMIT") or commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


if __name__ == "__main__":
    settings = parse()
    try:
        sys.exit(run(settings) if settings.worker is None else work(settings))
    except Exception:
        # not 1, which says that settings were wrong
        traceback.print_exc()
        sys.exit(5)
