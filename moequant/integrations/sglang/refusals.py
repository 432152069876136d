"""What is refused before weights are loaded, in words. E experts, W ranks of the expert-parallel group."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.moe.utils import get_deepep_mode, is_sbo_enabled, is_tbo_enabled
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.runtime_context import get_exec, get_lora, get_parallel
from sglang.srt.utils.common import require_attn_tp_gather, require_mlp_tp_gather

from moequant.integrations.sglang import VARIABLE

# of an unquantized checkpoint, and the dispatcher's for it
FORMATS = {torch.bfloat16: "none", torch.float16: "float16"}


def refusal(why: str) -> ValueError:
    """The error that says why not.

    Args:
        why: what came, what is possible, and what to do.

    Returns:
        It, to be raised.
    """
    return ValueError(f"{VARIABLE}=1: {why}, or unset {VARIABLE}")


def check_ranks(num_experts: int) -> None:
    """Refuses experts that can't be shared out.

    Args:
        num_experts: E.

    Raises:
        ValueError: E is no multiple of W.
    """
    ranks = get_parallel().moe_ep_size
    if num_experts % ranks:
        raise refusal(
            f"each of {ranks} ranks has as many experts, got {num_experts}: take another --tp, or --ep-num-redundant-experts"
        )


def check_layer(config: Any, quant_method: Any) -> None:
    """Refuses a layer, or a server, that moequant can't run.

    Args:
        config: SGLang's MoeRunnerConfig of the layer.
        quant_method: its quantization method.

    Raises:
        ValueError: there is something that moequant doesn't have.
    """
    _check_server()
    runner = getattr(config.runner_backend, "value", config.runner_backend)
    if runner != "deep_gemm":
        raise refusal(f"it takes the place of --moe-runner-backend deep_gemm, and this layer has {runner!r}: add it")
    check_ranks(config.num_experts)
    mine, every = config.num_local_experts, config.num_experts
    if config.num_fused_shared_experts or every != mine * get_parallel().moe_ep_size:
        raise refusal(f"ranks have nothing but their share of routed experts, got {mine} of {every}: leave shared experts unfused")
    if config.activation != "silu" or not config.is_gated or config.gemm1_alpha is not None or config.gemm1_clamp_limit is not None:
        raise refusal(
            f"SGLang's deep_gemm runner has gated silu alone, got {config.activation!r}: this model needs another backend"
        )
    if any(getattr(config.layer, f"{name}_weight_bias", None) is not None for name in ("w13", "w2")):
        raise refusal("experts have no biases here: this model needs another backend")
    if config.apply_router_weight_on_input or config.no_combine:
        raise refusal("routing weights are applied to what experts return: this model needs another backend")
    _check_format(config.params_dtype, quant_method)


def format_of(quant_method: Any, dtype: torch.dtype) -> str:
    """The dispatcher's quant for a layer.

    Args:
        quant_method: of a layer that was not refused.
        dtype: of its parameters, where they are not quantized.

    Returns:
        It.
    """
    return "fp8_e4m3fn" if isinstance(quant_method, Fp8MoEMethod) else FORMATS[dtype]


def _check_format(dtype: torch.dtype, quant_method: Any) -> None:
    """Refuses experts in another format than fp8 in blocks of 128x128, bfloat16 or float16."""
    name = type(quant_method).__name__
    if isinstance(quant_method, UnquantizedFusedMoEMethod):
        if dtype not in FORMATS:
            raise refusal(f"experts that are not quantized are in bfloat16 or float16, got {dtype}: add --dtype bfloat16")
        return
    if not isinstance(quant_method, Fp8MoEMethod):
        raise refusal(f"experts are in fp8 with blocks of 128x128, bfloat16 or float16, got {name}: take such a checkpoint")
    blocks = quant_method.weight_block_size
    if blocks is None or list(blocks) != [128, 128] or quant_method.is_fp4_expert or quant_method.use_mxfp8:
        raise refusal(f"fp8 experts have blocks of 128x128, got weight_block_size={blocks}: take such a checkpoint")
    if deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0:
        raise refusal("on this GPU SGLang packs scales for DeepGEMM when weights are loaded: set SGLANG_ENABLE_JIT_DEEPGEMM=0")


def _check_server() -> None:
    """Refuses what goes around the layer's three steps, or hides from a rank how many tokens the others have."""
    parallel = get_parallel()
    if is_sbo_enabled():
        raise refusal("there is no single-batch overlap: leave out --enable-single-batch-overlap")
    if is_tbo_enabled() and get_deepep_mode().value != "low_latency":
        raise refusal("two-batch overlap is for decoding, where batches fit the buffers: add --deepep-mode low_latency")
    if get_lora().enable_lora:
        raise refusal("SGLang runs LoRA's experts around the fused ones: leave out --enable-lora")
    if get_exec().moe.enable_eplb:
        raise refusal("SGLang's counts of experts' tokens are not kept: leave out --enable-eplb; --init-expert-location can stay")
    if parallel.attn_cp_size > 1:
        raise refusal("attention's context parallelism hides how many tokens ranks have: leave out --attn-cp-size")
    known = require_mlp_tp_gather() or (require_attn_tp_gather() and not parallel.attn_dp_enabled)
    if parallel.moe_ep_size > 1 and not known:
        raise refusal("ranks must know how many tokens the others have: leave out --moe-dense-tp-size or --enable-dp-lm-head")
