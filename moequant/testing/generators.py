"""Random routing. T tokens, K top-k, E experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moequant.checks import check_int, check_is

# Random numbers that `routing` draws, at most: 1 GiB.
MAX_SCORES = 2**28


def routing(
    tokens: int, top_k: int, num_experts: int, kind: str = "uniform", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random routing of T tokens, each to K distinct experts.

    Example: T=2, K=2, E=4, "one-hot" may give ids [[0, 3], [0, 1]].

    Args:
        tokens: T, at least 0.
        top_k: K, from 1 to E.
        num_experts: E.
        kind: "uniform": every expert as likely as any other.
            "zipf:A": the p-th most popular expert is drawn in proportion to p**-A, without replacement; which expert is how popular
            is a fixed shuffle of num_experts, the same on every rank.
            "one-hot": every token's first choice is expert 0, the others are uniform.
            "half": the same of every second token, and the others don't choose expert 0.
        generator: decides everything random here; its device is the result's. None for the CPU's default one.

    Returns:
        Ids (T, K) int32 and weights (T, K) float32, positive, each row summing to 1.

    Raises:
        ValueError: an unknown kind, fewer than K experts, or sizes that are too large to draw for.
    """
    for name, value in (("tokens", tokens), ("top_k", top_k), ("num_experts", num_experts)):
        check_int(name, value)
    if max(tokens, 1) * num_experts > MAX_SCORES:
        raise ValueError(
            f"tokens times num_experts must be at most {MAX_SCORES}, as many are drawn, got {tokens} and {num_experts}"
        )
    check_is("generator", generator, (torch.Generator, type(None)))
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..num_experts for distinct experts, got top_k={top_k}, num_experts={num_experts}")
    device = generator.device if generator is not None else torch.device("cpu")
    # the K largest of log-weight + Gumbel noise are a draw without replacement in proportion to the weights
    noise = torch.rand(tokens, num_experts, dtype=torch.float32, generator=generator, device=device).clamp_min(1e-30)
    scores = log_popularity(kind, num_experts).to(device) - (-noise.log()).log()
    if kind == "half":
        scores[::2, 0], scores[1::2, 0] = math.inf, -math.inf
    ids = scores.topk(top_k, dim=1).indices.to(torch.int32)
    weights = torch.rand(tokens, top_k, dtype=torch.float32, generator=generator, device=device) + 0.1
    return ids, weights / weights.sum(1, keepdim=True)


def log_popularity(kind: str, num_experts: int) -> Tensor:
    """The log of how likely each expert is, up to a constant.

    Args:
        kind: as for `routing`.
        num_experts: E.

    Returns:
        (E,) float32 on the CPU; infinite for an expert that every token chooses.

    Raises:
        ValueError: an unknown kind.
    """
    check_is("kind", kind, str)
    popularity = torch.zeros(num_experts, dtype=torch.float32, device="cpu")
    name, _, parameter = kind.partition(":")
    if kind == "one-hot":
        popularity[0] = math.inf
        return popularity
    if name == "zipf":
        try:
            exponent = float(parameter)
        except ValueError:
            exponent = math.nan
        if exponent >= 0:
            order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(0), device="cpu")
            return -exponent * torch.log1p(order.float())
    elif kind in ("uniform", "half"):
        return popularity
    raise ValueError(f'kind must be "uniform", "zipf:A" with a number A >= 0, "one-hot" or "half", got {kind!r}')
