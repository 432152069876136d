"""Random layers under grad for `fuzz_gpu.py`: a device's gradients against those of a CPU's reference.

A rounded number that lies on the other side of a limit, or of a step of fp8, has another gradient, and everything behind it differs.
So the CPU checks each product, activation and backward of one that the device has made against its own of the same operands, and goes on
with the device's numbers. What is left to compare, dispatch, combine and sums over rows, has the same bits or nearly.

T tokens, K top-k, L local experts, M rows of an expert's buffer, R rows of all experts together, H hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuzz_activations import assert_activated, assert_activated_and_quantized, bias_of, draw_activation, slack
from fuzz_backward import assert_close, assert_quantized, assert_sums, edges
from fuzz_operations import Place, by_reference, draw_columns, selected
from guarded import Guarded, guarded_buffers
from moequant import Activation, MoEQuantDispatcher, QuantizedTensor, reference
from moequant.formats import FLOAT_DTYPES
from moequant.quantization import dequantize
from moequant.reference.backward import contracted_rows
from moequant.testing import assert_bit_equal, relative_error
from moequant.training import between, functions
from moequant.training.layer import train
from moequant.training.precision import Precision
from moequant.training.rows import Rows
from moequant.transport.buffers import named
from training_cases import LARGEST

# a number may be rounded to the other one of two in bfloat16
ROUNDED = 4e-3
STEPS = ("product", "back_product", "activation")


class Tape:
    """What the steps of a layer gave on a device, in their order, on the CPU."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.within = False

    def keep(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, which is recorded, but for steps that it takes itself."""

        def call(*given: Any, **settings: Any) -> Any:
            if self.within:
                return step(*given, **settings)
            self.within = True
            try:
                result = step(*given, **settings)
            finally:
                self.within = False
            self.results.append(on_cpu(result))
            return result

        return call

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in STEPS:
                stack.enter_context(mock.patch.object(Precision, name, self.keep(getattr(Precision, name))))
            stack.enter_context(mock.patch.object(functions, "slopes", self.keep(functions.slopes)))
            yield

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """While it lasts, each step is checked, and gives what it gave on the device."""
        results = iter(self.results)
        steps = [check_product, check_back_product, check_activation]

        def checked(check: Callable[..., None]) -> Callable[..., Any]:
            def call(*given: Any, **settings: Any) -> Any:
                found = next(results)
                check(found, *given, **settings)
                return found

            return call

        with contextlib.ExitStack() as stack:
            for name, check in zip(STEPS, steps, strict=True):
                stack.enter_context(mock.patch.object(Precision, name, checked(check)))
            stack.enter_context(mock.patch.object(functions, "slopes", checked(check_slopes)))
            yield
        assert next(results, None) is None, "the device took a step more than the CPU"


def on_cpu(x: Any) -> Any:
    """A copy."""
    if isinstance(x, QuantizedTensor):
        return dataclasses.replace(x, values=on_cpu(x.values), scales=on_cpu(x.scales))
    if isinstance(x, between.Slopes):
        return between.Slopes(*map(on_cpu, x))
    return None if x is None else x.detach().to("cpu", copy=True)


def check_product(found: Tensor, how: Precision, a: Any, w: Tensor, rows: Rows, segments: int = 1) -> None:
    counts = rows.num_tokens, rows.expert_start
    expected = reference.grouped_gemm_blockscale(a, how.weight(w, segments), *counts, out_dtype=torch.float32)
    valid = valid_of(rows)
    mine, theirs = found[valid].float(), expected[valid]
    error = relative_error(mine, theirs)
    assert error <= ROUNDED, f"a product: relative error {error:.2e}"
    each = (mine - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-30)
    # few columns may cancel
    assert bool((each <= (0.02 if mine.shape[1] >= 64 else 0.2)).all()), f"a row of a product: {float(each.max()):.2e}"


def check_back_product(found: Tensor, how: Precision, a: Any, w: Tensor, rows: Rows) -> None:
    check_product(found, how, a, w.mT, rows)


def check_activation(found: Any, how: Precision, x: Tensor, rows: Rows, kind: Activation, bias: Tensor | None) -> None:
    given, valid = (x, rows.num_tokens, rows.expert_start), valid_of(rows)
    settings: dict[str, Any] = {"activation": kind, "bias": None if bias is None else bias.detach()}
    off = slack(x[valid])
    if isinstance(found, QuantizedTensor):
        wanted = reference.silu_mul_quantize(*given, **settings, dtype=found.values.dtype, recipe=how.recipe)
        mine, theirs = ((selected(y.values, valid), y.scales[valid]) for y in (found, wanted))
        assert_activated_and_quantized(mine, theirs, kind, how.recipe, off)
    else:
        assert_activated(found[valid], reference.silu_mul(*given, **settings)[valid], kind, off)


def check_slopes(found: between.Slopes, plan: Any, rows: Rows, given: between.Given, wanted: between.Wanted) -> None:
    expected, valid = between.by_torch(plan, rows, given, wanted), rows.valid.squeeze(1)
    x, d_inner = (tensor.flatten(0, -2)[valid].float() for tensor in (given.h, given.d_inner))
    if given.bias13 is not None:
        x = x + given.bias13.float()[rows.experts[valid]]
    off, largest = slack(x), float(d_inner.abs().max()) if d_inner.numel() else 0.0
    zeros = contracted_rows(rows.num_tokens, rows.sources, rows.expert_start).flatten() & ~valid
    for name, mine, theirs in zip(found._fields, found, expected, strict=True):
        assert (mine is None) == (theirs is None), f"{name}: {mine} against {theirs}"
    if found.of_h is not None and expected.of_h is not None:
        assert_close(found.of_h[valid], expected.of_h[valid], 2 * largest * off, "the gradient of h", edges(x, plan.kind))
        assert not found.of_h[zeros].float().abs().nan_to_num(1.0).any(), "the gradient of h has no zeros behind the rows"
    if found.inner is not None and expected.inner is not None:
        assert_close(found.inner[valid], expected.inner[valid], off, "inner")
        assert not found.inner[zeros].float().abs().nan_to_num(1.0).any(), "inner has no zeros behind the rows"
    if isinstance(found.operand, QuantizedTensor) and found.of_h is None:
        plain: Any = between.by_torch(plan, rows, given, wanted._replace(plain=True)).of_h
        made, scales = dequantize(found.operand).flatten(0, -2)[valid], found.operand.scales.flatten(0, -2)[valid]
        # numbers of 3 bits behind the first, and the smallest are 2**-9 apart
        least = scales.repeat_interleave(128, -1)[:, : made.shape[1]] * 2**-10
        assert_close(
            made, plain[valid], least + 2 * largest * off, "the gradient of h, quantized", edges(x, plan.kind), 1 / 16 + 1e-3
        )
    elif isinstance(found.operand, QuantizedTensor) and found.of_h is not None:
        narrow = found.operand.values.flatten(0, -2), found.operand.scales.flatten(0, -2)
        assert_quantized(narrow, found.of_h.to(torch.bfloat16), valid, found.operand.recipe)
    elif isinstance(found.operand, Tensor) and found.of_h is not None:
        assert_bit_equal(found.operand.flatten(0, -2)[valid], found.of_h.to(torch.bfloat16)[valid], "the gradient of h, multiplied")
    if found.of_weights is not None and expected.of_weights is not None:
        # as they come back, each has its row
        terms: Any = torch.empty(given.d_inner.shape)
        counts, entries = (rows.num_tokens, rows.expert_start), (rows.sources.flatten() & 0xFFFFFFFF)[valid]
        bias = None if given.bias13 is None else given.bias13.detach()
        reference.silu_mul(given.h, *counts, activation=plan.kind, bias=bias, out=terms)
        mine, theirs = (tensor.flatten()[entries] for tensor in (found.of_weights, expected.of_weights))
        assert_sums(mine, theirs, (d_inner, terms.flatten(0, -2)[valid]), off, given.more)
        absent = torch.ones(given.ids.numel(), dtype=torch.bool).index_fill_(0, entries, False)
        assert not found.of_weights.flatten()[absent].any(), "an entry without a row has a gradient"


def valid_of(rows: Rows) -> Tensor:
    return rows.valid.view(rows.sources.shape)


class Trained:
    """A dispatcher on one rank, and `train` with weights of random types: twice on the device, all buffers between guards, and once more
    on the CPU."""

    name = family = "trained"

    def __init__(self, rng: random.Random, place: Place) -> None:
        layers = importlib.import_module("fuzz_layers")
        self.place, self.drawn = place, set[str]()
        settings = layers.draw_layer(rng, place)
        # of fewer numbers each rounding is a large part, of more a CPU has too much to do
        hidden, entries = max(17, settings["hidden_size"]), settings["max_tokens_per_rank"] * settings["top_k"]
        most = min(2**21 // (settings["num_experts"] * hidden), 2**27 // (entries * hidden))
        self.inner = max(17, draw_columns(rng, place, most + 1))
        if rng.random() < 0.4:
            # torch's own products take rows of whole 16 bytes
            hidden, self.inner = (max(8, n // 8 * 8) + 16 for n in (hidden, self.inner))
        settings |= {"hidden_size": hidden, "quant": rng.choice(["none", "fp8_e4m3fn"]), "recipe": "ue8m0", "slots": 1}
        self.settings = settings | {"on_invalid_id": rng.choice(["error", "error", "absent"])}
        self.kind = draw_activation(rng)
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.parameters = rng.choice([torch.bfloat16, torch.float32])
        self.biases = [rng.choice([None, None, *FLOAT_DTYPES]) for _ in range(2)]
        self.recompute = rng.random() < 0.4
        with guarded_buffers(place.device) as self.buffers:
            self.dispatcher = MoEQuantDispatcher(**self.settings, transport="local", device=place.device)
        self.on_cpu = MoEQuantDispatcher(**self.settings, transport="local", device="cpu")

    def check(self, rng: random.Random) -> None:
        layers = importlib.import_module("fuzz_layers")
        inputs, spoiled = layers.draw_inputs(rng, self.settings, 1, self.dtype, twice=True), None
        if self.settings["on_invalid_id"] == "absent":
            self.drawn.add("ids beyond the range")
            (spoiled,) = layers.spoil_ids(rng, inputs, self.settings["num_experts"])
        hidden, ids, routing = inputs[0]
        self.drawn |= {f"{self.settings['quant']}, {self.settings['layout']}", "recompute" if self.recompute else "kept"}
        torch.manual_seed(rng.randrange(2**31))
        experts, rows, columns = self.settings["num_experts"], self.inner * self.kind.width, self.settings["hidden_size"]
        weights: list[Tensor | None] = [
            (torch.randn(experts, rows, columns) * columns**-0.5).bfloat16().to(self.parameters),
            (torch.randn(experts, columns, self.inner) * self.inner**-0.5).bfloat16().to(self.parameters),
            bias_of(experts, rows, self.biases[0], "cpu"),
            bias_of(experts, columns, self.biases[1], "cpu"),
        ]
        if rng.random() < 0.3:
            # half of their numbers stay, whatever the layout of experts in memory
            weights = [None if w is None else w.mT.contiguous().mT if w.dim() == 3 else w for w in weights]
        # as a loss has them, which is a mean
        grad = torch.randn(hidden.shape) * torch.randn(len(hidden), 1).exp() * rng.choice([1.0, 1e-3])
        given = [hidden, routing, *weights, grad.to(self.dtype)]
        for dispatcher in (self.dispatcher, self.on_cpu):
            # rows that an earlier setting dropped, which went wrong
            dispatcher.check()
        tapes = Tape(), Tape()
        for buffers in self.dispatcher._slots:
            layers.poison(named(buffers.buffers))
        made = []
        with guarded_buffers(self.place.device, self.buffers):
            for tape in tapes:
                with tape.recording():
                    made.append(self._gradients(self.dispatcher, given, ids if spoiled is None else spoiled, guarded=True))
        self.buffers.check()
        for name, first in made[0].items():
            assert_bit_equal(made[1][name], first, f"{name}, twice")
        with by_reference(), tapes[0].checking():
            expected = self._gradients(self.on_cpu, given, ids, guarded=False)
        assert self.dispatcher.check() == 2 * self.on_cpu.check()
        self._compare(made[0], expected, ids)

    def _gradients(self, dispatcher: Any, given: list[Any], ids: Tensor, guarded: bool) -> dict[str, Tensor]:
        """The output, and the gradient of all that was given, on the CPU. guarded: that lies between guards, and stays as it is."""
        device = dispatcher.device
        memories, own = [], []
        for x in given:
            if x is None or not guarded:
                own.append(None if x is None else x.detach().to(device, copy=True))
                continue
            # weights that lie the other way round do so here
            turned = not x.is_contiguous()
            memory = Guarded.of(x.mT if turned else x, device)
            own.append((memory.tensor.mT if turned else memory.tensor).detach())
            memories.append((memory, own[-1], x))
        *leaves, grad = own
        for leaf in leaves:
            if leaf is not None:
                leaf.requires_grad_()
        x, s, *weights = leaves
        out = train(dispatcher, (x, ids.to(device), s), tuple(weights), self.kind, recompute=self.recompute)
        out.backward(grad)
        made = {"output": out.detach().cpu()}
        for name, leaf in zip(("hidden", "weights", "w13", "w2", "bias13", "bias2"), leaves, strict=True):
            if leaf is not None:
                assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, f"the gradient of {name}: {leaf.grad}"
                made[name] = leaf.grad.cpu()
        for memory, mine, x in memories:
            memory.assert_only(name="what a layer was given")
            assert_bit_equal(mine.detach().cpu(), x, "what a layer was given")
        return made

    def _compare(self, made: dict[str, Tensor], expected: dict[str, Tensor], ids: Tensor) -> None:
        assert made.keys() == expected.keys()
        for name in ("hidden", "weights", *(() if self.recompute else ("output",))):
            assert_bit_equal(made[name], expected[name], f"the gradient of {name}")
        # of products that nobody has checked
        importlib.import_module("fuzz_layers").assert_near_layer(made["output"], expected["output"], "the output")
        for name in made.keys() - {"output", "hidden", "weights"}:
            mine, theirs = made[name], expected[name]
            # a GPU's products may round sums of their parts
            error, largest = relative_error(mine, theirs), LARGEST["none"]
            assert error <= (largest if mine.numel() >= 4096 else 2 * largest), (
                f"the gradient of {name}: relative error {error:.2e}"
            )
            for expert in range(len(theirs)):
                each = relative_error(mine[expert], theirs[expert])
                # sums may cancel
                assert each <= 4 * largest, f"the gradient of {name} of expert {expert}: relative error {each:.2e}"

    def close(self) -> None:
        for dispatcher in (self.dispatcher, self.on_cpu):
            dispatcher.close()
