"""Layers whose tokens must have the same bits in any company, for tests on CPUs, GPUs and several ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moequant import GroupedExperts, MoEQuantDispatcher

Tokens = tuple[Tensor, Tensor, Tensor]


class Model(NamedTuple):
    """A layer's sizes and number format."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    quant: str

    def settings(self, most: int, **changes: Any) -> dict[str, Any]:
        """A dispatcher's. most: the largest T."""
        sizes = {"num_experts": self.experts, "top_k": self.top_k, "hidden_size": self.hidden, "max_tokens_per_rank": most}
        return sizes | {"quant": self.quant, "batch_invariant": True} | changes

    def weights(self, device: str, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """w13 and w2 of a rank: each expert's are the same on any number of ranks."""
        local = self.experts // ranks
        made = []
        for number in range(rank * local, (rank + 1) * local):
            generator = torch.Generator(device).manual_seed(number)
            w13 = torch.randn(2 * self.inner, self.hidden, generator=generator, device=device) * self.hidden**-0.5
            w2 = torch.randn(self.hidden, self.inner, generator=generator, device=device) * self.inner**-0.5
            made.append((w13, w2))
        dtype = torch.float16 if self.quant == "float16" else torch.bfloat16
        first, second = (torch.stack(x).to(dtype) for x in zip(*made, strict=True))
        return first, second

    def experts_of(self, device: str, rank: int = 0, ranks: int = 1) -> GroupedExperts:
        return GroupedExperts.from_weights(*self.weights(device, rank, ranks), quant=self.quant)

    def tokens(self, count: int, seed: int, device: str) -> Tokens:
        """Hidden states, ids of which some are -1, and weights, from a CPU's generator."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(count, self.experts, generator=generator).argsort(1)[:, : self.top_k].contiguous()
        ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
        hidden = torch.randn(count, self.hidden, generator=generator).bfloat16()
        return hidden.to(device), ids.to(device), torch.rand(ids.shape, generator=generator).to(device)


def some(tokens: Tokens, places: Tensor | slice) -> Tokens:
    hidden, ids, weights = (x[places] for x in tokens)
    return hidden, ids, weights


def one_by_one(dispatcher: MoEQuantDispatcher, tokens: Tokens, experts: Any) -> Tensor:
    """Each token alone."""
    return torch.cat([dispatcher(*some(tokens, slice(t, t + 1)), experts) for t in range(len(tokens[0]))])


def differing(found: Tensor, expected: Tensor) -> int:
    """Numbers of which a bit differs."""
    assert found.shape == expected.shape and found.dtype == expected.dtype and bool(expected.isfinite().all())
    return int((found.contiguous().view(torch.int16) != expected.contiguous().view(torch.int16)).sum())
