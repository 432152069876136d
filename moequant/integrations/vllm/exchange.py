"""The dispatchers of an engine's layers, and how many calls of them a step of the model takes.

T tokens of this rank, K top-k, E experts, W ranks, H hidden size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.config import PADDED_TOKENS
from moequant.dispatcher import MoEQuantDispatcher
from moequant.experts import GroupedExperts
from moequant.integrations.vllm.settings import Settings
from moequant.integrations.vllm.watch import watch


@dataclass(frozen=True)
class Sizes:
    """Of layers that share dispatchers.

    Attributes:
        num_experts: E, of all ranks of the group.
        top_k: K.
        hidden_size: H.
        quant: as a dispatcher takes it.
        max_tokens: the largest T that vLLM gives a layer.
        padded: whether experts take rows as vLLM's batched format has them, and all T at once.
        batch_invariant: as a dispatcher takes it.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    quant: str
    max_tokens: int
    padded: bool
    batch_invariant: bool = False


class Exchange:
    """Two dispatchers that all layers share: one for steps of few tokens, as decoding has them, and one for chunks of longer ones. Which
    of them a step takes, and how often, follows from the largest T of all ranks, so that all ranks do the same.

    Args:
        group: of the ranks that share the experts; None: each rank has what it needs.
        sizes: of the layers.
        settings: the user's.

    Attributes:
        chunks: the dispatcher of chunks.
        decode: the one of few tokens; may be the same.

    """

    def __init__(self, group: dist.ProcessGroup | None, sizes: Sizes, settings: Settings) -> None:
        make = functools.partial(
            MoEQuantDispatcher,
            group,
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden_size,
            quant=sizes.quant,
            # whose rows vLLM's experts take by their shape
            layout="padded" if sizes.padded else "auto",
            transport="local" if group is None else settings.transport,
            reduce=settings.reduce,
            batch_invariant=sizes.batch_invariant,
            timeout=settings.timeout,
            first_timeout=settings.first_timeout,
        )
        # vLLM's experts get all tokens at once, and have been refused if these are too many
        most = min(sizes.max_tokens, settings.max_tokens)
        self.chunks = make(max_tokens_per_rank=most)
        few = PADDED_TOKENS if most > PADDED_TOKENS and not sizes.padded else most
        self.decode = make(max_tokens_per_rank=few) if few < most else self.chunks
        # the layer that came first, until it has come again
        self._first: object = None
        self._settled = False
        if group is not None and self.chunks.device.type == "cuda":
            watch((self.chunks, self.decode))

    def run(self, tokens: tuple[Tensor, Tensor, Tensor], experts: GroupedExperts, across: list[int], out: Tensor) -> None:
        """A layer. Collective.

        Args:
            tokens: hidden states (T, H), ids (T, K) and weights (T, K).
            experts: the layer's.
            across: T of each rank.
            out: (T, H), written.
        """
        self.settle(experts)
        hidden, ids, weights = tokens
        largest = max(across)
        dispatcher = self.decode if largest <= self.decode.config.max_tokens_per_rank else self.chunks
        step = dispatcher.config.max_tokens_per_rank
        # T = (5, 1) in chunks of 4: rank 0 sends 4 and 1, rank 1 sends 1 and 0
        for begin in range(0, largest, step):
            rows = slice(begin, begin + step)
            expected = sum(min(max(size - begin, 0), step) for size in across)
            dispatcher(hidden[rows], ids[rows], weights[rows], experts, out=out[rows], expected_tokens=expected)

    def settle(self, layer: object) -> None:
        """Ends `first_timeout` once a step has been through all layers.

        Args:
            layer: whose call begins.
        """
        if self._settled or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        if self._first is None:
            self._first = layer
        elif self._first is layer:
            for dispatcher in {self.chunks, self.decode}:
                dispatcher.check()
            self._settled, self._first = True, None


# for all layers of equal sizes, in all models of this process: a draft model shares with the one it drafts for
exchange_of = functools.cache(Exchange)
