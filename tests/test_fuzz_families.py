"""Each family of the fuzz runs its settings, and finds errors that are planted: a wrong bit, a guard that is touched."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fuzz_backward
import fuzz_families
import fuzz_gpu
import fuzz_weight_gradients
import interpreter
from fuzz_operations import Place
from guarded import GUARD, Buffers, GuardTouchedError, guarded_buffers
from moequant import MoEQuantDispatcher, ops
from moequant.ops import on_cpu
from moequant.testing import run_ranks
from moequant.training import functions, precision
from moequant.transport import packed, padded, shared, symmetric
from moequant.transport.local import LocalTransport

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
PLACE = Place("cpu", True)


def settings_of(family: str, block: int, count: int = 2, place: Place = PLACE) -> tuple[str | None, bool]:
    """How the first wrong one of a block's settings ends, or the last one."""
    drawn, error, guards = fuzz_gpu.attempt(fuzz_families.draw_family, block, place, [family])
    for seed in range(block * fuzz_gpu.BLOCK, block * fuzz_gpu.BLOCK + count):
        if error is None:
            _, error, guards = fuzz_gpu.attempt(drawn.check, random.Random(f"setting {seed}"))
    if drawn is not None and hasattr(drawn, "close"):
        drawn.close()
    return error, guards


def flip(x: Tensor) -> None:
    """The lowest bit of the first number."""
    if x.numel():
        x.view(torch.uint8)[(0,) * x.dim()] ^= 1


def behind(x: Tensor) -> None:
    """A store past the end."""
    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    whole[(x.storage_offset() + x.numel()) * x.itemsize + 3] = 0


@pytest.mark.parametrize("family", fuzz_gpu.ON_ONE)
def test_every_family_of_one_rank_runs(family, device):
    here = Place("cpu", True) if device == "cpu" else Place("cuda:0", False)
    assert settings_of(family, 0, place=here) == (None, False)


def test_families_are_those_that_can_be_asked_for():
    assert {family.family for family in fuzz_families.families_of(PLACE)} == {*fuzz_gpu.ON_ONE}
    assert {family.family for family in fuzz_families.families_of(Place("cpu", True, 0, 2))} == {*fuzz_gpu.ON_SEVERAL}
    with pytest.raises(ValueError, match="families must be some of those that 1 of cpu have, activation, .* got .'peers'.'?"):
        fuzz_families.families_of(PLACE, ["peers"])
    chosen = fuzz_gpu.parse(["--families", "trained", "layers"])
    assert fuzz_gpu.again(7, chosen) == "python tests/fuzz_gpu.py --only 7 --families trained layers"
    assert fuzz_gpu.undrawn(chosen, [{"family": "layers"}]) == {"trained"}
    assert "peers" not in fuzz_gpu.undrawn(fuzz_gpu.parse(["--ranks", "2"]), [])


def test_buffers_that_code_asks_torch_for_are_nan_between_guards():
    with guarded_buffers("cpu") as buffers:
        made = [torch.empty(2, 3, dtype=torch.bfloat16, device="cpu"), torch.empty((4,), device="cpu")]
        made.append(torch.empty_like(made[0], dtype=torch.float32))
        # as they were
        others = torch.empty(5), torch.empty_like(made[0].T)
    assert len(buffers.given) == 3 and others[1].stride() == (1, 3)
    assert all(bool(x.isnan().all()) and x.is_leaf and x.data_ptr() % 16 == 0 for x in made)
    buffers.check()
    assert int(buffers.given[1].memory[0]) == GUARD
    behind(made[1])
    with pytest.raises(GuardTouchedError, match=r"1 bytes behind a buffer of torch.float32 \(4,\)"):
        buffers.check()


def test_the_first_buffers_are_looked_at_again(monkeypatch):
    monkeypatch.setattr(Buffers, "MOST", 20_000)
    with guarded_buffers("cpu") as buffers:
        made = [torch.empty(10, device="cpu") for _ in range(3)]
    buffers.check()
    with guarded_buffers("cpu", buffers):
        torch.empty(5, device="cpu")
    assert [len(buffer.tensor) for buffer in buffers.given] == [10, 10, 5]
    behind(made[0])
    with pytest.raises(GuardTouchedError):
        buffers.check()


def damaged(patch: pytest.MonkeyPatch, owner: Any, name: str, damage: Callable[..., object]) -> None:
    """Lets a function do some damage besides: damage(result, *arguments)."""
    before = getattr(owner, name)

    def call(*given: Any, **settings: Any) -> Any:
        result = before(*given, **settings)
        damage(result, *given, **settings)
        return result

    patch.setattr(owner, name, call)


