"""Layers that are trained, and what autograd makes of the same layer written as one dense computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moequant import Activation, MoEQuantDispatcher
from moequant.activations import activation_of
from moequant.testing import assert_bit_equal, relative_error
from moequant.training.layer import train

HIDDEN, INNER = 64, 32
# relative errors of the output and of all gradients
LARGEST = {"none": 0.0055, "fp8_e4m3fn": 0.07}
ACTIVATIONS = {
    "silu": Activation(),
    "gpt-oss": Activation(limit=0.7, alpha=1.702, offset=1.0),
    "limit": Activation(limit=0.5),
    "limit after": Activation(limit=0.4, limit_after=True),
    "soft caps": Activation(gate_softcap=0.8, up_softcap=0.6),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu": Activation("relu"),
    "relu2, not gated": Activation("relu2", gated=False),
}


def dense_activation(x: Tensor, kind: Activation) -> Tensor:
    """`Activation`'s formulas as torch has them, in x's own type."""
    if not kind.gated:
        return dense_function(x, kind)
    gate, up = (x[..., ::2], x[..., 1::2]) if kind.interleaved else x.chunk(2, -1)
    if kind.limit is not None:
        up = up.clamp(-kind.limit, kind.limit)
    if kind.up_softcap is not None:
        up = kind.up_softcap * torch.tanh(up / kind.up_softcap)
    return dense_function(gate, kind) * (up + kind.offset)


def dense_function(gate: Tensor, kind: Activation) -> Tensor:
    functional = torch.nn.functional
    if kind.limit is not None and not kind.limit_after:
        gate = gate.clamp(max=kind.limit)
    if kind.function == "silu":
        factor = gate if kind.gate_softcap is None else kind.gate_softcap * torch.tanh(gate / kind.gate_softcap)
        value = factor * torch.sigmoid(kind.alpha * gate)
    elif kind.function.startswith("gelu"):
        value = functional.gelu(gate, approximate="tanh" if kind.function == "gelu_tanh" else "none")
    else:
        value = functional.relu(gate) ** (2 if kind.function == "relu2" else 1)
    return value.clamp(max=kind.limit) if kind.limit_after else value


class Weights(NamedTuple):
    """Of all E experts."""

    w13: Tensor
    w2: Tensor
    bias13: Tensor | None = None
    bias2: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """What a function makes of each."""
        biases = (None if bias is None else change(bias) for bias in (self.bias13, self.bias2))
        return Weights(change(self.w13), change(self.w2), *biases)


def weights_of(
    experts: int, hidden: int, inner: int, kind: Activation | str = "silu", biases: bool = False, seed: int = 0
) -> Weights:
    """In bfloat16's values."""
    generator, width = torch.Generator().manual_seed(seed), activation_of(kind).width * inner

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    pair = normal(experts, width, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5)
    return Weights(*pair, *((normal(experts, n, scale=0.2) for n in (width, hidden)) if biases else ()))


class Tokens(NamedTuple):
    """Of one rank, and the gradient of their result."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    grad: Tensor


def tokens_of(
    tokens: int, top_k: int, experts: int, hidden: int, seed: int = 0, absent: float = 0.1, dtype: torch.dtype = torch.bfloat16
) -> Tokens:
    """Distinct experts a token, of which some are absent (-1)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    ids = torch.where(torch.rand(ids.shape, generator=generator) < absent, -1, ids)
    grad = torch.randn(tokens, hidden, generator=generator) * torch.randn(tokens, 1, generator=generator).exp() * 1e-3
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    return Tokens(x.to(dtype), ids, torch.rand(ids.shape, generator=generator) + 0.1, grad.bfloat16().to(dtype))


def dense_layer(
    hidden: Tensor, ids: Tensor, weights: Tensor, of: Weights, kind: Activation, placed: Tensor | None = None
) -> Tensor:
    """Every expert on every token. placed: which entries count, (T, K) bool; None: those with an id."""
    h = torch.einsum("th,eih->tei", hidden, of.w13)
    h = h if of.bias13 is None else h + of.bias13
    y = torch.einsum("tei,ehi->teh", dense_activation(h, kind), of.w2)
    y = y if of.bias2 is None else y + of.bias2
    counted = (ids >= 0) if placed is None else placed
    rows = y.gather(1, ids.clamp_min(0).long().unsqueeze(2).expand(-1, -1, y.shape[2]))
    return (torch.where(counted.unsqueeze(2), rows, 0) * weights.unsqueeze(2)).sum(1)


