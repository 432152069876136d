"""Forward and backward of one expert layer, beside the same layer by torch's own operations: python benchmarks/bench_training.py

On several GPUs: torchrun --nproc-per-node N benchmarks/bench_training.py. All is eager. Torch's layer is in bfloat16: `grouped_mm`,
between ranks `all_to_all_single`, and autograd; once with `index_add` and once with gathers for its ways to the rows and back. On one
rank Liger's fused layer (`pip install liger-kernel`) is timed too, where it is there. Gradients are compared before anything is timed.

A case has the experts that one rank of 8 would hold on each rank, and as many rows.

Letters: T tokens of each rank, K top-k, E experts, W ranks, H hidden size, I intermediate size.
"""

from __future__ import annotations

import gc
import importlib
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, OneLineParser, process_group, progress, significant
from benchmarks.timing import Modes, Way, time_turn_about
from benchmarks.torch_experts import WAYS, grouped_mm, torch_layer
from moequant import MoEQuantDispatcher
from moequant.models import MODELS, ModelShape, model_shape
from moequant.nn import MoEExperts
from moequant.testing import relative_error, routing

SHARE = 8
# by model, the largest T; all have about as much to do
DEFAULT_TOKENS = {"qwen3-30b": 8192, "deepseek-v3": 4096}
CPU_SHAPE, CPU_TOKENS = ModelShape(256, 128, 32, 2), 16
# of what the busiest rank gets, over the mean, by the number of ranks: of one exactly what there is
ROOM, ALONE = 1.25, 1.0
# between two layers in bfloat16 that round in other places, and of fp8 from one in bfloat16
LARGEST = {"none": 0.015, "fp8_e4m3fn": 0.08}
REPS, PROFILED = 20, 3
NAMES = ("output", "hidden", "weights", "w13", "w2")
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
# Liger's fused layer, where it is installed
liger: Any = importlib.import_module("liger_kernel.ops.fused_moe") if find_spec("liger_kernel") else None