def wrong(family: str, text: str, guards: bool = False, blocks: int = 8) -> None:
    """Before long a setting is wrong, and says so."""
    errors = []
    for block in range(blocks):
        error, touched = settings_of(family, block)
        if error is not None and text in error:
            assert touched is guards, error
            return
        errors.append(error)
    raise AssertionError(f"{text} was not found: {errors}")


def test_a_guess_that_changes_a_batch_is_wrong(monkeypatch):
    def guessed(result: Any, *given: Any, expected_tokens: int | None = None, **settings: Any) -> None:
        if expected_tokens is not None:
            flip(result[0].values)

    damaged(monkeypatch, MoEQuantDispatcher, "dispatch", guessed)
    wrong("layers", "differ in")


def test_an_output_that_is_written_behind_its_rows_is_wrong(monkeypatch):
    def more(result: Any, dispatcher: Any, *given: Any, out: Tensor | None = None, **settings: Any) -> None:
        if out is not None and len(out):
            behind(out)

    damaged(monkeypatch, MoEQuantDispatcher, "__call__", more)
    wrong("layers", "a layer's output", guards=True)
    wrong("invariant", "a layer's output", guards=True)


@pytest.mark.parametrize("family", ["layers", "invariant", "trained"])
def test_an_id_that_is_cut_to_32_bits_is_wrong(family, monkeypatch):
    before = LocalTransport.dispatch

    def cut(self: Any, hidden: Tensor, ids: Tensor, *others: Any) -> Any:
        return before(self, hidden, ids.remainder(2**32) if ids.dtype == torch.int64 else ids.abs(), *others)

    monkeypatch.setattr(LocalTransport, "dispatch", cut)
    wrong(family, "AssertionError" if family == "trained" else "differ in")


def test_a_token_that_is_another_one_in_a_batch_is_wrong(monkeypatch):
    damaged(monkeypatch, LocalTransport, "combine", lambda result, self, y, weights, out, *_: len(out) > 1 and flip(out))
    wrong("invariant", "tokens in a batch and alone")


def test_a_store_behind_a_buffer_of_a_layer_is_wrong(monkeypatch):
    for family in ("invariant", "trained"):
        with monkeypatch.context() as patch:
            damaged(
                patch, LocalTransport, "combine", lambda result, self, y, weights, out, slot, state: behind(slot.buffers.values)
            )
            wrong(family, "behind a buffer of", guards=True)


