"""What lies between the two products of a backward: the kernel gives what torch does, and h is overwritten only where nobody needs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moequant import Activation, MoEQuantDispatcher
from moequant.batch import QuantizedTensor
from moequant.quantization import dequantize
from moequant.testing import assert_bit_equal, relative_error
from moequant.training.between import Given, Slopes, Wanted, by_kernel, by_torch
from moequant.training.functions import Plan
from moequant.training.layer import train
from moequant.training.precision import Precision
from moequant.training.routes import Routes
from training_cases import ACTIVATIONS, LARGEST, check_layer, leaves, run_layer, tokens_of, weights_of

EXPERTS, HIDDEN, TOKENS = 4, 128, 20
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
QUANTS = pytest.mark.parametrize("quant", LARGEST)
ALL = Wanted(plain=True, operand=True, inner=True, weights=True, keep=True)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU kernels run too, interpreted."""
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")


def dispatcher_of(layout: str, quant: str, device: str) -> MoEQuantDispatcher:
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 2, "hidden_size": HIDDEN, "max_tokens_per_rank": TOKENS}
    return MoEQuantDispatcher(**sizes, layout=layout, quant=quant, recipe="ue8m0", device=device)


def both(dispatcher: MoEQuantDispatcher, kind: Activation, inner: int, wanted: Wanted, biased: bool = False) -> tuple[Any, ...]:
    """The rows, what the kernel makes and what torch does. Expert 1 has no rows, and rows of no expert are NaN."""
    device = dispatcher.device
    tokens = tokens_of(TOKENS, 2, EXPERTS, HIDDEN)
    ids = torch.where(tokens.ids == 1, -1, tokens.ids).to(device)
    plan = Plan(Routes(dispatcher), Precision.of(dispatcher.config), kind)
    rows = plan.routes.dispatch(tokens.hidden.to(device), ids)
    shape = rows.sources.shape
    d_inner, h = (torch.randn(*shape, n, device=device).bfloat16() for n in (inner, kind.width * inner))
    for tensor in (d_inner, h):
        tensor.flatten(0, -2)[~rows.valid.squeeze(1)] = torch.nan
    bias = torch.randn(EXPERTS, h.shape[-1], device=device) if biased else None
    more = torch.randn(rows.valid.shape[0], device=device) if biased else None
    expected = by_torch(plan, rows, Given(d_inner, h, bias, tokens.weights.to(device), ids, more), wanted)
    given = Given(d_inner.clone(), h.clone(), bias, tokens.weights.to(device), ids, more)
    return rows, given, h, by_kernel(plan, rows, given, wanted), expected


def plain(x: QuantizedTensor | Tensor) -> Tensor:
    return (dequantize(x) if isinstance(x, QuantizedTensor) else x).float().flatten(0, -2)


def assert_same(rows: Any, made: Slopes, expected: Slopes, quant: str) -> None:
    valid = rows.valid.squeeze(1)
    assert made.of_h is not None and expected.of_h is not None
    assert relative_error(made.of_h[valid], expected.of_h[valid]) < 2e-3
    assert made.inner is not None and expected.inner is not None and made.operand is not None and expected.operand is not None
    assert relative_error(made.inner[valid], expected.inner[valid]) < 2e-3
    # numbers that two roundings place on other sides of a step of e4m3
    assert relative_error(plain(made.operand)[valid], plain(expected.operand)[valid]) < (2e-3 if quant == "none" else 5e-3)
    assert made.of_weights is not None and expected.of_weights is not None
    torch.testing.assert_close(made.of_weights, expected.of_weights, rtol=1e-4, atol=1e-4)


@QUANTS
@LAYOUTS
@pytest.mark.parametrize("inner", [128, 192], ids=str)
def test_the_kernel_makes_what_torch_does(inner, layout, quant, device):
    with dispatcher_of(layout, quant, device) as dispatcher:
        rows, given, h, made, expected = both(dispatcher, Activation(), inner, ALL)
        assert_same(rows, made, expected, quant)
        assert_bit_equal(given.h, h)
        rows, given, _, _, _ = both(dispatcher, Activation(), inner, ALL._replace(keep=False))
        # h, whose place it takes
        assert given.h[0].isfinite().all() if layout == "padded" else given.h[: int(rows.num_tokens[0])].isfinite().all()


@LAYOUTS
@pytest.mark.parametrize("name", ["gpt-oss", "relu2, not gated"])
def test_other_activations_with_biases_and_numbers_of_rows(name, layout, device):
    with dispatcher_of(layout, "fp8_e4m3fn", device) as dispatcher:
        rows, _, _, made, expected = both(dispatcher, ACTIVATIONS[name], 128, ALL, biased=True)
        assert_same(rows, made, expected, "fp8_e4m3fn")