class Case:
    """What the layers of one case are given: tokens, routing, and the gradient of the output."""

    def __init__(self, shape: ModelShape, tokens: int, experts: int, rank: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(tokens + 7919 * rank)
        ids, weights = routing(tokens, shape.top_k, experts, generator=generator)
        hidden, grad = (
            torch.randn(tokens, shape.hidden_size, dtype=torch.bfloat16, generator=generator, device=device) for _ in range(2)
        )
        self.ids, self.grad = ids, grad
        self.hidden, self.weights = hidden.requires_grad_(), weights.requires_grad_()

    def forward(self, layer: Layer) -> Tensor:
        return layer(self.hidden, self.ids, self.weights)

    def both(self, layer: Layer, parameters: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The output, and the gradients of hidden states, routing weights, w13 and w2."""
        out = self.forward(layer)
        return out.detach(), *torch.autograd.grad(out, (self.hidden, self.weights, *parameters), self.grad)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def memory_of(case: Case, layer: Layer, parameters: tuple[Tensor, Tensor], device: torch.device) -> dict[str, int]:
    """The most bytes that tensors take in forward and backward besides what is there, gradients among it, and those that are kept in
    between. The layer was called before. Nothing on a CPU."""
    if device.type == "cpu":
        case.both(layer, parameters)
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = allocated(device)
    out = case.forward(layer)
    kept = allocated(device) - before
    del out
    case.both(layer, parameters)
    torch.cuda.synchronize()
    return {"bytes": torch.cuda.max_memory_allocated(device) - before, "kept_bytes": kept}


def errors_of(made: tuple[Tensor, ...], expected: tuple[Tensor, ...], quant: str, name: str) -> dict[str, float]:
    """Relative errors by name. Raises AssertionError for one that is past what the format explains."""
    errors = {what: relative_error(a, b) for what, a, b in zip(NAMES, made, expected, strict=True)}
    # written so that a NaN fails
    if not all(error <= LARGEST[quant] for error in errors.values()):
        raise AssertionError(f"{name} and torch's layer differ by {errors}, expected at most {LARGEST[quant]} of each")
    return {what: float(f"{error:.3g}") for what, error in errors.items()}


def write_profile(path: Path, name: str, call: Callable[[], Any], device: torch.device) -> None:
    """Appends a table of the kernels of a call by their time, on a CPU of the operations."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        for _ in range(PROFILED):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_gpu = device.type == "cuda"
    rows = []
    for event in profiled.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # what the host calls has its kernels' time too
        if us > 0 and (not on_gpu or event.device_type.name == "CUDA"):
            rows.append((us / PROFILED, event.count / PROFILED, event.key))
    total = sum(us for us, _, _ in rows)
    with path.open("a") as file:
        file.write(f"{name}: {total:.0f} us a call\n{'us':>10} {'share':>6} {'calls':>6}\n")
        for us, count, key in sorted(rows, reverse=True)[:40]:
            file.write(f"{us:10.1f} {us / total:6.1%} {count:6.1f} {key[:120]}\n")
        file.write("\n")


def run_shape(bench: Bench | None, shape: ModelShape, tokens: int, options: Namespace, rank: int, device: torch.device) -> None:
    """Checks, times and records one model's layer for T tokens of each rank, in each format. Collective. bench: of rank 0."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    experts = max(shape.num_experts // SHARE, shape.top_k) * ranks
    case = Case(shape, tokens, experts, rank, device)
    room = options.rank_capacity or (ALONE if ranks == 1 else ROOM)
    settings: dict[str, Any] = {"num_experts": experts, "top_k": shape.top_k, "hidden_size": shape.hidden_size}
    settings |= {"max_tokens_per_rank": tokens, "layout": "ragged", "rank_capacity": room, "recipe": "ue8m0"}
    settings |= {"transport": options.transport}
    sizes = {"T": tokens, "H": shape.hidden_size, "I": shape.intermediate_size, "E": experts, "K": shape.top_k, "W": ranks}
    for quant in options.quants:
        progress(f"{sizes} {quant}")
        # what others have left is none of what this layer takes
        gc.collect()
        before = allocated(device)
        with MoEQuantDispatcher(**settings, quant=quant, device=device) as dispatcher:
            torch.manual_seed(0)
            narrow = options.keep_quantized and quant != "none"
            kept = {"recompute": options.recompute, "keep_quantized": narrow}
            module = MoEExperts(dispatcher, shape.intermediate_size, **kept, dtype=torch.bfloat16)
            parameters = module.w13, module.w2
            layers: dict[str, Layer] = {"moequant": module}
            if options.microbatch is not None:
                layers["moequant"] = partial(module, is_first_microbatch=True)
                if options.microbatch == "later":
                    case.both(layers["moequant"], parameters)
                    layers["moequant"] = partial(module, is_first_microbatch=False)
            if grouped_mm is not None:
                for way in WAYS:
                    layers[f"torch {way}"] = partial(by_torch, parameters, way)
            if liger is not None and ranks == 1:
                layers[f"liger_kernel {version('liger_kernel')}"] = partial(by_liger, parameters)
            made = case.both(layers["moequant"], parameters)
            buffers = allocated(device) - before - sum(x.nbytes for x in (*parameters, *made))
            if dispatcher.config.transport == "symmetric":
                buffers += dispatcher.buffer_bytes(**settings, quant=quant, world_size=ranks)
            expected = {name: case.both(layer, parameters) for name, layer in layers.items() if name != "moequant"}
            errors = {name: errors_of(made, theirs, quant, f"the layer in {quant}") for name, theirs in expected.items()}
            gradients = sum(x.nbytes for x in made[1:])
            del made, expected
            memory = {name: memory_of(case, layer, parameters, device) for name, layer in layers.items()}
            for way in memory.values():
                way |= {"gradient_bytes": gradients} if way else {}
            if memory["moequant"]:
                memory["moequant"]["bytes"] += buffers
                memory["moequant"]["buffer_bytes"] = buffers
            forward = {name: Way(partial(case.forward, layer), False) for name, layer in layers.items()}
            both = {name: Way(partial(case.both, layer, parameters), False) for name, layer in layers.items()}
            if options.profile is not None and rank == 0:
                options.profile.parent.mkdir(parents=True, exist_ok=True)
            for name, way in both.items():
                if options.profile is not None:
                    path = options.profile if rank == 0 else options.profile.with_suffix(f".rank{rank}{options.profile.suffix}")
                    write_profile(path, f"{sizes} {quant}, {name}", way.call, device)
            named = {**sizes, "quant": quant, "transport": dispatcher.config.transport, "routing": "uniform", "layout": "ragged"}
            named |= {name: True for name, value in kept.items() if value}
            if options.microbatch is not None:
                named[f"{options.microbatch}_microbatch"] = True
            for step, ways in (("forward", forward), ("forward + backward", both)):
                modes = time_turn_about(ways, device=device.type, reps=options.reps)
                if bench is not None:
                    more = {} if step == "forward" else {"errors": errors, "memory": memory}
                    record(bench, {**named, "step": step}, modes, more)


def by_torch(parameters: tuple[Tensor, Tensor], way: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch_layer(hidden, ids, weights, *parameters, way)


def by_liger(parameters: tuple[Tensor, Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Liger's fused layer, in bfloat16 by Triton, of one rank."""
    return liger.LigerFusedMoEFunction.apply(hidden, *parameters, ids.to(torch.int32), weights)


def record(bench: Bench, case: dict[str, Any], modes: dict[str, Modes], more: dict[str, Any]) -> None:
    """One step's record, torch's times beside it."""
    mine, others = modes["moequant"], {name: mode for name, mode in modes.items() if name != "moequant"}
    product = 2 * case["T"] * case["K"] * case["H"] * 3 * case["I"]
    dtype = torch.bfloat16 if case["quant"] == "none" else torch.float8_e4m3fn
    floor, flops = bench.floor_us(flops=product, dtype=dtype), product
    if case["step"] != "forward":
        # of weights' gradients in bfloat16
        floor, flops = 2 * floor + bench.floor_us(flops=product), 3 * product
    taken = more.get("memory", {})
    extra: dict[str, Any] = {"fresh_us": significant(mine.fresh.us, 5), **more}
    if others:
        times = {name: mode.chained.us for name, mode in others.items()}
        fastest = min(times, key=times.__getitem__)
        extra |= {"peer": fastest, "peer_us": significant(times[fastest], 5)}
        extra |= {"peers": {name: significant(us, 5) for name, us in times.items()}}
        extra |= {"peers_fresh": {name: significant(mode.fresh.us, 5) for name, mode in others.items()}}
        if taken.get("moequant"):
            extra |= {"bytes": taken["moequant"]["bytes"], "peer_bytes": taken[fastest]["bytes"]}
    bench.record("training", case, mine.chained, floor_us=floor, tflops=flops / mine.chained.us / 1e6, **extra)
    if bench.device == "cuda" and "bytes" in extra:
        rates = ", ".join(f"{name} {us / mine.chained.us:.2f} times as long" for name, us in extra["peers"].items())
        sizes = ", ".join(f"{name} {x['bytes'] / 2**20:.0f} ({x['kept_bytes'] / 2**20:.0f} kept)" for name, x in taken.items())
        print(f"    {rates}; MiB: {sizes}, gradients {taken['moequant']['gradient_bytes'] / 2**20:.0f}; errors {more['errors']}")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=sorted(MODELS), default=tuple(DEFAULT_TOKENS), metavar="NAME", help="from the table")
    add("--num-tokens", type=int, metavar="T", help="tokens of each rank (default: by the model, 8192 or 4096)")
    add("--quants", nargs="+", choices=tuple(LARGEST), default=tuple(LARGEST), help="(default: both)")
    add("--rank-capacity", type=float, help=f"times the mean (default: {ALONE} on one rank, {ROOM} on several)")
    add("--recompute", action="store_true", help="GEMM 1 runs again in the backward")
    add("--keep-quantized", action="store_true", help="in fp8, GEMM 1's result lies in fp8 until the backward")
    add("--microbatch", choices=("first", "later"), help="of several: the weights are quantized and kept, or are the kept ones")
    add("--transport", default="auto", choices=("auto", "local", "collective", "symmetric"), help="(default: auto)")
    add("--reps", type=int, default=REPS, help=f"of each timing (default: {REPS})")
    add("--profile", type=Path, help="append the kernels of forward and backward, by their time, to this file")
    add("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    options = parser.parse_args(argv)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    with process_group(kind) as (rank, device):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        bench = Bench.start(options.output_json, device=kind, gpus=ranks) if rank == 0 else None
        if kind == "cpu":
            run_shape(bench, CPU_SHAPE, options.num_tokens or CPU_TOKENS, options, rank, device)
            return
        for name in options.models:
            run_shape(bench, model_shape(name), options.num_tokens or DEFAULT_TOKENS.get(name, 4096), options, rank, device)


if __name__ == "__main__":
    main()
