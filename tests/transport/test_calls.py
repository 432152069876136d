"""What a call says of itself, as a word."""

from __future__ import annotations

import random
from typing import Any

import pytest

from moequant.transport.calls import LAYERS, Call, unlike


def test_a_word_is_31_bits_that_say_the_call():
    draw = random.Random(0)
    for _ in range(200):
        one, other = (draw.random() < 0.5 for _ in range(2))
        call = Call(draw.randrange(512), draw.randrange(2), 0, draw.randrange(LAYERS + 1))
        some = draw.randrange(256)
        for kind in (
            call._replace(first_experts=some),
            call._replace(first_experts=some, again=True),
            call._replace(gradients=True, again=one, makes=some % 16),
            call.combine(float16=one, pushed=other),
        ):
            assert 0 <= kind.word < 2**31
            assert Call.of(kind.word) == kind


def test_a_combine_has_nothing_of_its_dispatch_but_the_layer_and_the_slot():
    call = Call(1, 1, layer=5)
    for dispatch in (call, call._replace(first_experts=3), call._replace(gradients=True, makes=5), call._replace(again=True)):
        assert dispatch.combine(float16=True) == Call(1, 1, 0, 5, combines=True, float16=True)


def test_numbers_past_their_bits_wrap():
    assert Call.of(Call(512 + 3, 1, 256 + 2).word) == Call(3, 1, 2)


@pytest.mark.parametrize(
    "change",
    [{"dispatcher": 2}, {"slot": 1}, {"first_experts": 4}, {"layer": 6}, {"combines": True}, {"gradients": True}, {"again": True}],
)
def test_dispatches_that_differ_in_anything_are_unlike(change):
    check_unlike(Call(1, 0, 3, 5), change)


@pytest.mark.parametrize("change", [{"float16": True}, {"pushed": True}])
def test_combines_that_differ_in_anything_are_unlike(change):
    check_unlike(Call(1, 0, 3, 5).combine(), change)


def test_dispatches_of_which_other_gradients_are_made_are_unlike():
    check_unlike(Call(1, 0, 0, 5, gradients=True, makes=7), {"makes": 6})


def check_unlike(call: Call, change: dict[str, Any]) -> None:
    other = call._replace(**change)
    assert unlike(call.word, other.word) and unlike(other.word, call.word)
    assert not unlike(call.word, call.word)


def test_a_layer_that_is_not_said_goes_with_any():
    said, silent = Call(1, 0, layer=5).word, Call(1, 0).word
    assert not unlike(said, silent) and not unlike(silent, said) and not unlike(silent, silent)


def test_a_call_in_words():
    assert str(Call(3, 1)) == "dispatch in slot 1 of dispatcher 3"
    assert str(Call(0, 0, 4, 7)) == "dispatch of the first 4 experts of layer 6 in slot 0 of dispatcher 0"
    again = Call(0, 0, layer=7, again=True)
    assert str(again) == "dispatch of tokens once more for a backward of layer 6 in slot 0 of dispatcher 0"
    of_gradients = Call(0, 0, layer=1, gradients=True, makes=5)
    assert str(of_gradients) == (
        "dispatch of gradients of layer 0 that makes those of hidden states and w13 in slot 0 of dispatcher 0"
    )
    combine = Call(0, 1, combines=True, float16=True, pushed=True)
    assert str(combine) == "combine of float16 rows that were pushed in slot 1 of dispatcher 0"
