# pyright: reportMissingImports=false
"""Models of transformers with random weights, of the shapes of published ones, and what their experts make of tokens, one by one.

T tokens, K top-k, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moequant.integrations.transformers.contract import contract_of
from moequant.models import ModelShape

VOCABULARY = 8192


@dataclass(frozen=True)
class Model:
    """shape: of a layer's experts. family: of transformers. layers: all with experts. settings: what else the configuration has."""

    shape: ModelShape
    family: str
    layers: int
    settings: dict[str, Any]

    def build(self, device: str) -> Any:
        """The model in bfloat16 on a device, in no grad."""
        shape = self.shape
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "moe_intermediate_size": shape.intermediate_size,
            **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), shape.num_experts),
            "num_experts_per_tok": shape.top_k,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 8192,
        }
        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.for_model(self.family, **(sizes | self.settings))
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj_bias"):
                nn.init.normal_(parameter.data, std=0.1)
        return model.eval().requires_grad_(False)


def attention(heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


DEEPSEEK = {"first_k_dense_replace": 0, "n_shared_experts": 1}
MODELS = {
    "qwen3-30b": Model(ModelShape(2048, 768, 128, 8), "qwen3_moe", 8, {"norm_topk_prob": True} | attention(32, 4, 128)),
    "gpt-oss-20b": Model(
        ModelShape(2880, 2880, 32, 4), "gpt_oss", 4, {"layer_types": ["full_attention"] * 4} | attention(64, 8, 64)
    ),
    "deepseek-v3": Model(ModelShape(7168, 2048, 256, 8), "deepseek_v3", 1, DEEPSEEK),
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}
# for a CPU, by the same names
SMALL = {
    "qwen3-30b": Model(ModelShape(128, 64, 16, 4), "qwen3_moe", 2, attention(4, 2, 32)),
    "gpt-oss-20b": Model(ModelShape(160, 96, 8, 4), "gpt_oss", 2, {"layer_types": ["full_attention"] * 2} | attention(4, 2, 32)),
    "deepseek-v3": Model(
        ModelShape(256, 64, 16, 4),
        "deepseek_v3",
        1,
        DEEPSEEK | LATENT | {"num_attention_heads": 4, "num_key_value_heads": 4, "n_group": 4, "topk_group": 2},
    ),
}


def experts_of(model: nn.Module) -> list[Any]:
    """Its experts modules, layer by layer."""
    return [module for module in model.modules() if hasattr(module, "has_post_expert_norm")]


def expected_rows(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What bfloat16 weights of a module make of tokens (T, H), one pair of token and expert after the other, in float32 but for the
    rounding between the products: (T, H)."""
    contract = contract_of(module)
    w13, w2 = getattr(module, contract.up), module.down_proj
    biases = [getattr(module, name).float() for name in contract.biases]
    out = torch.zeros(hidden.shape, device=hidden.device)
    for token, experts in enumerate(ids.tolist()):
        for k, expert in enumerate(experts):
            first, second = (w[expert].float().T if contract.transposed else w[expert].float() for w in (w13, w2))
            columns = first @ hidden[token].float()
            if biases:
                columns = columns + biases[0][expert]
            inner = module._apply_gate(columns[None])[0] if contract.gated else module.act_fn(columns)
            row = second @ inner.bfloat16().float()
            out[token] += weights[token, k] * (row + biases[1][expert] if biases else row)
    return out
