"""Calls with wrong, odd and merely unusual arguments: each gives a right result or an error in our own words.

`python tests/test_call_fuzz.py 12000` runs that many and says what came of them; the same number of the same seed is the same call.
"""

from __future__ import annotations

import collections
import dataclasses
import linecache
import os
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moequant
from call_changes import changed
from layer_calls import dispatcher, stand_in, tokens
from moequant import ExpertBatch, QuantizedTensor
from public_calls import CALLS, Call, public_names, tensors_of, valid_rows

CALLS_IN_TESTS = 2000
PACKAGE = str(Path(moequant.__file__).parent)

# arguments that may be something which is strange elsewhere: "name" or "function.name"
MAY_BE: dict[str, tuple[type, ...]] = {
    "experts": (type(len), type, torch.nn.Module, object),
    "read": (type(len), type, torch.nn.Module),
    "device": (str, torch.device),
    "scale": (Tensor, int, float),
    "a_scale": (Tensor, int, float),
    "b_scale": (Tensor, int, float),
    "block": (list, tuple, torch.Size),
    "settings": (dict,),
    "inputs": (list, tuple),
    "model": (torch.nn.Module,),
    "eps": (int, float),
    "timeout": (int, float),
    "first_timeout": (int, float),
    "max_value": (int, float),
    "min_normal": (int, float),
}
OPTIONAL = {
    "num_tokens",
    "eps",
    "values",
    "scales",
    "out",
    "expected_rows",
    "expected_tokens",
    "first_timeout",
    "layer",
    "num_sms",
    "residual",
    "gate",
    "scale",
    "a_scale",
    "b_scale",
}
OPTIONAL |= {
    "bias",
    "a_scales",
    "b_scales",
    "scale_layout",
    "owner",
    "group",
    "capacity",
    "device",
    "chunks",
    "first_experts",
    "generator",
}
OPTIONAL |= {"router", "read", "max_tokens", "bias13", "bias2", "segments", "intermediate_size", "layer"}


class Verdict(Exception):
    """What is wrong with the outcome of a call. cause: the traceback of a poor error."""

    cause = ""


def judge_error(call: Call, error: BaseException) -> None:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    if isinstance(error, TypeError) and "keyword" in str(error):
        return
    if not isinstance(error, (ValueError, RuntimeError)):
        raise Verdict(f"{type(error).__name__}")
    if not frame.filename.startswith(PACKAGE) or not line.startswith("raise "):
        raise Verdict(f"{type(error).__name__} not raised by us")
    words = set(re.findall(r"[a-z]\w*", str(error)))
    named = {*call.arguments, *(field for x in call.arguments.values() if dataclasses.is_dataclass(x) for field in vars(x))}
    settings_words = SETTINGS_WORDS if "settings" in call.arguments else set()
    others = {
        "recipe" if "name" in named else "transport",
        "transport",
        "pushed",
        "room",
        "parts",
        "combine_send",
        *settings_words,
    }
    if not words & (named | others):
        raise Verdict(f"{type(error).__name__} names no argument")


SETTINGS_WORDS = {"num_experts", "top_k", "hidden_size", "max_tokens_per_rank", "topk_ids", "topk_weights", "hidden_states"}


def judge_arguments(call: Call, given: dict[str, Any]) -> None:
    """Raises for arguments that no call may accept."""
    for name, value in given.items():
        valid = call.arguments[name]
        if value is None and (valid is None or name in OPTIONAL):
            continue
        allowed = MAY_BE.get(name, ())
        if isinstance(value, allowed) and not (isinstance(value, bool) and not isinstance(valid, bool)):
            continue
        if name in call.dtypes:
            if value not in call.dtypes[name]:
                raise Verdict(f"{name}={value} was accepted")
        elif valid is not None and type(value) is not type(valid) and not (isinstance(value, Tensor) and isinstance(valid, Tensor)):
            if not {type(value), type(valid)} <= {Tensor, QuantizedTensor}:
                raise Verdict(f"{name} of {type(value).__name__} was accepted")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (value < 0 or value != value) and name != "dim":
            raise Verdict(f"{name}={value} was accepted")


def clean(value: Any) -> Any:
    """The same argument, tensors in memory of their own and in plain order."""
    if isinstance(value, Tensor):
        copied = value.detach().resolve_neg().clone()
        return copied.as_subclass(Tensor)
    if isinstance(value, (QuantizedTensor, ExpertBatch)):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(clean(x) for x in value)
    return value


