"""A launcher of worker processes that form one group of torch.distributed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What has to end is waited for as long as a busy machine may need: that costs nothing where all is well.
LIMIT_SECONDS = 600.0
# After one rank has failed, how long the others have to end by themselves and say what they saw.
GRACE_SECONDS = 10.0
# With all results there, how long workers have to end by themselves: some can't, as their group waits for a rank that is lost.
END_SECONDS = 3.0


class RankFailedError(RuntimeError):
    """A worker of `run_ranks` raised, died or did not end in time.

    Args:
        rank: the first that failed; for a timeout, the lowest that had not ended.
        message: with the workers' tracebacks.

    Attributes:
        rank: as given.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = LIMIT_SECONDS,
    backend: str = "gloo",
    setup: Callable[[], None] | None = None,
    may_die: Sequence[int] = (),
) -> list[Any]:
    """Calls `function(rank, world_size, *args)` in world_size processes that form one torch.distributed group.

    Args:
        function: importable by its module's name, as pickle wants it. Workers see the caller's sys.path and environment.
        world_size: how many processes.
        *args: pickled. So is what function returns: tensors on a GPU are moved to the CPU first.
        timeout: seconds for all of it; also the group's own. Ranks that have not ended by then are killed.
        backend: of init_process_group. With "nccl" in it, each worker's current device is the GPU of its rank.
        setup: importable, called in each worker before the function's module is imported: what must be patched or set before.
        may_die: ranks that may exit or be killed without a word (a test of faults); their result is None.

    Returns:
        Each rank's result, by rank.

    Raises:
        RankFailedError: with tracebacks, for the first rank that fails.
        ValueError: NCCL is asked for with fewer GPUs than ranks.
    """
    if "nccl" in backend and torch.cuda.device_count() < world_size:
        raise ValueError(f"backend {backend!r} needs a GPU for each of {world_size} ranks, found {torch.cuda.device_count()}")
    # torch's import, most of a worker's start, is done once, in the server that workers are forked from
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])
    # plain pickle: torch's own reductions would leave results in the memory of processes that have ended
    work = pickle.dumps((function, args))
    prepare = pickle.dumps(setup)
    workers: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="moequant-ranks-") as folder:
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                arguments = (rank, world_size, dict(os.environ), folder, timeout, backend, writer, prepare, work)
                worker = context.Process(target=_run_rank, args=arguments, daemon=True)
                worker.start()
                writer.close()
                workers.append(worker)
                pipes.append(reader)
            return _collect(workers, pipes, Path(folder), time.monotonic() + timeout, may_die)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
            for pipe in pipes:
                pipe.close()


def _run_rank(
    rank: int,
    world_size: int,
    environment: dict[str, str],
    folder: str,
    timeout: float,
    backend: str,
    writer: Connection,
    prepare: bytes,
    work: bytes,
) -> None:
    """A worker's whole life: sends (True, the pickled result) or (False, a traceback) and exits."""
    try:
        # the server that this was forked from has the environment of its own start; modules read it when they are imported
        os.environ.clear()
        os.environ.update(environment)
        with open(_stack_path(Path(folder), rank), "w") as stacks:
            # a rank that hangs is asked where it stands
            faulthandler.register(signal.SIGUSR1, stacks)
            torch.set_num_threads(1)
            setup = pickle.loads(prepare)
            if setup is not None:
                setup()
            device = None
            if "nccl" in backend:
                device = torch.device("cuda", rank)
                torch.cuda.set_device(device)
            # a rank whose function ends at once would close connections that another one is still making
            os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
            dist.init_process_group(
                backend,
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device,
            )
            del os.environ["TORCH_DIST_INIT_BARRIER"]
            function, args = pickle.loads(work)
            message = True, pickle.dumps(function(rank, world_size, *args))
            faulthandler.unregister(signal.SIGUSR1)
        writer.send(message)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        writer.send((False, traceback.format_exc()))
        writer.close()
        # not sys.exit: the destructors of a group whose peers are stuck would wait for them
        os._exit(1)


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _stack(worker: BaseProcess, path: Path) -> str:
    """Where the worker stands, by its own word; empty if it can't say."""
    if worker.pid is None or not path.exists():
        return ""
    os.kill(worker.pid, signal.SIGUSR1)
    deadline = time.monotonic() + GRACE_SECONDS
    while worker.is_alive() and time.monotonic() < deadline:
        if path.stat().st_size:
            # one write call a line: what follows the first line is there at once
            time.sleep(0.05)
            break
        time.sleep(0.01)
    return path.read_text()


def _collect(
    workers: list[BaseProcess], pipes: list[Connection], folder: Path, deadline: float, may_die: Sequence[int]
) -> list[Any]:
    """Waits until every worker has sent its result and ended, one has failed, or the deadline has passed."""
    results: list[Any] = [None] * len(workers)
    failures: dict[int, str] = {}
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready: list[Any] = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, payload = pipe.recv()
            except EOFError:
                workers[rank].join(GRACE_SECONDS)
                if rank not in may_die:
                    failures[rank] = f"ended with exit code {workers[rank].exitcode} and without a result\n"
            else:
                if succeeded:
                    results[rank] = pickle.loads(payload)
                else:
                    failures[rank] = payload
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        lost = f"rank {next(iter(failures))} of {len(workers)} failed"
    elif waiting:
        lost = f"ranks {sorted(waiting.values())} of {len(workers)} did not end in time"
    else:
        for worker in workers:
            worker.join(END_SECONDS)
        return results
    for rank in sorted(waiting.values()):
        failures[rank] = f"had not ended\n{_stack(workers[rank], _stack_path(folder, rank))}"
    details = "\n".join(f"--- rank {rank}: {text.rstrip()}" for rank, text in failures.items())
    raise RankFailedError(next(iter(failures)), f"{lost}\n{details}")
