"""Shapes of published mixture-of-experts models, for benchmarks and tests. Shapes only: no other property of a model is meant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """One expert layer's sizes.

    Attributes:
        hidden_size: H.
        intermediate_size: I of one expert.
        num_experts: E, routed experts only.
        top_k: K experts a token.
        note: what to know before comparing with the model itself; empty for nothing.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    note: str = ""


MODELS = {
    "deepseek-v3": ModelShape(7168, 2048, 256, 8),
    "v4-flash": ModelShape(4096, 2048, 256, 6),
    "v4-pro": ModelShape(7168, 3072, 384, 6),
    "qwen3-235b": ModelShape(4096, 1536, 128, 8),
    "qwen3-30b": ModelShape(2048, 768, 128, 8),
    "qwen3-next-80b": ModelShape(2048, 512, 512, 10),
    "glm-4.7": ModelShape(5120, 1536, 160, 8),
    "glm-5": ModelShape(6144, 2048, 256, 8),
    "kimi-k2": ModelShape(7168, 2048, 384, 8),
    "gpt-oss-120b": ModelShape(
        2880, 2880, 128, 4, "shape only: the model's own experts are MXFP4, with biases and another activation"
    ),
    "mixtral-8x7b": ModelShape(4096, 14336, 8, 2),
    "minimax-m2": ModelShape(3072, 1536, 256, 8),
}


def model_shape(name: str) -> ModelShape:
    """The shape of a model.

    Args:
        name: a key of MODELS.

    Returns:
        Its sizes.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]
