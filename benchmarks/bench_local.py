"""One expert layer on one GPU, without an exchange: routing, dispatch, combine, and the whole: python benchmarks/bench_local.py

A case has the experts that one rank of 8 would hold, and as many tokens, so that an expert has as many rows as on 8 ranks with T tokens
each. Beside the whole layer stands the same in bfloat16 by torch's own grouped_mm; of both, the most memory that tensors took in a call
besides weights and inputs, the dispatcher's buffers among it. --batch-invariant times the whole layer with that setting too.

Letters: T tokens, K top-k, E experts, M rows of an expert's buffer, H hidden size, I intermediate size, G = ceil(H / 128).
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import WORST_TOKEN, Bench, OneLineParser, check_output, measure_graph, progress
from moequant import GroupedExperts, MoEQuantDispatcher, ops
from moequant.models import MODELS, ModelShape, model_shape
from moequant.testing import routing

# torch 2.10 has it under another name
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)
RANKS = 8
DEFAULT_MODELS = ("deepseek-v3", "v4-flash", "qwen3-235b", "gpt-oss-120b")
TOKENS = (1, 8, 32, 128, 512, 4096)
CPU_SHAPE = ModelShape(256, 128, 64, 4)
CPU_TOKENS = (1, 32)


def make_weights(shape: ModelShape, experts: int, device: str) -> tuple[Tensor, Tensor]:
    """w13 (E, 2I, H) and w2 (E, H, I), bfloat16, scaled so that outputs are about as large as inputs."""
    hidden, size = shape.hidden_size, shape.intermediate_size
    w13 = torch.randn(experts, 2 * size, hidden, dtype=torch.bfloat16, device=device).mul_(hidden**-0.5)
    w2 = torch.randn(experts, hidden, size, dtype=torch.bfloat16, device=device).mul_(size**-0.5)
    return w13, w2


def check(hidden: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, out: Tensor, quant: str) -> None:
    """Raises AssertionError unless out is near a dense bfloat16 computation, at the first, middle and last token."""
    picked = sorted({0, len(hidden) // 2, len(hidden) - 1})
    expected = torch.zeros(len(picked), hidden.shape[1], device=hidden.device)
    for row, token in enumerate(picked):
        for k, expert in enumerate(ids[token].tolist()):
            gate, up = (w13[expert] @ hidden[token]).float().chunk(2)
            expected[row] += weights[token, k] * (w2[expert] @ (torch.nn.functional.silu(gate) * up).bfloat16()).float()
    result = check_output(out[picked], expected, quant)
    # the norm of a few tokens scatters more than that of many
    if not result.worst_token <= WORST_TOKEN * result.tolerance:
        raise AssertionError(f"the layer's result is {result}")


def torch_layer(hidden: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """The layer by torch's own operations, in bfloat16: (T, H)."""
    experts, top_k = len(w13), ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    token = order // top_k
    ends = torch.nn.functional.one_hot(ids.flatten().long(), experts).sum(0).cumsum(0).int()
    gate, up = grouped_mm(hidden[token], w13.mT, offs=ends).chunk(2, dim=-1)
    rows = grouped_mm(torch.nn.functional.silu(gate) * up, w2.mT, offs=ends)
    weighted = rows * weights.flatten()[order, None]
    return torch.zeros_like(hidden).index_add_(0, token, weighted.to(hidden.dtype))


