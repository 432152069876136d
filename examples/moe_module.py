"""An expert-parallel layer as a module of one's own model. Each rank has its own tokens and E / W of the experts.

torchrun --nproc-per-node 2 examples/moe_module.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moequant import GroupedExperts, MoEQuantDispatcher


class MoE(nn.Module):
    """A router over all experts, and this rank's share of them. One dispatcher serves every layer of a model."""

    def __init__(self, dispatcher: MoEQuantDispatcher, intermediate_size: int) -> None:
        super().__init__()
        self.dispatcher, config = dispatcher, dispatcher.config
        experts, hidden = config.num_local_experts, config.hidden_size
        self.router = nn.Linear(hidden, config.num_experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden, dtype=torch.bfloat16), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(experts, hidden, intermediate_size, dtype=torch.bfloat16), requires_grad=False)

    def quantize(self) -> None:
        """Once the weights are loaded."""
        self.experts = GroupedExperts.from_weights(self.w13, self.w2, quant=self.dispatcher.config.quant)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probabilities = self.router(tokens.float()).softmax(-1)
        weights, ids = probabilities.topk(self.dispatcher.config.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.dispatcher(tokens, ids, weights, self.experts).view(x.shape)


def build(device: str, layers: int = 2) -> tuple[MoEQuantDispatcher, nn.Sequential]:
    """A stack of layers with weights that stand in for loaded ones: the same router on every rank, experts of its own."""
    dispatcher = MoEQuantDispatcher(num_experts=8, top_k=2, hidden_size=256, max_tokens_per_rank=64, device=device)
    model = nn.Sequential(*(MoE(dispatcher, intermediate_size=128) for _ in range(layers))).to(device)
    first = (dist.get_rank() if dist.is_initialized() else 0) * dispatcher.config.num_local_experts
    shared = None
    for number, layer in enumerate(model):
        assert isinstance(layer, MoE)
        generator = torch.Generator().manual_seed(number)
        layer.router.weight.data.copy_(torch.randn(layer.router.weight.shape, generator=generator) / 16)
        for weight in (layer.w13, layer.w2):
            whole = torch.randn(dispatcher.config.num_experts, *weight.shape[1:], generator=generator) / weight.shape[-1] ** 0.5
            weight.data.copy_(whole[first : first + len(weight)])
        layer.quantize()
        shared = shared or layer.experts
        layer.experts.share_workspaces(shared)
    return dispatcher, model


def main() -> None:
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    with torch.device(device), torch.cuda.device(device if cuda else -1):
        dispatcher, model = build(device)
        with dispatcher:
            x = torch.randn(2, 16, 256).bfloat16()
            print(f"{tuple(x.shape)} to {tuple(model(x).shape)} on {device}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