def same(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    if a.dtype.itemsize == 1 and a.dtype != torch.bool:
        near = (a.view(torch.int8).int() - b.view(torch.int8).int()).abs() <= 1
        return a.shape == b.shape and a.dtype == b.dtype and bool(near.all())
    close = torch.allclose(a.double(), b.double(), rtol=1e-2 if a.dtype.itemsize == 2 else 1e-5, atol=1e-6, equal_nan=True)
    return a.shape == b.shape and a.dtype == b.dtype and close


def judge_result(name: str, call: Call, given: dict[str, Any], result: Any, again: Callable[[], Call]) -> None:
    """Raises unless a call that was accepted gives what it gives for plain copies of its arguments."""
    judge_arguments(call, given)
    found = tensors_of(result, valid_rows({**call.arguments, **given}))
    if (
        name in ("poison", "MoEQuantDispatcher.output_buffer")
        or call.arguments.keys() & {"begin", "generator"}
        or "handle" in given
    ):
        return
    # numbers have no device, and some are larger than a float holds
    tensors = [value for value in given.values() if not isinstance(value, (int, float))]
    if any(x.is_meta for value in tensors for x in tensors_of(value, None)) and not all(x.is_meta for x in found):
        raise Verdict('"meta" was accepted')
    fresh = again()
    arguments = {key: clean(given[key]) if key in given else value for key, value in fresh.arguments.items()}
    expected = tensors_of(fresh.function(**arguments), valid_rows(arguments))
    if len(found) != len(expected) or not all(map(same, found, expected)):
        raise Verdict("other numbers than of plain copies")


def trial(seed: int) -> tuple[str, str, Verdict | None]:
    """One call: its name, what came of it, and what is wrong with that."""
    rng = random.Random(seed)
    name = rng.choice(list(CALLS))

    def again() -> Call:
        torch.manual_seed(seed)
        return CALLS[name]()

    call = again()
    names = rng.sample(list(call.arguments), min(len(call.arguments), rng.choice((1, 1, 2)))) if call.arguments else []
    makers = {key: changed(call.arguments[key], rng) for key in names}
    given: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for key, make in makers.items():
                given[key] = make()
            result = call.function(**{**call.arguments, **given})
    except Exception as error:
        if any(map(callable, given.values())) and given.keys() & {"experts", "read"}:
            return name, "an error of the function that was given", None
        try:
            judge_error(call, error)
            judge_dispatcher(call)
        except Verdict as verdict:
            verdict.cause = "".join(traceback.format_exception(error))
            return name, "poor error", _told(verdict, given)
        return name, "clear error", None
    try:
        judge_result(name, call, given, result, again)
    except Exception as error:
        verdict = error if isinstance(error, Verdict) else Verdict(f"plain copies give {error!r}")
        return name, "wrong result", _told(verdict, given)
    return name, "right result", None


def _told(verdict: Verdict, given: dict[str, Any]) -> Verdict:
    verdict.args = (f"{verdict.args[0]}, with { ({key: _shown(x) for key, x in given.items()}) }",)
    return verdict


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {'nested' if value.is_nested else tuple(value.shape)} {value.layout} {value.device}"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__} of { ({key: _shown(x) for key, x in vars(value).items()}) }"
    return f"{type(value).__name__} {str(value)[:100]}"


def judge_dispatcher(call: Call) -> None:
    """Raises unless a dispatcher that refused a call goes on as if there had been none."""
    if call.owner is not None and not call.owner._closed:
        torch.manual_seed(0)
        arguments = tokens()
        if not torch.equal(call.owner(*arguments, stand_in), dispatcher()(*arguments, stand_in)):
            raise Verdict("a layer after a refused call is wrong")


def test_every_public_name_is_called():
    assert public_names() <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_that_are_changed_are_right_or_refused_in_words(name):
    call = CALLS[name]()
    if re.search(r"push|dispatch_first|dispatch_second", name):
        with pytest.raises(RuntimeError, match="only transport|by kernels alone"):
            call.function(**call.arguments)
    else:
        call.function(**call.arguments)


@pytest.mark.parametrize("part", range(8))
def test_changed_calls_are_right_or_refused_in_words(part):
    count = int(os.environ.get("MOEQUANT_FUZZED_CALLS", CALLS_IN_TESTS))
    wrong = [(seed, *outcome) for seed in range(part, count, 8) if (outcome := trial(seed))[2] is not None]
    assert not wrong, "\n".join(f"seed {seed}: {name}: {verdict}" for seed, name, _, verdict in wrong)


def main(count: int, first: int = 0) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        name, outcome, verdict = trial(seed)
        outcomes[outcome] += 1
        if verdict is not None:
            print(f"seed {seed}: {name}: {outcome}: {verdict}")
            if count == 1:
                print(verdict.cause)
    print(f"{count} calls: " + ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or [12000]))
