"""vLLM's activations as moequant's, as `apply_moe_activation` of vLLM computes them."""

# pyright: reportMissingImports=false
from __future__ import annotations

from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation

from moequant.activations import Activation

# what needs no numbers of the model
FIXED = {
    MoEActivation.GELU: Activation("gelu"),
    MoEActivation.GELU_TANH: Activation("gelu_tanh"),
    MoEActivation.SWIGLUOAI: Activation(limit=7.0, alpha=1.702, offset=1.0, interleaved=True),
    MoEActivation.SWIGLUSTEP: Activation(limit=7.0, limit_after=True),
    MoEActivation.SILU_NO_MUL: Activation("silu", gated=False),
    MoEActivation.GELU_NO_MUL: Activation("gelu", gated=False),
    MoEActivation.GELU_TANH_NO_MUL: Activation("gelu_tanh", gated=False),
    MoEActivation.RELU2_NO_MUL: Activation("relu2", gated=False),
}
KNOWN = {MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE, *FIXED}


def activation_of(kind: MoEActivation, numbers: ApplyMoEActivationConfig) -> Activation:
    """What a layer computes between its products.

    Args:
        kind: one of KNOWN.
        numbers: the model's.

    Returns:
        It.
    """
    if kind is MoEActivation.SILU:
        # which vLLM clamps, and neither scales nor shifts
        return Activation(limit=numbers.clamp_limit)
    if kind is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        return Activation(limit=numbers.clamp_limit, alpha=numbers.alpha, offset=numbers.beta)
    return FIXED[kind]
