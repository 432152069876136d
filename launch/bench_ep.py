"""Times one expert layer, step by step, on one rank or many, and checks its result against a dense bfloat16 computation.

    torchrun --nproc-per-node 8 launch/bench_ep.py --model deepseek-v3 --num-tokens 128
    python launch/bench_ep.py

Every figure is that of the slowest rank: the maximum over ranks of each repetition, then median and percentiles. Exit code 0: the
result is right; 1: it is past its tolerance; 2: wrong options.

Letters: T tokens of each rank, K top-k, E experts, W ranks, L = E / W local experts, M rows of an expert's buffer, C rows of it for each
source rank in the padded exchange, H hidden size, I intermediate size, G = ceil(H / 128).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    TOLERANCES,
    Bench,
    Check,
    OneLineParser,
    Timing,
    check_output,
    free_memory,
    process_group,
    progress,
    slowest_rank,
    time_collectively,
    time_wire,
)
from benchmarks.report import case_text
from moequant import GroupedExperts, MoEQuantDispatcher, quantize_expert_batch, reference
from moequant.batch import ceil_div
from moequant.config import CHOICES, QUANT_DTYPES, DispatcherConfig
from moequant.models import MODELS, model_shape
from moequant.testing import routing
from moequant.transport.collective import choose_exchange, message_bytes


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), metavar="NAME", help=f"take H, I, E and K of a model: {', '.join(MODELS)}")
    add("--num-tokens", type=int, metavar="T", help="tokens of each rank (default: 128, without a GPU 64)")
    add("--hidden", type=int, metavar="H", help="hidden size (default: 7168, without a GPU 512)")
    add("--intermediate", type=int, metavar="I", help="intermediate size of an expert (default: 2048, without a GPU 256)")
    add(
        "--num-experts",
        type=int,
        metavar="E",
        help="experts in all, a multiple of the ranks (default: 32 a rank up to 256, without a GPU 8 a rank; with --model on less than "
        "8 ranks their share of the model's experts on 8, so that weights fit)",
    )
    add("--num-topk", type=int, metavar="K", help="experts of a token (default: 8, without a GPU 4)")
    add("--transport", choices=CHOICES["transport"], default="auto", help="how rows move between ranks (default: auto)")
    add("--exchange", choices=CHOICES["exchange"], default="auto", help="of the collective transport (default: auto)")
    add("--quant", choices=tuple(TOLERANCES), default="fp8_e4m3fn", help="format of activations and weights (default: fp8_e4m3fn)")
    add("--routing", default="uniform", metavar="KIND", help="uniform, zipf:A (popularity falls as rank**-A) or one-hot")
    add("--capacity", type=int, metavar="M", help="rows of an expert's buffer; rows past it are dropped (default: none can be)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: a GPU if there is one)")
    add("--output-json", type=Path, metavar="PATH", help="append the records to this file, one JSON object a line")
    add("--seed", type=int, default=0, help="of weights, tokens and routing (default: 0)")
    add("--iters", type=int, default=20, help="repetitions of each timing (default: 20)")
    return parser


def parse_options(argv: list[str] | None, world_size: int) -> argparse.Namespace:
    """The options, with every default filled in. Exits with code 2 if one is wrong."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and torch.cuda.device_count() <= int(os.environ.get("LOCAL_RANK", "0")):
        parser.error(f"--device cuda needs a GPU for each rank, found {torch.cuda.device_count()}; use --device cpu or fewer ranks")
    large = options.device == "cuda"
    defaults = {
        "num_tokens": 128 if large else 64,
        "hidden": 7168 if large else 512,
        "intermediate": 2048 if large else 256,
        "num_experts": min(32 * world_size, max(256, world_size)) if large else 8 * world_size,
        "num_topk": 8 if large else 4,
    }
    if options.model is not None:
        shape = model_shape(options.model)
        share = shape.num_experts * min(world_size, 8) // 8
        fits = share >= shape.top_k and share % world_size == 0
        experts = share if fits else shape.num_experts
        defaults |= {"hidden": shape.hidden_size, "intermediate": shape.intermediate_size}
        defaults |= {"num_experts": experts, "num_topk": shape.top_k}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("num_tokens", "hidden", "intermediate", "num_experts", "num_topk", "iters"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.transport == "collective" and "RANK" not in os.environ:
        parser.error("--transport collective needs a process group; start the script with torchrun")
    try:
        routing(0, options.num_topk, options.num_experts, options.routing)
        config = DispatcherConfig(world_size=world_size, **dispatcher_settings(options))
    except ValueError as error:
        parser.error(str(error))
    needed, free = memory_needed(options, config), free_memory(options.device)
    if needed > free:
        parser.error(
            f"a rank needs about {needed / 2**30:.1f} GiB for weights and buffers, and {free / 2**30:.1f} GiB are free; use more ranks, "
            "or a smaller --num-tokens, --num-experts or --capacity"
        )
    return options


def dispatcher_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_experts": options.num_experts,
        "top_k": options.num_topk,
        "hidden_size": options.hidden,
        "max_tokens_per_rank": options.num_tokens,
        "quant": options.quant,
        "transport": options.transport,
        "exchange": options.exchange,
        "capacity": options.capacity,
        "on_overflow": "error" if options.capacity is None else "drop",
    }