def dense_gradients(
    ranks: list[Tokens], of: Weights, kind: Activation | str = "silu"
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """By autograd in float64: each rank's output and gradients of its tokens, and the gradients of all experts' weights."""
    kind = activation_of(kind)
    hidden = [tokens.hidden.double().requires_grad_() for tokens in ranks]
    routing = [tokens.weights.double().requires_grad_() for tokens in ranks]
    wide = of.each(lambda w: w.detach().cpu().double().requires_grad_())
    outs = [dense_layer(x, tokens.ids, s, wide, kind) for x, s, tokens in zip(hidden, routing, ranks, strict=True)]
    torch.autograd.backward(outs, [tokens.grad.double() for tokens in ranks])
    each = [{"output": out.detach(), "hidden": x.grad, "weights": s.grad} for out, x, s in zip(outs, hidden, routing, strict=True)]
    return each, {name: w.grad for name, w in wide._asdict().items() if w is not None}


def leaves(of: Weights, device: Any = "cpu", dtype: torch.dtype | None = None) -> Weights:
    """Copies that require grad."""
    return of.each(lambda w: w.detach().to(device, dtype, copy=True).requires_grad_())


def tokens_of_rank(
    rank: int, ranks: int, experts: int, hidden: int, most: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tokens:
    """Other numbers on other ranks; the last of several has none. Expert 1 gets none of any."""
    tokens = tokens_of(0 if 1 < ranks == rank + 1 else most - rank, 2, experts, hidden, seed=rank + 64 * seed, dtype=dtype)
    return tokens._replace(ids=torch.where(tokens.ids == 1, -1, tokens.ids))


def run_layer(
    rank: int, ranks: int, device: str, settings: dict[str, Any], sizes: tuple[int, int, int], options: dict[str, Any]
) -> dict[str, Tensor]:
    """This rank's output, and all gradients, of `train`, from forwards and backwards (`passes`) that have to have the same bits."""
    device, (hidden, inner, most) = device.format(rank=rank), sizes
    kind, recompute = options.get("kind", "silu"), options.get("recompute", False)
    experts = max(4, 2 * ranks) if ranks != 3 else 6
    local = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
    seed = options.get("seed", 0)
    every = weights_of(experts, hidden, inner, kind, options.get("biases", False), seed)
    tokens = tokens_of_rank(rank, ranks, experts, hidden, most, options.get("dtype", torch.bfloat16), seed)
    common: dict[str, Any] = {
        "num_experts": experts,
        "top_k": 2,
        "hidden_size": hidden,
        "max_tokens_per_rank": most,
        "recipe": "ue8m0",
    }
    results = []
    with MoEQuantDispatcher(**common | settings, device=device) as dispatcher:
        for _ in range(options.get("passes", 2)):
            poison_buffers(dispatcher)
            of = leaves(every.each(lambda w: w[local]), device)
            x, s = (t.to(device, copy=True).requires_grad_() for t in (tokens.hidden, tokens.weights))
            given = of.w13, of.w2, of.bias13, of.bias2
            kept = {"recompute": recompute, "keep_quantized": options.get("keep_quantized", False)}
            out = train(dispatcher, (x, tokens.ids.to(device), s), given, activation_of(kind), **kept)
            out.backward(tokens.grad.to(device))
            made = {"output": out, "hidden": x.grad, "weights": s.grad} | {
                n: w.grad for n, w in of._asdict().items() if w is not None
            }
            results.append({name: g.detach().cpu() for name, g in made.items() if g is not None})
            assert len(made) == len(results[-1])
    for name, first in results[0].items():
        assert_bit_equal(results[-1][name], first, name)
    return results[0]


def poison_buffers(dispatcher: MoEQuantDispatcher) -> None:
    """NaN, or what is none of any number, where the next rows come: what no one wrote is read by no one."""
    for slot in dispatcher._slots:
        values = slot.buffers.values
        if dispatcher.config.transport != "symmetric":
            values.view(torch.uint8).fill_(0x7F) if values.dtype != torch.bfloat16 else values.fill_(torch.nan)


def check_layer(results: list[dict[str, Tensor]], sizes: tuple[int, int, int], options: dict[str, Any], largest: float) -> None:
    """Against autograd in float64 on all ranks' tokens and experts."""
    hidden, inner, most = sizes
    ranks, kind = len(results), options.get("kind", "silu")
    experts = max(4, 2 * ranks) if ranks != 3 else 6
    every = weights_of(experts, hidden, inner, kind, options.get("biases", False))
    tokens = [tokens_of_rank(rank, ranks, experts, hidden, most, options.get("dtype", torch.bfloat16)) for rank in range(ranks)]
    each, of_weights = dense_gradients(tokens, every, kind)
    for rank, result in enumerate(results):
        for name, expected in each[rank].items():
            assert relative_error(result[name], expected) < largest, (rank, name, relative_error(result[name], expected))
    for name, expected in of_weights.items():
        joined = torch.cat([result[name] for result in results])
        assert relative_error(joined, expected) < largest, (name, relative_error(joined, expected))
        # of the expert without rows, exactly
        assert not joined[1].any()
