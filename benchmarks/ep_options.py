"""The options of launch/bench_ep.py. Letters as there."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import TOLERANCES, OneLineParser, free_memory
from benchmarks.traces import TraceError, check_matches, find_traces, load_trace, matching_trace
from moequant import MoEQuantDispatcher
from moequant.config import CHOICES, DispatcherConfig
from moequant.layer import check_overlap
from moequant.models import MODELS, model_shape
from moequant.testing import routing

# of this script's own: uniform on even ranks, no tokens on odd ones
EMPTY_RANKS = "empty-ranks"
SKEWS = ("zipf:1", "one-hot", "half", EMPTY_RANKS)
SIZES = ("num_tokens", "hidden", "intermediate", "num_experts", "num_topk")


def make_parser(description: str | None) -> OneLineParser:
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        choices=("trace", *sorted(MODELS)),
        metavar="NAME",
        help=f"take H, I, E and K of a model: {', '.join(MODELS)}; or trace: of a recorded one, on its activations (default without a "
        "GPU)",
    )
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
    add("--reduce", choices=CHOICES["reduce"], default="exact", help="how combine sums (default: exact)")
    add(
        "--overlap",
        choices=("on", "off"),
        default="on",
        help="with transport symmetric: the layer hides what it sends under the products, or does step after step (default: on)",
    )
    add(
        "--chunks",
        type=int,
        choices=(1, 2),
        default=1,
        help="parts of the layer's tokens with --overlap on (default: 1)",
    )
    add(
        "--first-experts",
        type=int,
        default=0,
        metavar="N",
        help="experts of each rank whose rows are sent first with --overlap on (default: 0, all at once)",
    )
    add("--quant", choices=tuple(TOLERANCES), default="fp8_e4m3fn", help="format of activations and weights (default: fp8_e4m3fn)")
    add(
        "--routing",
        metavar="KIND",
        help=f"uniform, zipf:A (popularity falls as rank**-A), one-hot, half (every second token names one expert), {EMPTY_RANKS} (odd "
        "ranks have no tokens), or trace[:FILE[@LAYER]], recorded routing (default: a trace of as many experts and top-k, or uniform)",
    )
    add("--skew", action="store_true", help=f"also time {', '.join(SKEWS)}")
    add("--peers", action="store_true", help="also time deep_ep and deep_gemm on the same inputs, where they are installed")
    add("--layout", choices=CHOICES["layout"], default="padded", help="of a rank's rows (default: padded)")
    add(
        "--batch-invariant",
        action="store_true",
        help="a token has the same bits in any batch (see the dispatcher's batch_invariant)",
    )
    add("--capacity", type=int, metavar="M", help="rows of an expert's buffer; rows past it are dropped (default: none can be)")
    add(
        "--rank-capacity",
        type=rows_or_factor,
        metavar="R",
        help="with --layout ragged: rows of a rank's buffer, or with a point in it a factor of the mean; rows past it are dropped "
        "(default: none can be)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: a GPU if there is one)")
    add("--output-json", type=Path, metavar="PATH", help="append the records to this file, one JSON object a line")
    add("--trace", type=Path, metavar="DIR", help="also write a Chrome trace of each rank there, with a range for each step")
    add("--seed", type=int, default=0, help="of weights, tokens and routing (default: 0)")
    add("--iters", type=int, default=20, help="repetitions of each timing (default: 20)")
    return parser


def rows_or_factor(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def parse_options(argv: list[str] | None, world_size: int, description: str | None = None) -> argparse.Namespace:
    """The options, with every default filled in, and `recorded`, the trace that is replayed, or None. Exits with code 2 if one is
    wrong."""
    parser = make_parser(description)
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and torch.cuda.device_count() <= int(os.environ.get("LOCAL_RANK", "0")):
        parser.error(f"--device cuda needs a GPU for each rank, found {torch.cuda.device_count()}; use --device cpu or fewer ranks")
    if options.transport in ("collective", "symmetric") and "RANK" not in os.environ:
        parser.error(f"--transport {options.transport} needs a process group; start the script with torchrun")
    for name in (*SIZES, "iters"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    options.recorded = None
    try:
        choose_shape(options, world_size)
        choose_routing(options)
        config = DispatcherConfig(world_size=world_size, **dispatcher_settings(options))
        check_overlap(options.chunks, options.first_experts, config, True, "GroupedExperts")
        if options.overlap == "off" or options.transport not in ("auto", "symmetric") or config.per_rank or world_size == 1:
            options.chunks, options.first_experts = 1, 0
    except ValueError as error:
        parser.error(str(error))
    needed, free = memory_needed(options, config), free_memory(options.device)
    if needed > free:
        parser.error(
            f"a rank needs about {needed / 2**30:.1f} GiB for weights and buffers, and {free / 2**30:.1f} GiB are free; use more ranks, "
            "or a smaller --num-tokens, --num-experts or --capacity, or --layout ragged"
        )
    return options


def choose_shape(options: argparse.Namespace, world_size: int) -> None:
    """Fills in the sizes that were not given. A recorded model's go together with its activations."""
    large = options.device == "cuda"
    plain = all(getattr(options, name) is None for name in ("model", "routing", *SIZES[1:]))
    if plain and not large and find_traces() and load_trace().num_experts % world_size == 0:
        options.model = "trace"
    defaults = {
        "num_tokens": 128 if large else 64,
        "hidden": 7168 if large else 512,
        "intermediate": 2048 if large else 256,
        "num_experts": min(32 * world_size, max(256, world_size)) if large else 8 * world_size,
        "num_topk": 8 if large else 4,
    }
    if options.model == "trace":
        name, _, spec = (options.routing or "trace").partition(":")
        if name != "trace":
            raise TraceError(f"--model trace replays its own routing, got --routing {options.routing}")
        options.recorded = trace = load_trace(spec)
        defaults |= {"hidden": trace.hidden_size, "intermediate": trace.intermediate_size}
        defaults |= {"num_experts": trace.num_experts, "num_topk": trace.top_k}
        if options.hidden not in (None, trace.hidden_size):
            raise TraceError(f"--model trace has activations of hidden size {trace.hidden_size}, got --hidden {options.hidden}")
    elif options.model is not None:
        shape = model_shape(options.model)
        share = shape.num_experts * min(world_size, 8) // 8
        fits = share >= shape.top_k and share % world_size == 0
        defaults |= {"hidden": shape.hidden_size, "intermediate": shape.intermediate_size}
        defaults |= {"num_experts": share if fits else shape.num_experts, "num_topk": shape.top_k}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def choose_routing(options: argparse.Namespace) -> None:
    """Settles on the routing, and loads the trace if it is one and `choose_shape` has not."""
    name, _, spec = (options.routing or "trace").partition(":")
    if name == "trace" and options.recorded is None:
        matching = None if spec else matching_trace(options.num_experts, options.num_topk)
        options.recorded = matching if options.routing is None else matching or load_trace(spec)
    if options.recorded is not None:
        check_matches(options.recorded, options.num_experts, options.num_topk)
        options.routing = f"trace:{options.recorded.name}"
        return
    kind = "uniform" if options.routing in (None, EMPTY_RANKS) else options.routing
    routing(0, options.num_topk, options.num_experts, kind)
    options.routing = options.routing or "uniform"