def most_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most memory that tensors take while a call lasts, besides what was there; None on a CPU."""
    if device == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def torch_beside(inputs: tuple[Tensor, Tensor, Tensor], given: tuple[Tensor, Tensor], device: str) -> dict[str, Any]:
    """What a layer's record says of torch's own, checked; nothing where torch has no grouped_mm."""
    if grouped_mm is None or device == "cpu":
        return {}
    check(*inputs, *given, torch_layer(*inputs, *given), "none")
    timing = measure_graph(lambda: torch_layer(*inputs, *given))
    taken = most_bytes(lambda: torch_layer(*inputs, *given), device)
    return {"peer": "torch grouped_mm, bfloat16", "peer_us": float(f"{timing.us:.5g}"), "peer_bytes": taken}


def run_shape(bench: Bench, shape: ModelShape, all_tokens: tuple[int, ...], quant: str, ways: list[dict[str, Any]]) -> None:
    """Times one model's layer for each number of tokens and each way: more of the dispatcher's settings."""
    experts, top_k, columns = max(shape.num_experts // RANKS, shape.top_k), shape.top_k, shape.hidden_size
    w13, w2 = make_weights(shape, experts, bench.device)
    layer = GroupedExperts.from_weights(w13, w2, quant=quant)
    for tokens in all_tokens:
        progress(f"H={columns} E={experts} with {tokens} tokens")
        generator = torch.Generator(bench.device).manual_seed(tokens)
        ids, weights = routing(tokens, top_k, experts, generator=generator)
        hidden = torch.randn(tokens, columns, dtype=torch.bfloat16, generator=generator, device=bench.device)
        beside = torch_beside((hidden, ids, weights), (w13, w2), bench.device)
        for way in ways:
            run_way(bench, shape, layer, (w13, w2), (hidden, ids, weights), {"quant": quant, **way}, beside)


def run_way(
    bench: Bench,
    shape: ModelShape,
    layer: GroupedExperts,
    given: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    beside: dict[str, Any],
) -> None:
    """Checks and times a layer in one way. given: w13 and w2, bfloat16. options: more of the dispatcher's settings.
    beside: what the record says of another layer."""
    (tokens, columns), experts, quant = inputs[0].shape, len(given[0]), options["quant"]
    settings: dict[str, Any] = {"num_experts": experts, "top_k": shape.top_k, "hidden_size": columns, "max_tokens_per_rank": tokens}
    settings |= {"transport": "local", "device": bench.device, **options}
    dispatchers: list[MoEQuantDispatcher] = []

    def first_call() -> None:
        dispatchers.append(MoEQuantDispatcher(**settings))
        check(*inputs, *given, dispatchers[0](*inputs, layer), quant)

    taken = most_bytes(first_call, bench.device)
    beside = beside if taken is None else {"bytes": taken, **beside}
    with dispatchers[0] as dispatcher:
        case = {"T": tokens, "H": columns, "I": shape.intermediate_size, "E": experts, "K": shape.top_k, "W": 1, "quant": quant}
        case |= {"transport": "local", "routing": "uniform"} | ({"layout": "ragged"} if dispatcher.config.ragged else {})
        case |= {"batch_invariant": True} if dispatcher.config.batch_invariant else {}
        run_steps(bench, case, dispatcher, layer, *inputs, beside)


def run_steps(
    bench: Bench,
    case: dict[str, int | str | bool],
    dispatcher: MoEQuantDispatcher,
    layer: GroupedExperts,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    beside: dict[str, Any],
) -> None:
    """Times and records routing, dispatch, combine and the whole layer; with batch_invariant=True, which the other steps don't know, the
    layer alone. beside: more of the layer's record."""
    config, (tokens, columns), size = dispatcher.config, hidden.shape, layer.intermediate_size
    width, rows = config.dtype.itemsize, ids.numel()
    row = columns * width + (4 * config.num_groups if config.quantized else 0)
    common = {key: value for key, value in case.items() if key != "I"}

    def record(
        op: str, own: dict[str, int | str | bool], step, nbytes: int, floor_us: float | None = None, flops: int = 0, **more
    ) -> None:
        timing = measure_graph(step, device=bench.device)
        rates: dict[str, Any] = {"tflops": flops / timing.us / 1e6} if flops else {"gbps": nbytes / timing.us / 1e3}
        bench.record(op, own, timing, floor_us=bench.floor_us(nbytes) if floor_us is None else floor_us, **rates, **more)

    if not config.batch_invariant:
        rows_in_expert, counts = torch.empty_like(ids), torch.empty(config.num_experts, dtype=torch.int32, device=ids.device)
        shape = {key: case[key] for key in ("T", "E", "K")}
        record("route", shape, lambda: ops.route(ids, rows_in_expert, counts, config.max_rows), 8 * rows + 4 * config.num_experts)
        record("dispatch", common, lambda: dispatcher.dispatch(hidden, ids, weights), tokens * columns * 2 + rows * row)
    batch, handle = dispatcher.dispatch(hidden, ids, weights)
    if not config.batch_invariant:
        output, summed = layer(batch), torch.empty_like(hidden)
        combined = (rows + tokens) * columns * 2
        record("combine", common, lambda: dispatcher.combine(output, handle, out=summed), combined)

    busy = int((batch.num_tokens > 0).sum())
    products = 6 * rows * size * columns
    # the weights of the experts that have rows are read, whatever else is
    floor = bench.floor_us(busy * 3 * size * columns * width, products, config.dtype)
    record("layer", case, lambda: dispatcher(hidden, ids, weights, layer), 0, floor, products, **beside)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=sorted(MODELS), default=DEFAULT_MODELS, metavar="NAME", help="from the table"
    )
    parser.add_argument("--num-tokens", nargs="+", type=int, metavar="T", help=f"tokens (default: {TOKENS})")
    parser.add_argument("--quant", choices=("fp8_e4m3fn", "int8", "none"), default="fp8_e4m3fn", help="(default: fp8_e4m3fn)")
    parser.add_argument(
        "--layouts", nargs="+", choices=("padded", "ragged"), default=("padded", "ragged"), help="of the rows (default: both)"
    )
    parser.add_argument("--batch-invariant", action="store_true", help="time the whole layer with batch_invariant=True as well")
    parser.add_argument("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    options = parser.parse_args()
    ways: list[dict[str, Any]] = [{"layout": layout} for layout in options.layouts]
    if options.batch_invariant:
        ways = [way | more for way in ways for more in ({}, {"batch_invariant": True})]
    torch.manual_seed(0)
    bench = Bench.start(options.output_json, device=options.device)
    with torch.no_grad():
        if bench.device == "cpu":
            run_shape(bench, CPU_SHAPE, CPU_TOKENS, options.quant, ways)
            return
        for name in options.models:
            run_shape(bench, model_shape(name), tuple(options.num_tokens or TOKENS), options.quant, ways)


if __name__ == "__main__":
    main()
