"""A layer's dispatcher, as SGLang's FusedMoE calls it, and its experts.

T tokens of this rank, K top-k, L local experts, M rows of an expert's buffer, R rows of a rank's (layout "ragged"), H hidden size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.dp_attention import get_dp_global_num_tokens
from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher, DispatchOutputFormat
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput, DeepEPLLDispatchOutput
from sglang.srt.layers.moe.utils import is_tbo_enabled
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from moequant.activations import Activation
from moequant.batch import DispatchHandle, ExpertBatch, QuantizedTensor, ceil_div
from moequant.experts import GroupedExperts
from moequant.integrations.sglang.dispatchers import Sizes, dispatchers_of
from moequant.integrations.sglang.refusals import format_of


class Tokens(NamedTuple):
    """What dispatch hands on where one call does everything: the tokens, which are still here.

    Attributes:
        hidden_states: (T, H).
        topk_ids: (T, K), -1 for "no expert".
        topk_weights: (T, K).
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @property
    def format(self) -> DispatchOutputFormat:
        """DeepEP's of low latency, which models expect of this backend."""
        return DispatchOutputFormat.DEEPEP_LL


class Received(DeepEPLLDispatchOutput):
    """DeepEP's output of low latency: hidden states (L, M, H) and scales (L, M, H / 128), ragged (R, ...), and masked_m (L,) rows.

    Attributes:
        batch: of which these are the tensors.
    """

    batch: ExpertBatch


