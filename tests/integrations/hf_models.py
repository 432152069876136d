# pyright: reportMissingImports=false
"""Tiny language models with random weights, one for each family."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 48},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "minimax_m2": {"rotary_dim": 16},
    "glm4_moe": {},
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "granitemoe": {},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "dots1": {"layer_types": ["full_attention"] * 2},
    "flex_olmo": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"],
        "moe_shared_expert_intermediate_size": 48,
        "moe_latent_size": None,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
    },
}


@functools.cache
def config_of(family: str) -> Any:
    # what a configuration doesn't know it takes as an attribute, which nothing reads
    return AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))


def build(family: str, **changes: Any) -> Any:
    """A model in bfloat16, the same at each call. changes: of its configuration."""
    torch.manual_seed(0)
    config = copy.deepcopy(config_of(family))
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # large enough that what the experts say counts
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            elif "sinks" in name or "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.requires_grad_(False)


def prompt(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
