"""Times one expert layer, step by step, on one rank or many, and checks its result against a dense bfloat16 computation.

    torchrun --nproc-per-node 8 launch/bench_ep.py --model deepseek-v3 --num-tokens 128
    python launch/bench_ep.py

Every figure is that of the slowest rank: the maximum over ranks of each repetition, then median and percentiles. us, p20 and p80 are of
calls that follow one another, from a CUDA graph where they can be captured; "fresh us" of single calls, before each of which all ranks
meet and stay idle. Exit code 0: the result is right; 1: it is past its tolerance; 2: wrong options.

Letters: T tokens of each rank, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, C rows of it for each
source rank in the padded exchange, H hidden size, I intermediate size, G = ceil(H / 128).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, Check, check_output, process_group, progress, time_wire
from benchmarks.ep_layer import EXCHANGE, Layer, all_ids, busiest, dense_layer, make_tokens, record_steps
from benchmarks.ep_options import EMPTY_RANKS, SKEWS, parse_options
from benchmarks.peers import Peers, find_peers
from benchmarks.records import case_text
from benchmarks.timing import Modes
from moequant.config import QUANT_DTYPES
from moequant.models import MODELS


def worst_check(check: Check) -> Check:
    """The worst figures of all ranks, the same on all ranks."""
    if not dist.is_initialized():
        return check
    checks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(checks, check)
    figures = torch.tensor([[c.relative, c.cosine, c.worst_token] for c in checks], dtype=torch.float64)
    # amax keeps a NaN
    relative, cosine, worst = figures.amax(0).tolist()
    return Check(relative, cosine, worst, check.tolerance)


class Run:
    """One run of the script on one rank: its ceilings, and the cases that it checks, times and records. passed: all were right."""

    def __init__(self, options: argparse.Namespace, rank: int, device: torch.device) -> None:
        self.options, self.rank, self.device = options, rank, device
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.passed = True
        wire_bytes, wire = time_wire(device) if self.world_size > 1 else (0, None)
        self.wire_gbps = wire_bytes / wire.us / 1e3 if wire is not None else math.inf
        self.bench = None
        if rank == 0:
            self.bench = Bench.start(options.output_json, device=options.device, gpus=self.world_size)
            if wire is not None:
                case = {"W": self.world_size, "exchange": "all_to_all_single", "bytes": wire_bytes}
                self.bench.record("copy", case, wire, floor_us=None, gbps=self.wire_gbps)
            self.bench.matmul_tflops(QUANT_DTYPES[options.quant])

    def say(self, line: str) -> None:
        if self.bench is not None:
            progress("")
            print(line, flush=True)

    def make_layer(self, **changes: Any) -> Layer:
        """changes: settings that differ from the options'."""
        progress(f"building the {changes.get('quant', self.options.quant)} layer")
        return Layer(self.options, make_tokens(self.options, self.options.routing, self.rank, self.device), self.rank, **changes)

    def run_case(self, layer: Layer, kind: str, steps: tuple[str, ...] | None = None, peers: Peers | None = None) -> None:
        """Checks a layer with tokens of a kind of routing, times its steps (None: all), and records them."""
        options = self.options
        layer.tokens = tokens = make_tokens(options, kind, self.rank, self.device)
        ids, placed = all_ids(options, kind, layer.config, self.device)
        # rows that earlier calls dropped don't count
        layer.dispatcher.check()
        expected = dense_layer(options, tokens.hidden, placed[self.rank, : len(tokens.ids)], tokens.weights)
        check = worst_check(check_output(layer(), expected, layer.config.quant))
        self.passed &= check.passed
        dropped = int(((ids >= 0) & (placed < 0)).sum())
        if layer.dispatcher.check() != dropped:
            raise RuntimeError(
                f"rank {self.rank}: dispatch dropped other rows than the {dropped} that the routing and the capacity imply"
            )
        timings: dict[str, Modes] = {}
        beside: dict[str, dict[str, Modes]] = {}
        for name, step in layer.steps().items():
            others = peers.ways.get(name) if peers else None
            if others:
                timings[name], beside[name] = layer.time_beside(name, step, others)
            elif steps is None or name in steps:
                timings[name] = layer.time(name, step)
        load = busiest(layer.config, ids, placed, layer.exchange)
        self.say(f"{case_text(layer.case(options, kind))}; busiest rank {load.rows} rows, {dropped} dropped\n{check}")
        if self.bench is not None:
            record_steps(self.bench, options, layer, kind, load, timings, self.wire_gbps, beside)

    def find_peers(self, layer: Layer) -> Peers:
        progress("building peers")
        peers = find_peers(layer)
        for remark in peers.remarks:
            self.say(remark)
        return peers

    def run(self) -> int:
        """Builds, checks, times. Returns the exit code."""
        options = self.options
        note = MODELS[options.model].note if options.model in MODELS else ""
        if note:
            self.say(f"{options.model} ({note})")
        layer = self.make_layer()
        self.run_case(layer, options.routing, peers=self.find_peers(layer) if options.peers else None)
        if options.trace is not None:
            self.say(f"trace in {layer.write_trace(options.trace)}")
        for kind in SKEWS if options.skew else ():
            if kind == EMPTY_RANKS and self.world_size == 1:
                self.say(f"{kind}: there is only one rank")
            elif kind != options.routing:
                self.run_case(layer, kind, EXCHANGE)
        if options.quant != "none":
            changes = {"quant": "none"} | ({"exchange": "packed"} if layer.exchange else {})
            del layer
            self.run_case(self.make_layer(**changes), options.routing, ("layer",))
        if not self.passed and self.rank == 0:
            print("the result is wrong, past its tolerance", file=sys.stderr)
        return 0 if self.passed else 1


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv, int(os.environ.get("WORLD_SIZE", "1")), __doc__)
    with process_group(options.device) as (rank, device), torch.no_grad():
        return Run(options, rank, device).run()


if __name__ == "__main__":
    sys.exit(main())