class MoEQuantTokenDispatcher(BaseDispatcher):
    """Of one layer; those of a model share what they send with. Collective where sizes first come.

    `dispatch` and `combine` leave everything to the experts between them: GEMM 2 stores rows at their tokens' ranks, and more tokens than
    there is room for go in as many calls as the rank with most needs. Two-batch overlap parts the steps, each half in a slot of its own.

    Args:
        config: SGLang's MoeRunnerConfig of the layer, which was not refused.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._config = config
        quant = format_of(config.layer.quant_method, config.params_dtype)
        slots = 2 if is_tbo_enabled() else 1
        sizes = Sizes(config.num_experts, config.top_k, config.hidden_size, quant, slots)
        self._inners = dispatchers_of(get_parallel().moe_ep_group.device_group, sizes)
        # of a dispatch under way, by slot, and its ids
        self._handles: dict[int, tuple[DispatchHandle, Tensor]] = {}
        self._experts: tuple[tuple[int, ...], GroupedExperts] | None = None

    def dispatch(self, hidden_states: Tensor, topk_output: Any) -> Tokens:
        """Sends nothing yet.

        Args:
            hidden_states: (T, H).
            topk_output: SGLang's StandardTopKOutput.

        Returns:
            The tokens, as they are.
        """
        return Tokens(hidden_states, topk_output.topk_ids, topk_output.topk_weights)

    def combine(self, combine_input: DeepEPLLCombineInput) -> Tensor:
        """What the experts returned.

        Args:
            combine_input: of `run_experts`.

        Returns:
            (T, H), the sums.
        """
        return combine_input.hidden_states

    def dispatch_a(self, hidden_states: Tensor, topk_output: Any, tbo_subbatch_index: int | None = None) -> None:
        """The first half of a dispatch.

        Args:
            hidden_states: (T, H), no more tokens than there is room for.
            topk_output: SGLang's StandardTopKOutput.
            tbo_subbatch_index: 0, 1, or None for 0.
        """
        slot = tbo_subbatch_index or 0
        ids, weights = topk_output.topk_ids, topk_output.topk_weights
        handle = self._inners[-1].dispatch_send(hidden_states, ids, weights, slot=slot, layer=self._config.layer_id)
        self._handles[slot] = handle, ids

    def dispatch_b(self, tbo_subbatch_index: int | None = None) -> Received:
        """The second half.

        Args:
            tbo_subbatch_index: as for the first.

        Returns:
            The batch of this rank's experts.
        """
        handle, ids = self._handles[tbo_subbatch_index or 0]
        batch = self._inners[-1].dispatch_recv(handle)
        received = Received(batch.values, batch.scales, ids, handle.topk_weights, batch.num_tokens, batch.expected_rows)
        received.batch = batch
        return received

    def combine_a(self, combine_input: DeepEPLLCombineInput, tbo_subbatch_index: int | None = None) -> None:
        """The first half of a combine.

        Args:
            combine_input: of `run_experts`.
            tbo_subbatch_index: as for `dispatch_a`.
        """
        self._inners[-1].combine_send(combine_input.hidden_states, self._handles[tbo_subbatch_index or 0][0])

    def combine_b(self, tbo_subbatch_index: int | None = None) -> Tensor:
        """The second half.

        Args:
            tbo_subbatch_index: as for `dispatch_a`.

        Returns:
            (T, H), the sums.
        """
        return self._inners[-1].combine_recv(self._handles.pop(tbo_subbatch_index or 0)[0])

    def run(self, tokens: Tokens, experts: GroupedExperts) -> Tensor:
        """The whole layer, in as many calls on each rank.

        Args:
            tokens: of `dispatch`.
            experts: of this rank.

        Returns:
            (T, H), the sums.
        """
        ranks = tokens_of_ranks(tokens.hidden_states.shape[0], self._inners[0].config.world_size)
        most = max(ranks)
        inner = next((inner for inner in self._inners if inner.config.max_tokens_per_rank >= most), self._inners[-1])
        room = inner.config.max_tokens_per_rank
        out = torch.empty_like(tokens.hidden_states)
        for begin in range(0, max(most, 1), room):
            hidden, ids, weights = (x[begin : begin + room] for x in tokens)
            together = sum(min(max(count - begin, 0), room) for count in ranks)
            part = out[begin : begin + room]
            inner(hidden, ids, weights, experts, layer=self._config.layer_id, out=part, expected_tokens=together)
        return out

    def experts(self, info: DeepGemmMoeQuantInfo) -> GroupedExperts:
        """This rank's experts, made once: they hold SGLang's parameters, and follow what is written to them.

        Args:
            info: what the quantization method has for DeepGEMM.

        Returns:
            Them.
        """
        parts = [x for x in (info.w13_weight, info.w2_weight, info.w13_scale, info.w2_scale) if x is not None]
        addresses = tuple(x.data_ptr() for x in parts)
        if self._experts is None or self._experts[0] != addresses:
            first, second = info.w13_weight.data, info.w2_weight.data
            if info.w13_scale is not None and info.w2_scale is not None:
                first = QuantizedTensor(first, info.w13_scale.data, "block", segments=2)
                second = QuantizedTensor(second, info.w2_scale.data, "block")
            self._experts = addresses, GroupedExperts(first, second, activation=Activation(limit=self._config.swiglu_limit))
        return self._experts[1]


def run_experts(dispatch_output: Tokens | Received, quant_info: DeepGemmMoeQuantInfo, runner_config: Any) -> DeepEPLLCombineInput:
    """SGLang's fused function of ("deepep", "deep_gemm"). Collective, unless two-batch overlap has parted the steps.

    Args:
        dispatch_output: of a `MoEQuantTokenDispatcher`.
        quant_info: the layer's weights.
        runner_config: of the layer.

    Returns:
        What the dispatcher's combine takes.
    """
    dispatcher: MoEQuantTokenDispatcher = runner_config.layer.dispatcher
    experts = dispatcher.experts(quant_info)
    if isinstance(dispatch_output, Received):
        result = experts(dispatch_output.batch)
    else:
        result = dispatcher.run(dispatch_output, experts)
    return DeepEPLLCombineInput(result, dispatch_output.topk_ids, dispatch_output.topk_weights)


def tokens_of_ranks(mine: int, ranks: int) -> list[int]:
    """How many tokens each rank has, as SGLang agreed before the step.

    Args:
        mine: tokens of this rank.
        ranks: of the group.

    Returns:
        Their numbers, by rank.

    Raises:
        RuntimeError: they are not those of this step, and tokens would be left out.
    """
    counts, parts = get_dp_global_num_tokens(), get_parallel().attn_tp_size
    # ranks that share attention each take a part of its tokens, the first ones one more
    each = [ceil_div(count - part, parts) for count in counts or () for part in range(parts)]
    if ranks == 1 or counts is None:
        return [mine] * ranks
    if len(each) != ranks or mine > max(each):
        raise RuntimeError(f"SGLang says that the {ranks} ranks have {each} tokens, and this one has {mine}; please report this")
    return each
