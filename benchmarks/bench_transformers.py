# pyright: reportMissingImports=false
"""Times models of transformers with their experts on moequant beside transformers' own implementations, in the same run:

    python benchmarks/bench_transformers.py
    python benchmarks/bench_transformers.py --models gpt-oss-20b --parts layer --seconds 60
    torchrun --nproc-per-node 2 benchmarks/bench_transformers.py

On one device: the experts of a layer (the mean over the model's layers, so that their weights don't stay in a cache), and whole
forwards: prefill of T tokens of one sequence, decode of one token of T sequences with a static cache; called by Python (eager), and
replayed from a CUDA graph. Under torchrun: the experts of a layer that are split over the ranks, beside `all_reduce` (all ranks hold one
batch of T tokens) and `all_to_all` (each has T tokens of its own).

Weights are random. Each result is compared with products of single tokens before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moequant.integrations.transformers  # noqa: F401
from benchmarks.common import WORST_TOKEN, Bench, OneLineParser, Timing, captured, check_output, gpu_samples, host_samples, progress
from benchmarks.transformers_models import MODELS, SMALL, VOCABULARY, Model, expected_rows, experts_of
from moequant.config import CHOICES, QUANT_DTYPES
from moequant.integrations.transformers.contract import contract_of
from moequant.integrations.transformers.weights import quantize_in_place
from moequant.models import ModelShape
from moequant.testing import routing

PEERS = ("grouped_mm", "batched_mm")
TOKENS, SMALL_TOKENS = (1, 16, 64, 4096), (1, 3, 24)
# more are a prefill, and not the decoding of so many sequences
DECODED = 64
CONTEXT, ROOM = 512, 1024
MODES = ("eager", "graph")
# for a sample, us; and the most calls in one
SAMPLE, MOST = 2e4, 10
# batched_mm copies the weights of each pair of token and expert
COPIED_BYTES = 16 << 30
# by part, T, mode and way
Times = dict[tuple[str, int, str], dict[str, Timing]]


class Clock:
    """How long this process may begin new cases."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        allowed = time.monotonic() < self.end
        if not allowed:
            self.left_out.append(what)
        return allowed


def samples_of(call: Callable[[], Any], device: str, reps: int) -> list[float]:
    """us of a call among several in a row, host and device together."""
    call()
    if device == "cpu":
        return host_samples(call, 3)
    first = gpu_samples(call, 1, flush_l2=False)[0]
    inner = max(1, min(MOST, int(SAMPLE / first)))

    def several() -> None:
        for _ in range(inner):
            call()

    return [us / inner for us in gpu_samples(several, reps, flush_l2=False)]


