# pyright: reportMissingImports=false
"""Times moequant in vLLM's modular MoE kernel beside vLLM's own Triton experts, in the same run, with the same fp8 weights:

    PYTHONPATH=<vLLM's Python files> python benchmarks/bench_vllm.py
    PYTHONPATH=<vLLM's Python files> torchrun --nproc-per-node 2 benchmarks/bench_vllm.py --models qwen3-30b

On one device vLLM quantizes, multiplies and sums up; on several it gathers all ranks' tokens, multiplies by its experts, and scatters the
sums, which is its default, --all2all-backend allgather_reducescatter. Called by Python (eager), and replayed from a CUDA graph. Both
results are compared with a dense float32 computation before they are timed. Calls take several routings in turn, so that weights come
from memory, as in a model of many layers.

vLLM 0.33 is needed as Python files alone: tests/integrations/engines.py fetches them. What its experts call of its compiled parts is
replaced (benchmarks/vllm_ops.py), and said.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import vllm_ops
from benchmarks.common import (
    Bench,
    Check,
    OneLineParser,
    Timing,
    check_output,
    process_group,
    progress,
    slowest_rank,
    time_collectively,
)
from moequant.models import MODELS as SHAPES, ModelShape

if TYPE_CHECKING:
    from benchmarks.vllm_layers import Layer

# DeepSeek-V3's with 32 experts a rank, as on eight ranks
MODELS = {"qwen3-30b": SHAPES["qwen3-30b"], "deepseek-v3": SHAPES["deepseek-v3"]}
EXPERTS_OF_A_RANK = {"deepseek-v3": 32}
SMALL = ModelShape(hidden_size=256, intermediate_size=128, num_experts=8, top_k=2)
TOKENS, SMALL_TOKENS = (1, 8, 32, 128, 1024), (1, 6)
MODES = ("eager", "graph")
# tokens that are computed densely
CHECKED = 16


def checked(layer: Layer, name: str, tokens: int) -> tuple[Callable[[], Any], Check]:
    """The call that is timed, and how right it is. Raises AssertionError for moequant's if it is wrong."""
    inputs = layer.inputs(tokens)
    picked = sorted({round(i * (tokens - 1) / max(1, CHECKED - 1)) for i in range(min(CHECKED, tokens))})
    # vLLM's kernels may write to what they are given
    out = layer.call(name, (inputs[0].clone(), *inputs[1:]))
    result = check_output(out[picked], layer.expected(*(x[picked] for x in inputs)), "fp8_e4m3fn")
    if name == "moequant" and not result.passed:
        raise AssertionError(f"{name}: T={tokens}: {result}")
    draws = itertools.cycle([layer.inputs(tokens, draw) for draw in range(layer.draws)])
    return lambda: layer.call(name, next(draws)), result


def time_case(layer: Layer, name: str, tokens: int, options: argparse.Namespace) -> dict[str, tuple[Timing, Check]]:
    """Of the slowest rank, by mode. Collective."""
    from benchmarks.vllm_layers import step_of

    with step_of(layer, tokens):
        call, result = checked(layer, name, tokens)
        found = {}
        for mode in MODES:
            in_graph = mode == "graph"
            if in_graph and layer.device.type == "cpu":
                continue
            samples = time_collectively(call, device=layer.device.type, in_graph=in_graph, reps=options.reps)
            found[mode] = Timing.of(slowest_rank(samples)), result
        return found


def run_model(bench: Bench | None, name: str, options: argparse.Namespace, device: torch.device) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    shape, sizes = MODELS[name], options.num_tokens or TOKENS
    if name in EXPERTS_OF_A_RANK:
        shape = ModelShape(shape.hidden_size, shape.intermediate_size, EXPERTS_OF_A_RANK[name] * world, shape.top_k)
    if device.type == "cpu":
        shape, sizes = SMALL, options.num_tokens or SMALL_TOKENS
    from benchmarks.vllm_layers import Layer

    progress(f"{name}: weights")
    layer = Layer(shape, max(sizes), device)
    for tokens in sizes:
        times: dict[str, dict[str, tuple[Timing, Check]]] = {}
        for kernel in layer.kernels:
            progress(f"{name}: T={tokens}, {kernel}")
            times[kernel] = time_case(layer, kernel, tokens, options)
        if bench is not None:
            record(bench, name, layer, tokens, times)
    layer.close()
    progress("")


def record(bench: Bench, name: str, layer: Layer, tokens: int, times: dict[str, dict[str, tuple[Timing, Check]]]) -> None:
    """moequant's times with vLLM's beside them, and the errors of both."""
    shape = layer.shape
    sizes = {"H": shape.hidden_size, "I": shape.intermediate_size, "E": shape.num_experts, "K": shape.top_k, "W": layer.world}
    own, peer_name = layer.kernels
    for mode, (timing, result) in times[own].items():
        peer, other = times[peer_name][mode]
        us = float(f"{peer.us:.5g}")
        errors = {"relative_error": float(f"{result.relative:.3g}"), "peer_relative_error": float(f"{other.relative:.3g}")}
        if not other.passed:
            print(f"{peer_name}, T={tokens}: {other}", file=sys.stderr)
        bench.record(
            "vllm_layer",
            {"T": tokens, **sizes, "model": name, "mode": mode},
            timing,
            floor_us=layer.floor_us(bench, tokens),
            label=f"{name} W={layer.world} T={tokens} {mode}, errors {result.relative:.3f} and {other.relative:.3f}",
            **{"peers": {peer_name: us}, "peer": peer_name, "peer_us": us, **errors},
        )


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"(default: {' '.join(MODELS)})")
    add("--num-tokens", nargs="+", type=int, metavar="T", help=f"of each rank (default: {TOKENS})")
    add("--reps", type=int, default=20, help="samples of a time (default: 20)")
    add("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    # vLLM can't be imported before
    vllm_ops.install()
    from benchmarks.vllm_layers import engine

    with process_group(device) as (rank, place), torch.inference_mode(), engine(place):
        gpus = int(os.environ.get("WORLD_SIZE", "1"))
        bench = Bench.start(options.output_json, device=device, gpus=gpus) if rank == 0 else None
        if bench is not None:
            print(f"{vllm_ops.REPLACED}; collectives are torch.distributed's", flush=True)
        for name in options.models:
            run_model(bench, name, options, place)


if __name__ == "__main__":
    main()
