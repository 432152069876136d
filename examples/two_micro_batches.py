"""Two micro-batches through expert layers, the exchange of one under the computation of the other.

torchrun --nproc-per-node 2 examples/two_micro_batches.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moequant import GroupedExperts, MoEQuantDispatcher

Router = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def run_layers(
    dispatcher: MoEQuantDispatcher, layers: Sequence[tuple[Router, GroupedExperts]], micro_batches: Sequence[Tensor]
) -> list[Tensor]:
    """Each micro-batch (T, H) has a slot of its own. Attention would stand beside the router."""
    hidden = list(micro_batches)
    for router, experts in layers:
        # rows of the first are on their way while the second is routed and quantized
        handles = [dispatcher.dispatch_send(x, *router(x), slot=slot) for slot, x in enumerate(hidden)]
        for slot, handle in enumerate(handles):
            batch = dispatcher.dispatch_recv(handle)
            # what the first returns is there while the second's experts compute
            dispatcher.combine_send(experts(batch, out=dispatcher.output_buffer(slot)), handle)
        hidden = [x + dispatcher.combine_recv(handle) for x, handle in zip(hidden, handles, strict=True)]
    return hidden


def build(device: str, depth: int = 2) -> tuple[MoEQuantDispatcher, list[tuple[Router, GroupedExperts]]]:
    """Layers of random weights: the same router on every rank, experts of its own."""
    dispatcher = MoEQuantDispatcher(num_experts=8, top_k=2, hidden_size=256, max_tokens_per_rank=64, slots=2, device=device)
    local, rank = dispatcher.config.num_local_experts, dist.get_rank() if dist.is_initialized() else 0
    layers: list[tuple[Router, GroupedExperts]] = []
    for number in range(depth):
        generator = torch.Generator().manual_seed(number)
        # on the CPU, as the generator is: a default device may be another
        gate = (torch.randn(256, 8, generator=generator, device="cpu") / 16).to(device)
        generator.manual_seed(100 * (rank + 1) + number)
        shapes = (local, 256, 256), (local, 256, 128)
        w13, w2 = (torch.randn(shape, generator=generator, device="cpu").bfloat16() / 16 for shape in shapes)

        def router(x: Tensor, gate: Tensor = gate) -> tuple[Tensor, Tensor]:
            weights, ids = (x.float() @ gate).softmax(-1).topk(2)
            return ids, weights

        layers.append((router, GroupedExperts.from_weights(w13.to(device), w2.to(device))))
    return dispatcher, layers


def main() -> None:
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
    dispatcher, layers = build(device)
    with dispatcher:
        outputs = run_layers(dispatcher, layers, [torch.randn(tokens, 256, device=device).bfloat16() for tokens in (64, 40)])
        print(f"{[tuple(x.shape) for x in outputs]} on {device}, transport {dispatcher.config.transport}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
