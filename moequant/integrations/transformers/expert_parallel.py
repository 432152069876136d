"""Expert parallelism: tokens go to their experts' ranks through moequant.

T tokens of this rank, K top-k, E experts, W ranks of the expert-parallel group, L = E / W local experts, H hidden size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation

from moequant.batch import ceil_div
from moequant.integrations.transformers.dispatchers import Place, sends_nothing
from moequant.integrations.transformers.layers import run_on
from moequant.integrations.transformers.settings import current, say_once
from moequant.integrations.transformers.training import Trained, trained, wants_grad
from moequant.traced import numbered, refuse_export, untraced

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Slices(NamedTuple):
    """A batch that all ranks of a group hold, of which each takes a slice.

    Attributes:
        group: of them.
        rank: this one.
        ranks: how many.
        tokens: T.
    """

    group: dist.ProcessGroup
    rank: int
    ranks: int
    tokens: int

    @property
    def rows(self) -> int:
        """Of the largest slice."""
        return ceil_div(self.tokens, self.ranks)

    @property
    def mine(self) -> slice:
        """This rank's, which is shorter than others', or empty, where they don't come out even."""
        first = min(self.tokens, self.rank * self.rows)
        return slice(first, min(self.tokens, first + self.rows))

    def taken(self, x: Tensor) -> Tensor:
        """This rank's slice.

        Args:
            x: (T, ...).

        Returns:
            (N, ...), a view.
        """
        return x[self.mine]

    def gathered(self, x: Tensor) -> Tensor:
        """All ranks' slices. Collective.

        Args:
            x: (N, ...), this rank's.

        Returns:
            (T, ...).
        """
        padded = x.new_zeros(self.rows, *x.shape[1:])
        padded[: len(x)] = x
        everyone = x.new_empty(self.rows * self.ranks, *x.shape[1:])
        dist.all_gather_into_tensor(everyone, padded, group=self.group)
        return everyone[: self.tokens]


class _TakeSlice(torch.autograd.Function):
    """This rank's slice of a batch, whose gradient has the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, slices: Slices, x: Tensor) -> Tensor:
        ctx.slices = slices
        return slices.taken(x).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, ctx.slices.gathered(grad_outputs[0])


class _GatherSlices(torch.autograd.Function):
    """The batch of all ranks' slices. Each rank has its gradient, and that of its own slice is part of it."""

    @staticmethod
    def forward(ctx: Any, slices: Slices, x: Tensor) -> Tensor:
        ctx.slices = slices
        return slices.gathered(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, ctx.slices.taken(grad_outputs[0])


class MoEQuantEP(EPImplementation):
    """One experts module's. Expert e is on rank e // L of the group, as transformers places them.

    Ranks that hold the same rows (tensor parallelism) each take those of their own experts, where they are all that share the experts,
    and nothing travels there; or a slice of the rows, whose sums are gathered. The sums are those of one rank, to the bit.

    Args:
        experts: the module.
        ep_mesh: the ranks that share the experts.
        tp_mesh: the ranks that hold the same rows as this one.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._num_experts = int(experts.num_experts) * ep_mesh.size()  # type: ignore[arg-type]
        self._module = weakref.ref(experts)
        # a batch that all ranks of the group hold, and batches of their own
        self._shared, self._apart = (Place(ep_mesh.get_group(), shared=shared) for shared in (True, False))
        self._all_to_all = AllToAllEP(experts, ep_mesh, tp_mesh)
        self._number = numbered.add(self)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sums of this rank's tokens. Collective.

        Args:
            hidden_states: (T, H) bfloat16, float16 or float32.
            top_k_index: (T, K) int64, ids among all E experts.
            top_k_weights: (T, K) of any float type.

        Returns:
            (T, H) of the hidden states' type.
        """
        module = self._module()
        assert module is not None
        if wants_grad(module, hidden_states, top_k_weights):
            return self.under_grad(module, hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_compiling():
            refuse_export()
            return torch.ops.moequant.transformers_expert_parallel(hidden_states, top_k_index, top_k_weights, self._number)
        return self.run(module, hidden_states, top_k_index, top_k_weights)

    @untraced
    def under_grad(self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """A call with a backward, which is collective too: moequant's, or that of what transformers has.

        Args:
            module: the experts.
            hidden_states: as for a call.
            top_k_index: as for a call.
            top_k_weights: as for a call.

        Returns:
            (T, H) of the hidden states' type.
        """
        of = trained(module)
        if isinstance(of, str):
            say_once(f'expert parallelism of {type(module).__name__} under grad is ep_implementation="all_to_all": {of}')
            return self._all_to_all(hidden_states, top_k_index, top_k_weights)
        return self.run(module, hidden_states, top_k_index, top_k_weights, of)

    def run(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        of: Trained | None = None,
    ) -> Tensor:
        """A call in moequant. Collective.

        Args:
            module: the experts.
            hidden_states: as for a call.
            top_k_index: as for a call.
            top_k_weights: as for a call.
            of: what is trained of them; None: nothing, and there is no grad.

        Returns:
            (T, H) of the hidden states' type.

        Raises:
            ValueError: more tokens than the settings say that there are.
        """
        settings, group = current(), self.ep_mesh.get_group()
        inputs, ranks = (hidden_states, top_k_index, top_k_weights), self.tp_mesh.size()
        slices = Slices(self.tp_mesh.get_group(), self.tp_mesh.get_local_rank(), ranks, hidden_states.shape[0])
        if self.shares_batch and sends_nothing(group, hidden_states.device, settings):
            return run_on(self._shared, module, self._num_experts, inputs, slices.tokens, settings, of)
        rows = most = slices.rows
        if not self.shares_batch:
            most = settings.max_tokens
            if settings.agree:
                largest = torch.tensor(rows, device=hidden_states.device)
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
                most = int(largest)
        if rows > most:
            raise ValueError(f"{rows} tokens of a rank are more than max_tokens={most}; configure(max_tokens=) or agree=True")
        if ranks == 1:
            return run_on(self._apart, module, self._num_experts, inputs, most, settings, of)
        # without grad these functions would only cost time
        take, gather = (_TakeSlice.apply, _GatherSlices.apply) if of is not None else (Slices.taken, Slices.gathered)
        inputs = take(slices, hidden_states), slices.taken(top_k_index), take(slices, top_k_weights)
        return gather(slices, run_on(self._apart, module, self._num_experts, inputs, most, settings, of))


@torch.library.custom_op("moequant::transformers_expert_parallel", mutates_args=())
def _expert_parallel(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, implementation: int) -> Tensor:
    """`MoEQuantEP.run` as one opaque operation, for torch.compile."""
    called = numbered[implementation]
    return called.run(called._module(), hidden_states, top_k_index, top_k_weights)


@_expert_parallel.register_fake
def _(hidden_states: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
