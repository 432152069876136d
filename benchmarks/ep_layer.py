"""The layer that launch/bench_ep.py checks and times: its tokens, its weights, a dense computation of it, and what it has to do.

Letters as in launch/bench_ep.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import Bench, progress
from benchmarks.ep_options import EMPTY_RANKS, dispatcher_settings
from benchmarks.timing import Modes, Way, time_modes, time_turn_about
from moequant import GroupedExperts, MoEQuantDispatcher, quantize_expert_batch, reference
from moequant.batch import ceil_div
from moequant.config import PLAIN_DTYPES, DispatcherConfig
from moequant.reference.routing import ragged_rows
from moequant.testing import routing
from moequant.transport.base import Stage
from moequant.transport.collective import CollectiveTransport, choose_exchange
from moequant.transport.packed import message_bytes

# in the order of the table
STEPS = (
    "quantize",
    "dispatch",
    "gemm1",
    "silu_mul_quantize",
    "gemm1_fused",
    "gemm2",
    "gemm2_push",
    "combine",
    "combine_push",
    "layer",
)
# of these, what involves other ranks
EXCHANGE = ("gemm2_push", "combine", "combine_push", "dispatch", "layer")
LABELS = {
    "quantize": "quantize alone",
    "gemm1": "GEMM 1",
    "silu_mul_quantize": "SwiGLU + quantize",
    "gemm1_fused": "GEMM 1 with SwiGLU + quantize",
    "gemm2": "GEMM 2",
    "gemm2_push": "GEMM 2 that sends its rows back",
    "combine_push": "combine of these",
}


class Tokens(NamedTuple):
    """A rank's hidden states (T, H) bfloat16, ids and weights (T, K)."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor


def make_tokens(options: argparse.Namespace, kind: str, rank: int, device: torch.device) -> Tokens:
    """A rank's tokens by a kind of routing. The same on whichever rank it is called; T is 0 on the odd ones of `empty-ranks`."""
    tokens, trace = options.num_tokens, options.recorded if kind.startswith("trace:") else None
    generator = torch.Generator(device).manual_seed((options.seed << 20) + (1 << 19) + rank)
    if trace is not None:
        ids, weights = (tensor.to(device) for tensor in trace.routing(rank * tokens, tokens))
    else:
        tokens = 0 if kind == EMPTY_RANKS and rank % 2 else tokens
        kind = "uniform" if kind == EMPTY_RANKS else kind
        ids, weights = routing(tokens, options.num_topk, options.num_experts, kind, generator)
    if trace is not None and options.model == "trace":
        return Tokens(trace.hidden_states(rank * tokens, tokens).to(device), ids, weights)
    hidden = torch.randn(tokens, options.hidden, generator=generator, device=device).bfloat16()
    return Tokens(hidden, ids, weights)


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