def time_mode(call: Callable[[], Any], mode: str, device: str, reps: int = 7) -> Timing | None:
    """None for a graph that can't be captured, or on a CPU."""
    if mode == "eager":
        return Timing.of(samples_of(call, device, reps))
    if device == "cpu":
        return None
    try:
        call()
        graph = captured(call)
    except RuntimeError as error:
        progress(f"not captured: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None
    timing = Timing.of(samples_of(graph.replay, device, reps))
    graph.reset()
    return timing


def layer_inputs(shape: ModelShape, tokens: int, device: str, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (T, H) bfloat16, ids (T, K) int64 and weights (T, K) bfloat16, the same for a seed, by default T."""
    generator = torch.Generator(device).manual_seed(tokens if seed is None else seed)
    ids, weights = routing(tokens, shape.top_k, shape.num_experts, generator=generator)
    hidden = torch.randn(tokens, shape.hidden_size, dtype=torch.bfloat16, generator=generator, device=device)
    return hidden, ids.long(), weights.bfloat16()


def check(out: Tensor, expected: Tensor, picked: list[int], quant: str) -> None:
    """Raises AssertionError unless the picked tokens' results are near the expected ones."""
    result = check_output(out[picked], expected, quant)
    # the norm of a few tokens scatters more than that of many
    if not result.worst_token <= WORST_TOKEN * result.tolerance:
        raise AssertionError(f"the experts' result is {result}")


class Steps:
    """What is timed of a model: by part and T a call, which computes with whatever implementation the model has."""

    def __init__(self, kind: Model, model: Any, device: str) -> None:
        self.kind, self.model, self.device = kind, model, device
        self.experts = experts_of(model)
        self.expected: dict[int, Tensor] = {}

    def layer(self, tokens: int, quant: str) -> Callable[[], Any]:
        """The experts of all layers, one after the other, checked at some tokens of the first."""
        inputs = layer_inputs(self.kind.shape, tokens, self.device)
        picked = sorted({0, tokens // 2, tokens - 1})
        if tokens not in self.expected:
            self.expected[tokens] = expected_rows(self.experts[0], *(x[picked] for x in inputs))
        check(self.experts[0](*inputs), self.expected[tokens], picked, quant)

        def call() -> None:
            for module in self.experts:
                module(*inputs)

        return call

    def forward(self, tokens: int) -> Callable[[], Any]:
        """A forward of the whole model: a prefill, or a step of decoding."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        length = tokens if tokens > self.decoded else 1
        ids = torch.randint(VOCABULARY, (tokens // length, length), generator=generator, device=self.device)
        if length > 1:
            return lambda: self.model(ids, use_cache=False, logits_to_keep=1)
        cache: Any = StaticCache(config=self.model.config, max_cache_len=ROOM)
        mask = torch.zeros(tokens, 1, 1, ROOM, dtype=torch.bfloat16, device=self.device)
        mask[..., CONTEXT + 1 :] = torch.finfo(torch.bfloat16).min
        position = torch.full((tokens, 1), CONTEXT, device=self.device)

        def call() -> None:
            self.model(ids, past_key_values=cache, attention_mask=mask, position_ids=position)
            for layer in cache.layers:
                layer.cumulative_length.fill_(CONTEXT)

        call()
        return call

    @property
    def decoded(self) -> int:
        return DECODED if self.device == "cuda" else SMALL_TOKENS[1]


def run_model(bench: Bench, name: str, kind: Model, options: argparse.Namespace, clock: Clock) -> None:
    """Times one model, all ways, and records what came of it."""
    progress(f"{name}: building")
    steps = Steps(kind, kind.build(bench.device), bench.device)
    ways = [(peer, "none") for peer in options.peers] + [("moequant", quant) for quant in options.quants]
    times: Times = {}
    for implementation, quant in ways:
        if quant != "none":
            for module in steps.experts:
                quantize_in_place(module, contract_of(module), QUANT_DTYPES[quant])
        steps.model.set_experts_implementation(implementation)
        way = quant if implementation == "moequant" else implementation
        for part in options.parts:
            for tokens in options.num_tokens or (TOKENS if bench.device == "cuda" else SMALL_TOKENS):
                what = f"{name}: {part}, T={tokens}, {way}"
                copied = tokens * kind.shape.top_k * 6 * kind.shape.hidden_size * kind.shape.intermediate_size
                if (implementation == "batched_mm" and copied > COPIED_BYTES) or not clock.allows(what):
                    continue
                progress(what)
                call = steps.layer(tokens, quant) if part == "layer" else steps.forward(tokens)
                for mode in MODES:
                    timing = time_mode(call, mode, bench.device)
                    if timing is not None:
                        times.setdefault((part, tokens, mode), {})[way] = timing
    progress("")
    record(bench, name, kind, times)


def record(bench: Bench, name: str, kind: Model, times: Times) -> None:
    """Records moequant's times with the peers' beside them. Of a layer: the mean of the model's."""
    shape = kind.shape
    size = {"H": shape.hidden_size, "I": shape.intermediate_size, "E": shape.num_experts, "K": shape.top_k}
    for (part, tokens, mode), by_way in times.items():
        share = kind.layers if part == "layer" else 1
        own = {way: timing for way, timing in by_way.items() if way in QUANT_DTYPES}
        peers = {way: timing.us / share for way, timing in by_way.items() if way not in own}
        for quant, timing in own.items():
            mean = Timing(timing.us / share, timing.us_p20 / share, timing.us_p80 / share)
            case = {"T": tokens, **size, "model": name, "layers": kind.layers, "quant": quant, "mode": mode}
            floor = layer_floor(bench, kind.shape, tokens, quant) if part == "layer" else None
            extra: dict[str, Any] = {"peers": {peer: float(f"{us:.5g}") for peer, us in peers.items()}} if peers else {}
            if peers:
                fastest = min(peers, key=lambda peer: peers[peer])
                extra |= {"peer": fastest, "peer_us": float(f"{peers[fastest]:.5g}")}
            bench.record(
                f"transformers_{part}", case, mean, floor_us=floor, label=f"{name} {part} T={tokens} {quant} {mode}", **extra
            )


def layer_floor(bench: Bench, shape: ModelShape, tokens: int, quant: str) -> float:
    """us of the products of a layer: of the weights of the experts that have rows, or of the operations."""
    _, ids, _ = layer_inputs(shape, tokens, bench.device)
    weights, dtype = 3 * shape.hidden_size * shape.intermediate_size, QUANT_DTYPES[quant]
    return bench.floor_us(len(ids.unique()) * weights * dtype.itemsize, 2 * ids.numel() * weights, dtype)


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"(default: {' '.join(MODELS)})")
    add("--parts", nargs="+", choices=("layer", "model"), default=("layer", "model"), help="(default: layer model)")
    add("--num-tokens", nargs="+", type=int, metavar="T", help=f"more than {DECODED} are a prefill (default: {TOKENS})")
    add("--quants", nargs="+", choices=("none", "fp8_e4m3fn", "int8"), default=("none", "fp8_e4m3fn"), help="none comes first")
    add(
        "--peers", nargs="*", default=PEERS, metavar="NAME", help="implementations of transformers (default: grouped_mm batched_mm)"
    )
    add("--transport", choices=CHOICES["transport"], default="auto", help="of moequant between ranks (default: auto)")
    add("--seconds", type=float, default=95, help="after so many no new case begins (default: 95)")
    add("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    return parser


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """Gives memory back behind what is done in it."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    # quantizing weights leaves none in bfloat16
    options.quants = sorted(options.quants, key=lambda quant: quant != "none")[:2]
    clock = Clock(options.seconds)
    if "RANK" in os.environ:
        # which takes some of this
        from benchmarks.transformers_ranks import run_ranks

        run_ranks(options, clock)
        return
    bench = Bench.start(options.output_json, device=options.device)
    for name in options.models:
        with torch.no_grad(), freed():
            run_model(bench, name, (MODELS if bench.device == "cuda" else SMALL)[name], options, clock)
    if clock.left_out:
        print(f"left out after {options.seconds:g} s: {'; '.join(clock.left_out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
