"""Random activations and biases for `fuzz_gpu.py`: the operations that compute them, and the experts that have them.

Letters: L experts, M rows of an expert's buffer, R rows of all experts together, H hidden size, I intermediate size.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fuzz_operations import (
    Place,
    assert_near,
    draw_columns,
    draw_counts,
    draw_ragged,
    selected,
    valid_rows,
)
from guarded import Guarded
from moequant import Activation, ExpertBatch, GroupedExperts, QuantizedTensor, ops, quantize_weight, reference
from moequant.activations import FUNCTIONS
from moequant.batch import ceil_div
from moequant.config import PLAIN_DTYPES, QUANT_DTYPES
from moequant.formats import FLOAT_DTYPES, FORMATS, max_of
from moequant.testing import assert_bit_equal, assert_nearly_quantized

# the distance of neighbouring numbers, as a part of a number and at least
STEPS = {
    torch.int8: (0.0, 1.0),
    torch.float8_e4m3fn: (2.0**-3, 2.0**-9),
    torch.float8_e4m3fnuz: (2.0**-3, 2.0**-10),
    torch.float8_e5m2: (2.0**-2, 2.0**-16),
    torch.bfloat16: (2.0**-7, 0.0),
    torch.float16: (2.0**-10, 2.0**-24),
    torch.float32: (0.0, 0.0),
}


def draw_activation(rng: random.Random) -> Activation:
    """Each function, with and without a gate and everything around it; a third of them plain SwiGLU."""
    if rng.random() < 0.3:
        return Activation()
    function, gated = rng.choice(FUNCTIONS), rng.random() < 0.75
    settings: dict[str, Any] = {"limit": rng.choice([None, 1.5, 7.0])}
    settings["limit_after"] = settings["limit"] is not None and rng.random() < 0.3
    if function == "silu":
        settings |= {"alpha": rng.choice([1.0, 1.702]), "gate_softcap": rng.choice([None, None, 3.0])}
    if gated:
        settings |= {"offset": rng.choice([0.0, 1.0, 0.7]), "up_softcap": rng.choice([None, None, 2.0])}
        settings["interleaved"] = rng.random() < 0.5
    return Activation(function, gated=gated, **settings)


def bias_of(experts: int, columns: int, dtype: torch.dtype | None, device: str) -> Tensor | None:
    return None if dtype is None else torch.randn(experts, columns, device=device).to(dtype)


def exact(activation: Activation) -> bool:
    """Whether its bits are the same everywhere: all but exp, erf and tanh are rounded alike."""
    return activation.function in ("relu", "relu2") and activation.up_softcap is None


def slack(x: Tensor) -> float:
    """By how much results of other functions may be off beside 1e-5 of them: where an offset cancels, for one."""
    return 1e-6 * max(1.0, float(x.float().nan_to_num().abs().max()) if x.numel() else 0.0)


def assert_activated(found: Tensor, expected: Tensor, activation: Activation, off: float) -> None:
    """Rows that are not quantized. off: of `slack`."""
    if exact(activation):
        assert_bit_equal(found, expected, "activated rows")
        return
    part, least = STEPS[found.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5 + part, atol=off + least)


def assert_activated_and_quantized(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], activation: Activation, recipe: str, off: float
) -> None:
    """Values and scales of rows. off: of `slack`."""
    if exact(activation):
        for name, mine, theirs in zip(("values", "scales"), found, expected, strict=True):
            assert_bit_equal(mine, theirs, name)
        return
    (values, scales), (theirs, their_scales) = found, expected
    same = torch.ones_like(scales, dtype=torch.bool)
    if recipe == "ue8m0":
        # next to a power of two a group may be on either side of it
        same = scales == their_scales
        assert int((~same).sum()) <= 1 + same.numel() // 1000, f"{int((~same).sum())} scales differ"
        other = (scales / their_scales)[~same]
        assert bool(((other == 0.5) | (other == 2.0)).all()), f"scales {other.tolist()} times as large"
    else:
        # SwiGLU's are within 4 units in the last place
        within = (1e-6, 0.0) if activation.plain else (1e-5, off / max_of(values.dtype, recipe))
        torch.testing.assert_close(scales, their_scales, rtol=within[0], atol=within[1], equal_nan=True)
    part, least = STEPS[values.dtype]
    mine, wanted = values.float(), theirs.float()
    of_column = same.repeat_interleave(128, 1)[:, : values.shape[1]]
    step = (wanted.abs() * part).clamp_min(least)
    assert bool((((mine - wanted).abs() <= 1.001 * step) | ~of_column).all()), "values more than a step apart"
    # of few values one step more or less is a large part
    if values.numel() >= 4096 and bool(same.all()):
        assert_nearly_quantized((values, their_scales), expected)


class Activated:
    """An activation of a product's rows with a bias or without, quantized and not; and a bias alone."""

    name = family = "activation"

    def __init__(self, rng: random.Random, place: Place) -> None:
        self.place, self.activation = place, draw_activation(rng)
        fmt = rng.choice([FORMATS["fp8_e4m3fn"], *FORMATS.values()])
        self.dtype, self.recipe = fmt.dtype, rng.choice(["default", "ue8m0", "deepgemm"])
        self.input, self.output = rng.choice([torch.bfloat16, torch.bfloat16, *FLOAT_DTYPES]), rng.choice(FLOAT_DTYPES)
        self.bias = rng.choice([None, *FLOAT_DTYPES])
        self.columns = draw_columns(rng, place, 2900)

    def check(self, rng: random.Random) -> None:
        device, columns, activation = self.place.device, self.columns, self.activation
        experts, rows = rng.randint(1, 4), rng.randint(1, 20 if self.place.tiny else 120)
        counts = draw_counts(rng, experts, rows)
        valid, num_tokens = valid_rows(counts, rows, device), torch.tensor(counts, dtype=torch.int32, device=device)
        wide = columns * activation.width
        x = torch.randn(experts, rows, wide + rng.choice([0, 0, 1, 8]), device=device) * rng.choice([1.0, 3.0])
        x, bias = x.to(self.input), bias_of(experts, wide, self.bias, device)
        layout, starts = draw_ragged(rng, counts, rows, device), None
        if layout is not None:
            x, valid, num_tokens, starts = layout.pack(x), layout.mask(), layout.num_tokens, layout.expert_start
        x, (*there, last), chosen = x[..., :wide], valid.shape, valid.cpu()
        given = x, num_tokens, starts
        on_cpu: list[Any] = [None if tensor is None else tensor.cpu() for tensor in (*given, bias)]
        settings: dict[str, Any] = {"activation": activation, "bias": on_cpu.pop()}
        off = slack(x)

        out = Guarded(*there, last, columns, dtype=self.output, device=device, skew=rng.choice([0, 0, 1]))
        ops.silu_mul(*given, out.tensor, activation.text, bias)
        out.assert_only(valid.unsqueeze(-1), "rows")
        expected: Any = torch.empty(*there, last, columns, dtype=self.output)
        reference.silu_mul(*on_cpu, **settings, out=expected)
        assert_activated(out.tensor[valid].cpu(), expected[chosen], activation, off)

        values = Guarded(*there, last, columns, dtype=self.dtype, device=device, skew=rng.choice([0, 0, rng.randint(1, 15)]))
        scales = Guarded(*there, ceil_div(columns, 128), last, dtype=torch.float32, device=device, skew=rng.choice([0, 0, 1]))
        by_row = scales.tensor.mT
        ops.silu_mul_quantize(*given, values.tensor, by_row, self.recipe, activation.text, bias)
        values.assert_only(valid.unsqueeze(-1), "values")
        scales.assert_only(valid.unsqueeze(-2), "scales")
        expected = reference.silu_mul_quantize(*on_cpu, **settings, dtype=self.dtype, recipe=self.recipe)
        mine = selected(values.tensor, valid), by_row[valid].cpu()
        theirs = selected(expected.values, chosen), expected.scales[chosen]
        assert_activated_and_quantized(mine, theirs, activation, self.recipe, off)
        if bias is not None:
            self._bias_alone(given, bias, valid)

    def _bias_alone(self, given: tuple[Tensor, Tensor, Tensor | None], bias: Tensor, valid: Tensor) -> None:
        """As of GEMM 2: the reference's bits."""
        x, num_tokens, starts = given
        added = Guarded(*x.shape, dtype=x.dtype, device=str(x.device))
        added.tensor[valid] = x[valid]
        ops.add_bias(added.tensor, num_tokens, starts, bias)
        added.assert_only(valid.unsqueeze(-1), "rows with a bias")
        expected = x.cpu().contiguous()
        reference.add_bias(expected, num_tokens.cpu(), None if starts is None else starts.cpu(), bias.cpu())
        assert_bit_equal(added.tensor[valid].cpu(), expected[valid.cpu()], "rows with a bias")


