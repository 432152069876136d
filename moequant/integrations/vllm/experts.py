"""The experts of vLLM's modular MoE kernel on moequant, in two pairings:

    `Exchanged` + `MoEQuantExperts`            the experts dispatch, multiply and combine: over NVLink the second product stores its rows
                                               at the tokens' ranks, and long prefills go in chunks
    `MoEQuantPrepareFinalize` + vLLM's own     prepare dispatches, finalize combines, and between them are vLLM's batched experts

T tokens of this rank, K top-k, E experts, W ranks, L local experts, M rows of an expert's buffer, H hidden size, I intermediate size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from torch.nn.functional import pad
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.prepare_finalize.passthrough import PassThroughPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kFp8Dynamic128Sym, kFp8Static128BlockSym

from moequant.batch import DispatchHandle, QuantizedTensor
from moequant.experts import GroupedExperts
from moequant.integrations.vllm.activations import KNOWN, activation_of
from moequant.integrations.vllm.exchange import Exchange


def exchanges(moe: FusedMoEConfig) -> bool:
    """Whether ranks hold tokens and experts of their own. Otherwise each has all tokens, and vLLM adds up what the ranks make of them.

    Args:
        moe: the layer's configuration.

    Returns:
        The answer.
    """
    return moe.moe_parallel_config.use_all2all_kernels


def tokens_across(moe: FusedMoEConfig, tokens: int) -> list[int]:
    """T of each rank, as the host knows them.

    Args:
        moe: the layer's configuration.
        tokens: T.

    Returns:
        W numbers, or T alone where nothing is exchanged.

    Raises:
        RuntimeError: vLLM has not said them, or less than T.
    """
    if not exchanges(moe):
        return [tokens]
    known = get_forward_context().dp_metadata
    if known is None:
        raise RuntimeError(
            "the ranks' numbers of tokens are not in vLLM's forward context: call the layer in set_forward_context(num_tokens=)"
        )
    across = known.local_sizes or known.num_tokens_across_dp_cpu.tolist()
    if tokens > max(across):
        raise RuntimeError(f"this rank has {tokens} tokens, and vLLM's forward context says {across} of the ranks")
    return across


def ids_to_send(moe: FusedMoEConfig, ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Ids as a dispatcher takes them.

    Args:
        moe: the layer's configuration.
        ids: (T, K), of all experts.
        expert_map: (E,), each expert's place on this rank, or -1; None: as numbered.

    Returns:
        (T, K), -1 for what is neither sent nor multiplied: rows that only fill up a graph's batch, and, where nothing is exchanged, other
        ranks' experts.
    """
    if expert_map is not None and not exchanges(moe):
        # -1 is the last place
        ids = torch.cat((expert_map, expert_map.new_full((1,), -1)))[ids.long()]
    filled = get_forward_context().is_padding if is_forward_context_available() else None
    if filled is None:
        return ids
    tokens = ids.shape[0]
    # of sequence parallel ranks each has its part of the rows, the last one less
    begin = moe.moe_parallel_config.ep_rank % moe.sp_size * tokens
    mine = filled[begin : begin + tokens]
    return ids.masked_fill(pad(mine, (0, tokens - mine.shape[0]), value=True)[:, None], -1)


class Exchanged(PassThroughPrepareAndFinalize):
    """Leaves everything to the experts.

    Args:
        reduced: whether what they return is the sum over all ranks.
    """

    def __init__(self, reduced: bool) -> None:
        super().__init__()
        self.reduced = reduced

    def output_is_reduced(self) -> bool:
        """Whether vLLM has nothing to add up.

        Returns:
            The answer.
        """
        return self.reduced