def dispatcher_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_experts": options.num_experts,
        "top_k": options.num_topk,
        "hidden_size": options.hidden,
        "max_tokens_per_rank": options.num_tokens,
        "quant": options.quant,
        "transport": options.transport,
        "exchange": options.exchange,
        "reduce": options.reduce,
        "layout": options.layout,
        "capacity": options.capacity,
        "rank_capacity": options.rank_capacity,
        "overlap": options.overlap == "on",
        "slots": 2 if options.chunks == 2 else 1,
        "batch_invariant": options.batch_invariant,
        "on_overflow": "error" if options.capacity is None and options.rank_capacity is None else "drop",
    }


def memory_needed(options: argparse.Namespace, config: DispatcherConfig) -> int:
    """Bytes of a rank, about: buffers, weights in bfloat16 and quantized, and what passes between the steps."""
    buffers = MoEQuantDispatcher.buffer_bytes(world_size=config.world_size, **dispatcher_settings(options))
    weights = config.num_local_experts * options.hidden * options.intermediate
    # bfloat16 and quantized, and float32 temporaries while w13 is quantized
    weight_bytes = weights * (3 * (2 + 1) + 24 * 2)
    rows = config.total_rows
    between = rows * (2 * 2 * options.intermediate + 2 * options.intermediate + 2 * options.hidden)
    # the bfloat16 layer, timed after it, has rows twice as wide
    return 2 * buffers + weight_bytes + between
