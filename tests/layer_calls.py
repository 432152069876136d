"""A valid call of every public method of batches, experts and dispatchers, and of what tests and benchmarks import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from function_calls import E4M3, NARROW, Call, counts, quantizer
from moequant import (
    Activation,
    CheckpointWeight,
    ExpertBatch,
    GroupedExperts,
    MoEQuantDispatcher,
    QuantizedTensor,
    formats,
    quantize_expert_batch,
    quantize_weight,
    testing,
)
from moequant.config import DispatcherConfig
from moequant.environment import environment

SETTINGS: dict[str, Any] = {"num_experts": 3, "top_k": 2, "hidden_size": 40, "max_tokens_per_rank": 8}


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """5 tokens of a dispatcher with SETTINGS."""
    return torch.randn(5, 40).bfloat16(), torch.stack([torch.randperm(3)[:2] for _ in range(5)]), torch.rand(5, 2)


def dispatcher(**settings: Any) -> MoEQuantDispatcher:
    return MoEQuantDispatcher(**{**SETTINGS, **settings}, device="cpu")


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2 * 24, 40).bfloat16(), torch.randn(3, 40, 24).bfloat16()


def blocks() -> tuple[QuantizedTensor, QuantizedTensor]:
    return quantize_weight(weights()[0], segments=2), quantize_weight(weights()[1])


def biases() -> dict[str, Any]:
    return {"bias13": torch.randn(3, 48), "bias2": torch.randn(3, 40)}


def experts() -> GroupedExperts:
    return GroupedExperts.from_weights(*weights())


def stand_in(batch: ExpertBatch) -> torch.Tensor:
    """Elementwise experts, whose result has the same bits everywhere."""
    scales = torch.ones_like(batch.values[..., :1]).float() if batch.scales is None else batch.scales
    return (batch.values.float() * scales.repeat_interleave(128, -1)[..., : batch.values.shape[-1]]).bfloat16()


def on(d: MoEQuantDispatcher, method: str, **arguments: Any) -> Call:
    return Call(getattr(d, method), arguments, owner=d)


def dispatched(method: str, step: str = "dispatch", **arguments: Any) -> Call:
    """A call that follows a dispatch."""
    d = dispatcher()
    result = getattr(d, step)(*tokens())
    handle = result[1] if isinstance(result, tuple) else result
    if method in ("combine", "combine_send", "push"):
        arguments["expert_output"] = torch.randn(3, 16, 40).bfloat16()
    if method == "combine_recv":
        d.combine_send(torch.randn(3, 16, 40).bfloat16(), handle)
    return on(d, method, handle=handle, **arguments)


def on_experts(method: str, **arguments: Any) -> Call:
    mine, d = experts(), dispatcher()
    batch, _ = d.dispatch(*tokens())
    function = getattr(mine, method)
    if method == "activation":
        arguments["gate_up"] = torch.randn(3, 16, 48).bfloat16()
    if method in ("gemm2", "gemm2_push"):
        arguments["inner"] = quantize_expert_batch(torch.randn(3, 16, 24))
    if method in ("push", "gemm2_push"):
        arguments["destinations"] = torch.zeros(3, 16, dtype=torch.int64)
    return Call(function, {**arguments, "batch": batch}, exact=method == "fuses")


def record(model: torch.nn.Module, **options: Any) -> None:
    with testing.record_routing(model, **options):
        model(torch.randn(3, 8))


class Block(torch.nn.Module):
    """As Hugging Face's, with a router that gives logits."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = torch.nn.Linear(8, 4), torch.nn.ModuleList([torch.nn.Identity()] * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x)


