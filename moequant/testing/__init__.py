"""Tools for tests and benchmarks: routing generators and a recorder, a single-process result, comparisons, poison, and a launcher of
worker processes.

Letters: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moequant import reference
from moequant.batch import ExpertBatch
from moequant.checks import check_has_numbers, check_int, check_is, check_no_grad, check_output, check_tensor, check_tokens
from moequant.config import DispatcherConfig
from moequant.formats import FLOAT_DTYPES, FORMAT_OF_DTYPE
from moequant.testing.recording import record_routing as record_routing
from moequant.transport.local import LocalTransport

# What has to end is waited for as long as a busy machine may need: that costs nothing where all is well.
LIMIT_SECONDS = 600.0
# After one rank has failed, how long the others have to end by themselves and say what they saw.
GRACE_SECONDS = 10.0
# With all results there, how long workers have to end by themselves: some can't, as their group waits for a rank that is lost.
END_SECONDS = 3.0
# Random numbers that `routing` draws, at most: 1 GiB.
MAX_SCORES = 2**28
# What `relative_error` and `cosine_difference` compare, in float64.
COMPARABLE = (*FLOAT_DTYPES, torch.float64, *FORMAT_OF_DTYPE, torch.uint8, torch.int16, torch.int32, torch.int64)


def routing(
    tokens: int, top_k: int, num_experts: int, kind: str = "uniform", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random routing of T tokens, each to K distinct experts.

    kind: "uniform": every expert as likely as any other.
        "zipf:A": the p-th most popular expert is drawn in proportion to p**-A, without replacement. Which expert is how popular is a
            fixed shuffle of num_experts, the same on every rank.
        "one-hot": every token's first choice is expert 0, the others are uniform.
        "half": the same of every second token, and the others don't choose expert 0.
    generator: decides everything random here; its device is the result's. None for the CPU's default one.

    Returns ids (T, K) int32 and weights (T, K) float32, positive, each row summing to 1. Raises ValueError for an unknown kind, or if
    there are less than K experts.

    Example: T=2, K=2, E=4, "one-hot" may give ids [[0, 3], [0, 1]].
    """
    for name, value in (("tokens", tokens), ("top_k", top_k), ("num_experts", num_experts)):
        check_int(name, value)
    if max(tokens, 1) * num_experts > MAX_SCORES:
        raise ValueError(
            f"tokens times num_experts must be at most {MAX_SCORES}, as many are drawn, got {tokens} and {num_experts}"
        )
    check_is("generator", generator, (torch.Generator, type(None)))
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..num_experts for distinct experts, got top_k={top_k}, num_experts={num_experts}")
    device = generator.device if generator is not None else torch.device("cpu")
    # the K largest of log-weight + Gumbel noise are a draw without replacement in proportion to the weights
    noise = torch.rand(tokens, num_experts, dtype=torch.float32, generator=generator, device=device).clamp_min(1e-30)
    scores = log_popularity(kind, num_experts).to(device) - (-noise.log()).log()
    if kind == "half":
        scores[::2, 0], scores[1::2, 0] = math.inf, -math.inf
    ids = scores.topk(top_k, dim=1).indices.to(torch.int32)
    weights = torch.rand(tokens, top_k, dtype=torch.float32, generator=generator, device=device) + 0.1
    return ids, weights / weights.sum(1, keepdim=True)


def log_popularity(kind: str, num_experts: int) -> Tensor:
    """(E,) float32: the log of how likely each expert is, up to a constant; infinite for an expert that every token chooses."""
    check_is("kind", kind, str)
    popularity = torch.zeros(num_experts, dtype=torch.float32, device="cpu")
    name, _, parameter = kind.partition(":")
    if kind == "one-hot":
        popularity[0] = math.inf
        return popularity
    if name == "zipf":
        try:
            exponent = float(parameter)
        except ValueError:
            exponent = math.nan
        if exponent >= 0:
            order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(0), device="cpu")
            return -exponent * torch.log1p(order.float())
    elif kind in ("uniform", "half"):
        return popularity
    raise ValueError(f'kind must be "uniform", "zipf:A" with a number A >= 0, "one-hot" or "half", got {kind!r}')


