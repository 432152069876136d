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
        experts, hidden, device = config.num_local_experts, config.hidden_size, dispatcher.device
        self.router = nn.Linear(hidden, config.num_experts, bias=False, device=device)
        w13 = torch.empty(experts, 2 * intermediate_size, hidden, dtype=torch.bfloat16, device=device)
        w2 = torch.empty(experts, hidden, intermediate_size, dtype=torch.bfloat16, device=device)
        self.w13, self.w2 = nn.Parameter(w13, requires_grad=False), nn.Parameter(w2, requires_grad=False)
        # GroupedExperts is no module and has copies: load_state_dict alone would leave the old experts in use
        self.register_load_state_dict_post_hook(lambda module, keys: module.quantize())

    def quantize(self) -> None:
        """Once the weights are there, and after each change of them."""
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
    model = nn.Sequential(*(MoE(dispatcher, intermediate_size=128) for _ in range(layers)))
    first = (dist.get_rank() if dist.is_initialized() else 0) * dispatcher.config.num_local_experts
    for number, layer in enumerate(model):
        assert isinstance(layer, MoE)
        generator = torch.Generator().manual_seed(number)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            # on the CPU, as the generator is: a default device may be another
            return torch.randn(shape, generator=generator, device="cpu") / shape[-1] ** 0.5

        layer.router.weight.data.copy_(normal(*layer.router.weight.shape))
        for weight in (layer.w13, layer.w2):
            whole = normal(dispatcher.config.num_experts, *weight.shape[1:])
            weight.data.copy_(whole[first : first + len(weight)])
        layer.quantize()
    return dispatcher, model


def main() -> None:
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
    dispatcher, model = build(device)
    with dispatcher:
        x = torch.randn(2, 16, 256, device=device).bfloat16()
        print(f"{tuple(x.shape)} to {tuple(model(x).shape)} on {device}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
