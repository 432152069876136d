"""vLLM's quantization method "moequant": for checkpoints with fp8 weights in blocks of 128x128 as they are, and for those without
quantization, whose experts get such weights while they are loaded. Everything but the experts is vLLM's own.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend, backend_to_kernel_cls, make_fp8_moe_quant_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped, kFp8Dynamic128Sym, kFp8Static128BlockSym
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from moequant.config import QUANT_DTYPES
from moequant.integrations.vllm.exchange import Sizes, exchange_of
from moequant.integrations.vllm.experts import Exchanged, MoEQuantExperts, MoEQuantPrepareFinalize, exchanges
from moequant.integrations.vllm.settings import Settings, settings_of
from moequant.quantization import quantize_weight

BLOCK = [128, 128]
SERVED = {"quant_method": "fp8", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}
# by what --moe-backend says: vLLM's experts that take batches. Without a word, moequant's own
BATCHED = {"triton": Fp8MoeBackend.BATCHED_TRITON, "deep_gemm": Fp8MoeBackend.BATCHED_DEEPGEMM}


@dataclass(frozen=True)
class Plan:
    """How a layer is computed, found before its weights are loaded.

    Attributes:
        backend: how vLLM lays out the weights.
        experts: what multiplies by them.
        settings: the user's.
    """

    backend: Fp8MoeBackend
    experts: type[Any]
    settings: Settings

    @property
    def batched(self) -> bool:
        """Whether the experts are vLLM's."""
        return self.experts is not MoEQuantExperts


def plan(moe: FusedMoEConfig) -> Plan:
    """How a layer is computed.

    Args:
        moe: the layer's configuration.

    Returns:
        It.

    Raises:
        ValueError: it can't be, or a setting is wrong.
    """
    engine = get_current_vllm_config()
    made, why = _plan(moe, settings_of(engine.additional_config)), _unserved(moe, engine.parallel_config.expert_placement_strategy)
    if why is None:
        cls = made.experts
        _, why = cls.is_supported_config(cls, moe, kFp8Static128BlockSym, kFp8Dynamic128Sym, cls.activation_format())
    if why is None and made.batched and moe.max_num_tokens > made.settings.max_tokens:
        why = (
            f"vLLM's experts get all tokens at once, and {moe.max_num_tokens} are above max_tokens: serve with --max-num-batched-tokens "
            f"{made.settings.max_tokens} or fewer, or raise max_tokens"
        )
    if why is not None:
        raise ValueError(f"--quantization moequant: {why}")
    return made


def _plan(moe: FusedMoEConfig, settings: Settings) -> Plan:
    if moe.moe_backend == "auto":
        # the layout that leaves weights as they are loaded
        return Plan(Fp8MoeBackend.TRITON, MoEQuantExperts, settings)
    if moe.moe_backend not in BATCHED:
        raise ValueError(
            "--quantization moequant has experts of its own (--moe-backend auto), or sends rows to vLLM's "
            f"({', '.join(BATCHED)}), got --moe-backend {moe.moe_backend}"
        )
    backend = BATCHED[moe.moe_backend]
    return Plan(backend, backend_to_kernel_cls(backend)[0], settings)


def _unserved(moe: FusedMoEConfig, placement: str) -> str | None:
    """Why a layer's parallelism is not served, if it isn't."""
    parallel = moe.moe_parallel_config
    if parallel.dp_size > 1 and not parallel.use_ep:
        return "ranks with tokens of their own have to have experts of their own: add --enable-expert-parallel"
    if parallel.pcp_size > 1:
        return f"there is no prefill context parallelism: leave it out, got {parallel.pcp_size} ranks of it"
    if exchanges(moe) and moe.num_experts % parallel.ep_size:
        return (
            f"all ranks have to have as many experts, got {moe.num_experts} on {parallel.ep_size} ranks: take another number of ranks, "
            "or add redundant experts (--enable-eplb)"
        )
    if exchanges(moe) and placement != "linear":
        return f"a rank's experts have to be neighbours: --expert-placement-strategy linear, got {placement}"
    return None


def kernel_of(moe: FusedMoEConfig, quant_config: FusedMoEQuantConfig, how: Plan, quant: str) -> mk.FusedMoEKernel:
    """A layer's kernel. Collective: the first one makes what all layers share.

    Args:
        moe: the layer's configuration.
        quant_config: the layer's scales and biases.
        how: `plan`.
        quant: of the weights, as a dispatcher takes it.

    Returns:
        The kernel.
    """
    reduced = exchanges(moe)
    sizes = Sizes(
        num_experts=moe.num_experts if reduced else moe.num_local_experts,
        top_k=moe.experts_per_token,
        hidden_size=moe.hidden_dim,
        quant=quant,
        max_tokens=moe.max_num_tokens,
        padded=how.batched,
        batch_invariant=envs.VLLM_BATCH_INVARIANT,
    )
    exchange = exchange_of(get_ep_group().device_group if reduced else None, sizes, how.settings)
    if not how.batched:
        return mk.FusedMoEKernel(Exchanged(reduced), MoEQuantExperts(moe, quant_config, exchange))
    around = MoEQuantPrepareFinalize(moe, exchange)
    rows = {"max_num_tokens": around.max_num_tokens_per_rank(), "num_dispatchers": around.num_dispatchers()}
    return mk.FusedMoEKernel(around, how.experts(moe_config=moe, quant_config=quant_config, **rows))