LAYERS: dict[str, Callable[[], Call]] = {
    "ExpertBatch": lambda: Call(
        ExpertBatch,
        {
            "values": torch.zeros(2, 4, 140, dtype=torch.int8),
            "scales": torch.ones(2, 2, 4).transpose(1, 2),
            "num_tokens": counts(3, 4),
            "sources": torch.zeros(2, 4, dtype=torch.int64),
            "recipe": "default",
            "expected_rows": 3,
            "slot": 0,
            "owner": None,
            "expert_start": None,
            "batch_invariant": True,
        },
    ),
    "ExpertBatch.rows_of": lambda: Call(
        dispatcher(layout="ragged").dispatch(*tokens())[0].rows_of, {"x": torch.zeros(48, 40), "expert": 1}
    ),
    "ExpertBatch.experts_of_rows": lambda: Call(dispatcher(layout="ragged").dispatch(*tokens())[0].experts_of_rows, {}),
    "ExpertBatch.part": lambda: Call(dispatcher().dispatch(*tokens())[0].part, {"begin": 1, "end": 3}),
    "Activation": lambda: Call(
        Activation,
        {"function": "silu", "gated": True, "alpha": 1.702, "limit": 7.0, "limit_after": False, "offset": 1.0}
        | {"gate_softcap": 3.0, "up_softcap": 2.0, "interleaved": True},
    ),
    "GroupedExperts": lambda: Call(
        GroupedExperts, dict(zip(("w13", "w2"), weights(), strict=True)) | {"activation": "silu"} | biases()
    ),
    "GroupedExperts.from_weights": lambda: Call(
        GroupedExperts.from_weights,
        dict(zip(("w13", "w2"), weights(), strict=True)) | {"quant": "int8", "activation": "silu", "recipe": "default"} | biases(),
    ),
    "GroupedExperts.from_quantized": lambda: Call(
        GroupedExperts.from_quantized,
        dict(zip(("w13", "w2"), blocks(), strict=True)) | {"activation": "silu"} | biases(),
    ),
    "GroupedExperts.from_checkpoint": lambda: Call(
        GroupedExperts.from_checkpoint,
        dict(zip(("w13", "w2"), (CheckpointWeight(q.values, q.scales) for q in blocks()), strict=True))
        | {"quant": "fp8_e4m3fn", "activation": "silu", "recipe": None}
        | biases(),
    ),
    "CheckpointWeight": lambda: Call(
        CheckpointWeight,
        {"values": blocks()[0].values, "scales": torch.ones(3, 2, 2), "block": (64, 20), "segments": 2, "transposed": False},
    ),
    "GroupedExperts.__call__": lambda: on_experts("__call__", out=torch.zeros(3, 16, 40).bfloat16(), num_sms=None),
    "GroupedExperts.gemm1_swiglu": lambda: on_experts("gemm1_swiglu", num_sms=2),
    "GroupedExperts.gemm1": lambda: on_experts("gemm1", num_sms=2),
    "GroupedExperts.activation": lambda: on_experts("activation"),
    "GroupedExperts.gemm2": lambda: on_experts("gemm2", out=torch.zeros(3, 16, 40).bfloat16(), num_sms=2),
    "GroupedExperts.fuses": lambda: on_experts("fuses"),
    "GroupedExperts.push": lambda: on_experts("push", num_sms=2),
    "GroupedExperts.gemm2_push": lambda: on_experts("gemm2_push", num_sms=2),
    "GroupedExperts.part": lambda: Call(experts().part, {"begin": 1, "end": 3}),
    "MoEQuantDispatcher": lambda: Call(
        MoEQuantDispatcher,
        {
            **SETTINGS,
            "group": None,
            "quant": "fp8_e4m3fn",
            "transport": "local",
            "exchange": "auto",
            "layout": "padded",
            "capacity": 16,
            "rank_capacity": None,
            "on_overflow": "drop",
            "reduce": "exact",
            "recipe": "default",
            "slots": 2,
            "overlap": True,
            "num_sms": 8,
            "timeout": 10.0,
            "first_timeout": 20.0,
            "batch_invariant": False,
            "device": "cpu",
        },
    ),
    "DispatcherConfig": lambda: Call(
        DispatcherConfig, {**SETTINGS, "num_experts": 4, "world_size": 2, "capacity": None, "timeout": 10}
    ),
    "MoEQuantDispatcher.buffer_bytes": lambda: Call(
        MoEQuantDispatcher.buffer_bytes,
        {
            **SETTINGS,
            "num_experts": 4,
            "world_size": 2,
            "intermediate_size": 32,
            "fused": False,
            "transport": "collective",
            "slots": 2,
        },
    ),
    "MoEQuantDispatcher.dispatch": lambda: on(dispatcher(), "dispatch", **named(tokens()), slot=0, layer=3, expected_tokens=12),
    "MoEQuantDispatcher.dispatch_send": lambda: on(
        dispatcher(slots=2), "dispatch_send", **named(tokens()), slot=1, expected_tokens=12
    ),
    "MoEQuantDispatcher.dispatch_recv": lambda: dispatched("dispatch_recv", "dispatch_send"),
    "MoEQuantDispatcher.dispatch_first": lambda: on(dispatcher(), "dispatch_first", **named(tokens()), slot=0, experts=2),
    "MoEQuantDispatcher.dispatch_second": lambda: dispatched("dispatch_second"),
    "MoEQuantDispatcher.combine": lambda: dispatched("combine", out=torch.zeros(5, 40).bfloat16()),
    "MoEQuantDispatcher.combine_send": lambda: dispatched("combine_send"),
    "MoEQuantDispatcher.combine_recv": lambda: dispatched("combine_recv", out=None),
    "MoEQuantDispatcher.push": lambda: dispatched("push"),
    "MoEQuantDispatcher.combine_pushed": lambda: dispatched("combine_pushed", out=None),
    "MoEQuantDispatcher.begin_push": lambda: dispatched("begin_push", dtype=torch.bfloat16),
    "MoEQuantDispatcher.output_buffer": lambda: on(dispatcher(), "output_buffer", slot=0),
    "MoEQuantDispatcher.__call__": lambda: on(
        dispatcher(),
        "__call__",
        **named(tokens()),
        experts=stand_in,
        slot=0,
        layer=0,
        chunks=1,
        first_experts=0,
        out=torch.zeros(5, 40).bfloat16(),
        expected_tokens=12,
    ),
    "MoEQuantDispatcher.check": lambda: on(dispatcher(), "check", wait=True),
    "MoEQuantDispatcher.ensure": lambda: on(dispatcher(), "ensure", max_tokens_per_rank=40),
    "MoEQuantDispatcher.close": lambda: on(dispatcher(), "close"),
    "environment": lambda: Call(environment, {}),
    "format_of": lambda: Call(formats.format_of, {"dtype": E4M3}, **quantizer(NARROW)),
    "recipe_of": lambda: Call(formats.recipe_of, {"name": "default"}),
    "max_of": lambda: Call(formats.max_of, {"dtype": E4M3, "recipe": "default"}, **quantizer(NARROW)),
    "routing": lambda: Call(
        testing.routing,
        {"tokens": 3, "top_k": 2, "num_experts": 4, "kind": "zipf:1", "generator": torch.Generator().manual_seed(0)},
    ),
    "relative_error": lambda: Call(testing.relative_error, {"x": torch.ones(2, 3), "reference": torch.ones(2, 3)}),
    "cosine_difference": lambda: Call(testing.cosine_difference, {"x": torch.ones(2, 3), "reference": torch.ones(2, 3)}),
    "poison": lambda: Call(testing.poison, {"tensor": torch.ones(2, 3)}),
    "in_one_process": lambda: Call(
        testing.in_one_process, {"settings": dict(SETTINGS), "inputs": [tokens(), tokens()], "experts": stand_in}
    ),
    "record_routing": lambda: Call(record, {"model": Block(), "router": None, "read": None, "max_tokens": 2}),
}


def named(values: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("hidden_states", "topk_ids", "topk_weights"), values, strict=True))
