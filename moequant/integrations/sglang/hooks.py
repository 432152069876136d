"""What SGLang asks instead of its own: where layers choose their class and their dispatcher, and around CUDA graphs."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import FusedOpPool
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec

from moequant.integrations.sglang import dispatchers
from moequant.integrations.sglang.refusals import check_layer, check_ranks, refusal
from moequant.integrations.sglang.token_dispatcher import MoEQuantTokenDispatcher, run_experts

LAYERS = "sglang.srt.layers.moe"
GRAPHS = "sglang.srt.model_executor.runner_utils.deepep_adapter.DeepEPCudaGraphRunnerAdapter"


def install() -> None:
    """Registers all hooks, which SGLang applies when its plugins are loaded."""
    HookRegistry.register(f"{LAYERS}.ep_moe.layer.get_moe_impl_class", layer_class, HookType.AROUND)
    HookRegistry.register(f"{LAYERS}.fused_moe_triton.layer.create_moe_dispatcher", create_dispatcher, HookType.AROUND)
    HookRegistry.register(f"{GRAPHS}.capture", before_capture, HookType.BEFORE)
    HookRegistry.register(f"{GRAPHS}.replay", before_replay, HookType.BEFORE)
    FusedOpPool.register_fused_func("deepep", "deep_gemm", run_experts)


class MoEQuantMoE(DeepEPMoE):
    """DeepEPMoE, which models and SGLang's eager breaks of CUDA graphs ask for by its class, without DeepGEMM's compiler.

    Args:
        **settings: as for FusedMoE.
    """

    def __init__(self, **settings: Any) -> None:
        # FusedMoE asserts it without a word
        check_ranks(settings["num_experts"])
        FusedMoE.__init__(self, **settings)
        # FusedMoE's own forward, with the runner that the quantization method made
        self.deprecate_flag = True


def layer_class(original: Callable[..., type], *args: Any, **kwargs: Any) -> type:
    """Around get_moe_impl_class.

    Args:
        original: SGLang's.
        *args: its arguments.
        **kwargs: its arguments.

    Returns:
        The class of a model's experts.
    """
    return MoEQuantMoE if _is_ours() else original(*args, **kwargs)


def create_dispatcher(original: Callable[..., Any], moe_runner_config: Any, quant_method: Any) -> Any:
    """Around create_moe_dispatcher, which is called before weights are loaded. Collective.

    Args:
        original: SGLang's.
        moe_runner_config: of the layer.
        quant_method: of the layer.

    Returns:
        The layer's dispatcher.

    Raises:
        ValueError: the layer asks for something that moequant doesn't have, or the server for another way to the experts.
    """
    if not _is_ours():
        return original(moe_runner_config, quant_method=quant_method)
    check_layer(moe_runner_config, quant_method)
    return MoEQuantTokenDispatcher(moe_runner_config)


def before_capture(*args: Any, **kwargs: Any) -> None:
    """Before a CUDA graph is captured. It keeps the limit of its waits, which is the long one until the first calls were waited for.

    Args:
        *args: not used.
        **kwargs: not used.
    """
    for dispatcher in dispatchers.all_of_them():
        dispatcher.check()


def before_replay(*args: Any, **kwargs: Any) -> None:
    """Before a CUDA graph is replayed: in a replay no code of moequant's runs that could say that a rank was lost.

    Args:
        *args: not used.
        **kwargs: not used.
    """
    for dispatcher in dispatchers.all_of_them():
        dispatcher.check(wait=False)


def _is_ours() -> bool:
    """Whether the layer that is being built is to run in moequant: a draft model may have a backend of its own."""
    asked = get_exec().moe.moe_a2a_backend
    if asked != "deepep":
        raise refusal(f"it takes the place of --moe-a2a-backend deepep, and this server has {asked!r}: add it")
    return get_moe_a2a_backend().is_deepep()
