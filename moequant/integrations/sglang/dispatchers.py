"""The dispatchers that all layers of this process share.

T tokens of a rank, K top-k, E experts, W ranks, H hidden size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from sglang.srt.environ import envs

from moequant.dispatcher import MoEQuantDispatcher
from moequant.integrations.groups import ByGroup

# Decoding has one of its own, whose buffers are small: an expert's rows lie where its number says.
DECODE, DEFAULT = 256, 2048
# Seconds. Ranks load weights and compile kernels minutes apart; later SGLang's own watchdog ends a process after 300.
FIRST_TIMEOUT, TIMEOUT = 1800.0, 120.0


@dataclass(frozen=True)
class Sizes:
    """Of the layers that share dispatchers.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: H.
        quant: as a dispatcher takes it.
        slots: 2 with two-batch overlap, otherwise 1.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    quant: str
    slots: int


_KNOWN: ByGroup[Sizes, tuple[MoEQuantDispatcher, ...]] = ByGroup()


def dispatchers_of(group: dist.ProcessGroup, sizes: Sizes) -> tuple[MoEQuantDispatcher, ...]:
    """Those of some sizes. Collective when they first come.

    Args:
        group: of the ranks that share the experts.
        sizes: of the layer.

    Returns:
        One with room for DECODE tokens, and one for as many as SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK says, or, unset, DEFAULT.
    """
    known = _KNOWN.of(group)
    if sizes not in known:
        variable = envs.SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK
        most = variable.get() if variable.is_set() else DEFAULT
        known[sizes] = tuple(
            MoEQuantDispatcher(
                group,
                num_experts=sizes.num_experts,
                top_k=sizes.top_k,
                hidden_size=sizes.hidden_size,
                max_tokens_per_rank=room,
                quant=sizes.quant,
                layout="auto",
                slots=sizes.slots,
                timeout=TIMEOUT,
                first_timeout=FIRST_TIMEOUT,
            )
            for room in sorted({min(DECODE, most), most})
        )
    return known[sizes]


def all_of_them() -> Iterator[MoEQuantDispatcher]:
    """Every dispatcher that layers of this process have.

    Yields:
        Them.
    """
    for dispatchers in _KNOWN.values():
        yield from dispatchers
