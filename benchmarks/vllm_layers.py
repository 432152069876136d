# pyright: reportMissingImports=false
"""A layer in vLLM's modular MoE kernel, with moequant's experts and with vLLM's own, for bench_vllm.py: what vLLM can't load has to be
replaced before this is imported.

E experts, K top-k, W ranks, L = E / W local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import vllm
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
import vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep as naive_dp_ep
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.v1.worker.workspace import init_workspace_manager

from benchmarks.common import Bench
from moequant import QuantizedTensor, dequantize, quantize_weight
from moequant.integrations.vllm.exchange import Exchange, Sizes
from moequant.integrations.vllm.experts import Exchanged, MoEQuantExperts
from moequant.integrations.vllm.settings import Settings
from moequant.models import ModelShape
from moequant.testing import routing

OWN, PEER = "moequant", f"vLLM {vllm.__version__} Triton experts"


@contextlib.contextmanager
def engine(device: torch.device) -> Iterator[None]:
    """What vLLM's kernels find around them: a configuration, workspaces, and a group of ranks."""
    init_workspace_manager(device)
    with set_current_vllm_config(VllmConfig()), mock.patch.object(naive_dp_ep, "get_ep_group", Gathered):
        yield


class Gathered:
    """What vLLM's group of expert parallel ranks does for its naive exchange, by torch.distributed in place of vLLM's own NCCL bindings:
    the same collectives, those of a dispatch in one NCCL group. All ranks have as many tokens."""

    def dispatch(
        self, rows: Tensor, weights: Tensor, ids: Tensor, is_sequence_parallel: bool, extra_tensors: list[Tensor]
    ) -> tuple[Any, ...]:
        given = [rows, weights, ids, *extra_tensors]
        out = [x.new_empty(dist.get_world_size() * len(x), *x.shape[1:]) for x in given]
        # which gloo has not
        with _coalescing_manager(device=rows.device) if rows.is_cuda else contextlib.nullcontext():
            for target, x in zip(out, given, strict=True):
                # which has no float8
                dist.all_gather_into_tensor(target.view(torch.uint8), x.contiguous().view(torch.uint8))
        return (*out[:3], out[3:])

    def combine_into_output(self, rows: Tensor, out: Tensor, is_sequence_parallel: bool) -> None:
        dist.reduce_scatter_tensor(out, rows)

    def allocate_combine_input(self, *_: Any, **__: Any) -> None:
        return None


