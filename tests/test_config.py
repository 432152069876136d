"""DispatcherConfig validates what it is given, and the sizes that follow are those that are allocated."""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from moequant import MoEQuantDispatcher
from moequant.config import CHOICES, POSITIVE, QUANT_DTYPES, DispatcherConfig, round_up
from moequant.transport.buffers import named

SIZES: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 300, "max_tokens_per_rank": 20}


def config(**changes) -> DispatcherConfig:
    return DispatcherConfig(**{**SIZES, **changes})


@pytest.mark.parametrize("value, multiple, expected", [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 16, 32)])
def test_round_up_goes_to_the_next_multiple(value, multiple, expected):
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", None, True], ids=repr)
@pytest.mark.parametrize("name", [*SIZES, "world_size", "slots"])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value!r}"):
        config(**{name: value})


@pytest.mark.parametrize("value", ["fp8", "", None], ids=repr)
@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_is_not_there_names_those_that_are(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of '{CHOICES[name][0]}'.*, got {value!r}"):
        config(**{name: value})


@pytest.mark.parametrize("name, value", [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_choice_is_accepted(name, value):
    # "auto" is only asked for of a layout
    assert getattr(config(**{name: value}), name) == ("padded" if (name, value) == ("layout", "auto") else value)


BAD = {
    "experts on too many ranks": ({"world_size": 3}, "multiple of the number of ranks, got 8 experts on 3 ranks; add experts"),
    "more slots": ({"slots": 3}, "slots must be 1 or 2, got 3"),
    "no capacity": ({"capacity": 0}, "capacity must be a positive number of rows for each expert, or None, got 0"),
    "a broken capacity": ({"capacity": 1.5}, "capacity must be .* got 1.5"),
    "an unknown recipe": ({"recipe": "mx"}, "recipe must be one of default, deepgemm, ue8m0, fnuz_224, got 'mx'"),
    "no time": ({"timeout": 0}, "timeout must be a number of seconds from 0.001 to 1e6, got 0"),
    "a time that is no number": ({"timeout": float("nan")}, "timeout must be a number of seconds from 0.001 to 1e6, got nan"),
    "no first time": ({"first_timeout": 0}, "first_timeout must be a number of seconds from 0.001 to 1e6, got 0"),
    "too long a time": ({"timeout": 1e6 + 1}, "timeout must be a number of seconds from 0.001 to 1e6, got 1000001.0"),
    "more rows than int32 numbers": ({"num_experts": 2**27, "capacity": 16}, "134217728 experts of 16 rows are too many"),
    "local on several ranks": (
        {"transport": "local", "world_size": 2},
        'serves one rank, got a group of 2; use "collective" or "auto"',
    ),
    "rows of an expert in one buffer": (
        {"layout": "ragged", "capacity": 16},
        'capacity is of layout "padded".* use rank_capacity, got 16',
    ),
    "rows of a rank in buffers of experts": ({"rank_capacity": 1.5}, 'rank_capacity is of layout "ragged".* use capacity, got 1.5'),
    "a rank without rows": ({"layout": "ragged", "rank_capacity": 0}, "rank_capacity must be a positive number of rows .* got 0"),
    "a factor of nothing": ({"layout": "ragged", "rank_capacity": -0.5}, "rank_capacity must be a positive .* got -0.5"),
    "a factor that is no number": ({"layout": "ragged", "rank_capacity": float("nan")}, "rank_capacity must be .* got nan"),
    "a factor without end": ({"layout": "ragged", "rank_capacity": float("inf")}, "rank_capacity must be .* got inf"),
    "rows that are true": ({"layout": "ragged", "rank_capacity": True}, "rank_capacity must be .* got True"),
    "rows in words": ({"layout": "ragged", "rank_capacity": "all"}, "rank_capacity must be .* got 'all'"),
    "more rows of ranks than int32 numbers": (
        {"layout": "ragged", "rank_capacity": 2**28, "world_size": 8},
        "8 ranks of 268435456 rows are too many: .* lower rank_capacity",
    ),
    "a reduction that is not there": ({"reduce": "tree"}, "reduce must be one of 'exact', 'per_rank', got 'tree'"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_raise_a_value_error(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_rows_up_to_the_last_that_int32_numbers_are_accepted():
    assert config(num_experts=2**27 - 1, capacity=16).max_rows == 16
    assert config(timeout=1e6).timeout == 1e6
    assert config(timeout=5).first_limit == 5 and config(timeout=5, first_timeout=900).first_limit == 900
    assert config(layout="ragged", rank_capacity=2**31 - 16).total_rows == 2**31 - 16


def test_the_constructors_defaults_are_those_of_the_settings():
    parameters = inspect.signature(MoEQuantDispatcher).parameters
    settings = {field.name: field.default for field in fields(DispatcherConfig) if field.default is not MISSING}
    assert settings.pop("world_size") == 1
    assert {name: parameters[name].default for name in settings} == settings


def test_settings_are_given_by_name_and_stay():
    with pytest.raises(TypeError):
        DispatcherConfig(8, 2, 300, 20)  # pyright: ignore[reportCallIssue]
    with pytest.raises(FrozenInstanceError):
        config().top_k = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "changes, local, rows, per_source",
    [
        # 20 tokens round up to 32 rows; 4 ranks send 80
        ({}, 8, 32, 32),
        ({"world_size": 4}, 2, 80, 32),
        ({"world_size": 4, "max_tokens_per_rank": 128}, 2, 512, 128),
        ({"world_size": 4, "capacity": 40}, 2, 48, 32),
        # no source can fill more than there is
        ({"world_size": 4, "capacity": 1}, 2, 16, 16),
        ({"max_tokens_per_rank": 1}, 8, 16, 16),
    ],
    ids=["one rank", "four ranks", "a multiple of 16", "capacity", "capacity of one", "one token"],
)
def test_rows_follow_from_ranks_tokens_and_capacity(changes, local, rows, per_source):
    settings = config(**changes)
    assert (settings.num_local_experts, settings.max_rows, settings.rows_per_source) == (local, rows, per_source)


@pytest.mark.parametrize(
    "changes, rows",
    [
        # 20 tokens, two experts each: 40 rows, and up to 15 more for each expert but the last
        ({}, 48 + 7 * 16),
        ({"world_size": 4, "num_experts": 16}, 4 * 40 + 3 * 16),
        # not more than padded: 80 rows of one expert or of each of two
        ({"world_size": 4, "num_experts": 4}, 80),
        ({"world_size": 4}, 2 * 80),
        ({"max_tokens_per_rank": 2, "num_experts": 2}, 2 * 16),
        ({"rank_capacity": 100}, 112),
        ({"rank_capacity": 1}, 16),
        # more than can come, if that is what is wanted
        ({"rank_capacity": 5000}, 5008),
        # 1.5 times 40, and 16 for each expert
        ({"world_size": 4, "rank_capacity": 1.5}, 64 + 2 * 16),
        ({"world_size": 4, "rank_capacity": 1e-9}, 16 + 2 * 16),
        # not more than all
        ({"world_size": 4, "num_experts": 16, "rank_capacity": 9.0}, 4 * 40 + 3 * 16),
    ],
    ids=str,
)
def test_rows_of_a_rank_follow_from_what_can_come_or_its_capacity(changes, rows):
    settings = config(layout="ragged", **changes)
    assert settings.ragged and settings.batch_shape == (rows,) and settings.total_rows == settings.max_rows == rows
    assert settings.rows_per_source == min(rows, round_up(settings.max_tokens_per_rank, 16))


def test_padded_rows_are_those_of_all_experts():
    settings = config(world_size=4)
    assert not settings.ragged and settings.batch_shape == (2, 80) and settings.total_rows == 160


@pytest.mark.parametrize("hidden_size, groups", [(1, 1), (128, 1), (129, 2), (2880, 23), (7168, 56)])
def test_groups_round_the_hidden_size_up(hidden_size, groups):
    assert config(hidden_size=hidden_size).num_groups == groups


@pytest.mark.parametrize(
    "quant, dtype",
    [
        ("none", torch.bfloat16),
        ("float16", torch.float16),
        ("fp8_e4m3fn", torch.float8_e4m3fn),
        ("fp8_e4m3fnuz", torch.float8_e4m3fnuz),
        ("fp8_e5m2", torch.float8_e5m2),
        ("int8", torch.int8),
    ],
)
def test_quant_names_the_type_of_the_values(quant, dtype):
    assert config(quant=quant).dtype == dtype
    assert config(quant=quant).quantized == (quant not in ("none", "float16"))
    assert set(QUANT_DTYPES) == set(CHOICES["quant"])


def test_the_difference_names_each_setting_that_differs():
    mine = config()
    assert mine.difference(config()) == ""
    assert mine.difference(replace(mine, top_k=3, quant="int8")) == "top_k: 2 and 3, quant: 'fp8_e4m3fn' and 'int8'"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slots": 2},
        {"capacity": 17},
        {"hidden_size": 128, "top_k": 8},
        {"layout": "ragged"},
        {"layout": "ragged", "rank_capacity": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("quant", QUANT_DTYPES)
def test_buffer_bytes_is_what_a_local_dispatcher_allocates(quant, changes):
    settings = {**SIZES, "quant": quant, **changes}
    size = config(quant=quant, **changes)
    rows, tokens = math.prod(size.batch_shape), 20 * size.top_k
    # of each expert num_tokens, and where its rows start
    experts = 8 * 4 * (2 if size.ragged else 1)
    batch = rows * (size.hidden_size * size.dtype.itemsize + (4 * size.num_groups if size.quantized else 0) + 8) + experts
    expected = size.slots * (batch + 2 * 4 * tokens + 4 * 8)
    assert MoEQuantDispatcher.buffer_bytes(**settings) == expected
    with MoEQuantDispatcher(**settings, transport="local", device="cpu") as dispatcher:
        buffers = [buffer for slot in dispatcher._slots for buffer in named(slot.buffers).values()]
    assert sum(buffer.untyped_storage().nbytes() for buffer in buffers) == expected


@pytest.mark.parametrize("exchange", ["padded", "packed"])
def test_buffer_bytes_needs_no_group_and_shrinks_with_the_experts_of_a_rank(exchange):
    few, many = (MoEQuantDispatcher.buffer_bytes(**SIZES, world_size=ranks, exchange=exchange, capacity=4096) for ranks in (2, 8))
    assert many < few
    # the batch alone: values, scales and sources of 1 and of 4 experts
    assert few - many > 3 * 4096 * (300 + 4 * 3 + 8) // 2


def test_buffer_bytes_validates_as_the_constructor_does():
    with pytest.raises(ValueError, match="multiple of the number of ranks"):
        MoEQuantDispatcher.buffer_bytes(**SIZES, world_size=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'experts'"):
        MoEQuantDispatcher.buffer_bytes(**SIZES, experts=3)
    with pytest.raises(ValueError, match="quant must be one of"):
        MoEQuantDispatcher(**SIZES, quant="fp4", device="cpu")


@pytest.mark.parametrize("name", POSITIVE)
def test_sizes_that_int32_can_not_hold_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {2**31}; sizes are int32"):
        config(**{name: 2**31})


def test_entries_that_int32_can_not_number_are_refused():
    with pytest.raises(ValueError, match=r"max_tokens_per_rank times top_k must be below 2\*\*31"):
        config(max_tokens_per_rank=2**29, top_k=4)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", [[], {}, 3, None, ["auto"]], ids=repr)
def test_choices_of_other_types_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"max_tokens_per_rank": 256}, "padded"),
        ({"max_tokens_per_rank": 257}, "ragged"),
        ({"max_tokens_per_rank": 257, "capacity": 512}, "padded"),
        ({"max_tokens_per_rank": 8, "rank_capacity": 1.5}, "ragged"),
    ],
    ids=str,
)
def test_auto_is_ragged_for_many_tokens_and_says_so(settings, layout):
    config = DispatcherConfig(**SIZES | settings, layout="auto")
    assert config.layout == layout and config.ragged == (layout == "ragged")
    assert replace(config, max_tokens_per_rank=4096).layout == layout