def all_ids(options: argparse.Namespace, kind: str, config: DispatcherConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(W, T, K) twice: every rank's ids, -1 where a rank has fewer tokens, and the same with -1 where the buffer has no room for the
    row."""
    each = [make_tokens(options, kind, rank, device).ids for rank in range(config.world_size)]
    ids = torch.stack([F.pad(x, (0, 0, 0, options.num_tokens - len(x)), value=-1) for x in each])
    if config.on_overflow == "error":
        return ids, ids
    # each half of a layer's tokens has the buffers for itself
    parts = ids.tensor_split((ceil_div(ids.shape[1], 2),), 1) if options.chunks == 2 else (ids,)
    return ids, torch.cat([without_overflow(part, config) for part in parts], 1)


def without_overflow(ids: Tensor, config: DispatcherConfig) -> Tensor:
    """Rows are ordered by (source rank, token, k), and the last ones find no place: -1."""
    flat = ids.flatten(0, 1)
    rows_in_expert, counts = torch.empty_like(flat), torch.empty(config.num_experts, dtype=torch.int32, device=ids.device)
    reference.route(flat, rows_in_expert, counts)
    if config.ragged:
        starts, _ = ragged_rows(counts.view(config.world_size, -1), config.total_rows)
        rows_in_expert += starts.flatten()[flat.clamp_min(0)]
    return torch.where(rows_in_expert.view(ids.shape) < config.max_rows, ids, -1)


@dataclass(frozen=True)
class Load:
    """What the busiest rank has to do: its tokens, valid rows of its experts, its experts that have any, and bytes that it sends to
    other ranks."""

    tokens: int
    rows: int
    experts: int
    dispatch_bytes: int
    combine_bytes: int


def busiest(config: DispatcherConfig, ids: Tensor, placed: Tensor, exchange: str | None) -> Load:
    """The load that `all_ids` makes, the largest of each figure over ranks. exchange: of the collective transport."""
    counts = torch.bincount(placed[placed >= 0].long(), minlength=config.num_experts).view(config.world_size, -1)
    rows, experts = int(counts.sum(1).max()), int((counts > 0).sum(1).max())
    value_bytes, out_bytes = config.hidden_size * config.dtype.itemsize, 2 * config.hidden_size
    groups, others = config.num_groups if config.quantized else 0, config.world_size - 1
    own = ids.shape[1], rows, experts
    if config.transport == "local":
        return Load(*own, 0, 0)
    if exchange == "padded":
        # scales and a source for each row, used or not
        padded_rows = others * config.num_local_experts * config.rows_per_source
        returned = others * config.max_tokens_per_rank if config.per_rank else padded_rows
        return Load(*own, padded_rows * (value_bytes + 4 * (groups + 1)), returned * out_bytes)
    ranks = torch.arange(config.world_size, device=ids.device)
    # a token travels to each rank that it reaches, placed or not: tokens by (source, target)
    reaches = (ids.unsqueeze(-1) // config.num_local_experts == ranks).any(2).sum(1)
    travels = reaches - reaches.diag().diag()
    token_bytes = message_bytes(config) if exchange == "packed" else value_bytes + 4 * groups
    sent = int(travels.sum(1).max()) * token_bytes
    if config.per_rank:
        return Load(*own, sent, int(travels.sum(0).max()) * out_bytes)
    owners = torch.where(placed >= 0, placed // config.num_local_experts, -1)
    returned = ((owners >= 0) & (owners != ranks[:, None, None])).sum((1, 2)).max()
    return Load(*own, sent, int(returned) * out_bytes)


class Layer:
    """One layer with its inputs, and how to time its steps. `tokens` may be exchanged for others."""

    def __init__(self, options: argparse.Namespace, tokens: Tokens, rank: int, **changes: Any) -> None:
        """changes: settings that differ from the options'."""
        device = tokens.hidden.device
        self.dispatcher = MoEQuantDispatcher(**dispatcher_settings(options) | changes, device=device)
        self.config = config = self.dispatcher.config
        self.rank = rank
        local = config.num_local_experts
        pairs = [expert_weights(options, expert, device) for expert in range(rank * local, (rank + 1) * local)]
        dtype = PLAIN_DTYPES.get(config.quant, torch.bfloat16)
        w13, w2 = (torch.stack(weights).to(dtype) for weights in zip(*pairs, strict=True))
        self.experts = GroupedExperts.from_weights(w13, w2, quant=config.quant)
        self.tokens = tokens
        self.iters = options.iters
        self.overlap = {"chunks": options.chunks, "first_experts": options.first_experts} if config.pushes else {}
        self.exchange = choose_exchange(config) if isinstance(self.dispatcher._transport, CollectiveTransport) else None
        self.in_graph = device.type == "cuda" and self.exchange != "packed"

    def __call__(self) -> Tensor:
        return self.dispatcher(*self.tokens, self.experts, **self.overlap)

    def case(self, options: argparse.Namespace, kind: str) -> dict[str, Any]:
        config = self.config
        case = {"T": options.num_tokens, "H": options.hidden, "I": options.intermediate, "E": config.num_experts, "K": config.top_k}
        case |= {"W": config.world_size, "quant": config.quant, "transport": config.transport}
        case |= {"exchange": self.exchange, "reduce": config.reduce, "routing": kind}
        if config.transport == "symmetric":
            way = "in halves" if options.chunks == 2 else "in waves" if options.first_experts else "rows pushed"
            case |= {"overlap": way if config.pushes else "steps apart"}
        # as it is rounded
        case |= {"capacity": config.max_rows if config.capacity is not None else None}
        case |= {"layout": "ragged", "rank_capacity": options.rank_capacity} if config.ragged else {}
        case |= {"batch_invariant": True} if config.batch_invariant else {}
        return {key: value for key, value in case.items() if value is not None}

    def time(self, name: str, step: Callable[[], Any]) -> Modes:
        progress(f"timing {LABELS.get(name, name)}")
        return time_modes(Way(step, self.in_graph), device=self.dispatcher.device.type, reps=self.iters)

    def time_beside(self, name: str, step: Callable[[], Any], peers: dict[str, Way]) -> tuple[Modes, dict[str, Modes]]:
        """A step and other libraries' ways to do it, turn about."""
        progress(f"timing {LABELS.get(name, name)} and {', '.join(peers)}")
        ways = {"": Way(step, self.in_graph), **peers}
        timings = time_turn_about(ways, device=self.dispatcher.device.type, reps=self.iters)
        return timings.pop(""), timings

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Every step alone, on what the step before it left, and the whole. Dispatch comes after combine, whose handle it makes stale."""
        config, dispatcher, experts, hidden = self.config, self.dispatcher, self.experts, self.tokens.hidden
        steps: dict[str, Callable[[], Any]] = {}
        if config.quantized:
            q = quantize_expert_batch(hidden[None], dtype=self.config.dtype)
            out: dict[str, Any] = {"values": q.values, "scales": q.scales}
            steps["quantize"] = lambda: quantize_expert_batch(hidden[None], dtype=q.values.dtype, **out)
        batch, handle = dispatcher.dispatch(*self.tokens)
        gate_up = experts.gemm1(batch)
        inner = experts.activation(gate_up, batch)
        output = experts.gemm2(inner, batch, out=dispatcher.output_buffer() if config.transport == "symmetric" else None)
        summed, slot = torch.empty_like(hidden), dispatcher._slots[0]

        def combine() -> None:
            # the same output again and again: no round of flags has to keep another one away
            slot.stage = Stage.LANDED
            dispatcher.combine(output, handle, out=summed)

        steps["gemm1"] = lambda: experts.gemm1(batch)
        steps["silu_mul_quantize"] = lambda: experts.activation(gate_up, batch)
        if experts.fuses(batch):
            steps["gemm1_fused"] = lambda: experts.gemm1_swiglu(batch)
        steps["gemm2"] = lambda: experts.gemm2(inner, batch)
        steps["combine"] = combine
        if config.pushes:
            destinations = slot.buffers.destinations

            def combine_pushed() -> None:
                slot.stage, slot.pushing = Stage.LANDED, torch.bfloat16
                dispatcher.combine_pushed(handle, out=summed)

            steps["gemm2_push"] = lambda: experts.gemm2_push(inner, batch, destinations)
            steps["combine_push"] = combine_pushed
        steps["dispatch"] = lambda: dispatcher.dispatch(*self.tokens)
        steps["layer"] = self
        return steps

    def write_trace(self, folder: Path, rounds: int = 3) -> Path:
        """Runs the layer step by step, then as a whole, under torch's profiler, and writes a Chrome trace with a range for each.
        Collective."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.dispatcher.device.type == "cuda")
        buffer = self.dispatcher.output_buffer() if self.config.transport == "symmetric" else None
        with profile(activities=activities) as profiler:
            for _ in range(rounds):
                with record_function("dispatch"):
                    batch, handle = self.dispatcher.dispatch(*self.tokens)
                if self.experts.fuses(batch):
                    with record_function(LABELS["gemm1_fused"]):
                        inner = self.experts.gemm1_swiglu(batch)
                else:
                    with record_function(LABELS["gemm1"]):
                        gate_up = self.experts.gemm1(batch)
                    with record_function(LABELS["silu_mul_quantize"]):
                        inner = self.experts.activation(gate_up, batch)
                with record_function(LABELS["gemm2"]):
                    output = self.experts.gemm2(inner, batch, out=buffer)
                with record_function("combine"):
                    self.dispatcher.combine(output, handle)
            for _ in range(rounds):
                with record_function("layer"):
                    self()
            if self.dispatcher.device.type == "cuda":
                torch.cuda.synchronize()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"layer-{self.config.quant}-rank{self.rank}.json"
        profiler.export_chrome_trace(str(path))
        return path


def record_steps(
    bench: Bench,
    options: argparse.Namespace,
    layer: Layer,
    kind: str,
    load: Load,
    timings: dict[str, Modes],
    wire_gbps: float,
    peers: dict[str, dict[str, Modes]],
) -> None:
    """One record for each timing, with the bytes and operations of the busiest rank. wire_gbps: the ceiling between ranks. peers: of
    each step, other libraries' timings that were made turn about with it."""
    config, case = layer.config, layer.case(options, kind)
    hidden, size, width = options.hidden, options.intermediate, config.dtype.itemsize
    scales = (lambda columns: 4 * ceil_div(columns, 128)) if config.quantized else (lambda columns: 0)
    row = hidden * width + scales(hidden)
    # of each step: bytes of memory traffic, bytes sent, operations
    gemm1 = load.experts * 2 * size * hidden * width + load.rows * (row + 4 * size), 0, 4 * load.rows * size * hidden
    gemm2 = load.experts * size * hidden * width + load.rows * (size * width + scales(size) + 2 * hidden), 0, gemm1[2] // 2
    gemm1_fused = gemm1[0] + load.rows * (size * width + scales(size) - 4 * size), 0, gemm1[2]
    work = {
        "gemm1_fused": gemm1_fused,
        "quantize": (load.tokens * (2 * hidden + row), 0, 0),
        "dispatch": (load.tokens * 2 * hidden + load.rows * row, load.dispatch_bytes, 0),
        "gemm1": gemm1,
        "silu_mul_quantize": (load.rows * (4 * size + size * width + scales(size)), 0, 0),
        "gemm2": gemm2,
        "combine": (load.tokens * (config.top_k + 1) * 2 * hidden, load.combine_bytes, 0),
        "gemm2_push": (gemm2[0], load.combine_bytes, gemm2[2]),
        "combine_push": (load.tokens * (config.top_k + 1) * 2 * hidden, 0, 0),
    }
    mean_rows = max(1, round(load.rows / config.num_local_experts))
    for name in (name for name in STEPS if name in timings):
        timing, fresh = timings[name].chained, timings[name].fresh
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
            label = LABELS.get(name, name)
        own = {}
        if name in ("gemm1", "gemm2"):
            n, k_dim = (2 * size, hidden) if name == "gemm1" else (hidden, size)
            own = {"step": name, "N": n, "K_dim": k_dim, "rows": mean_rows}
        label += "" if kind == options.routing else f", {kind}"
        if sent:
            label += f", {sent / 1e6:.2f} MB to other ranks"
            rates["wire_bytes"] = sent
        rates |= {f"fresh_{key}": float(f"{value:.5g}") for key, value in vars(fresh).items()}
        rates |= peer_fields(peers.get(name, {}))
        op = "grouped_gemm" if own else name
        bench.record(op, case | own, timing, floor_us=floor, label=label, **rates)


def peer_fields(peers: dict[str, Modes]) -> dict[str, Any]:
    """The fields of a record that tell of other libraries: all of them, and the fastest by itself."""
    if not peers:
        return {}
    us, fresh = ({name: float(f"{getattr(modes, mode).us:.5g}") for name, modes in peers.items()} for mode in ("chained", "fresh"))
    fastest = min(us, key=lambda name: us[name])
    return {"peer": fastest, "peer_us": us[fastest], "peers": us, "peers_fresh": fresh}