def draw_grouped_experts(rng: random.Random, place: Place, settings: dict[str, Any]) -> GroupedExperts:
    """This rank's experts, of which the draws but for the numbers are all ranks'."""
    local, hidden = settings["num_experts"] // place.ranks, settings["hidden_size"]
    inner = draw_columns(rng, place, min(2880, 2**24 // (local * hidden) + 1))
    activation, quant = draw_activation(rng), settings["quant"]
    biases = [rng.choice([None, None, *FLOAT_DTYPES]) for _ in range(2)]
    as_they_lie = activation.interleaved and rng.random() < 0.5
    torch.manual_seed(rng.randrange(2**31) + place.rank)
    rows, dtype = inner * activation.width, PLAIN_DTYPES.get(quant, torch.bfloat16)
    w13 = torch.randn(local, rows, hidden, device=place.device).mul_(hidden**-0.5).to(dtype)
    w2 = torch.randn(local, hidden, inner, device=place.device).mul_(inner**-0.5).to(dtype)
    more: dict[str, Any] = {
        "activation": activation,
        "bias13": bias_of(local, rows, biases[0], place.device),
        "bias2": bias_of(local, hidden, biases[1], place.device),
    }
    if not as_they_lie:
        return GroupedExperts.from_weights(w13, w2, quant=quant, recipe=settings["recipe"], **more)
    if quant in PLAIN_DTYPES:
        return GroupedExperts(w13, w2, **more)
    blocks = [quantize_weight(w, dtype=QUANT_DTYPES[quant], recipe=settings["recipe"]) for w in (w13, w2)]
    return GroupedExperts.from_quantized(*blocks, **more)


def check_steps(experts: GroupedExperts, batch: ExpertBatch) -> None:
    """The steps of experts, each against the reference of what it was given, and a call against its steps, to the bit."""
    counts = batch.num_tokens, batch.expert_start
    gate_up = experts.gemm1(batch)
    valid = reference.counted_rows(batch.num_tokens, gate_up, batch.expert_start)
    chosen = valid.cpu()
    on_cpu: list[Any] = [None if tensor is None else tensor.cpu() for tensor in (gate_up, *counts)]
    expected = reference.grouped_gemm_blockscale(batch.activations, experts.w13, *counts, out_dtype=torch.float32)
    assert_near(gate_up[valid], expected[valid])

    inner, off = experts.activation(gate_up, batch), slack(gate_up[valid])
    settings: dict[str, Any] = {"activation": experts.kind, "bias": None if experts.bias13 is None else experts.bias13.cpu()}
    if isinstance(inner, QuantizedTensor):
        wanted = reference.silu_mul_quantize(*on_cpu, **settings, dtype=inner.values.dtype, recipe=batch.recipe)
        mine = selected(inner.values, valid), inner.scales[valid].cpu()
        theirs = selected(wanted.values, chosen), wanted.scales[chosen]
        assert_activated_and_quantized(mine, theirs, experts.kind, batch.recipe, off)
    else:
        rows: Any = torch.empty(inner.shape, dtype=inner.dtype)
        reference.silu_mul(*on_cpu, **settings, out=rows)
        assert_activated(inner[valid].cpu(), rows[chosen], experts.kind, off)

    out = experts.gemm2(inner, batch).clone()
    product = out
    if experts.bias2 is not None:
        product = GroupedExperts(experts.w13, experts.w2, activation=experts.kind).gemm2(inner, batch, out=torch.empty_like(out))
        biased = product.clone()
        reference.add_bias(biased, *counts, experts.bias2)
        assert_bit_equal(out[valid], biased[valid], "GEMM 2 with its bias")
    expected = reference.grouped_gemm_blockscale(inner, experts.w2, *counts, out_dtype=torch.float32)
    assert_near(product[valid], expected[valid])
    # three times: the second is recorded, the third repeats its launches
    for turn in range(3):
        assert_bit_equal(experts(batch)[valid], out[valid], f"call {turn} of experts")
