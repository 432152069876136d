"""What a call says of itself, as a word."""

from __future__ import annotations

import random

import pytest

from moequant.transport.calls import LAYERS, Call, unlike


def test_a_word_is_31_bits_that_say_the_call():
    draw = random.Random(0)
    for _ in range(200):
        flags = [draw.random() < 0.5 for _ in range(3)]
        call = Call(draw.randrange(512), draw.randrange(2), draw.randrange(256), draw.randrange(LAYERS + 1), *flags)
        assert 0 <= call.word < 2**31
        assert Call.of(call.word) == call


def test_numbers_past_their_bits_wrap():
    assert Call.of(Call(512 + 3, 1, 256 + 2).word) == Call(3, 1, 2)


@pytest.mark.parametrize(
    "change",
    [{"dispatcher": 2}, {"slot": 1}, {"first_experts": 4}, {"layer": 6}, {"combines": True}, {"float16": True}, {"pushed": True}],
)
def test_calls_that_differ_in_anything_are_unlike(change):
    call = Call(1, 0, 3, 5)
    other = call._replace(**change)
    assert unlike(call.word, other.word) and unlike(other.word, call.word)
    assert not unlike(call.word, call.word)


def test_a_layer_that_is_not_said_goes_with_any():
    said, silent = Call(1, 0, layer=5).word, Call(1, 0).word
    assert not unlike(said, silent) and not unlike(silent, said) and not unlike(silent, silent)


def test_a_call_in_words():
    assert str(Call(3, 1)) == "dispatch in slot 1 of dispatcher 3"
    assert str(Call(0, 0, 4, 7)) == "dispatch of the first 4 experts of layer 6 in slot 0 of dispatcher 0"
    combine = Call(0, 1, combines=True, float16=True, pushed=True)
    assert str(combine) == "combine of float16 rows that were pushed in slot 1 of dispatcher 0"