class Layer:
    """A layer's weights on this rank, its two kernels, and what they should give. Collective.

    E is spread over W ranks: L experts on each.
    """

    # Routings that timed calls take in turn: the weights of one token's experts would lie in L2 from one call to the next, where a model
    # has other layers in between.
    draws = 8

    def __init__(self, shape: ModelShape, max_tokens: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        local = shape.num_experts // self.world
        self.mine = range(self.rank * local, (self.rank + 1) * local)
        made = [self.expert(e) for e in self.mine]
        self.w13, self.w2 = (
            QuantizedTensor(torch.cat([w[i].values for w in made]), torch.cat([w[i].scales for w in made]), "block", segments=2 - i)
            for i in range(2)
        )
        self.map: Tensor | None = None
        if self.world > 1:
            self.map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device=device)
            self.map[self.mine.start : self.mine.stop] = torch.arange(local, dtype=torch.int32, device=device)
        ranks = {"tp_rank": 0, "pcp_rank": 0, "dp_rank": self.rank, "ep_rank": self.rank}
        parallel = FusedMoEParallelConfig(
            **ranks,
            tp_size=1,
            pcp_size=1,
            sp_size=1,
            dp_size=self.world,
            ep_size=self.world,
            use_ep=self.world > 1,
            all2all_backend="allgather_reducescatter",
            enable_eplb=False,
        )
        self.moe = FusedMoEConfig(
            num_experts=shape.num_experts,
            experts_per_token=shape.top_k,
            hidden_dim=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_local_experts=local,
            num_logical_experts=shape.num_experts,
            activation=MoEActivation.SILU,
            device=device,
            routing_method=RoutingMethodType.Default,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
            max_num_tokens=max_tokens,
        )
        scales = fp8_w8a8_moe_quant_config(w1_scale=self.w13.scales, w2_scale=self.w2.scales, block_shape=[128, 128])
        self.kernels = {OWN: self.own(scales, max_tokens), PEER: self.peer(scales)}

    def close(self) -> None:
        """Lets go of moequant's buffers."""
        exchange = self.kernels[OWN].fused_experts.exchange
        for dispatcher in {exchange.chunks, exchange.decode}:
            dispatcher.close()

    def own(self, scales: FusedMoEQuantConfig, max_tokens: int) -> mk.FusedMoEKernel:
        shape = self.shape
        sizes = Sizes(shape.num_experts, shape.top_k, shape.hidden_size, "fp8_e4m3fn", max_tokens, padded=False)
        exchange = Exchange(dist.group.WORLD if self.world > 1 else None, sizes, Settings(timeout=60, first_timeout=300))
        return mk.FusedMoEKernel(Exchanged(self.world > 1), MoEQuantExperts(self.moe, scales, exchange))

    def peer(self, scales: FusedMoEQuantConfig) -> mk.FusedMoEKernel:
        around: Any = MoEPrepareAndFinalizeNoDPEPModular()
        if self.world > 1:
            around = naive_dp_ep.MoEPrepareAndFinalizeNaiveDPEPModular(num_dispatchers=self.world)
        return mk.FusedMoEKernel(around, TritonExperts(self.moe, scales))

    def expert(self, e: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The weights of an expert, the same on any rank."""
        h, i, generator = self.shape.hidden_size, self.shape.intermediate_size, torch.Generator(self.device).manual_seed(e)
        w13, w2 = (torch.randn(s, generator=generator, device=self.device) / s[-1] ** 0.5 for s in ((1, 2 * i, h), (1, h, i)))
        return quantize_weight(w13, dtype=torch.float8_e4m3fn, segments=2), quantize_weight(w2, dtype=torch.float8_e4m3fn)

    def inputs(self, tokens: int, draw: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, ids and weights of this rank, the same for both kernels, of one draw of several."""
        generator = torch.Generator(self.device).manual_seed(tokens + 7919 * self.rank + 104729 * draw)
        ids, weights = routing(tokens, self.shape.top_k, self.shape.num_experts, generator=generator)
        hidden = torch.randn(tokens, self.shape.hidden_size, dtype=torch.bfloat16, generator=generator, device=self.device)
        return hidden, ids.int(), weights.float()

    def expected(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What some tokens should give, in float32."""
        out = torch.zeros(hidden.shape, device=self.device)
        for e in ids.unique().tolist():
            w13, w2 = (dequantize(w)[0] for w in self.expert(e))
            token, k = (ids == e).nonzero(as_tuple=True)
            gate, up = (hidden[token].float() @ w13.T).chunk(2, -1)
            rows = (torch.nn.functional.silu(gate) * up) @ w2.T
            out.index_add_(0, token, rows * weights[token, k, None])
        return out

    def call(self, name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden, ids, weights = inputs
        weights13, weights2 = self.w13.values, self.w2.values
        return self.kernels[name].apply(
            hidden, weights13, weights2, weights, ids, MoEActivation.SILU, self.shape.num_experts, self.map, False
        )

    def floor_us(self, bench: Bench, tokens: int) -> float:
        """us of the products here: of the weights of experts that have rows, or of the operations."""
        numbers = 3 * self.shape.hidden_size * self.shape.intermediate_size
        ids = [self.inputs(tokens, draw)[1] for draw in range(self.draws)]
        entries = ids[0].numel()
        # uniform routing: other ranks' tokens reach this rank's experts as this one's reach all
        used = (
            sum(len(drawn.unique()) for drawn in ids) / len(ids)
            if self.world == 1
            else len(self.mine) * (1 - (1 - 1 / len(self.mine) / self.world) ** (entries * self.world))
        )
        return bench.floor_us(used * numbers, 2 * entries * numbers, torch.float8_e4m3fn)


@contextlib.contextmanager
def step_of(layer: Layer, tokens: int) -> Iterator[None]:
    """vLLM's context of a step in which each rank has so many tokens."""
    told = SimpleNamespace(local_sizes=[tokens] * layer.world, num_tokens_across_dp_cpu=None)
    with override_forward_context(SimpleNamespace(dp_metadata=told, is_padding=None)):  # type: ignore[arg-type]
        yield
