# pyright: reportMissingImports=false
"""Experts of transformers under grad: their gradients, what is frozen, the modes of torch, whole models, and an optimizer's steps."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", "5.23")

from hf_experts import EXPERTS, HIDDEN, error, make, odd_gate, quantize, run, scan, tokens
from hf_models import FAMILIES, VOCABULARY, build, prompt
from test_transformers_experts import BIASED, NORMED

from moequant.integrations.transformers import configure
from moequant.integrations.transformers.layers import layer_of
from moequant.integrations.transformers.settings import current, say_once
from moequant.integrations.transformers.training import trained
from moequant.testing import assert_bit_equal

QWEN, GPT = "Qwen3MoeExperts", "GptOssExperts"
NAMES = [QWEN, GPT]
# Measured over all classes, at most 5.9e-3, as in the forward.
LARGEST = 6.5e-3


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    before, clamp = current(), Tensor.clamp

    def passing(x: Tensor, *limits: Any, **named: Any) -> Tensor:
        clamped = clamp(x.detach(), *limits, **named)
        return torch.where(clamped == x, x, clamped)

    say_once.cache_clear()
    # a number on a limit passes its gradient on here, as in torch up to 2.13: of numbers in bfloat16 many lie there
    monkeypatch.setattr(Tensor, "clamp", passing)
    yield
    configure(**vars(before))


def gradients(module: Any, implementation: str, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The output and all gradients, of a loss that is linear in the output."""
    module.config._experts_implementation_internal = implementation
    hidden, ids, weights = inputs
    hidden, weights = (x.clone().requires_grad_() for x in (hidden, weights))
    out = module(hidden, ids, weights)
    out.backward(grad_of(len(hidden)).to(out))
    found = {"output": out.detach(), "hidden": hidden.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def grad_of(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(7)).bfloat16()


def trainable(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    module = make(scan()[name])
    if name.removesuffix("Experts") in BIASED:
        # none, or one that is far beyond the limit: beside it, sums of rounded products lie on one side or the other
        module.gate_up_proj_bias.copy_(
            8 * torch.randint(-1, 2, module.gate_up_proj_bias.shape, generator=torch.Generator().manual_seed(5))
        )
    return module.to(dtype).requires_grad_(True)


def rounded(module: Any) -> Any:
    """A copy in float32 that rounds GEMM 1's result, as all who compute in bfloat16 do: otherwise one in a thousand gates lies on the
    other side of a limit, where the gradient is 0."""
    module = copy.deepcopy(module).float()
    if module.has_gate:
        exact = module._apply_gate
        module._apply_gate = lambda columns: exact(columns + (columns.bfloat16().float() - columns).detach())
    return module


@pytest.mark.parametrize("name", scan())
def test_a_class_has_the_gradients_of_its_own_backward(name):
    module, short, inputs = trainable(name), name.removesuffix("Experts"), tokens(21)
    expected = gradients(rounded(module), "eager", (inputs[0].float(), *inputs[1:]))
    assert isinstance(trained(module), str) == (short in NORMED)
    found = gradients(module, "moequant", inputs)
    for of, gradient in found.items():
        assert gradient.dtype == (torch.float32 if of == "weights" else torch.bfloat16)
        assert error(gradient, expected[of]) < LARGEST, of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_other_types_have_gradients_of_theirs(name, dtype, caplog):
    hidden, ids, weights = tokens(21)
    expected = gradients(trainable(name), "moequant", (hidden, ids, weights))
    with caplog.at_level(logging.WARNING, "moequant"):
        found = gradients(trainable(name, dtype), "moequant", (hidden.to(dtype), ids, weights.to(dtype)))
    assert any("are trained in products of bfloat16" in record.message for record in caplog.records)
    for of, gradient in found.items():
        assert gradient.dtype == dtype
        assert error(gradient, expected[of]) < LARGEST, of


@pytest.mark.parametrize("frozen", ["experts", "tokens", "down_proj", "all but the routing weights"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_gets_no_gradient_and_changes_none(name, frozen):
    module, inputs = trainable(name), tokens(9)
    expected = gradients(module, "moequant", inputs)
    module.zero_grad()
    hidden, weights = (x.clone().requires_grad_(frozen != "tokens") for x in (inputs[0], inputs[2]))
    if "all" in frozen or frozen == "experts":
        module.requires_grad_(False)
    if "all" in frozen:
        hidden.requires_grad_(False)
    if frozen == "down_proj":
        module.down_proj.requires_grad_(False)
    out = module(hidden, inputs[1], weights)
    out.backward(grad_of(9))
    assert_bit_equal(out.detach(), expected["output"])
    of = {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    assert any(tensor.requires_grad for tensor in of.values())
    for key, tensor in of.items():
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            assert_bit_equal(tensor.grad, expected[key], key)


def test_a_weight_that_is_computed_from_others_passes_its_gradient_on():
    """As adapters are put on experts."""

    class Adapted(nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.down = nn.Parameter(torch.randn(EXPERTS, rows, 2, generator=generator).bfloat16() / 4)
            self.up = nn.Parameter(torch.randn(EXPERTS, 2, columns, generator=generator).bfloat16() / 4)

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.down @ self.up

    module, inputs = make(scan()[QWEN]), tokens(21)
    nn.utils.parametrize.register_parametrization(module, "down_proj", Adapted(*module.down_proj.shape[1:]))
    expected = gradients(rounded(module), "eager", (inputs[0].float(), *inputs[1:]))
    found = gradients(module, "moequant", inputs)
    assert len(found) == 5
    for of, gradient in found.items():
        assert error(gradient, expected[of]) < 1e-2, of
    # tokens that want none, and a weight that is no parameter of the module
    hidden, ids, weights = inputs
    assert module(hidden, ids, weights).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_are_absent_or_named_twice_and_no_tokens_at_all(name):
    module, (hidden, ids, weights) = trainable(name), tokens(40)
    module._is_expert_parallel = True
    mine, others = ids.clone(), ids % 2 == 0
    mine[others] = EXPERTS
    twice = ids // 4
    for some, kept in ((mine, ~others), (twice, torch.ones_like(others))):
        module.zero_grad()
        found = gradients(module, "moequant", (hidden, some, weights))
        plain = rounded(module)
        plain.zero_grad()
        plain._is_expert_parallel = False
        expected = gradients(plain, "eager", (hidden.float(), some.clamp(max=EXPERTS - 1), weights * kept))
        for of, gradient in found.items():
            # a weight of 0 has a gradient, an absent entry has none
            reference = expected[of] * kept if of == "weights" else expected[of]
            assert error(gradient, reference) < LARGEST, of
    for parameter in module.parameters():
        parameter.grad = None
    none = gradients(module, "moequant", tokens(0))
    assert none["hidden"].shape == (0, HIDDEN) and none["weights"].shape == (0, 3)
    assert not any(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_more_tokens_than_fit_are_trained_in_pieces(name):
    inputs = tokens(40)
    expected = gradients(trainable(name), "moequant", inputs)
    configure(max_tokens=12)
    found = gradients(trainable(name), "moequant", inputs)
    for of, gradient in found.items():
        # each piece is rounded, and each sum of pieces: 0.16% of what is rounded, which comes to 0.33% of four pieces; what is a token's
        # own is not, but some CPUs add products of other numbers of rows in another order
        assert error(gradient, expected[of]) < (1e-4 if of in ("output", "weights") else 5.5e-3), of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", ["plain", "fused"])
def test_training_and_inference_take_turns_on_the_weights_of_the_moment(name, optimizer):
    """A fused optimizer changes weights without a trace; a copy of them in another type or order must not outlive that."""
    module, inputs = trainable(name, torch.float32 if name == QWEN else torch.bfloat16), tokens(9)
    inputs = inputs[0].to(module.down_proj.dtype), *inputs[1:]
    adam = torch.optim.AdamW(module.parameters(), lr=0.02, fused=optimizer == "fused")
    before = run(module, "moequant", *inputs)
    for _ in range(3):
        found = gradients(module, "moequant", inputs)
        with torch.inference_mode():
            inferred = module(*inputs).clone()
        # between a backward and its step, too
        assert_bit_equal(inferred, found["output"])
        adam.step()
        adam.zero_grad()
        after = run(module, "moequant", *inputs)
        assert_bit_equal(after, run(copy.deepcopy(module), "moequant", *inputs))
        assert error(after, before) > 0.02
        before = after


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_no_gradient(name):
    inputs = tokens(9)
    expected = gradients(trainable(name), "moequant", inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(trainable(name), "moequant", inputs)
    for of, gradient in found.items():
        assert_bit_equal(gradient, expected[of], of)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_function_around_trained_experts_breaks_its_graph(name):
    module, inputs = trainable(name), tokens(9)
    expected = gradients(module, "moequant", inputs)
    module.zero_grad()
    hidden, ids, weights = inputs
    hidden, weights = (x.clone().requires_grad_() for x in (hidden, weights))
    out = torch.compile(lambda *given: 2 * module(*given) / 2, backend="eager")(hidden, ids, weights)
    assert_bit_equal(out.detach(), expected["output"])
    out.backward(grad_of(9))
    assert_bit_equal(module.down_proj.grad, expected["down_proj"])
    assert hidden.grad is not None
    assert_bit_equal(hidden.grad, expected["hidden"])


@pytest.mark.parametrize("name", [f"{GPT} of its own", "MuseSparkExperts"])
def test_what_moequant_can_not_train_the_built_in_does_and_it_is_said_once_why(name, caplog):
    module = trainable(name.partition(" ")[0])
    if "own" in name:
        module._apply_gate = odd_gate
    inputs = tokens(7)
    with caplog.at_level(logging.WARNING, "moequant"):
        found, again = (gradients(module, "moequant", inputs) for _ in range(2))
    (said,) = (record.message for record in caplog.records if "under grad" in record.message)
    assert f'{name.partition(" ")[0]} under grad runs as experts_implementation="grouped_mm": ' in said
    assert ("what it computes between its products" if "own" in name else "the norm behind its products") in said
    assert_bit_equal(again["output"], found["output"])
    assert error(found["output"], run(module, "moequant", *inputs)) < 1e-2


def test_quantized_weights_under_grad_are_refused():
    module = make(scan()[QWEN])
    quantize(module, "int8")
    hidden, ids, weights = tokens(3)
    module.config._experts_implementation_internal = "moequant"
    with pytest.raises(RuntimeError, match=r"quantized by MoEQuantConfig and has no backward; .* torch.no_grad"):
        module(hidden.float().requires_grad_(), ids, weights)


def loss_and_gradients(model: Any) -> dict[str, Tensor]:
    # some routers sample while they are trained
    torch.manual_seed(3)
    model.zero_grad()
    # with these no router of the families below has two scores so near that bfloat16 products choose the other expert
    ids = prompt(length=10).to(model.device)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_loss_and_the_gradients_that_it_has_by_itself(family):
    """In float32, but for the experts' products: in bfloat16 routers of the two choose other experts for a token here and there."""
    model = build(family).float().train().requires_grad_(True)
    expected = loss_and_gradients(model)
    model.set_experts_implementation("moequant")
    found = loss_and_gradients(model)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        # measured at most 1.1e-2: what two layers of experts do to a gradient that passes both
        # a router that chose between no two experts has none
        assert error(found[name], gradient) < 1.3e-2 if gradient.any() else not found[name].any(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(family, reentrant):
    model = build(family).train().requires_grad_(True)
    model.set_experts_implementation("moequant")
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.register_forward_pre_hook(lambda *given: calls.append(torch.is_grad_enabled()))
    found = loss_and_gradients(model)
    assert calls == ([False] * 2 + [True] * 2 if reentrant else [True] * 4)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_bit_equal(found[name], gradient, name)


def test_a_model_that_is_trained_learns_and_generates_with_what_it_has_learned():
    model = build("gpt_oss").train().requires_grad_(True)
    model.set_experts_implementation("moequant")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        losses.append(float(loss_and_gradients(model)["loss"]))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    made = model.eval().generate(prompt(), **settings)
    assert torch.equal(made, copy.deepcopy(model).generate(prompt(), **settings))
    assert bool((made < VOCABULARY).all())


def test_copies_of_weights_are_gone_while_they_are_trained():
    module, inputs = trainable(GPT), tokens(7)
    run(module, "moequant", *inputs)
    first = layer_of(module)
    gradients(module, "moequant", inputs)
    assert layer_of(module) is not first
