"""vLLM's own MoE layer on gloo ranks: its factory, its weight loader, its runner. E experts, K top-k, H hidden size, I intermediate size.

Imported only where vLLM is (tests/integrations/engines.py): ranks are forked from the process that has imported it, which takes seconds.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import vllm.distributed.device_communicators.cpu_communicator
import vllm.v1.executor.multiproc_executor  # noqa: F401
from torch import Tensor
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.quantization import get_quantization_config

from moequant import QuantizedTensor, dequantize, quantize_weight

E, K, H, I = 8, 2, 256, 128  # noqa: E741
CHECKPOINT = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# imports what vLLM leaves until a layer asks for its quantization, which each rank would do anew
get_quantization_config("fp8")
# a batch of vLLM's scheduler, above what most tests send
BATCH = 64


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns on forked ranks.

    Args:
        world: how many.
        function: called with the rank's number, free ports, and what follows.
        *args: of any kind, as nothing is pickled.

    Returns:
        By rank.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(4)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    context = multiprocessing.get_context("fork")
    # a rank that looked for garbage among all that is imported would copy it
    gc.freeze()
    ends = [context.Pipe(duplex=False) for _ in range(world)]

    def run(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
        torch.set_num_threads(1)
        try:
            ends[rank][1].send((True, function(rank, ports, *args)))
        except BaseException:
            ends[rank][1].send((False, traceback.format_exc()))
        # the others may still ask the store that this rank holds: all of them are ended together
        signal.pause()

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for _, there in ends:
        there.close()
    try:
        found = [here.recv() if here.poll(240) else (False, "nothing within 240 s") for here, _ in ends]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    wrong = [text for right, text in found if not right]
    assert not wrong, "\n".join(wrong)
    return [value for _, value in found]


@contextlib.contextmanager
def engine(
    rank: int, ports: list[int], data: int = 1, tensor: int = 1, backend: str = "auto", **settings: Any
) -> Iterator[VllmConfig]:
    """A rank of an engine without a model.

    Args:
        rank: its number.
        ports: free ones, the same on all ranks.
        data: data parallel ranks.
        tensor: tensor parallel ranks.
        backend: --moe-backend.
        **settings: "moequant" in --additional-config.

    Yields:
        vLLM's configuration.
    """
    parallel = ParallelConfig(tensor_parallel_size=tensor, enable_expert_parallel=data * tensor > 1)
    if data > 1:
        parallel = ParallelConfig(
            data_parallel_size=data,
            data_parallel_rank=rank,
            enable_expert_parallel=True,
            data_parallel_master_ip="127.0.0.1",
            distributed_executor_backend="mp",
        )
        # ranks that are built by hand each look for a free port of their own
        parallel.data_parallel_master_port = ports[1]
        parallel._data_parallel_master_port_list = ports[2:]
    config = VllmConfig(parallel_config=parallel, additional_config={"moequant": settings})
    config.scheduler_config.max_num_batched_tokens = BATCH
    config.kernel_config.moe_backend = backend
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=tensor,
            rank=rank if tensor > 1 else 0,
            distributed_init_method=f"tcp://127.0.0.1:{ports[0]}",
            local_rank=rank,
            backend="gloo",
        )
        initialize_model_parallel(tensor, 1, backend="gloo")
        yield config


def checkpoint() -> tuple[Tensor, Tensor]:
    """Weights in bfloat16, w13 (E, 2I, H) and w2 (E, H, I)."""
    g = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(E, 2 * I, H, generator=g) / H**0.5, torch.randn(E, H, I, generator=g) / I**0.5
    return w13.bfloat16(), w2.bfloat16()


@functools.cache
def quantized() -> tuple[QuantizedTensor, QuantizedTensor]:
    """The same as an fp8 checkpoint has them."""
    w13, w2 = checkpoint()
    return quantize_weight(w13, dtype=torch.float8_e4m3fn, segments=2), quantize_weight(w2, dtype=torch.float8_e4m3fn)


def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights, ids = gating_output.float().softmax(-1).topk(topk)
    return weights, ids.int()


def make_layer(number: int = 0, config: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """vLLM's layer, with places for weights.

    Args:
        number: of the layer.
        config: the checkpoint's quantization; {} for none.
        **arguments: other ones of vLLM's factory.
    """
    method = get_quantization_config("moequant")
    given = CHECKPOINT if config is None else config
    quantization = method.from_config(given) if given else method()
    sizes = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I, "params_dtype": torch.bfloat16}
    prefix = {"quant_config": quantization, "prefix": f"model.layers.{number}.mlp.experts"}
    return FusedMoEFactory(**(sizes | prefix | {"custom_routing_function": route, "renormalize": False} | arguments))


def load(layer: Any, fp8: bool = True) -> Any:
    """Gives a layer its weights by vLLM's loader, expert by expert, as from a checkpoint."""
    experts = layer.routed_experts
    w13, w2 = quantized() if fp8 else checkpoint()
    for e in range(E):
        for shard, name, w, rows in (("w1", "w13", w13, slice(I)), ("w3", "w13", w13, slice(I, 2 * I)), ("w2", "w2", w2, slice(H))):
            values = w.values if isinstance(w, QuantizedTensor) else w
            parts = {"weight": values[e, rows]}
            if isinstance(w, QuantizedTensor):
                parts["weight_scale_inv"] = w.scales[e, rows.start and 1 : rows.stop // 128]
            for kind, part in parts.items():
                place = getattr(experts, f"{name}_{kind}")
                place.weight_loader(place, part, f"experts.{e}.{shard}.{kind}", shard_id=shard, expert_id=e)
    experts.quant_method.process_weights_after_loading(experts)
    return layer


def tokens_of(rank: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states (T, H) and logits (T, E) of a rank."""
    g = torch.Generator().manual_seed(10 + rank)
    return torch.randn(tokens, H, generator=g).bfloat16(), torch.randn(tokens, E, generator=g)


def call(layer: Any, config: VllmConfig, rank: int, across: tuple[int, ...], padding: int = 0) -> tuple[Tensor, Tensor]:
    """What a layer gives for a rank's tokens, of which the last ones fill up, and what a dense computation of the same weights does."""
    x, logits = tokens_of(rank, across[rank])
    mask = torch.arange(len(x)) >= len(x) - padding
    distributed = torch.tensor(across, dtype=torch.int32) if len(across) > 1 else None
    with set_forward_context(None, config, num_tokens=len(x), num_tokens_across_dp=distributed, is_padding=mask):
        out = layer(x.clone(), logits)
    weights, ids = route(x, logits, K, False)
    return out, dense(x, weights, ids.masked_fill(mask[:, None], -1))


def dense(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer in float32, with dequantized weights."""
    w13, w2 = (dequantize(w) for w in quantized())
    out = torch.zeros(len(x), H)
    for t, k in ((ids >= 0).nonzero()).tolist():
        gate, up = (w13[ids[t, k]] @ x[t].float()).chunk(2)
        out[t] += weights[t, k] * (w2[ids[t, k]] @ (torch.nn.functional.silu(gate) * up))
    return out