class MoEQuantExperts(mk.FusedMoEExpertsModular):
    """Experts that dispatch and combine.

    Args:
        moe_config: the layer's.
        quant_config: the layer's.
        exchange: all layers'.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig, exchange: Exchange) -> None:
        super().__init__(moe_config, quant_config)
        self.exchange = exchange
        self._experts: GroupedExperts | None = None
        # of the weights that these are made of
        self._places = (0, 0)

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Rows as tokens have them.

        Returns:
            The format.
        """
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        """The dispatch quantizes."""
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return (weight_key, activation_key) == (kFp8Static128BlockSym, kFp8Dynamic128Sym)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in KNOWN

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        # what it does not is said in words: method._unserved
        return True

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        """Nothing is left to add up.

        Returns:
            What does nothing.
        """
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *others: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspaces of vLLM's: the dispatchers have some that all layers share.

        Args:
            M: T.
            N: 2I.
            K: H.
            *others: what vLLM says besides.

        Returns:
            Two empty ones, and the output's.
        """
        return (0,), (0,), (M, K)

    def apply(self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, **call: Any) -> None:
        """A layer. Collective.

        Args:
            output: (T, H), written.
            hidden_states: (T, H).
            w1: (L, 2I, H), gate first.
            w2: (L, H, I).
            **call: vLLM's other arguments: topk_weights, topk_ids, activation, expert_map, apply_router_weight_on_input.
        """
        ids = ids_to_send(self.moe_config, call["topk_ids"], call["expert_map"])
        rows, weights = weighted(hidden_states, call["topk_weights"], call["apply_router_weight_on_input"])
        across = tokens_across(self.moe_config, rows.shape[0])
        self.exchange.run((rows, ids, weights), self._experts_of(w1, w2, call["activation"]), across, output)

    def _experts_of(self, w1: Tensor, w2: Tensor, activation: MoEActivation) -> GroupedExperts:
        """The weights where vLLM has them, which may fill them anew."""
        places = w1.data_ptr(), w2.data_ptr()
        if self._experts is None or self._places != places:
            assert self.w1_scale is not None and self.w2_scale is not None
            kind = activation_of(activation, self.activation_config)
            self._places = places
            self._experts = GroupedExperts(
                QuantizedTensor(w1.data, self.w1_scale.data, "block", segments=kind.halves),
                QuantizedTensor(w2.data, self.w2_scale.data, "block"),
                activation=kind,
                bias13=self.w1_bias,
                bias2=self.w2_bias,
            )
        return self._experts


def weighted(hidden: Tensor, weights: Tensor, on_input: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and weights, for models that weight what goes into an expert.

    Args:
        hidden: (T, H).
        weights: (T, K).
        on_input: whether it is such a model, which has K = 1.

    Returns:
        (T, H) and (T, K).
    """
    return (hidden * weights.to(hidden.dtype), torch.ones_like(weights)) if on_input else (hidden, weights)


class MoEQuantPrepareFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """Dispatch and combine around experts of vLLM's, whose rows lie in batches: (L, M, H).

    Args:
        moe: the layer's configuration.
        exchange: all layers', padded.
    """

    def __init__(self, moe: FusedMoEConfig, exchange: Exchange) -> None:
        super().__init__()
        self.moe, self.exchange, self.dispatcher = moe, exchange, exchange.chunks
        self._handle: DispatchHandle | None = None

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        """Each expert's rows in a buffer of its own."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    def topk_indices_dtype(self) -> torch.dtype | None:
        """Of the ids: int32 and int64 will do.

        Returns:
            None.
        """
        return None

    def max_num_tokens_per_rank(self) -> int:
        """What vLLM multiplies by `num_dispatchers`.

        Returns:
            M / W, M being a multiple of 16.
        """
        return self.dispatcher.config.max_rows // self.num_dispatchers()

    def num_dispatchers(self) -> int:
        """Ranks that send to an expert.

        Returns:
            W.
        """
        return self.dispatcher.config.world_size

    def output_is_reduced(self) -> bool:
        """Whether vLLM has nothing to add up.

        Returns:
            The answer.
        """
        return exchanges(self.moe)

    def prepare(self, a1: Tensor, topk_weights: Tensor, topk_ids: Tensor, *call: Any, **others: Any) -> mk.PrepareResultType:
        """Dispatches. Collective.

        Args:
            a1: (T, H).
            topk_weights: (T, K).
            topk_ids: (T, K).
            *call: vLLM's other arguments: the number of experts, expert_map, apply_router_weight_on_input, and of quantization.
            **others: what of them vLLM gives by name.

        Returns:
            Values (L, M, H), scales and counts.
        """
        _, expert_map, on_input, *_ = call
        self.exchange.settle(self)
        ids, across = ids_to_send(self.moe, topk_ids, expert_map), tokens_across(self.moe, a1.shape[0])
        rows, weights = weighted(a1, topk_weights, on_input)
        batch, self._handle = self.dispatcher.dispatch(rows, ids, weights, expected_tokens=sum(across))
        return batch.values, batch.scales, mk.ExpertTokensMetadata(batch.num_tokens, None), None, None

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *call: Any) -> None:
        """Combines. Collective.

        Args:
            output: (T, H), written.
            fused_expert_output: (L, M, H).
            *call: vLLM's other arguments.
        """
        assert isinstance(call[-1], TopKWeightAndReduceDelegate) and self._handle is not None
        self.dispatcher.combine(fused_expert_output, self._handle, out=output)