BACKWARD: dict[str, tuple[Callable[..., object], str, bool]] = {
    "a zero": (
        lambda _, given, placed, entries, gradient, *more: gradient.masked_fill_(gradient == 0, 1e-3),
        "zeros of the gradient",
        False,
    ),
    "a row of nobody": (
        lambda _, given, placed, entries, gradient, *more: gradient[-1:].fill_(1e-3),
        "elements of the gradient",
        True,
    ),
    "a larger gradient": (lambda _, given, placed, entries, gradient, *more: gradient.mul_(1.02), "the gradient: ", False),
    "a weight's gradient": (
        lambda _, given, placed, entries, *more: entries[1] is not None and entries[1].mul_(1.001),
        "routing",
        False,
    ),
    "a row's value": (
        lambda _, given, placed, entries, gradient, inner, *more: inner is not None and inner.mul_(0.98),
        "inner: ",
        False,
    ),
    "past the end": (lambda _, given, placed, entries, gradient, *more: behind(gradient), "behind the gradient", True),
    "a narrow bit": (lambda _, *given: given[5] is not None and flip(given[5][0]), "values of the gradient differ", False),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_an_error_of_a_backward_is_found(case, monkeypatch):
    damage, text, guards = BACKWARD[case]
    damaged(monkeypatch, fuzz_backward.ops, "silu_mul_backward", damage)
    wrong("silu_mul_backward", text, guards)


@pytest.mark.parametrize(("damage", "guards"), [(flip, False), (behind, True)], ids=["a bit", "past the end"])
def test_an_error_of_plain_rows_is_found(damage, guards, monkeypatch):
    damaged(monkeypatch, fuzz_backward.ops, "plain_rows", lambda _, out, *given: damage(out))
    wrong("plain_rows", "behind plain rows" if guards else "plain rows differ", guards)


COLUMNWISE: dict[str, tuple[Callable[..., object], str, bool]] = {
    "a bit": (lambda values, scales, ends: flip(values), "values differ", False),
    "a scale": (lambda values, scales, ends: scales[:1, :1].mul_(2), "scales differ", False),
    "an end": (lambda values, scales, ends: ends[-1:].add_(1), "ends of blocks differ", False),
    "a block of nobody": (lambda values, scales, ends: values.view(torch.int8)[:, -1:].fill_(0), "values differ", False),
    "past the end": (lambda values, scales, ends: behind(values), "behind values", True),
    "past the ends": (lambda values, scales, ends: behind(ends), "behind ends of blocks", True),
}


@pytest.mark.parametrize("case", COLUMNWISE)
def test_an_error_of_rows_along_the_tokens_is_found(case, monkeypatch):
    damage, text, guards = COLUMNWISE[case]
    damaged(monkeypatch, fuzz_backward.ops, "quantize_columnwise", lambda _, *given, **settings: damage(*given[4:7]))
    wrong("columnwise", text, guards)


def idle(x: Tensor) -> Tensor:
    """A number of an expert whose gradient is all zeros; if there is none, of no consequence."""
    rows = (x == 0).flatten(1).all(1).nonzero().flatten().tolist()
    return x[rows[0], :1, :1] if rows else x[:0]


GRADIENTS: dict[str, tuple[Callable[..., object], str, bool]] = {
    "another number": (lambda _, *given: given[5].mul_(1.03), "relative error", False),
    "of an expert without tokens": (lambda _, *given: idle(given[5]).fill_(1e-4), "has no tokens", False),
    "past the end": (lambda _, *given: behind(given[5]), "behind the gradient", True),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_an_error_of_a_weight_gradient_is_found(case, monkeypatch):
    damage, text, guards = GRADIENTS[case]
    damaged(monkeypatch, fuzz_weight_gradients.ops, "weight_gradient", damage)
    wrong("weight_gradient", text, guards)


def test_a_weight_gradient_that_is_not_the_same_twice_is_wrong(monkeypatch):
    turns = iter(range(10**6))
    damaged(monkeypatch, fuzz_weight_gradients.ops, "weight_gradient", lambda _, *given: next(turns) % 2 and flip(given[5]))
    wrong("weight_gradient", "gradients, twice differ")


WEIGHTS: dict[str, tuple[Callable[..., object], str, bool]] = {
    "a value": (lambda values, scales, *across: flip(values), "values of w", False),
    "a scale": (lambda values, scales, *across: flip(scales), "scales of w", False),
    "a value of the transpose": (lambda values, scales, *across: across and flip(across[0]), "values of its transpose", False),
    "past the end": (lambda values, scales, *across: behind(values), "behind values of w", True),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_an_error_of_a_quantized_weight_is_found(case, monkeypatch):
    damage, text, guards = WEIGHTS[case]
    damaged(monkeypatch, ops, "quantize_weight", lambda _, w, values, scales, *given: damage(values, scales, *given[3:]))
    wrong("weight", text, guards)


def scaled(name: str, factor: float) -> Callable[..., object]:
    """Makes what `slopes` gives other by a factor."""

    def damage(made: Any, *given: Any) -> None:
        if getattr(made, name) is not None:
            getattr(made, name).mul_(factor)

    return damage


TRAINED: dict[str, tuple[Any, str, Callable[..., object], str]] = {
    "a product": (precision.Precision, "product", lambda made, *_: made.mul_(1.01), "a product: relative error"),
    "one number of a product": (precision.Precision, "back_product", lambda made, *_: made[..., :1].add_(1.0), "product: "),
    "an activation's derivative": (functions, "slopes", scaled("of_h", 1.02), "the gradient of h: "),
    "a routing weight's": (functions, "slopes", scaled("of_weights", 1.001), "routing weights: "),
    "what is multiplied by": (functions, "slopes", scaled("inner", 0.98), "inner: "),
    "a weight's": (precision.Precision, "weight_gradient", lambda made, *_: made[:1].mul_(1.03), "the gradient of w"),
    "a bit of a token's": (functions.Routes, "sum", lambda made, *_: flip(made), "the gradient of hidden"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_an_error_of_a_layer_that_is_trained_is_found(case, monkeypatch):
    owner, name, damage, text = TRAINED[case]
    calls = [0]

    def on_the_device(*given: Any, **settings: Any) -> None:
        if calls[0]:
            damage(*given, **settings)

    # the CPU's layer is right
    damaged(monkeypatch, owner, name, on_the_device)
    before = fuzz_families.Trained._gradients

    def gradients(*given: Any, guarded: bool) -> Any:
        calls[0] = guarded
        return before(*given, guarded=guarded)

    monkeypatch.setattr(fuzz_families.Trained, "_gradients", gradients)
    wrong("trained", text)


def test_a_gradient_that_is_not_the_same_twice_is_wrong(monkeypatch):
    turns = iter(range(10**6))
    damaged(monkeypatch, precision.Precision, "weight_gradient", lambda made, *_: made[:1].mul_(1 + next(turns)))
    wrong("trained", ", twice differ")


@pytest.mark.parametrize(("damage", "text"), [(flip, "values of w"), (behind, "behind a buffer")], ids=["a bit", "past the end"])
def test_an_error_of_weights_that_are_quantized_anew_is_found(damage, text, monkeypatch):
    # what is made as a reference, without guards, is right
    plain = torch.empty
    damaged(monkeypatch, ops, "quantize_weight", lambda _, w, values, *given: torch.empty is not plain and damage(values))
    wrong("checkpoint", text, guards=damage is behind)


Planted = dict[str, list[tuple[Any, str, Callable[..., object]]]]


def of_combine(transport: Any, damage: Callable[[Tensor], object] = flip) -> list[tuple[Any, str, Callable[..., object]]]:
    return [(transport, "combine", lambda _, self, y, weights, out, *more: damage(out))]


SHARED: Planted = {
    "a sum": of_combine(shared.SharedTransport),
    "a row": [(shared.SharedTransport, "dispatch", lambda made, *given: flip(made[0].values))],
    "past the end": of_combine(shared.SharedTransport, behind),
}
SPREAD: Planted = {
    "a token alone": of_combine(LocalTransport, lambda out: len(out) == 1 and flip(out)),
    "the padded exchange": of_combine(padded.PaddedTransport),
    "the packed exchange": of_combine(packed.PackedTransport),
    "a shared batch": of_combine(shared.SharedTransport),
    "rows of the second rank": [
        (padded.PaddedTransport, "dispatch", lambda made, self, *_: self.first_expert and made[0].values.view(torch.uint8).zero_())
    ],
    "products as the batch has it": [
        (packed.PackedTransport, "dispatch", lambda made, *_: object.__setattr__(made[0], "batch_invariant", False)),
        (on_cpu, "product", lambda made, a, b, batch_invariant=False: batch_invariant or made.mul_(1.01)),
    ],
    "past the end": of_combine(packed.PackedTransport, behind),
}
# where kernels are interpreted
PUSHED: Planted = {
    "a sum of rows that were pushed": [
        (symmetric.SymmetricTransport, "combine_pushed", lambda _, self, dtype, weights, out, *more: flip(out))
    ]
}
# the family, its errors, and the blocks that have what these are planted in
SEVERAL: dict[str, tuple[str, Planted, Sequence[int]]] = {
    "shared": ("shared", SHARED, range(2)),
    "invariant": ("invariant", SPREAD, range(2)),
    "pushed": ("invariant", PUSHED, [2]),
}


def run_planted(rank: int, ranks: int, case: str) -> dict[str, tuple[str | None, bool]]:
    """The first error of each kind that is planted, and of none: any rank's."""
    found: dict[str, tuple[str | None, bool]] = {}
    control, (family, errors, blocks) = fuzz_gpu.Control(ranks, rank), SEVERAL[case]
    for name, planted in {"none": [], **errors}.items():
        with pytest.MonkeyPatch.context() as patch:
            for plant in planted:
                damaged(patch, *plant)
            ends = (control.merge(*settings_of(family, block, 1, Place("cpu", True, rank, ranks)), False) for block in blocks)
            found[name] = next((end[:2] for end in ends if end[0]), (None, False))
    return found


def check_planted(case: str, **how: Any) -> None:
    for found in run_ranks(run_planted, 2, case, **how):
        assert found.pop("none") == (None, False)
        assert all(error for error, _ in found.values()), found
        assert [name for name, (_, guards) in found.items() if guards] == [name for name in found if name == "past the end"]


@pytest.mark.parametrize("case", ["shared", "invariant"])
def test_families_of_several_ranks_run_and_errors_of_theirs_are_found(case):
    check_planted(case)


@pytest.mark.usefixtures("interpreted")
def test_a_token_that_is_another_one_where_rows_are_pushed_is_wrong():
    check_planted("pushed", setup=interpreter.install)
