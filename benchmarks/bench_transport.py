"""Times dispatch and combine alone, between GPUs: torchrun --nproc-per-node 8 benchmarks/bench_transport.py

Letters: T tokens of each rank, K top-k, E experts, W ranks, H hidden size, M rows of an expert's buffer.

Every time is that of a CUDA graph of many calls, of the slowest rank. The floor is the bytes that leave, or reach, the busiest rank, at
the speed at which this machine's ranks store to, or load from, all others' memory, measured in the same run. Before it is timed, each
transport's batch and sums are compared, bit for bit, with those of `collective`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, OneLineParser, Timing, process_group, progress, slowest_rank, time_collectively
from moequant import MoEQuantDispatcher
from moequant.batch import DispatchHandle, ExpertBatch
from moequant.kernels.library.symmetric import NO_FAULT
from moequant.kernels.routing.combine import Remote, combine_shared
from moequant.kernels.symmetric.push_rows import push_rows
from moequant.models import MODELS, model_shape
from moequant.testing import assert_bit_equal, routing
from moequant.transport.base import Stage
from moequant.transport.peer_memory import PeerMemory

TOKENS = (1, 8, 32, 128, 512, 4096)


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="deepseek-v3", help="whose H, E and K (default: deepseek-v3)")
    add("--num-tokens", type=int, nargs="+", default=TOKENS, metavar="T", help=f"tokens of each rank (default: {TOKENS})")
    add("--num-experts", type=int, metavar="E", help="experts in all (default: the model's)")
    add("--capacity", type=int, default=2048, metavar="M", help="rows of an expert's buffer at most (default: 2048)")
    add("--transports", nargs="+", default=("symmetric", "collective"), help="(default: symmetric collective)")
    add("--iters", type=int, default=20, help="replays of each graph (default: 20)")
    add("--output-json", type=Path, metavar="PATH", help="append the records to this file, one JSON object a line")
    return parser


def wire_ceilings(rank: int, ranks: int, device: torch.device) -> dict[str, tuple[Timing, float]]:
    """The time, and GB/s, at which every rank at once stores to ("push"), and loads from ("pull"), the memory of all others."""
    rows, columns = 8192 * (ranks - 1), 7168
    size = rows * columns * 2
    assert dist.group.WORLD is not None
    memory = PeerMemory(dist.group.WORLD, size, device)
    local = memory.local.view(torch.bfloat16).view(1, rows, columns)
    mine = torch.zeros_like(local)
    counts = torch.full((1,), rows, dtype=torch.int32, device=device)
    row = torch.arange(rows, device=device)
    peers = (rank + 1 + row % (ranks - 1)) % ranks
    addresses = (memory.pointers[peers] + row * columns * 2).view(1, rows)
    flat = (peers * rows + row).int().view(rows // 8, 8)
    well = torch.full((1,), NO_FAULT.value, dtype=torch.int32, device=device)

    remote = Remote(memory.pointers, 0, rows, ranks)

    def pull() -> None:
        combine_shared(mine, flat, None, mine[0, : rows // 8], well, remote=remote)

    ceilings = {}
    for way, step in (("push", lambda: push_rows(mine, counts, None, None, addresses)), ("pull", pull)):
        samples = time_collectively(step, device="cuda", in_graph=True, reps=5, inner=5)
        timing = Timing.of(slowest_rank(samples))
        ceilings[way] = timing, size / timing.us / 1e3
    dist.barrier()
    return ceilings


def stand_in(batch: ExpertBatch, out: Tensor) -> Tensor:
    """An elementwise expert into out, exact by construction."""
    values = batch.values.float()
    if batch.scales is not None:
        values *= batch.scales.repeat_interleave(128, 2)[..., : values.shape[2]]
    return out.copy_(values)


class Case:
    """One shape on all transports."""

    def __init__(self, options: argparse.Namespace, tokens: int, rank: int, ranks: int, device: torch.device) -> None:
        shape = model_shape(options.model)
        self.experts = options.num_experts or shape.num_experts
        self.tokens, self.rank, self.ranks, self.iters = tokens, rank, ranks, options.iters
        self.settings: dict[str, Any] = {
            "num_experts": self.experts,
            "top_k": shape.top_k,
            "hidden_size": shape.hidden_size,
            "max_tokens_per_rank": tokens,
            "capacity": min(options.capacity, tokens * ranks),
            "on_overflow": "drop",
        }
        generators = [torch.Generator(device).manual_seed(peer) for peer in range(ranks)]
        routings = [routing(tokens, shape.top_k, self.experts, "uniform", generator) for generator in generators]
        self.all_ids = torch.stack([ids for ids, _ in routings])
        hidden = torch.randn(tokens, shape.hidden_size, generator=generators[rank], device=device).bfloat16()
        self.inputs = (hidden, *routings[rank])

    def wire_bytes(self, per_token: bool, row_bytes: int) -> int:
        """Bytes between the busiest rank and the others: a row for each entry, or one for each token and rank."""
        owners = self.all_ids // (self.experts // self.ranks)
        peers = torch.arange(self.ranks, device=owners.device)
        rows = owners[..., None] == peers
        counts = (rows.any(2).sum(1) if per_token else rows.sum((1, 2))).float()
        counts.fill_diagonal_(0)
        return int(counts.sum(1).max()) * row_bytes

    def dispatcher(self, **changes: Any) -> MoEQuantDispatcher:
        return MoEQuantDispatcher(**self.settings | changes)

    def time(self, step: Callable[[], Any]) -> Timing:
        samples = time_collectively(step, device="cuda", in_graph=True, reps=self.iters, inner=20 if self.tokens < 1024 else 5)
        return Timing.of(slowest_rank(samples))

    def run(
        self, transport: str, reduce: str, expected: tuple[ExpertBatch, Tensor] | None
    ) -> tuple[ExpertBatch, Tensor, dict[str, Timing]]:
        """Checks and times one transport. Returns its batch, its sums, and the times by op."""
        exchange = {"exchange": "padded"} if transport == "collective" else {}
        with self.dispatcher(transport=transport, reduce=reduce, **exchange) as dispatcher:
            hidden, _, weights = self.inputs
            out = torch.empty_like(hidden)
            batch, handle = dispatcher.dispatch(*self.inputs)
            output = stand_in(batch, dispatcher.output_buffer())
            dispatcher.combine(output, handle, out=out)
            dispatcher.check()
            kept = copied(batch)
            if expected is not None:
                compare(kept, expected[0])
                assert_bit_equal(out, expected[1], f"{transport} {reduce}")
            slot = dispatcher._slots[0]

            def combine(handle: DispatchHandle = handle) -> None:
                # the same rows again: nothing is overwritten by other bits, so that no round of flags has to come between
                slot.stage, slot.pushing = Stage.LANDED, None
                dispatcher.combine(output, handle, out=out)

            timings = {}
            if reduce == "exact":
                timings["dispatch"] = self.time(lambda: dispatcher.dispatch(*self.inputs))
                batch, handle = dispatcher.dispatch(*self.inputs)
            timings["combine_pull"] = self.time(lambda: combine(handle))
            if dispatcher.config.pushes:
                dispatcher.push(output, handle)
                pushed = dispatcher.combine_pushed(handle)
                if expected is not None:
                    assert_bit_equal(pushed, expected[1], "pushed")

                def combine_pushed(handle: DispatchHandle = handle) -> None:
                    slot.stage, slot.pushing = Stage.LANDED, torch.bfloat16
                    dispatcher.combine_pushed(handle, out=out)

                timings["combine_push"] = self.time(combine_pushed)

                def push(handle: DispatchHandle = handle) -> None:
                    slot.stage, slot.pushing = Stage.LANDED, None
                    dispatcher.push(output, handle)

                timings["push"] = self.time(push)
        return kept, out.clone(), timings


def copied(batch: ExpertBatch) -> ExpertBatch:
    """The batch, without what its slot may change, rows that are not valid zeroed."""
    valid = torch.arange(batch.values.shape[1], device=batch.values.device) < batch.num_tokens[:, None]
    rows = batch.values.view(torch.uint8).unflatten(2, (batch.values.shape[2], -1))
    values = torch.where(valid[..., None, None], rows, 0).flatten(2).view(batch.values.dtype)
    scales = None if batch.scales is None else torch.where(valid[..., None], batch.scales, 0.0)
    sources = torch.where(valid, batch.sources, 0)
    return ExpertBatch(values, scales, batch.num_tokens.clone(), sources, batch.recipe, batch.expected_rows)


def compare(batch: ExpertBatch, expected: ExpertBatch) -> None:
    for name in ("num_tokens", "sources", "values", "scales"):
        mine, theirs = getattr(batch, name), getattr(expected, name)
        if mine is not None:
            assert_bit_equal(mine, theirs, name)


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    with process_group("cuda") as (rank, device), torch.no_grad():
        ranks = dist.get_world_size()
        bench = Bench.start(options.output_json, device="cuda", gpus=ranks) if rank == 0 else None
        ceilings = wire_ceilings(rank, ranks, device)
        gbps = {way: speed for way, (_, speed) in ceilings.items()}
        if bench is not None:
            for way, (timing, speed) in ceilings.items():
                bench.record("copy", {"W": ranks, "way": way}, timing, floor_us=None, gbps=speed)
        for tokens in options.num_tokens:
            case = Case(options, tokens, rank, ranks, device)
            hidden_size, top_k = case.settings["hidden_size"], case.settings["top_k"]
            for reduce in ("exact", "per_rank"):
                expected = None
                for transport in sorted(options.transports):
                    progress(f"T={tokens} {transport} {reduce}")
                    batch, out, timings = case.run(transport, reduce, expected)
                    expected = (batch, out) if transport == "collective" else expected
                    for op, timing in timings.items():
                        if op == "dispatch":
                            groups = -(-hidden_size // 128)
                            sent, way = case.wire_bytes(True, hidden_size + 4 * groups), "push"
                        elif op == "combine_push":
                            sent, way = 0, "push"
                        else:
                            sent = case.wire_bytes(reduce == "per_rank", 2 * hidden_size)
                            way = "pull" if op == "combine_pull" and reduce == "exact" else "push"
                        if bench is not None:
                            floor = sent / gbps[way] / 1e3
                            record = {
                                "T": tokens,
                                "H": hidden_size,
                                "E": case.experts,
                                "K": top_k,
                                "W": ranks,
                                "quant": "fp8_e4m3fn",
                            }
                            record |= {
                                "transport": transport,
                                "reduce": reduce,
                                "routing": "uniform",
                                "capacity": case.settings["capacity"],
                            }
                            bench.record(op, record, timing, floor_us=floor or None, gbps=sent / timing.us / 1e3 if sent else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
