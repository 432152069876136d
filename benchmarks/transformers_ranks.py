# pyright: reportMissingImports=false
"""The part of bench_transformers.py that runs under torchrun: the experts of a layer that are split over the ranks.

T tokens, K top-k, E experts, W ranks, L = E / W local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP

from benchmarks.bench_transformers import SMALL_TOKENS, TOKENS, Clock, check, freed, layer_floor, layer_inputs
from benchmarks.common import Bench, Timing, process_group, progress, slowest_rank, time_collectively
from benchmarks.transformers_models import MODELS, SMALL, Model, expected_rows, experts_of
from moequant.config import QUANT_DTYPES
from moequant.integrations.transformers import configure
from moequant.integrations.transformers.contract import contract_of
from moequant.integrations.transformers.expert_parallel import MoEQuantEP
from moequant.integrations.transformers.weights import quantize_in_place

PEERS = {"all_reduce": AllReduceEP, "all_to_all": AllToAllEP}
REPS = 10


def split(module: Any, first: int, experts: int) -> Any:
    """This rank's experts of a module, as transformers splits them."""
    parameters = dict(module.named_parameters())
    # shared with the copy, so that nothing is copied that isn't used
    mine = copy.deepcopy(module, {id(parameter): parameter for parameter in parameters.values()})
    for name, parameter in parameters.items():
        setattr(mine, name, nn.Parameter(parameter[first : first + experts].clone(), requires_grad=False))
    mine.num_experts, mine._is_expert_parallel = experts, True
    return mine


def run_ranks(options: argparse.Namespace, clock: Clock) -> None:
    """Times the models of a run, and records what came of it. Collective."""
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    with process_group(device) as (rank, place), torch.no_grad():
        bench = Bench.start(options.output_json, device=device, gpus=dist.get_world_size()) if rank == 0 else None
        for name in options.models:
            with freed():
                run_model(bench, name, (MODELS if device == "cuda" else SMALL)[name], options, clock, place)


def run_model(bench: Bench | None, name: str, kind: Model, options: argparse.Namespace, clock: Clock, device: torch.device) -> None:
    """One model, with one batch for all ranks and with one for each."""
    rank, ranks, shape = dist.get_rank(), dist.get_world_size(), kind.shape
    progress(f"{name}: building")
    whole = experts_of(kind.build(str(device)))
    local = shape.num_experts // ranks
    modules = [split(module, rank * local, local) for module in whole]
    # the first stays whole, for the check
    del whole[1:]
    everyone = DeviceMesh(device.type, [list(range(ranks))], mesh_dim_names=("others", "mine"))["mine"]
    alone = DeviceMesh(device.type, [[other] for other in range(ranks)], mesh_dim_names=("others", "mine"))["mine"]
    sizes = options.num_tokens or (TOKENS if device.type == "cuda" else SMALL_TOKENS)
    cases = [(batch, tokens) for batch in ("one batch", "batches of their own") for tokens in sizes]
    times: dict[tuple[str, int], dict[str, Timing]] = {}
    expected: dict[tuple[str, int], Tensor] = {}
    for quant in options.quants:
        if quant != "none":
            for module in modules:
                quantize_in_place(module, contract_of(module), QUANT_DTYPES[quant])
        for batch, tokens in cases:
            shared = batch == "one batch"
            inputs = layer_inputs(shape, tokens, str(device), seed=tokens if shared else tokens + 7919 * rank)
            picked = sorted({0, tokens - 1})
            if (batch, tokens) not in expected:
                expected[batch, tokens] = expected_rows(whole[0], *(x[picked] for x in inputs))
            configure(agree=False, max_tokens=max(16, tokens), transport=options.transport)
            ways: dict[str, type[Any]] = {quant: MoEQuantEP}
            if quant == options.quants[0]:
                ways |= {peer: kind for peer, kind in PEERS.items() if quant == "none" and (shared or peer == "all_to_all")}
            for way, implementation in ways.items():
                # the clocks of ranks differ
                going = [clock.allows(way) if rank == 0 else True]
                dist.broadcast_object_list(going, device=device)
                if not going[0]:
                    continue
                progress(f"{name}: {batch}, T={tokens}, {way}")
                for module in modules:
                    module.config._experts_implementation_internal = "moequant" if way == quant else "grouped_mm"
                meshes = everyone, everyone if shared else alone
                layers = [implementation(module, *meshes) for module in modules]
                check(layers[0](*inputs), expected[batch, tokens], picked, quant)
                in_graph = device.type == "cuda" and way != "all_to_all"
                timing = timed(lambda layers=layers, inputs=inputs: [layer(*inputs) for layer in layers], device, in_graph)
                times.setdefault((batch, tokens), {})[way] = timing
    progress("")
    if bench is not None:
        record(bench, name, kind, options.transport, times)


def timed(call: Callable[[], Any], device: torch.device, in_graph: bool) -> Timing:
    """Of the slowest rank. Collective."""
    samples = time_collectively(call, device=device.type, in_graph=in_graph, reps=REPS if in_graph else 3, inner=3)
    return Timing.of(slowest_rank(samples))


def record(bench: Bench, name: str, kind: Model, transport: str, times: dict[tuple[str, int], dict[str, Timing]]) -> None:
    """The mean of the model's layers, moequant's with the peers' beside it."""
    shape, ranks = kind.shape, dist.get_world_size()
    size = {"H": shape.hidden_size, "I": shape.intermediate_size, "E": shape.num_experts, "K": shape.top_k, "W": ranks}
    for (batch, tokens), by_way in times.items():
        peers = {way: float(f"{timing.us / kind.layers:.5g}") for way, timing in by_way.items() if way in PEERS}
        for quant, timing in by_way.items():
            if quant in peers:
                continue
            mean = Timing(timing.us / kind.layers, timing.us_p20 / kind.layers, timing.us_p80 / kind.layers)
            case = {
                "T": tokens,
                **size,
                "model": name,
                "layers": kind.layers,
                "quant": quant,
                "batch": batch,
                "transport": transport,
            }
            # all ranks read and multiply at once
            floor = layer_floor(bench, shape, tokens, quant) / (ranks if batch == "one batch" else 1)
            fastest = min(peers, key=lambda peer: peers[peer], default=None)
            extra: dict[str, Any] = {} if fastest is None else {"peers": peers, "peer": fastest, "peer_us": peers[fastest]}
            label = f"{name} {batch}, W={ranks} T={tokens} {quant}"
            bench.record("transformers_experts", case, mean, floor_us=floor, label=label, **extra)
