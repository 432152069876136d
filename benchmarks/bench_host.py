"""What a layer costs the host, call by call, without CUDA graphs: python benchmarks/bench_host.py, or, with `symmetric`, under torchrun

A time is that of a few calls that are only queued, over their number: the GPU's queue is empty before and does not fill up. Letters: T
tokens, K top-k, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_local import make_weights
from benchmarks.common import Bench, OneLineParser, Timing, measure_graph, process_group, slowest_rank
from benchmarks.peers import import_peer, masked_product
from moequant import ExpertBatch, GroupedExperts, MoEQuantDispatcher, QuantizedTensor, quantize_expert_batch
from moequant.kernels.library.launch import Launchable
from moequant.models import ModelShape
from moequant.testing import routing

# calls that are queued without a look at the GPU: their launches fit in its queue
QUEUED, ROUNDS = 20, 30


def host_samples(call: Callable[[], Any], device: str) -> list[float]:
    """us of host time a call."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    samples = []
    for _ in range(ROUNDS):
        wait()
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        for _ in range(QUEUED):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / QUEUED)
    wait()
    return samples


def calls_of(
    dispatcher: MoEQuantDispatcher, layer: GroupedExperts, hidden: Tensor, ids: Tensor, weights: Tensor
) -> dict[str, Callable[[], Any]]:
    """The layer and its parts, by op."""
    batch, _ = dispatcher.dispatch(hidden, ids, weights)
    calls: dict[str, Callable[[], Any]] = {
        "host_layer": lambda: dispatcher(hidden, ids, weights, layer),
        "host_dispatch": lambda: dispatcher.dispatch(hidden, ids, weights),
        "host_experts": lambda: layer(batch),
        "host_product": lambda: layer.gemm1(batch),
    }
    if batch.scales is not None:
        out: dict[str, Any] = {"values": torch.empty_like(batch.values), "scales": torch.empty_like(batch.scales)}
        x = torch.empty(*batch.values.shape, dtype=torch.bfloat16, device=hidden.device)
        calls["host_quantize"] = lambda: quantize_expert_batch(x, batch.num_tokens, dtype=batch.values.dtype, **out)
    if hidden.is_cuda:
        # the same kernels as Triton launches them
        calls |= {f"{op}_triton": triton_launch(calls[op]) for op in ("host_product", "host_quantize") if op in calls}
    return calls | torch_calls(layer, hidden, ids) | deep_gemm_calls(layer, batch)


def triton_launch(call: Callable[[], Any]) -> Callable[[], Any]:
    """Triton's own launch of the one kernel that a call launches, with the same arguments."""
    launches: list[tuple[Any, ...]] = []

    class Seen(Launchable):
        def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            launches.append((self.kernel, grid, arguments, named))
            return launch(self, grid, arguments, named)

    launch, Launchable.launch = Launchable.launch, Seen.launch  # type: ignore[method-assign]
    try:
        call()
    finally:
        Launchable.launch = launch  # type: ignore[method-assign]
    ((kernel, grid, arguments, named),) = launches
    return lambda: kernel[grid](*arguments, **named)


def torch_calls(layer: GroupedExperts, hidden: Tensor, ids: Tensor) -> dict[str, Callable[[], Any]]:
    """torch's own product of experts, of as many rows, for comparison: what one call of it costs the host."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None or not hidden.is_cuda:
        return {}
    experts, columns, depth = layer.w13.shape
    rows = hidden.new_zeros(ids.numel(), depth)
    weights = hidden.new_zeros(experts, depth, columns)
    ends = torch.linspace(0, ids.numel(), experts + 1, device=hidden.device)[1:].int()
    return {"host_torch_grouped_mm": lambda: grouped_mm(rows, weights, offs=ends)}


def deep_gemm_calls(layer: GroupedExperts, batch: ExpertBatch) -> dict[str, Callable[[], Any]]:
    """DeepGEMM's GEMM 1 of the same operands, where it is installed."""
    w13, deep_gemm = layer.w13, import_peer("deep_gemm", [])
    if deep_gemm is None or not isinstance(w13, QuantizedTensor) or w13.values.dtype != torch.float8_e4m3fn:
        return {}
    product, operands = masked_product(deep_gemm), ((batch.values, batch.scales), (w13.values, w13.scales))
    out, rows = torch.empty_like(layer.gemm1(batch)), batch.expected_rows
    return {"host_deep_gemm": lambda: product(*operands, out, batch.num_tokens, rows, disable_ue8m0_cast=True)}


def record_all(bench: Bench | None, options: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Times the layer and its parts on all ranks; rank 0, which has a bench, records the slowest's."""
    shape = ModelShape(options.hidden, options.intermediate, options.num_experts, options.num_topk)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    local = shape.num_experts // ranks
    torch.manual_seed(rank)
    layer = GroupedExperts.from_weights(*make_weights(shape, local, str(device)), quant=options.quant)
    for tokens in options.num_tokens:
        ids, weights = (x.to(device) for x in routing(tokens, shape.top_k, shape.num_experts))
        hidden = torch.randn(tokens, shape.hidden_size, device=device).bfloat16()
        settings: dict[str, Any] = {"num_experts": shape.num_experts, "top_k": shape.top_k, "hidden_size": shape.hidden_size}
        with MoEQuantDispatcher(**settings, max_tokens_per_rank=tokens, quant=options.quant, device=device) as dispatcher:
            case = {"T": tokens, "H": shape.hidden_size, "I": shape.intermediate_size, "E": shape.num_experts, "K": shape.top_k}
            case |= {"W": ranks, "quant": options.quant, "transport": dispatcher.config.transport}
            calls = calls_of(dispatcher, layer, hidden, ids, weights)
            timings = {op: Timing.of(slowest_rank(host_samples(call, device.type))) for op, call in calls.items()}
            # what the GPU takes for it
            timings["layer"] = measure_graph(calls["host_layer"], device=device.type)
            for op, timing in timings.items():
                if bench is not None:
                    bench.record(op, case | ({"routing": "uniform"} if op == "layer" else {}), timing, floor_us=None)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num-tokens", type=int, nargs="+", default=(1, 64, 512), metavar="T", help="tokens of each rank (default: 1 64 512)")
    add("--hidden", type=int, default=2048, metavar="H", help="hidden size (default: 2048)")
    add("--intermediate", type=int, default=768, metavar="I", help="intermediate size of an expert (default: 768)")
    add("--num-experts", type=int, default=32, metavar="E", help="experts in all (default: 32)")
    add("--num-topk", type=int, default=8, metavar="K", help="experts of a token (default: 8)")
    add("--quant", choices=("fp8_e4m3fn", "int8", "none"), default="fp8_e4m3fn", help="(default: fp8_e4m3fn)")
    add("--output-json", type=Path, help="append records here instead of benchmarks/results/<machine>.jsonl")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    options = parser.parse_args()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    with torch.no_grad(), process_group(kind) as (rank, device):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        bench = Bench.start(options.output_json, device=kind, gpus=ranks) if rank == 0 else None
        record_all(bench, options, rank, device)


if __name__ == "__main__":
    main()
