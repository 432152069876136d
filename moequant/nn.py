"""`MoEExperts`: the experts of a layer as a module that is trained.

T tokens of this rank, K top-k, E experts, W ranks, L = E / W local experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moequant.activations import Activation, activation_of
from moequant.checks import check_choice, check_int, check_is
from moequant.dispatcher import MoEQuantDispatcher
from moequant.experts import GroupedExperts
from moequant.formats import FLOAT_DTYPES
from moequant.training.layer import requires_grad, train
from moequant.training.operands import Operands
from moequant.training.precision import Precision
from moequant.transport.lifecycle import step

__all__ = ["MoEExperts"]


class _Shared:
    """Something that copies of a module share."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class MoEExperts(nn.Module):
    """This rank's experts, between a dispatch and a combine: everything of an expert-parallel layer but the router, which stays yours.

    The parameters are plain ones, in bfloat16, float16 or float32: `w13` (L, 2I, H), gate first, not gated (L, I, H), `w2` (L, H, I),
    and with bias `bias13` and `bias2`. What the products take is made of them in each forward and each backward, so that no optimizer, no
    `load_state_dict` and no `.to` leaves an old copy in use, unless is_first_microbatch says that they stay as they are. Expert e of
    all E starts with the same numbers on any number of ranks.

    Forward and backward are collective: all ranks of the dispatcher's group call all layers in one order, and all of them call
    `backward`, those without tokens too. One dispatcher serves all layers. Kept for the backward are the hidden states, the routing and
    GEMM 1's result, of which keep_quantized takes half the memory and recompute none; rows and their order follow from the ids alone,
    so that `torch.utils.checkpoint` recomputes the same.

    Gradients of the weights are sums over the tokens of all ranks, of whatever these call `backward` on. Copies of the module share the
    dispatcher.

    Args:
        dispatcher: of quant "none" or "fp8_e4m3fn"; for the latter recipe "ue8m0" is the best.
        intermediate_size: I.
        activation: an `Activation`, or the name of its function.
        bias: whether both products have a bias.
        recompute: GEMM 1 runs again in the backward, and its result is not kept: less memory for a third of the forward's products.
        keep_quantized: GEMM 1's result is kept for the backward in fp8, rounded once more for its derivatives: half the memory. The
            output stays the same. Of a quantizing dispatcher, without recompute.
        dtype: of the parameters; None: torch's default.
        device: of the parameters; None: the dispatcher's.

    Raises:
        ValueError: a format or recipe in which nothing is trained, or another wrong setting.
    """

    def __init__(
        self,
        dispatcher: MoEQuantDispatcher,
        intermediate_size: int,
        *,
        activation: str | Activation = "silu",
        bias: bool = False,
        recompute: bool = False,
        keep_quantized: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_is("dispatcher", dispatcher, MoEQuantDispatcher)
        check_int("intermediate_size", intermediate_size, 1)
        for name, value in (("bias", bias), ("recompute", recompute), ("keep_quantized", keep_quantized)):
            check_is(name, value, bool)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_choice("dtype", dtype, FLOAT_DTYPES)
        self._shared, config = _Shared(dispatcher), dispatcher.config
        Precision.of(config)
        if keep_quantized and (recompute or config.quant == "none"):
            raise ValueError(
                f'keep_quantized is of a dispatcher that quantizes, without recompute: got quant="{config.quant}" and '
                f'recompute={recompute}; leave it out, or build the dispatcher with quant="fp8_e4m3fn"'
            )
        self.keep_quantized = keep_quantized
        self.intermediate_size, self.kind, self.recompute = intermediate_size, activation_of(activation), recompute
        experts, hidden, wide = config.num_local_experts, config.hidden_size, self.kind.width * intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=dispatcher.device if device is None else device))

        self.w13, self.w2 = parameter(experts, wide, hidden), parameter(experts, hidden, intermediate_size)
        self.bias13 = parameter(experts, wide) if bias else None
        self.bias2 = parameter(experts, hidden) if bias else None
        self._operands: Operands | None = None
        self.reset_parameters()

    @property
    def dispatcher(self) -> MoEQuantDispatcher:
        """The one that it was built with."""
        return self._shared.value

    def reset_parameters(self) -> None:
        """Weights of variance 1 / columns, other ones for each of all E experts, and biases of zero. Takes one number of torch's default
        generator on each rank, which all have to have seeded alike.
        """
        seed, first = int(torch.randint(2**62, (), device="cpu")), self.dispatcher._rank * len(self.w13)
        with torch.no_grad():
            for number in range(0 if self.w13.is_meta else len(self.w13)):
                generator = torch.Generator(self.w13.device).manual_seed(seed + first + number)
                for w in (self.w13, self.w2):
                    w[number].normal_(std=w.shape[2] ** -0.5, generator=generator)
            for bias in (self.bias13, self.bias2):
                if bias is not None:
                    bias.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        is_first_microbatch: bool | None = None,
        slot: int = 0,
    ) -> Tensor:
        """The layer. Collective.

        Args:
            hidden_states: (T, H) bfloat16, float16 or float32.
            topk_ids: (T, K), as for `MoEQuantDispatcher.dispatch`.
            topk_weights: (T, K) float32, bfloat16 or float16.
            is_first_microbatch: of several between two steps of the optimizer. True: what the products take of w13 and w2 is made anew,
                and kept. False: what is kept is used, in the backward too. None: made anew each time, and what was kept is dropped, but
                in a forward under no_grad. As TransformerEngine's modules have it. In fp8 two bytes are kept of each weight, for both
                directions; of parameters that aren't bfloat16, with quant="none", a bfloat16 copy.
            slot: of the dispatcher, whose buffers are used, in the backward too.

        Returns:
            (T, H) of the hidden states' type: each token's sum of its experts' rows by their weights. Errors are those of
            `MoEQuantDispatcher.dispatch` and `combine`.

        Raises:
            ValueError: is_first_microbatch is none of these, or wrong tensors.
            RuntimeError: is_first_microbatch=False after no True, or after a None, or torch knows that the weights have changed since.
        """
        operands = self._operands_of(is_first_microbatch)
        return _run(self.dispatcher, self, (hidden_states, topk_ids, topk_weights), slot, operands)

    def _operands_of(self, is_first_microbatch: bool | None) -> Operands | None:
        if is_first_microbatch is not None and not isinstance(is_first_microbatch, bool):
            raise ValueError(f"is_first_microbatch must be True, False or None, got {is_first_microbatch!r}")
        if is_first_microbatch is None:
            # a validation in between leaves what is kept
            if torch.is_grad_enabled():
                self._operands = None
            return None
        if is_first_microbatch:
            self._operands = Operands(Precision.of(self.dispatcher.config), self.w13, self.w2)
        elif self._operands is None:
            raise RuntimeError(
                "is_first_microbatch=False, but no forward with True came before it, or one without the argument came since, which keeps "
                "nothing: give True in the first forward after each step of the optimizer"
            )
        else:
            self._operands.check(self.w13, self.w2)
        return self._operands

    def grouped_experts(self) -> GroupedExperts:
        """The experts with the weights that they have now, for inference: they don't follow later changes.

        Returns:
            `GroupedExperts` of the dispatcher's quant and recipe.
        """
        experts = Precision.of(self.dispatcher.config).experts(self.w13, self.w2, self.bias13, self.bias2, self.kind)
        assert isinstance(experts, GroupedExperts)
        return experts

    def extra_repr(self) -> str:
        """What stands between the parentheses.

        Returns:
            The sizes.
        """
        config = self.dispatcher.config
        sizes = f"{config.num_local_experts} of {config.num_experts} experts, {config.hidden_size}, {self.intermediate_size}"
        return f"{sizes}, {self.kind.text!r}, bias={self.bias13 is not None}, quant={config.quant!r}, recompute={self.recompute}"


@step
def _run(
    dispatcher: MoEQuantDispatcher,
    experts: MoEExperts,
    tokens: tuple[Tensor, Tensor, Tensor],
    slot: int,
    operands: Operands | None,
) -> Tensor:
    """The forward: one thread's at a time, and a graph break for torch.compile, as the products make their weights."""
    weights = experts.w13, experts.w2, experts.bias13, experts.bias2
    # where nothing has a gradient, nothing is kept for one, and the bits are those of inference
    recompute = experts.recompute or not requires_grad(*tokens, *experts.parameters(recurse=False))
    kept = {"recompute": recompute, "keep_quantized": experts.keep_quantized, "operands": operands}
    return train(dispatcher, tokens, weights, experts.kind, **kept, slot=slot, layer=dispatcher._layer_of(experts))