def test_only_what_is_wanted_is_made(device):
    with dispatcher_of("ragged", "fp8_e4m3fn", device) as dispatcher:
        _, given, _, made, expected = both(dispatcher, Activation(), 128, Wanted(False, False, False, False, True))
        for slopes in (made, expected):
            assert slopes.of_h is slopes.operand is slopes.inner is slopes.of_weights is None
        assert given.d_inner.isnan().any()


@pytest.mark.parametrize("inner", [128, 192], ids=str)
def test_a_gradient_that_is_quantized_alone_has_the_numbers_that_it_has_beside_the_plain_one(inner, device):
    with dispatcher_of("ragged", "fp8_e4m3fn", device) as dispatcher:
        operands = []
        for wanted in (ALL, ALL._replace(plain=False)):
            torch.manual_seed(3)
            rows, _, _, made, expected = both(dispatcher, Activation(), inner, wanted)
            assert (made.of_h is None) == (expected.of_h is None) == (not wanted.plain) and made.operand is not None
            operands.append(plain(made.operand)[rows.valid.squeeze(1)])
        assert_bit_equal(*operands)


@pytest.mark.parametrize("layout, quant", [("padded", "none"), ("ragged", "fp8_e4m3fn")])
def test_whole_layers_by_kernels_have_the_gradients_of_autograd(layout, quant, device):
    settings, sizes = {"quant": quant, "layout": layout}, (256, 128, 40)
    options = {"recompute": layout == "padded", "passes": 1}
    check_layer([run_layer(0, 1, device, settings, sizes, options)], sizes, options, LARGEST[quant])


@LAYOUTS
@pytest.mark.parametrize("inner", [128, 200], ids=str)
def test_a_result_kept_in_fp8_comes_back_as_its_rows_dequantized(inner, layout, device):
    with dispatcher_of(layout, "fp8_e4m3fn", device) as dispatcher:
        rows, given, _, _, _ = both(dispatcher, Activation(), inner, ALL)
        plan = Plan(Routes(dispatcher), Precision.of(dispatcher.config), Activation(), keep_quantized=True)
        values, scales = plan.kept(given.h, rows)
        back, valid = plan.restored((values, scales), rows), rows.valid.squeeze(1)
        expected = plain(QuantizedTensor(values, scales, "transposed", "ue8m0"))[valid]
        assert back.shape == given.h.shape and values.nbytes + scales.nbytes < 0.54 * given.h.nbytes
        assert_bit_equal(back.flatten(0, -2)[valid].float(), expected)


@pytest.mark.parametrize("quant", ["none", pytest.param("fp8_e4m3fn", marks=pytest.mark.gpu)])
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(quant, device):
    with dispatcher_of("ragged", quant, device) as dispatcher:
        of, tokens = leaves(weights_of(EXPERTS, HIDDEN, 128), device), tokens_of(TOKENS, 2, EXPERTS, HIDDEN)
        x, s = (t.to(device).requires_grad_() for t in (tokens.hidden, tokens.weights))
        out = train(dispatcher, (x, tokens.ids.to(device), s), (of.w13, of.w2, None, None), Activation())
        call = out, (x, s, of.w13, of.w2), tokens.grad.to(device)
        first, second = torch.autograd.grad(*call, retain_graph=True), torch.autograd.grad(*call)
        for a, b in zip(first, second, strict=True):
            assert_bit_equal(a, b)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_the_memory_of_a_result_that_nobody_reads_again_is_free_within_the_backward(retain, biases, device, monkeypatch):
    """GEMM 1's, once the numbers that follow from it are there in fp8: when w13's gradient is made."""
    held, sizes, made = [], [], Precision.weight_gradient
    monkeypatch.setattr(Plan, "kept", lambda self, h, rows: held.append(h) or (h,))

    def looking(*given: Any) -> Tensor:
        sizes.append(held[0].untyped_storage().nbytes())
        return made(*given)

    monkeypatch.setattr(Precision, "weight_gradient", looking)
    with dispatcher_of("ragged", "fp8_e4m3fn", device) as dispatcher:
        of, tokens = leaves(weights_of(EXPERTS, HIDDEN, 128, biases=biases), device), tokens_of(TOKENS, 2, EXPERTS, HIDDEN)
        given = tokens.hidden.to(device).requires_grad_(), tokens.ids.to(device), tokens.weights.to(device)
        out = train(dispatcher, given, (of.w13, of.w2, of.bias13, of.bias2), Activation())
        out.backward(tokens.grad.to(device), retain_graph=retain)
    # a bias's gradient is the sum of plain rows, which lie there
    assert len(sizes) == 2 and all((size > 0) == (retain or biases) for size in sizes)
