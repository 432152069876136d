"""torchtitan's mixture-of-experts layers on moequant, forward and backward: an override of its token dispatcher.

    --override.imports moequant.integrations.torchtitan.token_dispatcher

Router and experts stay torchtitan's. Needs torchtitan 0.3; raises ImportError otherwise.

T tokens of this rank, K top-k, E experts, L local experts, R rows of a rank's, D hidden size, as torchtitan calls it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moequant.config import ROW_ALIGNMENT
from moequant.dispatcher import MoEQuantDispatcher
from moequant.integrations.groups import ByGroup
from moequant.integrations.versions import UNTESTED, installed, takes

# of these, as the interface of its dispatchers changes with each
WANTED = 0, 3


def require(found: str | None) -> None:
    """Refuses a torchtitan that this was not written for.

    Args:
        found: its version, or None where there is none.

    Raises:
        ImportError: there is none, or it is another one.
    """
    wanted = ".".join(map(str, WANTED))
    if found is None or not takes("torchtitan", found, WANTED):
        raise ImportError(
            f"moequant.integrations.torchtitan was written for torchtitan {wanted}, got {found or 'none'}: "
            f"pip install 'torchtitan=={wanted}.*', or take another moequant; {UNTESTED}=1 tries it all the same"
        )


require(installed("torchtitan"))

from torchtitan.config import derive, override  # noqa: E402
from torchtitan.models.common.token_dispatcher import BaseEPTokenDispatcher, LocalTokenDispatcher  # noqa: E402

# by group, and by what else layers have to have in common
_DISPATCHERS: ByGroup[tuple[object, ...], MoEQuantDispatcher] = ByGroup()


class MoEQuantTokenDispatcher(BaseEPTokenDispatcher):
    """A layer's; those of a model share one MoEQuantDispatcher, which is made when tokens first come, and grows with them.

    Rows come in bfloat16, those of an expert from a multiple of 16 on. What is between them is zero, and counted, so that it has no
    gradient either.

    Args:
        config: torchtitan's settings of the layer, and moequant's.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        """Of a layer. The attributes besides torchtitan's are arguments of `moequant.MoEQuantDispatcher`.

        Attributes:
            transport: as there.
            rank_capacity: as there; None: room for all rows that can come.
            on_overflow: as there.
            timeout: as there, in seconds.
        """

        transport: str = "auto"
        rank_capacity: int | float | None = None
        on_overflow: str = "error"
        timeout: float = 60.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._settings = {
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "transport": config.transport,
            "rank_capacity": config.rank_capacity,
            "on_overflow": config.on_overflow,
            "timeout": config.timeout,
        }

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Sends tokens to their experts' ranks. Collective.

        Args:
            x_TD: (T, D), T the same on all ranks.
            topk_scores_TK: (T, K).
            topk_expert_ids_TK: (T, K).
            num_local_tokens_per_expert_E: (E,), not used.

        Returns:
            Rows (R, D), the rows of each local expert (L,), and what `combine` takes.
        """
        del num_local_tokens_per_expert_E
        dispatcher = self._dispatcher(x_TD)
        batch, handle = dispatcher.dispatch(x_TD, topk_expert_ids_TK, topk_scores_TK)
        counts = (batch.num_tokens + (ROW_ALIGNMENT - 1)) // ROW_ALIGNMENT * ROW_ALIGNMENT
        return batch.values, counts, (dispatcher, handle)

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        """Brings experts' rows back and sums them by the scores, in float32. Collective.

        Args:
            routed_output_RD: (R, D).
            metadata: of `dispatch`.
            x_TD: (T, D), as dispatch had it; not used.

        Returns:
            (T, D).
        """
        del x_TD
        dispatcher, handle = metadata
        return dispatcher.combine(routed_output_RD, handle)

    def _dispatcher(self, x: Tensor) -> MoEQuantDispatcher:
        """The one of all layers like this one, with room for these tokens."""
        tokens, hidden = max(x.shape[0], 1), x.shape[1]
        group: dist.ProcessGroup | None = None if self.ep_mesh is None else self.ep_mesh.get_group()
        known = _DISPATCHERS.of(group)
        key = hidden, x.device, *self._settings.values()
        if key not in known:
            settings: dict[str, Any] = self._settings | ({"transport": "local"} if group is None else {})
            sizes = {"hidden_size": hidden, "max_tokens_per_rank": tokens, "device": x.device}
            known[key] = MoEQuantDispatcher(group, quant="none", layout="ragged", **sizes, **settings)
        known[key].ensure(tokens)
        return known[key]


@override(target=LocalTokenDispatcher.Config, description="moequant sends tokens to experts, and brings their rows back.")
def token_dispatcher(config: Any, **settings: Any) -> MoEQuantTokenDispatcher.Config:
    """torchtitan's factory of the replacement.

    Args:
        config: of any of torchtitan's token dispatchers.
        **settings: attributes of `MoEQuantTokenDispatcher.Config`.

    Returns:
        The configuration that takes its place.

    Raises:
        ValueError: there is no such setting, or experts want their rows at multiples of more than 16.
    """
    multiple = getattr(config, "pad_multiple", None) or 1
    if ROW_ALIGNMENT % multiple:
        raise ValueError(
            f"an expert's rows begin at a multiple of {ROW_ALIGNMENT}, and these experts want {multiple}: leave out this override, or "
            "their conversion"
        )
    return derive(config, MoEQuantTokenDispatcher.Config, **settings)