def in_one_process(
    settings: Mapping[str, Any], inputs: Sequence[Sequence[Tensor]], experts: Callable[[ExpertBatch], Tensor]
) -> tuple[ExpertBatch, list[Tensor], int]:
    """What W ranks together have to get from a dispatch and a combine, computed on a CPU by one process with all ranks' tokens: what
    any transport is compared with, bit for bit.

    settings: of the dispatcher on W ranks; its transport, exchange and slots don't matter. inputs: each rank's hidden states (T, H), ids
    and weights (T, K). experts: from the batch of all E experts to their output (E, M, H).

    Returns the batch, whose sources are entry numbers, token * K + k, of all ranks' tokens joined; each rank's output (T, H); and the
    number of rows that had no room. Raises InvalidExpertIdError for ids outside -1..E-1, ValueError for other wrong settings and inputs.
    """
    check_is("settings", settings, Mapping)
    if not callable(experts):
        raise ValueError(f"experts must be callable with an ExpertBatch, got {type(experts).__name__}")
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise ValueError(f"inputs must be a list of each rank's hidden states, ids and weights, got {inputs!r}")
    cpu, ignored = torch.device("cpu"), {"transport": "local", "exchange": "auto", "slots": 1, "reduce": "exact"}
    each = DispatcherConfig(**{**settings, **ignored})
    for rank, tensors in enumerate(inputs):
        if not isinstance(tensors, (list, tuple)) or len(tensors) != 3:
            raise ValueError(f"inputs[{rank}] must be the rank's hidden states, ids and weights, got {type(tensors).__name__}")
        for tensor in tensors:
            check_tensor(f"inputs[{rank}]", tensor)
            check_has_numbers(f"inputs[{rank}]", tensor)
        check_tokens(each, cpu, *(tensor.cpu() for tensor in tensors))
    ranks = len(inputs)
    most = ranks * each.max_tokens_per_rank
    config = replace(each, max_tokens_per_rank=most, capacity=each.capacity or most)
    status = torch.zeros(3, dtype=torch.int64, device="cpu")
    transport = LocalTransport(config, 0, cpu, status)
    hidden, ids, weights = (torch.cat([tensor.cpu() for tensor in tensors]) for tensors in zip(*inputs, strict=True))
    slot = transport.allocate()
    batch, taken = transport.expert_batch(slot, len(ids)), slot.take(len(ids))
    # the specification's own steps, where the transport would take kernels, if interpreted
    reference.route(ids, taken.slots, slot.buffers.counts, config.max_rows, slot.buffers.num_tokens, status)
    rows, outputs = taken.rows, (batch.values, batch.scales)
    reference.scatter(hidden, ids, taken.slots, *outputs, rows=rows, sources=batch.sources, recipe=config.recipe)
    output, out = experts(batch), torch.empty_like(hidden)
    check_tensor("what experts return", output, shape=tuple(batch.values.shape))
    output = output.flatten(0, 1)
    if settings.get("reduce", "exact") == "per_rank":
        reference.combine_per_rank(output, rows, weights, output.shape[0] // ranks, out)
    else:
        reference.combine(output, rows, weights, out)
    return batch, list(out.split([len(tensors[0]) for tensors in inputs])), int(status[1])


def check_comparable(x: Tensor, reference: Tensor) -> None:
    """Raises ValueError unless both are tensors of one shape: others would be broadcast, and a wrong shape pass for right."""
    check_tensor("reference", reference, dtypes=COMPARABLE)
    check_tensor("x", x, shape=tuple(reference.shape), dtypes=COMPARABLE, device=reference.device)
    for name, tensor in (("x", x), ("reference", reference)):
        check_has_numbers(name, tensor)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """The Frobenius norm of x - reference over that of reference, in float64. 0 where both are empty or zero; NaN if x has a NaN. Raises
    ValueError unless both have one shape."""
    check_comparable(x, reference)
    error = torch.linalg.vector_norm((x.double() - reference.double()).flatten()).item()
    norm = torch.linalg.vector_norm(reference.double().flatten()).item()
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def cosine_difference(x: Tensor, reference: Tensor) -> float:
    """1 - 2 * sum(x * reference) / sum(x**2 + reference**2), in float64: 0 for equal tensors, sensitive to angle and length both.
    Raises ValueError unless both have one shape."""
    check_comparable(x, reference)
    x, reference = x.double().flatten(), reference.double().flatten()
    denominator = (x.square() + reference.square()).sum().item()
    return 1.0 - 2.0 * torch.dot(x, reference).item() / denominator if denominator else 0.0


def assert_bit_equal(a: Tensor, b: Tensor, name: str = "tensors") -> None:
    """Raises AssertionError unless a and b have the same dtype, shape and bits: 0.0 differs from -0.0, a NaN equals the same NaN.

    Strides and devices may differ.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise AssertionError(f"{name} differ: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
    # a copy: a tensor of one element counts as contiguous whatever its stride, and then has no bytes to view
    left, right = (x.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format) for x in (a, b))
    size = a.element_size()
    different = (left.view(torch.uint8).view(-1, size) != right.view(torch.uint8).view(-1, size)).any(1)
    if not different.any():
        return
    first = int(different.nonzero()[0])
    index, rest = [], first
    for extent in reversed(a.shape):
        rest, position = divmod(rest, extent)
        index.insert(0, position)
    shown = [f"{x[first].item()} (0x{x[first : first + 1].view(torch.uint8).numpy()[::-1].tobytes().hex()})" for x in (left, right)]
    raise AssertionError(
        f"{name} differ in {int(different.sum())} of {different.numel()} elements, first at {index}: {shown[0]} against {shown[1]} "
        f"({a.dtype}, shape {tuple(a.shape)})"
    )


def assert_nearly_quantized(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Raises AssertionError unless values and scales are within the tolerance of what goes through exp, erf or rsqrt: scales 4 units in
    the last place apart, values one step. More than 98% of the values have to be equal, or the tolerance would hide a wrong formula."""

    def codes(values: Tensor) -> Tensor:
        """Narrow numbers as integers of which neighbours differ by 1."""
        bits = values.view(torch.int8).int()
        return bits if values.dtype == torch.int8 else torch.where(bits < 0, -(bits & 0x7F), bits)

    (values, scales), (expected_values, expected_scales) = result, expected
    assert_bit_equal(scales.isnan(), expected_scales.isnan(), "bad groups")
    if values.dtype != expected_values.dtype or values.shape != expected_values.shape:
        raise AssertionError(
            f"values differ: {values.dtype} {values.shape} against {expected_values.dtype} {expected_values.shape}"
        )
    if values.numel() == 0:
        return
    ulps = int((scales.contiguous().view(torch.int32) - expected_scales.contiguous().view(torch.int32)).abs().max())
    steps = (codes(values) - codes(expected_values)).abs()
    equal = float((steps == 0).float().mean())
    if ulps > 4 or steps.max() > 1 or equal <= 0.98:
        raise AssertionError(
            f"scales {ulps} units in the last place apart (at most 4), values {int(steps.max())} steps (at most 1), {equal:.1%} equal"
        )


def poison(tensor: Tensor) -> Tensor:
    """Fills a tensor with what must not be read: NaN, or bytes of 0x7f for integers (True for bool). Returns it."""
    check_tensor("tensor", tensor, dtypes=(*COMPARABLE, torch.bool))
    check_no_grad(tensor=tensor)
    check_output("tensor", tensor)
    if tensor.is_floating_point():
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else int.from_bytes(b"\x7f" * tensor.element_size(), "little"))


class RankFailedError(RuntimeError):
    """A worker of `run_ranks` raised, died or did not end in time. Its message holds the workers' tracebacks.

    rank: the first that failed; for a timeout, the lowest that had not ended.
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

    function: importable by its module's name, as pickle wants it. Workers see the caller's sys.path and environment.
    args: pickled. So is what function returns: tensors on a GPU are moved to the CPU first.
    timeout: seconds for all of it; also the group's own. Ranks that have not ended by then are killed.
    backend: of init_process_group. With "nccl" in it, each worker's current device is the GPU of its rank.
    setup: importable, called in each worker before the function's module is imported: what must be patched or set before.
    may_die: ranks that may exit or be killed without a word (a test of faults); their result is None.

    Returns each rank's result, by rank. Raises RankFailedError, with tracebacks, for the first rank that fails.
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
            dist.init_process_group(
                backend,
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device,
            )
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
