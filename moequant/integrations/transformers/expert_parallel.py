"""Expert parallelism: tokens go to their experts' ranks through moequant.

T tokens of this rank, K top-k, E experts, W ranks of the expert-parallel group, L = E / W local experts, H hidden size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation

from moequant.batch import ceil_div
from moequant.integrations.transformers.dispatchers import Place, sends_nothing
from moequant.integrations.transformers.layers import run_on, wants_grad
from moequant.integrations.transformers.settings import current, say_once
from moequant.traced import numbered

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
        self._under_grad = AllToAllEP(experts, ep_mesh, tp_mesh)
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
            say_once('expert parallelism under grad is ep_implementation="all_to_all": moequant has no backward')
            return self._under_grad(hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_compiling():
            return torch.ops.moequant.transformers_expert_parallel(hidden_states, top_k_index, top_k_weights, self._number)
        return self.run(module, hidden_states, top_k_index, top_k_weights)

    def run(self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """A call without grad. Collective.

        Args:
            module: the experts.
            hidden_states: as for a call.
            top_k_index: as for a call.
            top_k_weights: as for a call.

        Returns:
            (T, H) of the hidden states' type.

        Raises:
            ValueError: more tokens than the settings say that there are.
        """
        settings, group = current(), self.ep_mesh.get_group()
        tokens, ranks = hidden_states.shape[0], self.tp_mesh.size()
        if self.shares_batch and sends_nothing(group, hidden_states.device, settings):
            inputs = hidden_states, top_k_index, top_k_weights
            return run_on(self._shared, module, self._num_experts, inputs, tokens, settings)
        rows = ceil_div(tokens, ranks)
        first = min(tokens, self.tp_mesh.get_local_rank() * rows)
        mine = slice(first, min(tokens, first + rows))
        most = rows if self.shares_batch else settings.max_tokens
        if not self.shares_batch and settings.agree:
            largest = torch.tensor(rows, device=hidden_states.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            most = int(largest)
        if rows > most:
            raise ValueError(f"{rows} tokens of a rank are more than max_tokens={most}; configure(max_tokens=) or agree=True")
        inputs = hidden_states[mine], top_k_index[mine], top_k_weights[mine]
        sums = run_on(self._apart, module, self._num_experts, inputs, most, settings)
        if ranks == 1:
            return sums
        padded = nn.functional.pad(sums, (0, 0, 0, rows - sums.shape[0]))
        everyone = sums.new_empty(rows * ranks, sums.shape[1])
        dist.all_gather_into_tensor(everyone, padded, group=self.tp_mesh.get_group())
        return everyone[:tokens]


@torch.library.custom_op("moequant::transformers_expert_parallel", mutates_args=())
def _expert_parallel(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, implementation: int) -> Tensor:
    """`MoEQuantEP.run` as one opaque operation, for torch.compile."""
    called = numbered[implementation]
    return called.run(called._module(), hidden_states, top_k_index, top_k_weights)


@_expert_parallel.register_fake
def _(hidden_states: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