def memory_needed(options: argparse.Namespace, config: DispatcherConfig) -> int:
    """Bytes of a rank, about: buffers, weights in bfloat16 and quantized, and what passes between the steps."""
    buffers = MoEQuantDispatcher.buffer_bytes(world_size=config.world_size, **dispatcher_settings(options))
    weights = config.num_local_experts * options.hidden * options.intermediate
    # bfloat16 and quantized, and float32 temporaries while w13 is quantized
    weight_bytes = weights * (3 * (2 + 1) + 24 * 2)
    rows = config.num_local_experts * config.max_rows
    between = rows * (2 * 2 * options.intermediate + 2 * options.intermediate + 2 * options.hidden)
    # the bfloat16 layer, timed after it, has rows twice as wide
    return 2 * buffers + weight_bytes + between


def expert_weights(options: argparse.Namespace, expert: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One expert's w13 (2I, H) and w2 (H, I), bfloat16, scaled so that outputs are about as large as inputs. The same on every rank."""
    generator = torch.Generator(device).manual_seed((options.seed << 20) + expert)
    hidden, size = options.hidden, options.intermediate
    w13 = torch.randn(2 * size, hidden, generator=generator, device=device).mul_(hidden**-0.5)
    w2 = torch.randn(hidden, size, generator=generator, device=device).mul_(size**-0.5)
    return w13.bfloat16(), w2.bfloat16()


def dense_layer(options: argparse.Namespace, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer without any exchange or quantization: bfloat16 products, float32 sums over k. (T, H) float32.

    hidden_states: (T, H) bfloat16. ids: (T, K), -1 for absent. weights: (T, K).
    """
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in range(options.num_experts):
        token, k = (ids == expert).nonzero(as_tuple=True)
        if token.numel():
            w13, w2 = expert_weights(options, expert, hidden_states.device)
            gate, up = (hidden_states[token] @ w13.T).float().chunk(2, -1)
            product = (F.silu(gate) * up).bfloat16() @ w2.T
            out.index_add_(0, token, weights[token, k].unsqueeze(1) * product.float())
    return out


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


def make_routing(options: argparse.Namespace, rank: int, device: torch.device) -> tuple[Tensor, Tensor, torch.Generator]:
    """A rank's ids and weights (T, K), and the generator that made them. The same on whichever rank it is called."""
    generator = torch.Generator(device).manual_seed((options.seed << 20) + (1 << 19) + rank)
    return *routing(options.num_tokens, options.num_topk, options.num_experts, options.routing, generator), generator


def all_ids(options: argparse.Namespace, config: DispatcherConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(W, T, K) twice: every rank's ids, and the same with -1 where the expert's buffer has no room for the row."""
    ids = torch.stack([make_routing(options, rank, device)[0] for rank in range(config.world_size)])
    if options.capacity is None:
        return ids, ids
    # rows are ordered by (source rank, token, k), and the last ones find no place
    slots, counts = torch.empty_like(ids.flatten(0, 1)), torch.empty(options.num_experts, dtype=torch.int32, device=device)
    reference.route(ids.flatten(0, 1), slots, counts)
    return ids, torch.where(slots.view(ids.shape) < config.max_rows, ids, -1)


@dataclass(frozen=True)
class Load:
    """What the busiest rank has to do: valid rows of its experts, its experts that have any, and bytes that it sends to other ranks."""

    rows: int
    experts: int
    dispatch_bytes: int
    combine_bytes: int


def busiest(config: DispatcherConfig, ids: Tensor, placed: Tensor, exchange: str | None) -> Load:
    """The load that `all_ids` makes, the largest of each figure over ranks. exchange: None where nothing is sent."""
    counts = torch.bincount(placed[placed >= 0].long(), minlength=config.num_experts).view(config.world_size, -1)
    rows, experts = int(counts.sum(1).max()), int((counts > 0).sum(1).max())
    value_bytes, out_bytes = config.hidden_size * config.dtype.itemsize, 2 * config.hidden_size
    groups = config.num_groups if config.quantized else 0
    if exchange is None:
        return Load(rows, experts, 0, 0)
    if exchange == "padded":
        # scales and a source for each row, used or not
        padded_rows = (config.world_size - 1) * config.num_local_experts * config.rows_per_source
        return Load(rows, experts, padded_rows * (value_bytes + 4 * (groups + 1)), padded_rows * out_bytes)
    ranks = torch.arange(config.world_size, device=ids.device)
    # a token travels to each rank that it reaches, placed or not
    reaches = (ids.unsqueeze(-1) // config.num_local_experts == ranks).any(2).sum(1)
    sent = (reaches.sum(1) - reaches.diagonal()).max()
    owners = torch.where(placed >= 0, placed // config.num_local_experts, -1)
    returned = ((owners >= 0) & (owners != ranks[:, None, None])).sum((1, 2)).max()
    return Load(rows, experts, int(sent) * message_bytes(config), int(returned) * out_bytes)


class Layer:
    """One layer with its inputs, and how to time its steps."""

    def __init__(self, options: argparse.Namespace, tokens: tuple[Tensor, Tensor, Tensor], rank: int, **changes: Any) -> None:
        """tokens: hidden states (T, H), ids and weights (T, K). changes: settings that differ from the options'."""
        device = tokens[0].device
        self.dispatcher = MoEQuantDispatcher(**dispatcher_settings(options) | changes, device=device)
        self.config = self.dispatcher.config
        local = self.config.num_local_experts
        pairs = [expert_weights(options, expert, device) for expert in range(rank * local, (rank + 1) * local)]
        w13, w2 = (torch.stack(weights) for weights in zip(*pairs, strict=True))
        self.experts = GroupedExperts.from_weights(w13, w2, quant=self.config.quant)
        self.tokens = tokens
        self.iters = options.iters
        single = self.config.world_size == 1 and self.config.transport != "collective"
        self.exchange = None if single else choose_exchange(self.config)
        self.in_graph = device.type == "cuda" and self.exchange != "packed"

    def __call__(self) -> Tensor:
        return self.dispatcher(*self.tokens, self.experts)

    def case(self, options: argparse.Namespace) -> dict[str, Any]:
        config = self.config
        case = {"T": options.num_tokens, "H": options.hidden, "I": options.intermediate, "E": config.num_experts, "K": config.top_k}
        case |= {"W": config.world_size, "quant": config.quant, "transport": "collective" if self.exchange else "local"}
        case |= {"exchange": self.exchange, "reduce": config.reduce, "routing": options.routing}
        # as it is rounded
        case |= {"capacity": config.max_rows if config.capacity is not None else None}
        return {key: value for key, value in case.items() if value is not None}

    def time(self, name: str, step: Callable[[], Any]) -> Timing:
        progress(f"timing {name}")
        device = self.dispatcher.device.type
        return Timing.of(slowest_rank(time_collectively(step, device=device, in_graph=self.in_graph, reps=self.iters)))

    def time_steps(self) -> dict[str, Timing]:
        """Every step alone, on what the step before it left, then the whole."""
        dispatcher, experts, hidden = self.dispatcher, self.experts, self.tokens[0]
        timings = {}
        if self.config.quantized:
            q = quantize_expert_batch(hidden[None], dtype=self.config.dtype)
            out: dict[str, Any] = {"values": q.values, "scales": q.scales}
            timings["quantize"] = self.time("quantize", lambda: quantize_expert_batch(hidden[None], dtype=q.values.dtype, **out))
        timings["dispatch"] = self.time("dispatch", lambda: dispatcher.dispatch(*self.tokens))
        batch, handle = dispatcher.dispatch(*self.tokens)
        gate_up = experts.gemm1(batch)
        inner = experts.activation(gate_up, batch)
        output = experts.gemm2(inner, batch)
        summed = torch.empty_like(hidden)
        timings["gemm1"] = self.time("GEMM 1", lambda: experts.gemm1(batch))
        timings["silu_mul_quantize"] = self.time("SwiGLU + quantize", lambda: experts.activation(gate_up, batch))
        if experts.fuses(batch):
            timings["gemm1_fused"] = self.time("GEMM 1 with SwiGLU + quantize", lambda: experts.gemm1_swiglu(batch))
        timings["gemm2"] = self.time("GEMM 2", lambda: experts.gemm2(inner, batch))
        timings["combine"] = self.time("combine", lambda: dispatcher.combine(output, handle, out=summed))
        timings["layer"] = self.time("the whole layer", self)
        return timings


def record_steps(
    bench: Bench, options: argparse.Namespace, layer: Layer, load: Load, timings: dict[str, Timing], wire_gbps: float
) -> None:
    """One record for each timing, with the bytes and operations of the busiest rank. wire_gbps: the ceiling between ranks."""
    config, case = layer.config, layer.case(options)
    tokens, hidden, size, width = options.num_tokens, options.hidden, options.intermediate, config.dtype.itemsize
    scales = (lambda columns: 4 * ceil_div(columns, 128)) if config.quantized else (lambda columns: 0)
    row = hidden * width + scales(hidden)
    # of each step: bytes of memory traffic, bytes sent, operations
    gemm1 = load.experts * 2 * size * hidden * width + load.rows * (row + 4 * size), 0, 4 * load.rows * size * hidden
    gemm2 = load.experts * size * hidden * width + load.rows * (size * width + scales(size) + 2 * hidden), 0, gemm1[2] // 2
    gemm1_fused = gemm1[0] + load.rows * (size * width + scales(size) - 4 * size), 0, gemm1[2]
    work = {
        "gemm1_fused": gemm1_fused,
        "quantize": (tokens * (2 * hidden + row), 0, 0),
        "dispatch": (tokens * 2 * hidden + load.rows * row, load.dispatch_bytes, 0),
        "gemm1": gemm1,
        "silu_mul_quantize": (load.rows * (4 * size + size * width + scales(size)), 0, 0),
        "gemm2": gemm2,
        "combine": (tokens * (config.top_k + 1) * 2 * hidden, load.combine_bytes, 0),
    }
    labels = {"quantize": "quantize alone", "gemm1": "GEMM 1", "gemm2": "GEMM 2", "silu_mul_quantize": "SwiGLU + quantize"}
    labels["gemm1_fused"] = "GEMM 1 with SwiGLU + quantize"
    mean_rows = max(1, round(load.rows / config.num_local_experts))
    for name, timing in timings.items():
        if name == "layer":
            # whatever else is done meanwhile, the products take that long
            floor = sum(bench.floor_us(nbytes, flops, config.dtype) for nbytes, _, flops in (gemm1, gemm2))
            sent, flops = load.dispatch_bytes + load.combine_bytes, gemm1[2] + gemm2[2]
            rates: dict[str, Any] = {"tflops": flops / timing.us / 1e6}
            label = "bf16 layer, for comparison" if options.quant != config.quant else "layer"
        else:
            nbytes, sent, flops = work[name]
            floor = max(bench.floor_us(nbytes, flops, config.dtype), sent / wire_gbps / 1e3)
            rates = {"gbps": (sent or nbytes) / timing.us / 1e3} | ({"tflops": flops / timing.us / 1e6} if flops else {})
            label = labels.get(name, name)
        own = {}
        if name in ("gemm1", "gemm2"):
            n, k_dim = (2 * size, hidden) if name == "gemm1" else (hidden, size)
            own = {"step": name, "N": n, "K_dim": k_dim, "rows": mean_rows}
        if sent:
            label += f", {sent / 1e6:.2f} MB to other ranks"
            rates["wire_bytes"] = sent
        op = "grouped_gemm" if own else name
        bench.record(op, case | own, timing, floor_us=floor, label=label, **rates)


def run(options: argparse.Namespace, rank: int, device: torch.device) -> int:
    """Builds, checks, times. Returns the exit code."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ids, weights, generator = make_routing(options, rank, device)
    hidden = torch.randn(options.num_tokens, options.hidden, generator=generator, device=device).bfloat16()
    wire_bytes, wire = time_wire(device) if world_size > 1 else (0, None)
    bench = None
    if rank == 0:
        bench = Bench.start(options.output_json, device=options.device, gpus=world_size)
        if wire is not None:
            case = {"W": world_size, "exchange": "all_to_all_single", "bytes": wire_bytes}
            bench.record("copy", case, wire, floor_us=None, gbps=wire_bytes / wire.us / 1e3)
        bench.matmul_tflops(QUANT_DTYPES[options.quant])
    wire_gbps = wire_bytes / wire.us / 1e3 if wire is not None else math.inf

    passed = True
    compared = [] if options.quant == "none" else [{"quant": "none"} | ({"exchange": "packed"} if world_size > 1 else {})]
    for changes in [{}, *compared]:
        progress(f"building and checking the {changes.get('quant', options.quant)} layer")
        layer = Layer(options, (hidden, ids, weights), rank, **changes)
        every_id, placed = all_ids(options, layer.config, device)
        check = worst_check(check_output(layer(), dense_layer(options, hidden, placed[rank], weights), layer.config.quant))
        passed &= check.passed
        absent = int((placed < 0).sum())
        if layer.dispatcher.check() != absent:
            raise RuntimeError(
                f"rank {rank}: dispatch dropped other rows than the {absent} that the routing and the capacity imply"
            )
        timings = {"layer": layer.time("the bf16 layer", layer)} if changes else layer.time_steps()
        if bench is not None:
            progress("")
            load = busiest(layer.config, every_id, placed, layer.exchange)
            note = model_shape(options.model).note if options.model else ""
            print(f"{options.model} ({note})\n" if note else "", end="")
            print(f"{case_text(layer.case(options))}; busiest rank {load.rows} rows, {absent} dropped\n{check}")
            record_steps(bench, options, layer, load, timings, wire_gbps)
    if not passed and rank == 0:
        print("the result is wrong, past its tolerance", file=sys.stderr)
    return 0 if passed else 1


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv, int(os.environ.get("WORLD_SIZE", "1")))
    with process_group(options.device) as (rank, device), torch.no_grad():
        return run(options, rank, device)


if __name__ == "__main__":
    sys.exit(main())