def quant_of(weight: torch.Tensor) -> str:
    """The name of a weight's type.

    Args:
        weight: a quantized one.

    Returns:
        As a dispatcher takes it.
    """
    return next(name for name, dtype in QUANT_DTYPES.items() if dtype == weight.dtype)


class MoEQuantMethod(Fp8MoEMethod):
    """Of experts whose weights a checkpoint has in fp8.

    Args:
        quant_config: the model's.
        layer: the experts.

    Raises:
        ValueError: moequant can't compute them. Before they are loaded.
    """

    def __init__(self, quant_config: Fp8Config, layer: RoutedExperts) -> None:
        # its own constructor would look for experts of vLLM's
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.quant_config = quant_config
        self.weight_block_size = self.moe_block_shape = quant_config.weight_block_size
        self.block_quant, self.per_act_token_quant = True, False
        self.weight_scale_name, self.weight_scale_refine = "weight_scale_inv", None
        self.plan = plan(self.moe)
        self.experts_cls, self.fp8_backend = self.plan.experts, self.plan.backend

    def _init_moe_kernel(self, layer: RoutedExperts) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = kernel_of(self.moe, self.moe_quant_config, self.plan, quant_of(layer.w13_weight))


class MoEQuantOnlineMethod(OnlineMoEMethodBase):
    """Of experts whose weights a checkpoint has in bfloat16 or float16: a layer is quantized as soon as it is loaded.

    Args:
        layer: the experts.

    Raises:
        ValueError: moequant can't compute them. Before they are loaded.
    """

    def __init__(self, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.plan = plan(self.moe)
        self.experts_cls = self.plan.experts

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Quantizes a layer.

        Args:
            layer: with all its weights.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        dtype = current_platform.fp8_dtype()
        for name, segments in (("w13", self.moe.w13_num_shards), ("w2", 1)):
            made = quantize_weight(getattr(layer, f"{name}_weight").data, dtype=dtype, segments=segments)
            replace_parameter(layer, f"{name}_weight", made.values)
            replace_parameter(layer, f"{name}_weight_scale_inv", made.scales)
        layer.weight_block_size = BLOCK
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = kernel_of(self.moe, self.moe_quant_config, self.plan, quant_of(layer.w13_weight))
        layer._already_called_process_weights_after_loading = True

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """What vLLM's kernel knows of a layer's weights.

        Args:
            layer: quantized.

        Returns:
            It.
        """
        return make_fp8_moe_quant_config(
            fp8_backend=self.plan.backend,
            w1_scale=layer.w13_weight_scale_inv,
            w2_scale=layer.w2_weight_scale_inv,
            a1_scale=None,
            a2_scale=None,
            w1_bias=getattr(layer, "w13_bias", None),
            w2_bias=getattr(layer, "w2_bias", None),
            block_shape=BLOCK,
        )


class MoEQuantConfig(Fp8Config):
    """The method for a model. Without arguments, as vLLM makes it for a checkpoint without quantization, the experts are quantized, and
    nothing else is.

    Args:
        **settings: of a checkpoint, as `Fp8Config` takes them.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @classmethod
    def get_name(cls) -> str:
        """Of the method.

        Returns:
            What --quantization takes.
        """
        return "moequant"

    @classmethod
    def get_min_capability(cls) -> int:
        """Of NVIDIA GPUs.

        Returns:
            That of the first ones with fp8.
        """
        return 89

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Whether a checkpoint is to be served by this method.

        Args:
            hf_quant_cfg: its quantization.
            user_quant: what --quantization says.
            hf_config: the model's.

        Returns:
            The method's name if it was asked for, otherwise None.

        Raises:
            ValueError: it was asked for, and the checkpoint is quantized otherwise.
        """
        if user_quant != cls.get_name():
            return None
        names = "quant_method", "weight_block_size", "activation_scheme", "store_dtype"
        found = {name: hf_quant_cfg[name] for name in names if hf_quant_cfg.get(name) is not None}
        if {"activation_scheme": "dynamic", **found} != SERVED:
            raise ValueError(
                "--quantization moequant takes checkpoints with fp8 weights in blocks of 128x128 and dynamic activations, or without "
                f"quantization, got {found}; serve this one without --quantization"
            )
        return cls.get_name()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What loads and computes a layer.

        Args:
            layer: any.
            prefix: its name.

        Returns:
            For experts that are quantized one of this module's, otherwise vLLM's own.
        """
        names = {"fused_mapping": self.packed_modules_mapping, "match_mode": self.ignored_layers_match_mode}
        quantized = self.weight_block_size is not None
        if isinstance(layer, RoutedExperts) and not is_layer_skipped(prefix=prefix, ignored_layers=self.ignored_layers, **names):
            return MoEQuantMethod(self, layer) if quantized else MoEQuantOnlineMethod(layer)
        if quantized:
            return super().get_quant_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register(name: str) -> None:
    """Makes it known to vLLM. May be called again.

    Args:
        name: what --quantization takes.
    """
    register_quantization_config(name)(MoEQuantConfig)
